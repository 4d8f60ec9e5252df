"""The op table as test cases: each entry's example, its calls, and fresh inputs for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxquant
from fxquant import Op, Recipe, Scheme, Setting
from fxquant.behaviour import FloatOnly, Measuring
from fxquant.capture.capture import capture
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.ops.calls import call_of
from fxquant.ops.entry import Call, OpEntry
from fxquant.ops.example import Example
from fxquant.ops.table import TABLE
from fxquant.passes.canonicalize import canonicalize

ALL = list(TABLE)
COMPUTING = [name for name, e in TABLE.items() if not isinstance(e.behaviour, (FloatOnly, Measuring))]
ROUNDED = Recipe(quantize_outputs=True)


def mostly_long(names: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """Parameters of a test that takes a second or more: those in ``quick`` in every run, the others with ``-m long``."""
    quick = set(quick)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.long) for name in names]


def rounded(name: str, activation: Scheme | None = None) -> Recipe:
    """The recipe that rounds what an entry's example gives; an op that is left in float by itself has to be named."""
    setting = Setting() if activation is None else Setting(activation=activation)
    named = [(Op(name), setting)] if TABLE[name].sensitive else []
    return Recipe(named, default=setting, quantize_outputs=True)


SCHEMES = {
    "4 bits": Scheme(bits=4),
    "2 bits": Scheme(bits=2),
    "5 bits signed": Scheme(bits=5, signed=True, symmetric=True, narrow_range=True),
    "8 bits symmetric signed narrow": Scheme(signed=True, symmetric=True, narrow_range=True),
    "8 bits symmetric unsigned": Scheme(symmetric=True),
    "12 bits": Scheme(bits=12),
    "16 bits": Scheme(bits=16),
    "16 bits signed": Scheme(bits=16, signed=True, symmetric=True),
}
WEIGHTS = {
    bits: Scheme(bits=bits, symmetric=True, signed=True, per_channel=True, narrow_range=True) for bits in (2, 4, 6, 16)
}
"""Tensors and weights that are not of 8 bits as by default."""


def entry_of(name: str) -> OpEntry:
    return TABLE[name]


def example_of(name: str) -> Example:
    return TABLE[name].example()


def inputs_like(example: Example, rows: int, seed: int, gain: float = 1.0) -> tuple[Tensor, ...]:
    """Inputs of the example's kind with ``rows`` times as many rows; ``gain`` widens their range."""
    generator = torch.Generator().manual_seed(seed)

    def draw(x: Tensor) -> Tensor:
        shape = (x.shape[0] * rows, *x.shape[1:])
        if not x.is_floating_point():
            return torch.randint(0, int(x.max()) + 1, shape, generator=generator)
        return gain * (torch.randn(shape, generator=generator) * 1.5 + 0.2)

    return tuple(draw(x) for x in example.inputs)


def canonical(model: nn.Module, inputs: tuple[Tensor, ...]) -> LeveledModule:
    return canonicalize(capture(model, inputs, for_training=False).model)


def calls_in(module: LeveledModule, entry: OpEntry) -> list[Call]:
    """The calls of ``entry`` that were recognized."""
    nodes = [n for n in module.graph.nodes if n.meta.get("entry") is entry and "reason" not in n.meta]
    return [call_of(n, module.get_submodule(str(n.target)) if n.op == "call_module" else None) for n in nodes]


def recipe_with(activation: Scheme | None = None, weight: Scheme | None = None) -> Recipe:
    given = {k: v for k, v in (("activation", activation), ("weight", weight)) if v is not None}
    return Recipe(default=Setting(**given), quantize_outputs=True)


def calibrated(example: Example, recipe: Recipe = ROUNDED) -> LeveledModule:
    """Prepared on the example and calibrated on it and on three more batches.

    Tests try inputs that reach further: on a processor that adds products by twos, pairs of any bytes have to fit.
    """
    prepared = fxquant.prepare(example.module, example.inputs, recipe=recipe)
    batches = [example.inputs, *(inputs_like(example, 4, seed) for seed in (11, 12, 13))]
    return for_any_bytes(fxquant.calibrate(prepared, batches, progress=False))


