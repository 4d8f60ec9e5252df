"""What a file need not say: attributes at their defaults, zero points of weights, and the same constant twice.

    Conv(x, w, group=1, dilations=[1, 1], kernel_shape=[3, 3])   →   Conv(x, w, kernel_shape=[3, 3])
    DequantizeLinear(q, scale, [0, 0, …], axis=0)                →   DequantizeLinear(q, scale, axis=0)

A missing zero point is zero, of the type of the integers. Those of products stay: ONNX Runtime 1.31 computes a Gemm in float
where the weight's zero point is missing (its QGemm wants one per channel), and a convolution in integers all the same.
Source: ONNX operators DequantizeLinear, Conv, MaxPool.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

__all__ = ["drop_copies", "drop_defaults", "drop_zero_points"]

_DEFAULT_ELEMENT = {"dilations": 1, "strides": 1, "pads": 0, "output_padding": 0}
"""Of lists with an entry per axis, whose defaults the standard states in words."""
_WINDOWS = ("Conv", "ConvTranspose", "QLinearConv", "ConvInteger", "MaxPool", "AveragePool", "LpPool")
_SUMS_WITHOUT_ZERO_POINTS = ("Conv", "ConvTranspose")


def drop_defaults(model: Any) -> None:
    """Drop each attribute in ``model`` (an ``onnx_ir.Model``) that has its default value."""
    import onnx

    version = model.opset_imports.get("", 0)
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx"):
            continue
        known = onnx.defs.get_schema(node.op_type, version, "").attributes
        for name, attribute in list(node.attributes.items()):
            if name in known and not attribute.is_ref() and _is_default(node, attribute, known[name].default_value):
                del node.attributes[name]


def _is_default(node: Any, attribute: Any, default: Any) -> bool:
    import onnx

    if default.type != onnx.AttributeProto.UNDEFINED:
        stated = onnx.helper.get_attribute_value(default)
        stated = stated.decode() if isinstance(stated, bytes) else stated
        return bool(default.type == attribute.type.value and attribute.value == stated)
    element = _DEFAULT_ELEMENT.get(attribute.name) if node.op_type in _WINDOWS else None
    return element is not None and all(number == element for number in attribute.value)


def drop_zero_points(model: Any) -> None:
    """Drop the zero points in ``model`` that are zero, of constants that nothing but convolutions read."""
    for node in model.graph.all_nodes():
        if node.op_type != "DequantizeLinear" or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        stored, zero_point = node.inputs[0], node.inputs[2].const_value
        if stored.const_value is None or zero_point is None or np.any(zero_point.numpy()):
            continue
        readers = [reader.op_type for reader in node.outputs[0].consumers()]
        if readers and all(reader in _SUMS_WITHOUT_ZERO_POINTS for reader in readers):
            node.resize_inputs(2)


def drop_copies(model: Any) -> None:
    """Keep one of the constants in a graph of ``model`` that have the same type, shape and numbers."""
    for graph in model.graphs():
        fixed, first = {id(value) for value in (*graph.inputs, *graph.outputs)}, dict[Any, Any]()
        for name, value in list(graph.initializers.items()):
            held = value.const_value
            if held is None or id(value) in fixed or held.dtype.name == "STRING":
                continue
            kept = first.setdefault((held.dtype, tuple(held.shape), hashlib.sha256(held.tobytes()).digest()), value)
            if kept is not value:
                value.replace_all_uses_with(kept)
                del graph.initializers[name]
