"""The QOperator form of a file: the standard's operators on integers, where it has them.

    Dequantize(x), Dequantize(w), Dequantize(b) → Conv → Quantize    →   QLinearConv(x, w, b)
    Dequantize(a), Dequantize(b) → MatMul → Quantize                 →   QLinearMatMul(a, b)
    Dequantize(x), Dequantize(w), Dequantize(b) → Gemm               →   MatMulInteger(x, w) + b → Cast → · s_x s_w
    Dequantize(x), Dequantize(w), Dequantize(b) → Conv               →   ConvInteger(x, w) + b → Cast → · s_x s_w
    … → Relu → Quantize                                              →   … → Clip, of the integers

QLinearMatMul has no bias: the accumulator, its bias and what they stand for are four operators of the standard, and so are
they where a result is not rounded, or from one signedness to the other (for which ONNX Runtime 1.31 has no QLinearConv). A
bias is in steps of s_x·s_w in all of these. What has no such operator stays between Quantize and Dequantize: sums, averages,
functions, transposed convolutions, and what has weights or tensors that are not of 8 bits.

OpenVINO 2026.4 takes the per-channel scale of a QLinearConv's weight for one per *input* channel: it refuses the file, or
where there are as many of both computes something else; and it refuses a QLinearMatMul with a scale per column.
Source: ONNX operators QLinearConv, QLinearMatMul, ConvInteger, MatMulInteger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fxquant.onnx.integer_moves import add_constant, is_per_tensor, stand_in

__all__ = ["to_qoperators"]


@dataclass(frozen=True)
class _Integers:
    """A tensor as a DequantizeLinear reads it: ``value`` are 8-bit integers, ``scale`` is float32, ``()`` or ``(C,)``."""

    value: Any
    scale: Any
    zero_point: Any
    axis: int

    @property
    def is_signed(self) -> bool:
        return bool(self.zero_point.const_value.dtype.name == "INT8")

    @property
    def scales(self) -> np.ndarray:
        return np.asarray(self.scale.const_value.numpy())

    @property
    def is_constant(self) -> bool:
        return self.value.const_value is not None


@dataclass(frozen=True)
class _Rounded:
    """Where a result is rounded: its QuantizeLinear, and what stands between both, last first."""

    quantize: Any
    between: list[Any]

    @property
    def is_signed(self) -> bool:
        return bool(self.quantize.inputs[2].const_value.dtype.name == "INT8")


def to_qoperators(model: Any) -> None:
    """Replace in ``model`` (an ``onnx_ir.Model``) what the standard has an operator on integers for."""
    from onnx_ir.passes import common

    for node in list(model.graph.all_nodes()):
        if node.op_type == "Conv":
            _convolution(model, node)
        elif node.op_type in ("MatMul", "Gemm"):
            _product(model, node)
    common.RemoveUnusedNodesPass()(model)


def _convolution(model: Any, node: Any) -> None:
    x, weight = _integers(model, node.inputs[0]), _integers(model, node.inputs[1])
    if x is None or x.scales.size > 1 or weight is None or not weight.is_constant:
        return
    if weight.scales.size > 1 and weight.axis != 0:
        return
    bias = _bias(model, node, x.scales * weight.scales)
    if bias is None:
        return
    rounded = _rounded(node, ())
    if rounded is not None and _fit(x, weight, rounded):
        _replace(model, rounded, "QLinearConv", x, weight, bias, node)
    else:
        _accumulate(model, node, "ConvInteger", x, weight, bias)


def _product(model: Any, node: Any) -> None:
    a, b = _integers(model, node.inputs[0]), _integers(model, node.inputs[1])
    b = None if b is None else _by_columns(model, node, b)
    if a is None or a.scales.size > 1 or b is None:
        return
    bias = _bias(model, node, a.scales * b.scales)
    if bias is None:
        return
    rounded = None if bias else _rounded(node, ("Reshape",))
    if rounded is not None and _fit(a, b, rounded):
        _replace(model, rounded, "QLinearMatMul", a, b, [], node)
    else:
        _accumulate(model, node, "MatMulInteger", a, b, bias)


def _accumulate(model: Any, node: Any, operator: str, a: _Integers, b: _Integers, bias: list[Any]) -> None:
    """The product of integers as an accumulator, with its bias, and as what that stands for."""
    import onnx_ir as ir

    scale, channels = a.scales * b.scales, [-1]
    if operator == "ConvInteger":
        channels += [1] * (len(b.value.const_value.shape) - 2)
        bias = [add_constant(model, one.const_value.numpy().reshape(channels), f"{one.name}:column") for one in bias]
    to_float = [ir.AttrInt64("to", ir.DataType.FLOAT.value)]
    factor = add_constant(model, scale.reshape(channels) if scale.ndim else scale)
    zero_points = [] if b.is_constant and not np.any(b.zero_point.const_value.numpy()) else [b.zero_point]
    kept = list(node.attributes.values()) if operator == "ConvInteger" else []
    steps = [ir.Node("", operator, [a.value, b.value, a.zero_point, *zero_points], kept, name=node.name)]
    for kind, rest, attributes in (("Add", bias, ()), ("Cast", [], to_float), ("Mul", [factor], ())):
        if kind != "Add" or bias:
            name = f"{node.name}:{kind.lower()}" if node.name else None
            steps.append(ir.Node("", kind, [steps[-1].outputs[0], *rest], attributes, name=name))
    node.graph.insert_before(node, steps)
    stand_in(node.outputs[0], steps[-1].outputs[0])


def _by_columns(model: Any, node: Any, b: _Integers) -> _Integers | None:
    """The second operand of a product as QLinearMatMul takes it: ``(…, K, N)``, one scale or one per column."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    if attributes.get("transA") or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
        return None
    is_transposed = bool(attributes.get("transB"))
    if b.scales.size > 1 and b.axis != (0 if is_transposed else len(b.value.const_value.shape) - 1):
        return None
    if not is_transposed:
        return b
    if not b.is_constant:
        return None
    name = f"{b.value.name}:transposed"
    if name not in model.graph.initializers:
        add_constant(model, np.ascontiguousarray(b.value.const_value.numpy().T), name)
    return _Integers(model.graph.initializers[name], b.scale, b.zero_point, 1)


