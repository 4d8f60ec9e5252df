"""Constants with one scale per head behind a MatMul, written with one per row: the numbers stay.

    Mul(D(Q(MatMul(a, b))), D(c))     c: [heads, 1, 1]   →   c: [heads, rows, 1]

OpenVINO 2026.4 takes a constant that varies along one axis for a part of the rounding behind it, and moves it into the
MatMul, which knows such factors for the last axis only: it refuses files for fixed sizes ("any_of(scale.size(), OC, 1U)"),
and for free ones gives outputs of no rows (Swin v2).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fxquant.onnx.integer_moves import add_constant

__all__ = ["spread_over_rows"]


def spread_over_rows(model: Any) -> None:
    """Repeat each constant of integers in ``model`` (an ``onnx_ir.Model``) that multiplies a MatMul along one axis."""
    from onnx_ir.passes import common

    spread = False
    for node in list(model.graph):
        if node.op_type != "Mul":
            continue
        for index, (factor, product) in enumerate((node.inputs, reversed(node.inputs))):
            if _is_stored(factor) and _comes_from_a_matmul(product):
                spread |= _spread(model, node, index, product.shape)
    if spread:
        common.RemoveUnusedNodesPass()(model)


def _spread(model: Any, node: Any, index: int, shape: Any) -> bool:
    """Let ``node`` read its constant factor with one axis more of the product's ``shape``, where that size is fixed."""
    import onnx_ir as ir

    dequantize = node.inputs[index].producer()
    stored = dequantize.inputs[0]
    numbers = stored.const_value.numpy()
    varied = [axis - numbers.ndim for axis, size in enumerate(numbers.shape) if size > 1]
    if len(varied) != 1 or varied[0] == -1 or shape is None or len(shape) < numbers.ndim:
        return False
    axis = -2 if varied[0] != -2 else -1
    if not isinstance(shape[axis], int) or shape[axis] == 1:
        return False
    wanted = list(numbers.shape)
    wanted[axis] = shape[axis]
    name = f"{stored.name}:{'x'.join(map(str, wanted))}"
    if name not in model.graph.initializers:
        add_constant(model, np.ascontiguousarray(np.broadcast_to(numbers, wanted)), name)
    made = ir.Node("", "DequantizeLinear", [model.graph.initializers[name], *dequantize.inputs[1:]])
    made.outputs[0].shape, made.outputs[0].type = ir.Shape(wanted), node.inputs[index].type
    node.graph.insert_before(node, made)
    node.replace_input_with(index, made.outputs[0])
    return True


def _is_stored(value: Any) -> bool:
    """Whether ``value`` is dequantized from a constant, by one scale."""
    made_by = value.producer()
    if made_by is None or made_by.op_type != "DequantizeLinear":
        return False
    scale = made_by.inputs[1].const_value
    return made_by.inputs[0].const_value is not None and scale is not None and scale.size == 1


def _comes_from_a_matmul(value: Any) -> bool:
    made_by = value.producer()
    while made_by is not None and made_by.op_type in ("QuantizeLinear", "DequantizeLinear"):
        made_by = made_by.inputs[0].producer()
    return made_by is not None and made_by.op_type == "MatMul"
