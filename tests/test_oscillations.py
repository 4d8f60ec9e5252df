"""Oscillating weights: the paper's algorithm written as loops, its toy problem, and depthwise networks that train."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from comparisons import assert_close_to_scale
from torch import Tensor, nn

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.errors import InputError
from fxquant.training import Oscillations


def setting(rule: str, bits: int = 3, **others: Any) -> Setting:
    return Setting(weight=Scheme.weight(bits, quantizer=rule, **others), activation=Scheme.activation(8))


class Depthwise(nn.Module):
    """Two separable blocks."""

    def __init__(self) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for _ in range(2):
            parts += [nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
            parts += [nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 3), nn.Sequential(*parts), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(step % 7))
    return x, torch.stack([x[:, 0].mean((1, 2)), x[:, 1].amax((1, 2)), x[:, 2].std((1, 2)), x.mean((1, 2, 3))], 1)


def prepared_net(rule: str = "lsq", bits: int = 3) -> Any:
    torch.manual_seed(0)
    recipe = Recipe({"stem": setting(rule, 8), "head": setting(rule, 8)}, default=setting(rule, bits))
    prepared = fxquant.prepare(Depthwise().train(), batch(0)[0], qat=True, recipe=recipe)
    return fxquant.calibrate(prepared, [batch(0)[0]], progress=False).train()


def sgd(prepared: Any, rate: float = 0.05) -> torch.optim.Optimizer:
    groups = fxquant.parameter_groups(prepared, lr=1e-3)
    return torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=1e-4)


def train(prepared: Any, optimizer: Any, watched: Oscillations, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        x, y = batch(step)
        ((prepared(x) - y).square().mean() + watched.loss()).backward()
        optimizer.step()
        watched.step()


class Papers:
    """Algorithm 1, one weight at a time, in Python's floats."""

    def __init__(self, integers: list[int], momentum: float, threshold: float) -> None:
        self.m, self.threshold, n = momentum, threshold, len(integers)
        self.last, self.mean, self.f = list(integers), [float(q) for q in integers], [0.0] * n
        self.psi, self.frozen = [0] * n, [False] * n

    def step(self, integers: list[int]) -> None:
        for i, given in enumerate(integers):
            q = self.last[i] if self.frozen[i] else given
            change = q - self.last[i]
            sign = (change > 0) - (change < 0)
            oscillates = change != 0 and self.psi[i] != 0 and sign != self.psi[i]
            self.f[i] = self.m * oscillates + (1 - self.m) * self.f[i]
            if change != 0:
                self.psi[i] = sign
            self.mean[i] = self.m * q + (1 - self.m) * self.mean[i]
            self.last[i] = q
            if self.f[i] > self.threshold and not self.frozen[i]:
                self.frozen[i], self.last[i] = True, round(self.mean[i])


