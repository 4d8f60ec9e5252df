"""Bits per layer: the solver is exact, the losses are those of single layers, and the budget holds."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import digits
import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.algorithms.bits_per_layer import mixed_precision
from fxquant.algorithms.budget import Option, pareto_front, within_budget
from fxquant.errors import CalibrationError, InputError
from fxquant.numerics.affine import dequantize, quantize
from fxquant.targets import get


def some_groups(seed: int) -> list[list[Option]]:
    rng = random.Random(seed)
    return [
        [
            Option(rng.randrange(1, 40), rng.choice([0.0, rng.random(), rng.random() * 10]))
            for _ in range(rng.randrange(1, 5))
        ]
        for _ in range(rng.randrange(1, 7))
    ]


@pytest.mark.parametrize("seed", range(30))
def test_the_solver_against_every_choice(seed):
    groups = some_groups(seed)
    every = [
        (sum(option.cost for option in choice), sum(option.loss for option in choice))
        for choice in itertools.product(*groups)
    ]
    unbeaten = sorted({(c, x) for c, x in every if not any((a <= c and b < x) or (a < c and b <= x) for a, b in every)})
    front = pareto_front(groups)
    assert [point.cost for point in front] == [cost for cost, _ in unbeaten]
    assert [point.loss for point in front] == pytest.approx([loss for _, loss in unbeaten])
    for point in front:
        chosen = [options[i] for options, i in zip(groups, point.chosen, strict=True)]
        assert sum(option.cost for option in chosen) == point.cost
        assert sum(option.loss for option in chosen) == pytest.approx(point.loss)
    cheapest = min(cost for cost, _ in every)
    for budget in (cheapest, cheapest + 7, cheapest + 33, 10**6):
        best = within_budget(groups, budget)
        assert best.cost <= budget
        assert best.loss == pytest.approx(min(loss for cost, loss in every if cost <= budget))
    with pytest.raises(InputError, match=f"below the {cheapest}"):
        within_budget(groups, cheapest - 1)


def test_thirty_layers_are_solved_exactly_enough_to_beat_every_uniform_choice():
    rng = random.Random(1)
    sizes = [rng.choice([432, 2304, 4608, 9216, 18432, 36864]) for _ in range(30)]
    groups = [[Option(size * b, rng.random() * 4.0**-b) for b in (2, 3, 4, 8)] for size in sizes]
    for b, place in ((3, 1), (4, 2)):
        uniform = sum(options[place].loss for options in groups)
        best = within_budget(groups, sum(sizes) * b)
        assert best.cost <= sum(sizes) * b and best.loss < uniform


def test_an_option_must_be_a_number():
    with pytest.raises(InputError, match="finite"):
        pareto_front([[Option(1, float("nan"))]])
    with pytest.raises(InputError, match="needs an option"):
        pareto_front([[Option(1, 0.0)], []])


@pytest.fixture(scope="module")
def network():
    return digits.trained(), [digits.data()[0][:256]]


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Per output channel, by the largest magnitude."""
    scale = weight.flatten(1).abs().amax(1) / (2 ** (bits - 1) - 1)
    q = quantize(weight, scale, torch.zeros_like(scale), -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1, axis=0)
    return dequantize(q, scale, torch.zeros_like(scale), axis=0)


def test_losses_are_those_of_one_layer_rounded_in_the_float_network(network):
    """One loss by hand: batch norm folded, one weight rounded, the float network run."""
    model, data = network
    target = replace(get("x86"), processor="vnni")  # one that leaves the scales of 8 bits as they are
    front = mixed_precision(model, data, bits=(2, 8), bits_per_weight=8, batches=None, target=target, progress=False)
    prepared = fxquant.prepare(model, data[0])
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        exact = prepared(data[0]).double()
        total = 0.0
        for name in front.bits:
            part = prepared.get_submodule(name)
            before = part.weight.clone()
            part.weight.copy_(rounded(before, 8))
            total += float((prepared(data[0]).double() - exact).square().sum() / exact.square().sum())
            part.weight.copy_(before)
    assert front.loss == pytest.approx(total, rel=1e-3)
    assert set(front.bits.values()) == {8} and set(front.bits) == {"stem", "grouped", "side", "fc"}


@pytest.mark.parametrize("measure", ["noise", "kl"])
def test_the_budget_holds_and_the_recipe_gives_each_layer_its_bits(network, measure):
    model, data = network
    found = mixed_precision(model, data, bits_per_weight=3.5, measure=measure, progress=False)
    prepared = fxquant.calibrate(fxquant.prepare(model, data[0], recipe=found.recipe()), data, progress=False)
    sizes = {name: prepared.get_submodule(name).weight.numel() for name in found.bits}
    for name, bits in found.bits.items():
        assert prepared.get_submodule(name).weight_quantizer.scheme.bits == bits
    assert sum(sizes[name] * bits for name, bits in found.bits.items()) == found.cost <= 3.5 * sum(sizes.values())
    assert found.front[0][0] == 2 * sum(sizes.values()) and found.front[-1][0] <= 8 * sum(sizes.values())
    assert len(set(found.bits.values())) > 1
    assert f"{found.cost / sum(sizes.values()):.4g} bits a weight" in str(found)


