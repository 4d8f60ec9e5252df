"""Which integer form becomes which native operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from fxquant.kernels.native.library import Step
from fxquant.kernels.native.operations import (
    Add,
    Attention,
    Average,
    Concatenation,
    Door,
    Maximum,
    Operation,
    Pointwise,
    Product,
)
from fxquant.kernels.native.weighted import Weighted
from fxquant.kernels.native.weights import Unfit, addition, channel_affine_numbers, held, rescaling_of
from fxquant.nn.accumulating import IntegerProduct, IntegerSum, IntegerWeighted
from fxquant.nn.integer import (
    Dequantize,
    IntegerEvaluate,
    IntegerLinearMap,
    IntegerOp,
    IntegerPass,
    IntegerTable,
    Quantize,
)
from fxquant.ops.behaviour import ChannelAffine

__all__ = ["FORMS", "PASSES", "Lines"]


class Lines(Protocol):
    """What a form asks of the lowering."""

    def operands(self, nodes: Sequence[Any]) -> list[int]:
        """The lines of nodes."""

    def is_signed(self, node: Any) -> bool:
        """Whether a node's bytes are held 128 higher."""

    def gives(self, node: fx.Node, dtype: torch.dtype | None) -> None:
        """Say what a node's bytes are."""


def _zero_point(lines: Lines, node: fx.Node, part: Any, index: int) -> int:
    """Of an operand, as held."""
    return int(part.offset[index]) + 128 * lines.is_signed(node.args[index])


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [a for a in node.args if isinstance(a, fx.Node)]


def _quantize(lines: Lines, node: fx.Node, part: Quantize) -> Operation:
    scheme = part.scheme
    lines.gives(node, scheme.storage_dtype)
    shift = 128 * scheme.signed
    bounds = scheme.qmin + shift, scheme.qmax + shift
    return Door(lines.operands(node.args), "quantize", float(part.scale), int(part.zero_point) + shift, bounds)


def _dequantize(lines: Lines, node: fx.Node, part: Dequantize) -> Operation:
    if part.dtype != torch.float32:
        raise Unfit(f"its result is {part.dtype}")
    zero_point = int(part.zero_point) + 128 * lines.is_signed(node.args[0])
    return Door(lines.operands(node.args), "dequantize", float(part.scale), zero_point, (0, 255))


def _weighted(lines: Lines, node: fx.Node, part: IntegerWeighted) -> Operation:
    if part.output_dtype is not None:
        lines.gives(node, part.output_dtype)
    elif part.real_dtype != torch.float32:
        raise Unfit(f"its result is {part.real_dtype}")
    if len(node.args) != 1 or node.kwargs:
        raise Unfit("it is called with more than its input")
    return Weighted(lines.operands(node.args), part, _zero_point(lines, node, part, 0))


def _tabulated(lines: Lines, node: fx.Node, part: IntegerOp) -> Operation:
    """A function of one tensor's numbers, asked for all 256."""
    (source,) = _tensors(node)
    signed = lines.is_signed(source)
    lines.gives(node, part.output_dtype)
    every = torch.arange(256, dtype=torch.int32) - 128 * signed
    if isinstance(part, IntegerTable):  # a grid of fewer bits has fewer entries, and its tensors no other numbers
        every = every.clamp(int(part.first), int(part.first) + len(part.table) - 1)
    found = part(*(every.to(torch.int8 if signed else torch.uint8) if a is source else a for a in node.args))
    table = (found.to(torch.int32) + 128 * (part.output_dtype == torch.int8)).to(torch.uint8).contiguous()

    def write(step: Step) -> None:
        step.out.table = table.data_ptr()

    return Pointwise(lines.operands([source]), "table", write, (table,))


def _sum(lines: Lines, node: fx.Node, part: IntegerSum) -> Operation:
    if len(_tensors(node)) == 1:
        return _tabulated(lines, node, part)
    lines.gives(node, part.output_dtype)
    zero_points = _zero_point(lines, node, part, 0), _zero_point(lines, node, part, 1)
    return Add(lines.operands(node.args), addition(part, zero_points))


def _product(lines: Lines, node: fx.Node, part: IntegerProduct) -> Operation:
    if len(_tensors(node)) == 1:
        return _tabulated(lines, node, part)
    if int(part.sign) < 0:
        raise Unfit("its factors have scales of different signs")
    lines.gives(node, part.output_dtype)
    zero_points = _zero_point(lines, node, part, 0), _zero_point(lines, node, part, 1)
    return Product(lines.operands(node.args), rescaling_of(part, 16, torch.tensor(255 * 255)), zero_points)


def _evaluate(lines: Lines, node: fx.Node, part: IntegerEvaluate) -> Operation:
    entry: Any = part.entry
    form = entry.native
    if isinstance(entry.behaviour, ChannelAffine):
        build = _affine
    elif form in _EVALUATED:
        build = _EVALUATED[form]
    else:
        raise Unfit("how it computes inside is not written natively")
    lines.gives(node, part.output_dtype)
    return build(lines, node, part)


def _parameters(part: IntegerEvaluate) -> dict[str, Tensor]:
    return {name: getattr(part, f"parameter_{name}").double() for name in part.parameter_names}