@pytest.mark.parametrize("rule", ["observed", "lsq"])
@pytest.mark.parametrize("threshold", [None, 0.35])
def test_it_is_the_papers_algorithm(rule, threshold):
    """On weights that jump between levels at random, with steps that move too where they are learned."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 3)).train()
    model = fxquant.prepare(model, torch.randn(2, 40), qat=True, recipe=setting(rule))
    model(torch.randn(2, 40))
    weight, quantizer = model.get_parameter("0.weight"), model.get_submodule("0").weight_quantizer
    with torch.no_grad():
        weight[:, 0] = 3 * quantizer.scale  # the ends of the grid stay, so that an observed range does too
    watched = Oscillations(model, momentum=0.2, freeze_above=threshold)

    def integers(values: Tensor) -> Tensor:
        return (values / quantizer.grid.scale[:, None]).round().clamp(-3, 3).int()

    paper = Papers(integers(weight.detach()).flatten().tolist(), 0.2, math.inf if threshold is None else threshold)
    generator = torch.Generator().manual_seed(1)
    for step in range(30):
        with torch.no_grad():
            scale = quantizer.grid.scale[:, None]
            jump = torch.randint(-1, 2, weight.shape, generator=generator) * (torch.arange(40) > 0)
            weight.copy_(((weight / scale).round() + jump).clamp(-3, 3) * scale + 0.2 * scale * (torch.arange(40) > 0))
            if rule == "lsq":
                quantizer.step.mul_(1 + 0.02 * math.sin(step))
            given = integers(weight)
        watched.step()
        paper.step(given.flatten().tolist())
        (found,) = watched.frequencies.values()
        assert torch.allclose(found.flatten().double(), torch.tensor(paper.f, dtype=torch.float64), atol=1e-6)
        (frozen,) = watched.frozen.values()
        assert frozen.flatten().tolist() == paper.frozen
        assert integers(weight.detach()).flatten()[frozen.flatten()].tolist() == [
            q for q, held in zip(paper.last, paper.frozen, strict=True) if held
        ]
    assert (0 < sum(paper.frozen) < 120) if threshold else not any(paper.frozen)
    assert watched.share(0.1) == pytest.approx(sum(f > 0.1 for f in paper.f) / 120)


def toy(watched_by: dict[str, Any], steps: int = 300) -> tuple[list[int], Any]:
    """The paper's §3.1: one weight, the loss (w_q - w*)² / 2 with w* between two levels, straight-through gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).train()
    model = fxquant.prepare(model, torch.ones(1, 1), qat=True, recipe=setting("lsq"))
    model(torch.ones(1, 1))
    weight, quantizer = model.get_parameter("0.weight"), model.get_submodule("0").weight_quantizer
    with torch.no_grad():
        quantizer.set_grid(torch.tensor([0.1]), torch.tensor([0]))
        weight.fill_(0.12)
    watched, seen = Oscillations(model, **watched_by), []
    for _ in range(steps):
        loss = (quantizer(weight) - 0.125).square().sum() / 2 + watched.loss()
        (gradient,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight.sub_(0.1 * gradient)
        watched.step()
        seen.append(int((quantizer(weight.detach()) / quantizer.scale).round()))
    return seen, watched


def test_the_papers_toy_problem_oscillates_as_it_says():
    """Around the threshold 0.15 between 0.1 and 0.2, for a share d / s of the time above it, d = 0.025 of s = 0.1.

    Two changes each four steps on average, and each is an oscillation: a frequency of a half.
    """
    seen, watched = toy({"momentum": 0.01})
    later = seen[100:]
    assert set(later) == {1, 2} and sum(q == 2 for q in later) / len(later) == pytest.approx(0.25, abs=0.02)
    (frequency,) = watched.frequencies.values()
    assert float(frequency) == pytest.approx(0.5, abs=0.06)
    assert watched.share() == 1.0


def test_the_toy_problem_ends_on_the_better_level_when_it_is_frozen():
    seen, watched = toy({"momentum": 0.02, "freeze_above": 0.2})
    begin = next(i for i in range(len(seen)) if len(set(seen[i:])) == 1)
    assert 20 < begin < 200 and seen[-1] == 1, "0.125 is nearer to 0.1 than to 0.2"
    assert all(bool(f.all()) for f in watched.frozen.values())


def test_the_toy_problem_is_dampened():
    """With λ the weight rests where (w_q - w*) = 2·λ·(ŵ - w): inside the level, at 0.1 + 0.025 / (2·λ)."""
    seen, _ = toy({"dampening": 2.0})
    assert set(seen[100:]) == {1}


@pytest.mark.parametrize("rule", ["observed", "lsq"])
def test_dampening_is_the_papers_loss(rule):
    torch.manual_seed(0)
    prepared = prepared_net(rule)
    watched = Oscillations(prepared, dampening=0.3)
    assert len(watched.frequencies) == 4, "stem and head have 8 bits"
    expected = torch.zeros((), dtype=torch.float64)
    gradients: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in watched.frequencies:
            prepared.get_parameter(name).mul_(1.5 if rule == "lsq" else 1.0)  # some beyond the ends of their range
    for name in watched.frequencies:
        part, weight = prepared.get_submodule(name.removesuffix(".weight")), prepared.get_parameter(name)
        prepared(batch(1)[0])
        scale = part.weight_quantizer.grid.scale.double().reshape(-1, 1, 1, 1)
        w = weight.detach().double()
        rounded = (w / scale).round().clamp(-3, 3) * scale
        inside = (w / scale).abs() <= 3
        expected += 0.3 * (rounded - w.clamp(-3 * scale, 3 * scale)).square().sum()
        gradients[name] = 0.3 * 2 * (w - rounded) * inside
        assert rule == "observed" or not bool(inside.all())
    prepared.zero_grad()
    loss = watched.loss()
    loss.backward()
    assert_close_to_scale(loss.detach().double(), expected, 1e-5)
    for name, gradient in gradients.items():
        assert_close_to_scale(prepared.get_parameter(name).grad.double(), gradient, 1e-5, name)
    touched = {name for name, p in prepared.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert touched == set(gradients), "no gradient of scales"


@pytest.mark.parametrize("rule", ["observed", "lsq", "tqt"])
def test_frozen_integers_stay_whatever_the_optimizer_does(rule):
    """Momentum, weight decay, steps that are learned: what is frozen is the same integer to the end, and ships."""
    prepared = prepared_net(rule)
    watched, optimizer = Oscillations(prepared, momentum=0.1, freeze_above=0.02), sgd(prepared, 0.1)
    held: dict[str, Tensor] = {}
    for step in range(40):
        train(prepared, optimizer, watched, range(step, step + 1))
        for name, frozen in watched.frozen.items():
            part = prepared.get_submodule(name.removesuffix(".weight"))
            with torch.no_grad():
                rounded = part.weight_quantizer(part.weight)
            now = (rounded / part.weight_quantizer.grid.scale.reshape(-1, 1, 1, 1)).round()
            before = held.get(name, torch.full_like(now, torch.nan))
            assert torch.equal(now[~before.isnan()], before[~before.isnan()]), name
            held[name] = torch.where(before.isnan() & frozen, now, before)
    assert sum(int((~q.isnan()).sum()) for q in held.values()) > 20
    frozen_model = fxquant.freeze(prepared)
    for name, integers in held.items():
        part, norm = name.removesuffix(".weight"), f"body.{int(name.split('.')[1]) + 1}"
        shipped = frozen_model.get_submodule(part)
        q = (shipped.weight / shipped.weight_quantizer.scale.reshape(-1, 1, 1, 1)).round()
        q = q * prepared.get_submodule(norm).weight.sign().reshape(-1, 1, 1, 1)
        assert torch.equal(q[~integers.isnan()], integers[~integers.isnan()])


def integers_of(prepared: Any, names: list[str]) -> Tensor:
    found = []
    for name in names:
        part = prepared.get_submodule(name.removesuffix(".weight"))
        with torch.no_grad():
            rounded = part.weight_quantizer(part.weight)
        found.append((rounded / part.weight_quantizer.grid.scale.reshape(-1, 1, 1, 1)).round().flatten())
    return torch.cat(found)


@pytest.mark.long
def test_depthwise_networks_oscillate_less():
    """Changes of integers that go back on the one before, in the last 25 steps."""
    reversals = {}
    treatments = {"plain": {}, "frozen": {"freeze_above": (0.1, 0.01)}, "dampened": {"dampening": (0.0, 0.1)}}
    for name, options in treatments.items():
        prepared = prepared_net()
        watched, optimizer = Oscillations(prepared, momentum=0.1, steps=40, **options), sgd(prepared)
        train(prepared, optimizer, watched, range(45))
        last = integers_of(prepared, list(watched.frequencies))
        direction, reversals[name] = torch.zeros_like(last), 0
        for step in range(45, 70):
            train(prepared, optimizer, watched, range(step, step + 1))
            now = integers_of(prepared, list(watched.frequencies))
            change = (now - last).sign()
            reversals[name] += int((change * direction < 0).sum())
            last, direction = now, torch.where(change != 0, change, direction)
    assert reversals["plain"] > 20 and max(reversals["frozen"], reversals["dampened"]) < 0.5 * reversals["plain"]


def test_courses_run_by_half_a_cosine():
    watched = Oscillations(prepared_net(), freeze_above=(0.04, 0.01), dampening=(0.0, 0.1), steps=10)
    for count, share in ((0, 0.0), (5, 0.5), (10, 1.0), (20, 1.0)):
        watched.count = count
        assert watched._now(watched.freeze_above) == pytest.approx(0.04 - 0.03 * share)
        assert watched._now(watched.dampening) == pytest.approx(0.1 * share)


@pytest.mark.long
@pytest.mark.parametrize("bits", [None, {0: 8, 2: 4, 9: 3}], ids=["three bits", "with a schedule"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(bits):
    def start() -> list[Any]:
        prepared = prepared_net()
        watched = Oscillations(prepared, momentum=0.1, freeze_above=(0.05, 0.01), dampening=0.01, steps=15)
        return [prepared, sgd(prepared), watched, fxquant.Schedule(prepared, bits=bits)]

    def run(parts: list[Any], steps: range) -> None:
        for step in steps:
            train(*parts[:3], range(step, step + 1))
            parts[3].step()

    whole, first, again = start(), start(), start()
    run(whole, range(30))
    run(first, range(15))
    for part, one in zip(again, first, strict=True):
        part.load_state_dict(copy.deepcopy(one.state_dict()))
    run(first, range(15, 17))  # which leaves the state that was given alone
    run(again, range(15, 30))
    for key, value in whole[0].state_dict().items():
        assert torch.equal(again[0].state_dict()[key], value), key
    assert any(bool(f.any()) for f in whole[2].frozen.values())
    for key, value in whole[2].frequencies.items():
        assert torch.equal(again[2].frequencies[key], value)


def test_functions_with_raw_parameters_are_followed():
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(nn.functional.linear(x, self.w), self.w.t())

    prepared = fxquant.prepare(Raw().train(), torch.ones(2, 3), qat=True, recipe=setting("lsq"))
    prepared(torch.ones(2, 3))
    assert list(Oscillations(prepared).frequencies) == ["w"]


def test_what_cannot_be_followed_is_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    x = torch.randn(4, 3, 8, 8)
    recipe = Recipe({"3": setting("twn", 2)}, default=setting("lsq"))
    prepared = fxquant.prepare(model.train(), x, qat=True, recipe=recipe, batch_norm="whitepaper")
    with pytest.raises(InputError, match=r"no weight of this Sequential.*0\.weight: a batch norm is folded before"):
        Oscillations(prepared)
    late = fxquant.prepare(model.train(), x, qat=True, recipe=recipe)
    watched = Oscillations(late)
    assert list(watched.frequencies) == ["0.weight"]
    assert "twn" in watched.left_out["3.weight"] and "do not stay" in watched.left_out["3.weight"]
    with pytest.raises(InputError, match="needs steps"):
        Oscillations(late, freeze_above=(0.1, 0.01))
    with pytest.raises(InputError, match="at most 1"):
        Oscillations(late, momentum=0.0)
    other = watched.state_dict()
    other["weights"]["5.weight"] = other["weights"]["0.weight"]
    with pytest.raises(InputError, match=r"not followed here: 5\.weight"):
        watched.load_state_dict(other)
