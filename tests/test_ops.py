"""Generated from the op table: every entry's example through prepare, freeze and convert, and every spelling."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
from comparisons import assert_integers_agree, assert_ops_agree, assert_same_bits, output_integers
from op_cases import (
    ALL,
    COMPUTING,
    calibrated,
    calls_in,
    canonical,
    entry_of,
    example_of,
    frozen_example,
    inputs_like,
    model_of,
    operand_values,
    quantizers,
    recipe_with,
    rows_for,
)
from torch import fx, nn

import fxquant
from fxquant import Op, Recipe, Scheme, Setting
from fxquant.behaviour import Weighted
from fxquant.nn.integer import IntegerOp
from fxquant.numerics.requantize import ROUNDINGS
from fxquant.ops.entry import OpEntry
from fxquant.ops.example import Example
from fxquant.ops.table import TABLE

ELEMENTS = 20_000
WEIGHTED = [name for name in COMPUTING if isinstance(entry_of(name).behaviour, Weighted)]


ROUNDING = ("add", "sub", "mul", "div", "matmul", "bmm", "cat")
"""Ops beside the weighted ones whose kernels requantize, each in the rounding mode that was asked for."""
TWO_ROUNDINGS = ("sub", "mul", "div")
"""Their examples hold two ops one behind the other, so that one level of the first may become two of the second."""


def run(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    with torch.no_grad():
        return module(*copy.deepcopy(inputs))


@pytest.mark.parametrize("name", ALL)
def test_the_example_holds_the_entry_with_attributes_away_from_their_defaults(name):
    entry, example = entry_of(name), example_of(name)
    calls = calls_in(canonical(example.module, example.inputs), entry)
    if name == "float":
        nodes = canonical(example.module, example.inputs).graph.nodes
        assert any(n.meta.get("entry") is entry for n in nodes)
        return
    if name == "identity":
        assert calls
        return
    assert calls, f"the example of {name} contains no {name}"
    optional = [p.name for p in entry.parameters if not p.operand and not p.required and not p.name.startswith("_")]
    optional = [p for p in optional if p not in ("training", "inplace", "dtype", "return_indices", "sparse")]
    given = {key for call in calls for key in call.attributes}
    required = {p.name for p in entry.parameters if not p.operand and (p.required or p.variadic)}
    if optional and name != "contiguous":
        assert given & (set(optional) | required), f"{name}: all of {optional} are at their defaults"


@pytest.mark.parametrize("name", COMPUTING)
@pytest.mark.parametrize("qat", [False, True], ids=["ptq", "qat"])
def test_with_quantizers_off_the_example_is_unchanged(name, qat):
    example = example_of(name)
    prepared = fxquant.prepare(example.module, example.inputs, qat=qat)
    for rows in (1, 3):
        inputs = inputs_like(example, rows, seed=rows)
        with fxquant.quantizers_off(prepared):
            assert_same_bits(run(prepared, inputs), run(example.module, inputs), f"{name}, {rows} times the rows")


CASES = [(name, "single") for name in COMPUTING]
CASES += [(name, rounding) for name in (*WEIGHTED, *ROUNDING) for rounding in ROUNDINGS if rounding != "single"]


@pytest.mark.parametrize(("name", "rounding"), CASES, ids=[f"{n}-{r}" for n, r in CASES])
def test_integers_are_the_frozen_models(name, rounding):
    example, frozen = example_of(name), frozen_example(name)
    integer = fxquant.convert(frozen, rounding=rounding)
    rows, share = rows_for(example, ELEMENTS // 2), 0.99 if rounding == "double" else 0.999
    inputs = [inputs_like(example, rows, 21), inputs_like(example, rows, 22, gain=1.7)]
    for batch in inputs:
        assert_ops_agree(frozen, integer, batch, share=share)
    if not entry_of(name).drops and name != "identity":
        assert holds_integer(integer, entry_of(name)), f"{name} is not in integers in its own example"
    compared = [(q, q_frozen(frozen, integer, batch)) for batch in inputs for q in output_integers(integer, batch)]
    largest = 1 if rounding == "single" or name not in TWO_ROUNDINGS else 2
    assert_integers_agree(compared, at_least=ELEMENTS, largest=largest, share=share - 0.001, what=f"{name} end to end")


def holds_integer(integer: fx.GraphModule, entry: OpEntry) -> bool:
    """Whether an integer op is ``entry``'s, or took it in."""
    nodes = [n for n in integer.graph.nodes if n.op == "call_module"]
    nodes = [n for n in nodes if isinstance(integer.get_submodule(n.target), IntegerOp)]
    return any(n.meta["entry"] is entry or entry.title in n.meta.get("merged", ()) for n in nodes)


