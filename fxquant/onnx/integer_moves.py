"""Tensors of a file that are moved about as the integers they are.

    q → Dequantize → MaxPool → Quantize → …   →   q → MaxPool → …
    q → Dequantize → Reshape → Gemm           →   q → Reshape → Dequantize → Gemm

What only moves values, or takes the largest, does the same to integers on one grid as to what they stand for. For the
QOperator form; in QDQ, runtimes look for the pairs themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fxquant.onnx.repeated_roundings import have_same_grid

__all__ = ["add_constant", "is_per_tensor", "move_integers", "stand_in"]

_MOVES = (
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Slice", "Gather", "Expand", "Tile"),
    *("Split", "MaxPool"),
)
"""Operators that every runtime has for 8-bit integers, whose first input is the tensor."""


def move_integers(model: Any) -> None:
    """Take each operator in ``model`` (an ``onnx_ir.Model``) that moves dequantized values in front of the dequantizing."""
    from onnx_ir.passes import common

    for node in list(model.graph.all_nodes()):
        count = len(node.inputs) if node.op_type == "Concat" else 1 if node.op_type in (*_MOVES, "Pad") else 0
        sources = [None if value is None else value.producer() for value in node.inputs[:count]]
        if not sources or not all(_dequantizes(source) and have_same_grid(source, sources[0]) for source in sources):
            continue
        if node.op_type == "MaxPool" and len(node.outputs) > 1:
            continue
        rest = list(node.inputs[count:])
        if node.op_type == "Pad" and not _pads_integers(model, node, sources[0], rest):
            continue
        _move(node, sources, rest)
    common.RemoveUnusedNodesPass()(model)


def _move(node: Any, sources: list[Any], rest: list[Any]) -> None:
    """Put ``node`` on the integers that ``sources`` read, and dequantize what comes out, unless it is rounded at once."""
    import onnx_ir as ir

    integers = [source.inputs[0] for source in sources]
    moved = ir.Node(
        *("", node.op_type, [*integers, *rest], list(node.attributes.values())),
        num_outputs=len(node.outputs),
        name=node.name,
    )
    node.graph.insert_before(node, moved)
    for before, after in zip(list(node.outputs), moved.outputs, strict=True):
        after.shape, after.dtype = before.shape, sources[0].inputs[2].const_value.dtype
        grid = ir.Node("", "DequantizeLinear", [after, *sources[0].inputs[1:]])
        for reader in list(before.consumers()):
            if reader.op_type == "QuantizeLinear" and have_same_grid(grid, reader):
                stand_in(reader.outputs[0], after)
        node.graph.insert_before(node, grid)
        grid.name = None
        stand_in(before, grid.outputs[0])


def stand_in(before: Any, after: Any) -> None:
    """Use ``after`` wherever ``before`` is, under its name."""
    graph = before.producer().graph
    for i, output in enumerate(graph.outputs):
        if output is before:
            graph.outputs[i] = after
    after.shape, after.type = before.shape or after.shape, before.type or after.type
    before.replace_all_uses_with(after)
    after.name, before.name = before.name, None


def _dequantizes(node: Any) -> bool:
    return node is not None and node.op_type == "DequantizeLinear" and is_per_tensor(node)


def is_per_tensor(node: Any) -> bool:
    """Whether a DequantizeLinear or QuantizeLinear has one scale, known, and a zero point that says its 8-bit type."""
    if len(node.inputs) != 3 or any(value is None or value.const_value is None for value in node.inputs[1:]):
        return False
    scale, zero_point = (value.const_value for value in node.inputs[1:])
    return bool(scale.size == 1 and scale.numpy().dtype == np.float32 and zero_point.dtype.name in ("INT8", "UINT8"))


def _pads_integers(model: Any, node: Any, source: Any, rest: list[Any]) -> bool:
    """Whether ``node`` pads with a number on the grid of ``source``; put into ``rest`` as an integer then."""
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return True
    given = rest[1] if len(rest) > 1 else None
    if given is not None and given.const_value is None:
        return False
    value = np.float32(0) if given is None else given.const_value.numpy().reshape(()).astype(np.float32)
    scale, zero_point = (one.const_value.numpy().reshape(()) for one in source.inputs[1:])
    limits, integer = np.iinfo(zero_point.dtype), int(np.rint(value / scale)) + int(zero_point)
    if not limits.min <= integer <= limits.max or np.float32(integer - int(zero_point)) * scale != value:
        return False
    padding = add_constant(model, np.array(integer, dtype=zero_point.dtype))
    rest[1:] = [padding, *rest[2:]]
    return True


def add_constant(model: Any, content: np.ndarray, name: str = "") -> Any:
    """A new constant in ``model``, by default with any name that is free."""
    import onnx_ir as ir

    initializers = model.graph.initializers
    name = name or f"added_{len(initializers)}"
    while name in initializers:
        name += "_"
    tensor = ir.tensor(content, name=name)
    value = ir.Value(name=name, shape=ir.Shape(content.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value