def _integers(model: Any, value: Any) -> _Integers | None:
    """What ``value`` dequantizes; None unless those are 8-bit integers on a known grid."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[1].const_value is None:
        return None
    stored = node.inputs[0]
    if is_per_tensor(node):
        return _Integers(stored, node.inputs[1], node.inputs[2], 0)
    if stored.const_value is None or stored.const_value.dtype.name not in ("INT8", "UINT8"):
        return None
    scale, zero_point = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is None:
        zeros = np.zeros(tuple(scale.const_value.shape), dtype=stored.const_value.dtype.numpy())
        zero_point = add_constant(model, zeros)
    if zero_point.const_value is None or "block_size" in node.attributes or scale.const_value.numpy().ndim > 1:
        return None
    axis = node.attributes.get("axis")
    rank = len(stored.const_value.shape)
    return _Integers(stored, scale, zero_point, (1 if axis is None else axis.as_int()) % rank)


def _bias(model: Any, node: Any, step: np.ndarray) -> list[Any] | None:
    """The bias of a weighted op in steps of the accumulator: none, or one tensor; None where it has another step."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return []
    made = value.producer()
    if made is not None and made.op_type == "DequantizeLinear" and len(made.inputs) == 2:
        integers, scale = made.inputs
        known = integers.const_value is not None and integers.const_value.dtype.name == "INT32"
        if known and scale.const_value is not None and np.allclose(scale.const_value.numpy(), step, rtol=1e-5, atol=0):
            return [integers]
    elif value.const_value is not None and value.const_value.numpy().ndim == 1:
        integers = np.rint(value.const_value.numpy().astype(np.float64) / step)
        if np.abs(integers).max(initial=0) < 2**31:
            return [add_constant(model, integers.astype(np.int32))]
    return None


def _rounded(node: Any, moves: tuple[str, ...]) -> _Rounded | None:
    """Where the result of ``node`` is rounded to 8 bits, behind clamps and ``moves`` that nothing else reads."""
    between: list[Any] = []
    while True:
        value = (between[-1] if between else node).outputs[0]
        readers = list(value.uses())
        if len(readers) != 1 or readers[0].idx != 0 or value.is_graph_output():
            return None
        (reader,) = (use.node for use in readers)
        if reader.op_type == "QuantizeLinear":
            return _Rounded(reader, between) if is_per_tensor(reader) else None
        bounds = reader.inputs[1:] if reader.op_type == "Clip" else []
        is_known = all(bound is None or bound.const_value is not None for bound in bounds)
        if not (reader.op_type in ("Relu", "Clip", *moves) and is_known):
            return None
        between.append(reader)


def _fit(a: _Integers, b: _Integers, rounded: _Rounded) -> bool:
    """Whether ONNX Runtime has the operator: unsigned to unsigned with any weight, or all signed."""
    return a.is_signed == rounded.is_signed and (b.is_signed or not a.is_signed)


def _replace(
    model: Any, rounded: _Rounded, operator: str, a: _Integers, b: _Integers, bias: list[Any], node: Any
) -> None:
    """Put ``operator`` in the place of ``node``, what follows it up to its rounding on integers, and drop that."""
    import onnx_ir as ir

    operands = [a.value, a.scale, a.zero_point, b.value, b.scale, b.zero_point]
    kept = list(node.attributes.values()) if operator == "QLinearConv" else []
    made = [ir.Node("", operator, [*operands, *rounded.quantize.inputs[1:], *bias], kept, name=node.name)]
    quantize = rounded.quantize
    made[0].outputs[0].shape = node.outputs[0].shape
    for step in rounded.between:
        rest = list(step.inputs[1:])
        if step.op_type in ("Relu", "Clip"):
            rest = _integer_bounds(model, step, quantize)
        kind = "Clip" if step.op_type == "Relu" else step.op_type
        made.append(ir.Node("", kind, [made[-1].outputs[0], *rest], list(step.attributes.values()), name=step.name))
        made[-1].outputs[0].shape = step.outputs[0].shape
    for step in made:
        step.outputs[0].dtype = quantize.inputs[2].const_value.dtype
    quantize.graph.insert_before(quantize, made)
    stand_in(quantize.outputs[0], made[-1].outputs[0])


def _integer_bounds(model: Any, clamp: Any, quantize: Any) -> list[Any]:
    """The bounds of a clamp as integers: rounding does not change the order of numbers."""
    scale, zero_point = (one.const_value.numpy().reshape(()) for one in quantize.inputs[1:])
    limits, bounds = np.iinfo(zero_point.dtype), [np.float32(0)]
    if clamp.op_type == "Clip":
        bounds = [None if one is None else one.const_value.numpy().reshape(()) for one in clamp.inputs[1:3]]

    def integer(bound: Any) -> Any:
        rounded = np.clip(np.rint(bound / scale) + np.float64(zero_point), limits.min, limits.max)
        return add_constant(model, np.array(rounded, dtype=zero_point.dtype))

    return [None if bound is None else integer(bound) for bound in bounds]