def q_frozen(frozen: nn.Module, integer: nn.Module, inputs: tuple[Any, ...]) -> torch.Tensor:
    """The integers of the frozen model's result, on the grid that the integer model ends with."""
    from comparisons import on_grid

    last = [n for n in integer.graph.nodes if n.op == "call_module" and "dequantize" in n.name][-1]
    end = integer.get_submodule(last.target)
    return on_grid(run(frozen, inputs), end.scale, end.zero_point)


SCHEMES = {
    "4 bits": Scheme(bits=4),
    "16 bits": Scheme(bits=16),
    "signed": Scheme(signed=True),
    "symmetric signed": Scheme(symmetric=True, signed=True),
    "symmetric unsigned": Scheme(symmetric=True),
    "16 bits symmetric signed": Scheme(bits=16, symmetric=True, signed=True, narrow_range=True),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize("name", [*WEIGHTED, "add", "cat", "relu", "mean"])
def test_integers_are_the_frozen_models_on_other_grids(name, scheme):
    example = example_of(name)
    frozen = fxquant.freeze(calibrated(example, recipe_with(activation=scheme)))
    assert all(q.scheme == scheme for q in quantizers(frozen) if type(q).__name__ == "FakeQuantize")
    integer = fxquant.convert(frozen)
    for seed, gain in ((31, 1.0), (32, 1.7)):
        inputs = inputs_like(example, rows_for(example, ELEMENTS // 2), seed, gain)
        share = 0.999 if scheme.bits < 16 else 0.97
        assert_ops_agree(frozen, integer, inputs, share=share)


WEIGHT_SCHEMES = {
    "2 bits": Scheme(bits=2, symmetric=True, signed=True, per_channel=True, narrow_range=True),
    "4 bits": Scheme(bits=4, symmetric=True, signed=True, per_channel=True, narrow_range=True),
    "16 bits": Scheme(bits=16, symmetric=True, signed=True, per_channel=True),
    "per tensor": Scheme(symmetric=True, signed=True, narrow_range=True),
    "full range": Scheme(symmetric=True, signed=True, per_channel=True),
    "mse": Scheme(symmetric=True, signed=True, per_channel=True, estimator="mse"),
}


@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES.values(), ids=WEIGHT_SCHEMES.keys())
@pytest.mark.parametrize("name", WEIGHTED)
def test_integers_are_the_frozen_models_with_other_weights(name, scheme):
    example = example_of(name)
    frozen = fxquant.freeze(calibrated(example, recipe_with(weight=scheme)))
    inputs = inputs_like(example, rows_for(example, ELEMENTS), 41, 1.3)
    assert_ops_agree(frozen, fxquant.convert(frozen), inputs)


def spellings(name: str) -> list[tuple[str, str, Any]]:
    """Every spelling of an entry as (entry, kind, target)."""
    entry = entry_of(name)
    functions = dict.fromkeys([*([entry.function] if entry.function.__module__ != "fxquant" else []), *entry.functions])
    found = [(name, "function", f) for f in functions if not getattr(f, "__module__", "").startswith("fxquant.")]
    found += [(name, "in-place function", f) for f in dict.fromkeys(entry.inplace_functions)]
    found += [(name, "method", m) for m in entry.methods]
    found += [(name, "in-place method", m) for m in entry.inplace_methods]
    return found + [(name, "module", m) for m in entry.modules]


def spelling_id(case: tuple[str, str, Any]) -> str:
    name, kind, target = case
    return f"{name}: {kind} {target if isinstance(target, str) else target.__name__}"


REFLECTED = ("__radd__", "__rmul__")
CALLED = [case for name in ALL for case in spellings(name) if case[1] != "module" and name not in ("measure", "float")]
CALLED = [case for case in CALLED if case[0] != "batch_norm"]


@pytest.mark.parametrize("case", CALLED, ids=spelling_id)
def test_every_spelling_is_recognized(case):
    name, kind, target = case
    call, tensors, held = operand_values(name)
    attributes = dict(call.attributes)
    if name == "dropout":
        attributes.update(training=False)
    if getattr(target, "__module__", "") == "_operator" or (isinstance(target, str) and target.startswith("__")):
        attributes.pop("alpha", None)
    if getattr(target, "__module__", "") != "fxquant.ops.weighted":
        attributes.pop("padding_mode", None)

    def spelled(xs: list[Any], parameters: dict[str, Any]) -> Any:
        result = apply(call, kind, target, xs, parameters, attributes)
        return result[0] if call.entry.returns == "tuple" else result

    model = model_of(spelled, tuple(tensors), held)
    expected = run(model, tuple(tensors))
    graph = canonical(model, tuple(tensors))
    assert len(calls_in(graph, call.entry)) == 1, f"not recognized: {[n.meta.get('reason') for n in graph.graph.nodes]}"
    assert_same_bits(run(graph, tuple(tensors)), expected)


def apply(
    call: Any, kind: str, target: Any, xs: list[Any], parameters: dict[str, Any], attributes: dict[str, Any]
) -> Any:
    operands = [xs] if call.entry.operand_names[0] == "tensors" else xs
    positional, named = by_position(call, kind, target, attributes)
    if "method" in kind:
        return getattr(operands[0], target)(*operands[1:], *positional, **named)
    given = [parameters[n] for n in call.entry.operand_names if n in parameters]
    if call.entry.order and target in call.entry.functions:
        given_names = [n for n in call.entry.operand_names if n not in parameters]
        by_name = {**dict(zip(given_names, operands, strict=True)), **parameters}
        return target(*[by_name[n] for n in call.entry.order], **named)
    if call.entry.name == "layer_norm":
        return target(*operands, *positional, *given, **named)
    return target(*operands, *given, *positional, **named)


def by_position(call: Any, kind: str, target: Any, attributes: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """What the spelling takes by position (sizes, dims, an index) and by name."""
    variadic = [p.name for p in call.entry.parameters if p.variadic]
    required = [p.name for p in call.entry.parameters if p.required and not p.operand]
    leading = [n for n in (*required, *variadic) if n in attributes]
    rest = {n: v for n, v in attributes.items() if n not in leading}
    values = [attributes[n] for n in leading]
    if variadic and "method" in kind and len(values) == 1:
        values = list(values[0])
    return values, rest


MODULES: dict[type[nn.Module], nn.Module] = {
    nn.Flatten: nn.Flatten(1, 2),
    nn.Softmax2d: nn.Softmax2d(),
    nn.Upsample: nn.Upsample(scale_factor=2.0),
    nn.UpsamplingNearest2d: nn.UpsamplingNearest2d(scale_factor=2),
    nn.UpsamplingBilinear2d: nn.UpsamplingBilinear2d(scale_factor=2),
    nn.ConstantPad1d: nn.ConstantPad1d((1, 2), 0.0),
    nn.ConstantPad2d: nn.ConstantPad2d((1, 2, 0, 1), 0.0),
    nn.ConstantPad3d: nn.ConstantPad3d((1, 2, 0, 1, 2, 0), 0.0),
    nn.ZeroPad1d: nn.ZeroPad1d((1, 2)),
    nn.ZeroPad2d: nn.ZeroPad2d((1, 2, 0, 1)),
    nn.ZeroPad3d: nn.ZeroPad3d((1, 2, 0, 1, 0, 1)),
    nn.ReflectionPad1d: nn.ReflectionPad1d((1, 2)),
    nn.ReflectionPad2d: nn.ReflectionPad2d((1, 2, 0, 1)),
    nn.ReflectionPad3d: nn.ReflectionPad3d((1, 2, 0, 1, 1, 0)),
    nn.ReplicationPad1d: nn.ReplicationPad1d((1, 2)),
    nn.ReplicationPad2d: nn.ReplicationPad2d((1, 2, 0, 1)),
    nn.ReplicationPad3d: nn.ReplicationPad3d((1, 2, 0, 1, 1, 0)),
    nn.BatchNorm1d: nn.BatchNorm1d(3, eps=1e-2),
    nn.BatchNorm2d: nn.BatchNorm2d(3, eps=1e-2),
    nn.BatchNorm3d: nn.BatchNorm3d(3, eps=1e-2),
    nn.SyncBatchNorm: nn.SyncBatchNorm(3, eps=1e-2),
    nn.Dropout: nn.Dropout(0.3),
    nn.Dropout1d: nn.Dropout1d(0.3),
    nn.Dropout2d: nn.Dropout2d(0.3),
    nn.Dropout3d: nn.Dropout3d(0.3),
    nn.Embedding: nn.Embedding(11, 4, padding_idx=1),
}
SPECIAL = {
    ("interpolate", nn.Upsample): nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=True),
    ("pad_value", nn.ConstantPad1d): nn.ConstantPad1d((1, 2), 0.7),
    ("pad_value", nn.ConstantPad2d): nn.ConstantPad2d((1, 2, 0, 1), 0.7),
    ("pad_value", nn.ConstantPad3d): nn.ConstantPad3d((1, 2, 0, 1, 2, 0), -0.7),
}
MODULE_CASES = [case for name in ALL for case in spellings(name) if case[1] == "module"]


@pytest.mark.parametrize("case", MODULE_CASES, ids=spelling_id)
def test_every_module_is_recognized_quantized_and_converted(case):
    name, _, cls = case
    example = module_example(name, cls)
    assert len(calls_in(canonical(example.module, example.inputs), entry_of(name))) == 1
    prepared = fxquant.calibrate(fxquant.prepare(example.module, example.inputs), [example.inputs], progress=False)
    with fxquant.quantizers_off(prepared):
        assert_same_bits(run(prepared, example.inputs), run(example.module, example.inputs))
    frozen = fxquant.freeze(prepared)
    assert_ops_agree(frozen, fxquant.convert(frozen), example.inputs, share=0.99)


def module_example(name: str, cls: type[nn.Module]) -> Example:
    """A model with a module of class ``cls`` that is ``name``'s, and an input that it takes."""
    call, tensors, _ = operand_values(name)
    module = SPECIAL.get((name, cls)) or MODULES.get(cls)
    if module is None and type(call.module) is cls:
        module = call.module
    if module is None:
        module = cls(**{k: v for k, v in call.attributes.items() if k != "_stacklevel"})
    dims = next((d for d in (1, 2, 3) if cls.__name__.endswith(f"{d}d")), None)
    x = tensors[0]
    if cls in MODULES and dims is not None and x.is_floating_point():
        extra = 1 if cls is nn.Dropout1d else dims
        x = torch.randn(2, 3, *(4 + i for i in range(extra)))
    if cls is nn.SyncBatchNorm:
        x = torch.randn(2, 3, 4, 5)
    chained: list[nn.Module] = [copy.deepcopy(module)]
    if not isinstance(entry_of(name).behaviour, Weighted) and x.is_floating_point():
        chained.insert(0, nn.Hardswish() if cls is not nn.Hardswish else nn.Sigmoid())
    return Example(nn.Sequential(*chained).eval(), (x,))


@pytest.mark.parametrize(
    "cls", [nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Hardswish, nn.Dropout]
)
def test_modules_in_place_are_recognized_and_leave_their_input_alone(cls):
    model = nn.Sequential(nn.Linear(5, 4), cls(inplace=True)).eval()
    x = torch.randn(7, 5)
    prepared = fxquant.prepare(model, x)
    with fxquant.quantizers_off(prepared):
        assert_same_bits(run(prepared, (x,)), run(model, (x,)))
    assert not any("reason" in n.meta for n in prepared.graph.nodes)


NUMBERS = {
    "x + 2": lambda x: x + 2,
    "2.5 + x": lambda x: 2.5 + x,
    "x - 2": lambda x: x - 2,
    "2.5 - x": lambda x: 2.5 - x,
    "x * -2": lambda x: x * -2,
    "0 * x": lambda x: 0 * x + x,
    "x / 4": lambda x: x / 4,
    "x / -0.3": lambda x: x / -0.3,
    "3 / (|x| + 1)": lambda x: 3 / (x.abs() + 1),
    "-x": lambda x: -x * 1.5,
    "add alpha": lambda x: torch.add(x, 2, alpha=3),
    "sub alpha": lambda x: torch.sub(2.0 * x, x, alpha=0.5),
    "rsub": lambda x: torch.rsub(x, 2.0) + x,
    "x ** 2": lambda x: x**2 + x,
}


@pytest.mark.parametrize("function", NUMBERS.values(), ids=NUMBERS.keys())
def test_arithmetic_with_numbers(function):
    model = model_of(lambda xs, _: function(xs[0]), (torch.zeros(1),))
    x = torch.randn(64, 40) * 2
    recipe = Recipe([(Op("div"), Setting())]) if function is NUMBERS["3 / (|x| + 1)"] else None
    frozen = fxquant.freeze(fxquant.calibrate(fxquant.prepare(model, x, recipe=recipe), [x], progress=False))
    integer = fxquant.convert(frozen)
    assert_ops_agree(frozen, integer, (x * 1.4,))
    scale = max(float(q.scale) for q in quantizers(frozen))
    inside = run(model, (x,))
    assert float((run(frozen, (x,)) - inside).abs().max()) <= 4 * scale * max(1.0, float(inside.abs().max()) / 4)


STANDALONE = {
    "relu": lambda x: torch.relu(x),
    "relu6": lambda x: torch.nn.functional.relu6(x),
    "clamp": lambda x: x.clamp(-0.3, 1.4),
    "clamp min": lambda x: x.clamp(min=0.4),
    "clamp max": lambda x: x.clamp(max=-0.4),
    "relu used twice": lambda x: torch.relu(x * 0.7) + x,
}


@pytest.mark.parametrize("function", STANDALONE.values(), ids=STANDALONE.keys())
def test_clamps_that_stand_alone(function):
    model, x = model_of(lambda xs, _: function(xs[0]), (torch.zeros(1),)), torch.randn(200, 110) * 3
    frozen = fxquant.freeze(fxquant.calibrate(fxquant.prepare(model, x), [x], progress=False))
    assert_ops_agree(frozen, fxquant.convert(frozen), (x * 1.3,))


def test_the_table_names_each_spelling_once_or_tells_the_calls_apart():
    """Two entries may share a spelling only where each says which calls are its own."""
    owners: dict[Any, list[str]] = {}
    for name in ALL:
        for _, kind, target in spellings(name):
            owners.setdefault((kind, target), []).append(name)
    shared = {key: names for key, names in owners.items() if len(names) > 1}
    for key, names in shared.items():
        assert all(TABLE[n].accepts is not None or n in ("float",) for n in names), f"{key} belongs to {names}"


def test_operators_are_spelled_in_the_table():
    for function in (operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul, operator.getitem):
        assert any(function in (e.function, *e.functions) for e in TABLE.values())