def test_groups_and_shared_weights_share_their_bits(network):
    model, data = network
    found = mixed_precision(model, data, bits_per_weight=4, groups=["s*"], progress=False)
    assert found.bits["stem"] == found.bits["side"]

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(torch.relu(self.a(x)))))

    torch.manual_seed(0)
    found = mixed_precision(Twice().eval(), [torch.randn(8, 6)], bits_per_weight=4, progress=False)
    assert len(set(found.bits.values())) == 1


def test_bit_operations_as_budget(network):
    """Multiply-adds of the layers by hand: 8×8 images, pooled to 4×4."""
    model, data = network
    macs = {"stem": 64 * 9 * 16, "grouped": 16 * 16 * 9 * 4, "side": 16 * 16 * 8, "fc": 96 * 10}
    budget = sum(macs.values()) * 4 * 8
    found = mixed_precision(model, data, bit_operations=budget, progress=False)
    assert found.cost == sum(macs[name] * bits * 8 for name, bits in found.bits.items()) <= budget


def test_what_mixed_precision_takes(network):
    model, data = network
    for given, says in (
        ({}, "one budget"),
        ({"bits_per_weight": 4, "bit_operations": 5}, "one budget"),
        ({"bits_per_weight": 1.5}, "below the"),
        ({"bits_per_weight": 4, "measure": "mse"}, "measure='mse'"),
        ({"bits_per_weight": 4, "bits": (4, 4)}, "different numbers"),
        ({"bits_per_weight": 4, "groups": ["nothing*"]}, "selects no layer"),
    ):
        with pytest.raises(InputError, match=says):
            mixed_precision(model, data, progress=False, **given)
    with pytest.raises(CalibrationError, match="empty"):
        mixed_precision(model, [], bits_per_weight=4, progress=False)


class Again(nn.Module):
    """One layer that is called twice, one that shares its weight, and a function of a parameter."""

    def __init__(self, *, twice: bool = True, tied: bool = False, function: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.twice, self.function = twice, function
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(x)))
        x = self.a(x) if self.twice else x
        return self.c(x) + (nn.functional.linear(x, self.c.weight) if self.function else 0)


CALLED = {
    "twice": ({}, 36 + 36 + 24, 3 * 36 + 24),
    "tied": ({"twice": False, "tied": True}, 36 + 24, 2 * 36 + 24),
    "tied and twice": ({"tied": True}, 36 + 24, 3 * 36 + 24),
    "a function too": ({"twice": False, "function": True}, 36 + 36 + 24, 2 * 36 + 2 * 24),
}


@pytest.mark.parametrize("kind", CALLED)
def test_a_weight_counts_once_and_every_call_of_it_multiplies(kind):
    """Weights and multiply-adds by hand; the recipe gives every call the bits that were paid for."""
    torch.manual_seed(0)
    settings, weights, macs = CALLED[kind]
    model, data = Again(**settings).eval(), [torch.randn(8, 6)]
    found = mixed_precision(model, data, bits=(3, 5), bits_per_weight=5, progress=False)
    assert (found.weights, found.cost) == (weights, 5 * weights)
    assert found.front[0][0] == 3 * weights
    paid = mixed_precision(model, data, bits=(3, 5), bit_operations=3 * macs * 8, progress=False)
    assert paid.cost == 3 * macs * 8 and set(paid.bits.values()) == {3}
    prepared = fxquant.prepare(model, data[0], recipe=paid.recipe())
    used = [m.weight_quantizer.scheme.bits for m in prepared.modules() if hasattr(m, "weight_quantizer")]
    assert used and set(used) == {3}


def test_a_glob_takes_along_what_shares_a_weight():
    torch.manual_seed(0)
    model = Again(twice=False, tied=True).eval()
    found = mixed_precision(model, [torch.randn(8, 6)], bits_per_weight=4, groups=["b", "a"], progress=False)
    assert found.bits["a"] == found.bits["b"] and found.weights == 36 + 24 and found.cost <= 4 * 60


def test_what_cannot_be_compared_is_said():
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).argmax(1)

    class Endless(Silent):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) / 0.0

    torch.manual_seed(0)
    data = [torch.randn(8, 6)]
    with pytest.raises(InputError, match="no tensor of real numbers"):
        mixed_precision(Silent().eval(), data, bits_per_weight=4, progress=False)
    with pytest.raises(CalibrationError, match="gives NaN or infinity"):
        mixed_precision(Endless().eval(), data, bits_per_weight=4, progress=False)
