"""INQ: powers of two as the paper rounds to them, and partitions of which what is frozen never moves."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import digits
import pytest
import torch
from comparisons import assert_same_bits
from torch import Tensor, nn

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.errors import InputError, RecipeError
from fxquant.quantizers.inq import INQWeight
from fxquant.recipe import FIRST, LAST
from fxquant.training import IncrementalQuantization

W = torch.randn(12, 30, generator=torch.Generator().manual_seed(0)) ** 3 * 0.1
SHARES = {0: 0.5, 4: 0.75, 8: 0.875, 12: 1.0}


def inq(bits: int) -> Setting:
    return Setting(weight=Scheme.weight(bits, per_channel=False, quantizer="inq"), activation=Scheme.activation(8))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_become_the_papers_powers_of_two(bits):
    """Equations 1 to 4, one number at a time."""
    quantizer = INQWeight(Scheme.weight(bits, per_channel=False, quantizer="inq")).train()
    found, n1 = quantizer(W), math.floor(math.log2(4 * float(W.abs().max()) / 3))
    n2 = n1 + 1 - 2 ** (bits - 2)
    powers = [0.0, *(2.0**n for n in range(n2, n1 + 1))]
    for w, given in zip(W.flatten().tolist(), found.flatten().tolist(), strict=True):
        expected = 0.0
        for alpha, beta in itertools.pairwise(powers):
            if (alpha + beta) / 2 <= abs(w) < 3 * beta / 2:
                expected = math.copysign(beta, w)
        assert given == expected
    assert len(found.abs().unique()) == 1 + 2 ** (bits - 2)
    x, incoming = W.clone().requires_grad_(), torch.randn(W.shape, generator=torch.Generator().manual_seed(1))
    quantizer(x).backward(incoming)
    assert torch.equal(x.grad, incoming)
    edges = torch.tensor([0.49, 0.5, 0.76, 1.49, 1.5, 100.0, -0.5, 0.0]) * quantizer.scale
    top = float(2 ** (2 ** (bits - 2) - 1))
    assert (quantizer(edges) / quantizer.scale).tolist() == [0, 1, 1, 1, min(2.0, top), top, -1, 0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def batch(step: int) -> Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step))


def start() -> list[Any]:
    torch.manual_seed(0)
    prepared = fxquant.prepare(Net().train(), batch(0), qat=True, recipe=Recipe(default=inq(4)))
    partition = IncrementalQuantization(prepared, SHARES)
    return [prepared, torch.optim.SGD(prepared.parameters(), 0.1, momentum=0.9, weight_decay=1e-2), partition]


def train(parts: list[Any], steps: range) -> None:
    prepared, optimizer, partition = parts
    for step in steps:
        optimizer.zero_grad()
        (prepared.train()(batch(step)) - 1).square().mean().backward()
        optimizer.step()
        partition.step()


def test_what_is_frozen_never_moves_and_in_the_end_all_is_on_the_grid():
    parts = start()
    prepared, _, partition = parts
    frozen: dict[str, Tensor] = {}
    for step in range(15):
        share = SHARES[max(at for at in SHARES if at <= step)]
        for name, mask in partition.frozen.items():
            weight, part = prepared.get_parameter(name), prepared.get_submodule(name.removesuffix(".weight"))
            assert int(mask.sum()) == round(share * weight.numel())
            before = frozen.get(name, torch.full_like(weight, torch.nan))
            assert torch.equal(weight[~before.isnan()], before[~before.isnan()])
            assert torch.equal(weight[mask], part.weight_quantizer.on_powers(weight)[mask])
            frozen[name] = torch.where(mask, weight.detach(), before)
            assert part.weight_quantizer.partial == (share < 1)
            if share < 1:
                with torch.no_grad():
                    assert part.weight_quantizer(weight) is weight, "the rest trains in float"
        train(parts, range(step, step + 1))
    for name, mask in partition.frozen.items():
        assert bool(mask.all())
        grid = prepared.get_submodule(name.removesuffix(".weight")).weight_quantizer.grid
        steps = (prepared.get_parameter(name) / grid.scale).abs()
        assert set(steps.unique().tolist()) <= {0, 1, 2, 4, 8}
    fxquant.convert(prepared)


def test_the_largest_are_frozen_first():
    prepared, _, partition = start()
    torch.manual_seed(0)
    given = Net().conv.weight.detach()
    mask = partition.frozen["conv.weight"]
    assert float(given[mask].abs().min()) >= float(given[~mask].abs().max())
    assert torch.equal(prepared.conv.weight[~mask], given[~mask])


@pytest.mark.parametrize("stop", [3, 8])
@pytest.mark.parametrize("made_last", [False, True], ids=["made, then loaded", "loaded, then made"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(stop, made_last):
    whole, first = start(), start()
    train(whole, range(15))
    train(first, range(stop))
    states = [copy.deepcopy(part.state_dict()) for part in first]
    train(first, range(stop, stop + 2))  # which leaves the states alone
    again = start()
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    if made_last:
        again[2] = IncrementalQuantization(again[0], SHARES)
        again[2].load_state_dict(states[2])
    train(again, range(stop, 15))
    for key, value in whole[0].state_dict().items():
        assert torch.equal(again[0].state_dict()[key], value), key


def test_digits_keep_their_accuracy_with_powers_of_two(tmp_path):
    torch.manual_seed(0)
    images = digits.data()[0][:256]
    ends = Setting(weight=Scheme.weight(8), activation=Scheme.activation(8))
    recipe = Recipe([(FIRST, ends), (LAST, ends)], default=inq(4))
    prepared = fxquant.prepare(digits.trained().train(), images[:2], qat=True, recipe=recipe)
    partition = IncrementalQuantization(prepared, {0: 0.5, 1: 0.75, 2: 0.875, 3: 1.0})
    for _ in range(3):
        digits.train(prepared, epochs=1, rate=0.01)
        partition.step()  # once an epoch: what moved in between is put back
    fxquant.reestimate_batchnorm(prepared, [images])
    accuracy = digits.accuracy(prepared)
    assert accuracy > digits.accuracy(digits.trained()) - 2
    assert digits.accuracy(fxquant.convert(prepared)) == pytest.approx(accuracy, abs=0.5)
    fxquant.save(prepared, tmp_path / "model.pt")
    loaded = fxquant.load(digits.DigitsNet(), tmp_path / "model.pt").eval()
    with torch.no_grad():
        assert_same_bits(loaded(images), prepared.eval()(images))


def test_what_makes_no_sense_is_refused():
    prepared = start()[0]
    for shares in ({}, {0: 0.5}, {0: 0.7, 1: 0.5, 2: 1.0}, {-1: 1.0}):
        with pytest.raises(InputError, match=r"they rise to 1\.0"):
            IncrementalQuantization(prepared, shares)
    plain = fxquant.prepare(Net().train(), batch(0), qat=True)
    with pytest.raises(InputError, match=r"has no weight of the rule inq.\n.*what to do"):
        IncrementalQuantization(plain, SHARES)
    folded = fxquant.prepare(Net().train(), batch(0), qat=True, batch_norm="whitepaper", recipe=Recipe(default=inq(4)))
    with pytest.raises(InputError, match=r"folds a batch norm before conv\.weight is rounded"):
        IncrementalQuantization(folded, SHARES)
    with pytest.raises(RecipeError, match="128 with 5: set bits to 4 or fewer"):
        fxquant.prepare(Net().train(), batch(0), qat=True, recipe=Recipe(default=inq(5)))
    other = IncrementalQuantization(prepared, {0: 1.0})
    with pytest.raises(InputError, match="other shares"):
        other.load_state_dict(IncrementalQuantization(start()[0], SHARES).state_dict())