def _affine(lines: Lines, node: fx.Node, part: IntegerEvaluate) -> Operation:
    """As the reference computes it, but with its constants multiplied out; compared with it for every byte."""
    zero_point, least, most = held(part)
    unit = float(part.output_scale)
    gain, offset = _parameters(part).values()
    signed = lines.is_signed(node.args[0])
    gain = gain * float(part.input_scale[0]) / unit
    offset = offset / unit - gain * _zero_point(lines, node, part, 0)
    every = torch.arange(256)
    found = (torch.round(every.double()[:, None] * gain + offset) + zero_point).clamp(least, most)
    source = (every - 128 * signed).to(torch.int8 if signed else torch.uint8)
    wanted = part(source[:, None].expand(-1, len(gain))).to(torch.int32) + 128 * (part.output_dtype == torch.int8)
    if not torch.equal(found.to(torch.int32), wanted):
        raise Unfit("its gains leave results half way between two integers")
    numbers = channel_affine_numbers(gain, offset)

    def write(step: Step) -> None:
        step.numbers, step.out.magic = numbers.data_ptr(), 1.5 * 2**52 + zero_point
        step.out.low, step.out.high = least, most

    return Pointwise(lines.operands(node.args), "affine", write, (numbers,), channels=len(gain))


def _layer_norm(lines: Lines, node: fx.Node, part: IntegerEvaluate) -> Operation:
    shape = tuple(part.attributes["normalized_shape"])
    if len(shape) != 1 or len(node.args) != 1 or node.kwargs:
        raise Unfit("it normalizes over more than the last axis")
    zero_point, least, most = held(part)
    found, unit = _parameters(part), float(part.output_scale)
    gain = found.get("weight", torch.ones(shape, dtype=torch.float64)) / unit
    offset = found.get("bias", torch.zeros(shape, dtype=torch.float64)) / unit
    numbers = torch.stack([gain, offset]).float().contiguous()
    epsilon = float(part.attributes.get("eps", 1e-5)) / float(part.input_scale[0]) ** 2

    def write(step: Step) -> None:
        step.numbers, step.scale[0], step.zero_point[1] = numbers.data_ptr(), epsilon, zero_point
        step.out.low, step.out.high = least, most

    return Pointwise(lines.operands(node.args), "layer norm", write, (numbers,), channels=shape[0])


def _attention(lines: Lines, node: fx.Node, part: IntegerEvaluate) -> Operation:
    a = part.attributes
    if len(node.args) != 3 or node.kwargs or a.get("enable_gqa") or a.get("attn_mask") is not None:
        raise Unfit("it has a mask, or shares keys between heads")
    zero_point, least, most = held(part)
    before = [_zero_point(lines, node, part, i) for i in range(3)]
    zero_points = before[0], before[1], before[2], zero_point
    query, key, value = (float(s) for s in part.input_scale[:3])
    units = query * key, value / float(part.output_scale)
    scale, causal = a.get("scale"), bool(a.get("is_causal", False))
    if scale is not None and scale < 0:
        raise Unfit("its scale is negative")
    return Attention(lines.operands(node.args), zero_points, units, scale, causal, (least, most))


def _softmax(lines: Lines, node: fx.Node, part: IntegerEvaluate) -> Operation:
    entry: Any = part.entry
    if len(node.args) != 1 or node.kwargs or not isinstance(part.attributes.get("dim"), int):
        raise Unfit("along which axis it sums is not known")
    zero_point, least, most = held(part)
    steps = float(part.input_scale[0]), 1 / float(part.output_scale)
    logarithm = entry.native == "log softmax"

    def write(step: Step) -> None:
        step.scale[:], step.zero_point[1], step.taps = steps, zero_point, int(logarithm)
        step.out.low, step.out.high = least, most

    return Pointwise(lines.operands(node.args), "softmax", write, (), axis=int(part.attributes["dim"]))


_EVALUATED = {"layer norm": _layer_norm, "attention": _attention, "softmax": _softmax, "log softmax": _softmax}


def _linear_map(lines: Lines, node: fx.Node, part: IntegerLinearMap) -> Operation:
    entry: Any = part.entry
    form, attributes = entry.native, dict(part.attributes)
    if form not in ("average", "adaptive average", "mean") or node.kwargs or len(node.args) != 1:
        raise Unfit("only averages over images are written natively")
    if attributes.get("divisor_override") is not None:
        raise Unfit("it divides by a number of its own")
    lines.gives(node, part.output_dtype)
    zero_point, least, most = held(part)
    zero_points = _zero_point(lines, node, part, 0), zero_point
    ratio = float(part.ratio)
    return Average(lines.operands(node.args), entry.function, attributes, form, ratio, zero_points, (least, most))


def _maximum(lines: Lines, node: fx.Node, part: IntegerPass) -> Operation:
    if len(node.args) != 1 or node.kwargs:
        raise Unfit("its arguments are computed in the graph")
    return Maximum(lines.operands(node.args), part.entry.function, dict(part.attributes))


def _concatenation(lines: Lines, node: fx.Node, part: IntegerPass) -> Operation:
    (tensors,) = node.args
    if not isinstance(tensors, (list, tuple)) or len({lines.is_signed(t) for t in tensors}) != 1:
        raise Unfit("its tensors are not held alike")
    return Concatenation(lines.operands(tensors), int(part.attributes.get("dim", 0)))


PASSES: dict[str, Callable[[Lines, fx.Node, Any], Operation]] = {
    "maximum": _maximum,
    "concatenation": _concatenation,
}
"""Forms that move numbers and are no view, by what their entries call them."""

FORMS: dict[type, Callable[[Lines, fx.Node, Any], Operation]] = {
    Quantize: _quantize,
    Dequantize: _dequantize,
    IntegerWeighted: _weighted,
    IntegerTable: _tabulated,
    IntegerSum: _sum,
    IntegerProduct: _product,
    IntegerEvaluate: _evaluate,
    IntegerLinearMap: _linear_map,
}
"""All others, by their class."""