def for_any_bytes(prepared: Any) -> Any:
    """A calibrated model whose sums of two products stay within 16 bits for all inputs, not only for such as it has seen."""
    for part in prepared.modules():
        if isinstance(part, WeightQuantize) and part.out_axis is not None:
            part.reach.fill_(255.0)
    return prepared


def prepared_of(model: nn.Module, example: Any, recipe: Recipe | None = None, qat: bool = False) -> Any:
    prepared = fxquant.prepare(model, example, recipe=recipe, qat=qat)
    batch = example if isinstance(example, (tuple, dict)) else (example,)
    return fxquant.calibrate(prepared, [batch], progress=False)


def run(module: Any, inputs: tuple[Any, ...]) -> Any:
    with torch.no_grad():
        return module(*copy.deepcopy(inputs))


@cache
def frozen_example(name: str) -> LeveledModule:
    """The frozen model of an entry's example; shared between tests, so do not change it."""
    return fxquant.freeze(calibrated(example_of(name), rounded(name)))


def quantizers(module: nn.Module) -> list[FakeQuantize]:
    return [part for part in module.modules() if isinstance(part, FakeQuantize)]


def rows_for(example: Example, elements: int) -> int:
    """How many times the example's rows give an output of ``elements`` elements, and no op's input too many."""
    with torch.no_grad():
        size = example.module(*copy.deepcopy(example.inputs)).numel()
    return -(-elements // size)


class OneInput(nn.Module):
    """A function of one tensor as a model; ``held`` are its parameters."""

    def __init__(self, function: Callable[..., Any], held: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.function = function
        self.names = list(held or {})
        for name, value in (held or {}).items():
            setattr(self, f"held_{name}", nn.Parameter(value.clone()))

    def held(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"held_{name}") for name in self.names}

    def forward(self, x: Tensor) -> Any:
        return self.function([x], self.held())


class TwoInputs(OneInput):
    """A function of two tensors as a model."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.function([x, y], self.held())


class ThreeInputs(OneInput):
    """A function of three tensors as a model."""

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Any:  # type: ignore[override]
        return self.function([x, y, z], self.held())


def model_of(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], held: dict[str, Tensor] | None = None
) -> nn.Module:
    return (OneInput, TwoInputs, ThreeInputs)[len(inputs) - 1](function, held).eval()


def sized(value: Any, example: Example) -> Any:
    """An argument with the batch size that it reads off the input put in."""
    if isinstance(value, (tuple, list)) and not all(isinstance(v, fx.Node) and v.meta["is_tensor"] for v in value):
        return type(value)(example.inputs[0].shape[0] if isinstance(v, fx.Node) else v for v in value)
    return value


def operand_values(name: str) -> tuple[Call, list[Tensor], dict[str, Tensor]]:
    """An entry's call in its example, with the values of its tensor operands and of its parameters."""
    example = example_of(name)
    module = canonical(example.module, example.inputs)
    call = calls_in(module, TABLE[name])[0]
    values: dict[str, Any] = {}
    call = replace(call, arguments={k: sized(v, example) for k, v in call.arguments.items()})

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    with torch.no_grad():
        Keep(module).run(*example.inputs)
    held_names = call.entry.operand_names[1:] if call.module is not None else ()
    held = {n: getattr(call.module, n) for n in held_names if isinstance(getattr(call.module, n, None), Tensor)}
    fixed = {name: node for name, node in call.arguments.items() if getattr(node, "op", "") == "get_attr"}
    held |= {name: values[node.name] for name, node in fixed.items()}
    return call, [values[n.name].detach().clone() for n in call.operands if n not in fixed.values()], held
