"""An island's code uses the parts that it calls as its author wrote it, in branches too that the example did not take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparisons import decibels
from torch import nn

import fxquant
from fxquant.capture.islands import graphs_of, islands_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.second(F.relu(self.first(x))) * self.gain

    def encode(self, x):
        return self.first(x).relu()

    @property
    def total(self):
        return self.first.weight.abs().sum()


def size_of(layer):
    return layer.weight.abs().sum()


class Around(nn.Module):
    """Calls all its parts, and above a bound does ``rare`` too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.block, self.gain = nn.Linear(6, 6), Block(), nn.Parameter(torch.ones(6))
        self.several = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.row = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.unseen = [self.block]

    def forward(self, x):
        y = self.row(self.several[1](self.several[0](self.block(self.layer(x))))) * self.gain
        return self.rare(y, x) if float(x.sum()) > 1000 else y

    def rare(self, y, x):
        raise NotImplementedError


def inner_weight(self, y, x):
    return y * self.block.first.weight[0, 0]


def layer(self, y, x):
    return y / self.layer.weight.norm() + self.layer.bias


def no_bias(self, y, x):
    return y if self.block.second.bias is None else x


def parameter(self, y, x):
    return y + self.block.gain


def method(self, y, x):
    return y + self.block.encode(x)


def a_property(self, y, x):
    return y + self.block.total


def inner_call(self, y, x):
    return y + self.block.first(x)


def alias(self, y, x):
    block = self.block
    first = block.first
    return y * first.weight.sum() + block.second(x)


def helper(self, y, x):
    return y * size_of(self.block.first)


def in_a_lambda(self, y, x):
    return (lambda: y * self.block.first.weight.sum())()


def by_name(self, y, x):
    return y * getattr(self.layer, "weight").sum()  # noqa: B009  (as people write it)


def tied(self, y, x):
    return F.linear(y, self.layer.weight, self.layer.bias)


def loop(self, y, x):
    for each in self.several:
        y = y * each.weight.abs().sum()
    return y


def past_the_registry(self, y, x):
    return y * self.unseen[0].first.weight.sum()


def bracket(self, y, x):
    return y * self.row[-1].weight.sum() + self.row[0](x)


def part_of_a_row(self, y, x):
    return y + self.row[:2](x)


def through_a_row(self, y, x):
    for each in self.row:
        x = each(x)
    return y + x


def parameters(self, y, x):
    return y * sum(p.abs().sum() for p in self.block.parameters())


def all_parameters(self, y, x):
    return y * sum(p.abs().sum() for p in self.parameters())


def dtype_of_parameters(self, y, x):
    return y.to(next(self.block.parameters()).dtype) + 1


def state(self, y, x):
    return y * self.block.state_dict()["first.weight"].sum()


def other_parameters(self, y, x):
    given = {"weight": self.layer.weight * 2, "bias": self.layer.bias}
    return y + torch.func.functional_call(self.layer, given, (x,))


def asks_for_a_class(self, y, x):
    for each in self.row:
        y = y + (each.weight.sum() if isinstance(each, nn.Linear) else 1)
    return y


QUICK: tuple[Callable[..., Any], ...] = (
    inner_weight, layer, a_property, alias, helper, bracket, parameters, other_parameters,
)  # fmt: skip
LONG: tuple[Callable[..., Any], ...] = (
    no_bias, parameter, method, inner_call, in_a_lambda, by_name, tied, loop, past_the_registry, part_of_a_row,
    through_a_row, all_parameters, dtype_of_parameters, state, asks_for_a_class,
)  # fmt: skip
RARE = [*QUICK, *(pytest.param(rare, marks=pytest.mark.long) for rare in LONG)]


@pytest.mark.parametrize("rare", RARE, ids=lambda rare: rare.__name__)
def test_what_a_branch_uses_that_the_example_did_not_take(rare):
    """int8 weights were read for the float ones (-47 dB without a word), or nothing was there: AttributeError."""
    torch.manual_seed(0)
    model = type("Island", (Around,), {"rare": rare})().eval()
    x, other = torch.randn(9, 6) * 0.3, torch.rand(200, 6) * 4
    prepared = fxquant.prepare(model, x)
    fxquant.calibrate(prepared, [x, other], progress=False)
    with torch.no_grad():
        frozen, integer = fxquant.freeze(prepared), fxquant.convert(prepared)
        for data in (x, other):
            assert decibels(model(data), integer(data)) > 34
            assert decibels(frozen(data), integer(data)) > 60
    assert fxquant.coverage(integer).macs_share > 0.6


def test_what_no_branch_uses_is_one_graph():
    model = type("Island", (Around,), {"rare": lambda self, y, x: y * self.gain.sum() + x.shape[0]})().eval()
    prepared = fxquant.prepare(model, torch.randn(9, 6))
    assert [island.path for island in islands_of(prepared)] == [""]
    assert not any(part.meta.get("read_from_outside") for part in graphs_of(prepared).values())


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, scale):
        return self.b(self.a(x).relu() * scale)


class ByClass(nn.Sequential):
    def forward(self, x, scale):
        if float(x.sum()) > 1e9:
            return x
        for part in self:
            given = (x, scale) if isinstance(part, Scaled) else (x,)
            x = part(*given) * (2 if isinstance(part, nn.Linear) else 1)
        return x


def test_an_island_asks_what_its_parts_are():
    """A graph in their place was none of their class: it was called without the second argument, or not doubled."""
    torch.manual_seed(0)
    model, inputs = ByClass(Block(), Scaled(), nn.Linear(6, 6)).eval(), (torch.randn(90, 6), torch.rand(90, 6))
    prepared = fxquant.prepare(model, inputs)
    fxquant.calibrate(prepared, [inputs], progress=False)
    integer = fxquant.convert(prepared)
    with torch.no_grad():
        assert decibels(model(*inputs), integer(*inputs)) > 34
    causes = {island.path: island.cause for island in islands_of(prepared)}
    assert "ask for its class" in causes["2"] and "class of 1" in causes["1"]
    assert fxquant.coverage(integer).macs_share == pytest.approx(4 / 5)
