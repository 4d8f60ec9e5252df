"""The batch size in a file: as few operators as can be read it, and none reads it off a tensor's first axis.

    Reshape(y, Concat(Shape(x)[0:1], 2, 24, H, W))   →   Reshape(y, Concat(0, 2, 24, H, W))
    Shape(x)[0:1]                                    →   Size(x) / (3 · H · W)

A Reshape copies a first axis that stays as it is. What else wants the batch size (the Expand of a class token) counts rows.
Both say the same in other words, for the sake of one runtime: OpenVINO 2026.4 redirects each read of a first axis to the
first convolution of the same batch, and computes a convolution with such a second reader wrongly where a bias and a
rounding follow it (its bias is lost; measured: 17 instead of 22 dB in vit_b_32, 14 instead of 32 in shufflenet_v2_x0_5).
Source: ONNX operator Reshape (a 0 in the target copies the size of that axis).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["copy_batch_size", "count_rows"]


def copy_batch_size(model: Any) -> None:
    """Write 0 for the first size of each Reshape in ``model`` (an ``onnx_ir.Model``) that keeps a free first axis."""
    from onnx_ir.passes import common

    targets: dict[Any, Any] = {}
    for node in list(model.graph.all_nodes()):
        if node.op_type == "Reshape" and _keeps_first_axis(node):
            target = node.inputs[1]
            if target not in targets:
                targets[target] = _joined(target.producer(), _constant(model, "same_size", 0))
            node.replace_input_with(1, targets[target])
            node.attributes.pop("allowzero", None)
    if targets:
        common.RemoveUnusedNodesPass()(model)


def count_rows(model: Any) -> None:
    """Count the rows of an input of ``model`` where its batch size is read, if a convolution is in the file."""
    if not any(node.op_type == "Conv" for node in model.graph.all_nodes()):
        return
    for node in list(model.graph):
        if node.op_type == "Shape" and node.inputs[0] in model.graph.inputs and _bounds(node) == (0, 1):
            counted = _counted(model, node)
            node.outputs[0].replace_all_uses_with(counted)
            model.graph.remove(node)


def _counted(model: Any, shape: Any) -> Any:
    """How many rows the tensor has that ``shape`` reads, computed in front of it: elements over elements of a row."""
    import onnx_ir as ir

    (x,) = shape.inputs
    size = ir.Node("", "Size", [x])
    fixed = math.prod(length for length in x.shape[1:] if isinstance(length, int))
    nodes, row = [size], _constant(model, f"row_of_{fixed}", max(1, fixed))
    for axis, length in enumerate(x.shape[1:], 1):
        if not isinstance(length, int):
            read = ir.Node("", "Shape", [x], [ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)])
            some = ir.Node("", "Max", [read.outputs[0], _constant(model, "row_of_1", 1)])  # none cannot divide
            product = ir.Node("", "Mul", [row, some.outputs[0]])
            nodes += [read, some, product]
            row = product.outputs[0]
    rows = ir.Node("", "Div", [size.outputs[0], row])
    rows.outputs[0].shape, rows.outputs[0].type = shape.outputs[0].shape, shape.outputs[0].type
    model.graph.insert_before(shape, [*nodes, rows])
    return rows.outputs[0]


def _bounds(shape: Any) -> tuple[int | None, int | None]:
    start, end = shape.attributes.get("start"), shape.attributes.get("end")
    return (0 if start is None else start.as_int()), (None if end is None else end.as_int())


def _keeps_first_axis(reshape: Any) -> bool:
    """Whether the first axis has the same free size before and after, and the target says so in a number of its own."""
    data, target = reshape.inputs
    made, concat = reshape.outputs[0], target.producer()
    if not data.shape or not made.shape or concat is None or concat.op_type != "Concat":
        return False
    before, after, first = data.shape[0], made.shape[0], concat.inputs[0]
    is_single = first.shape is not None and list(first.shape) == [1] and first.const_value is None
    return is_single and not isinstance(before, int) and before.value is not None and before == after


def _joined(concat: Any, first: Any) -> Any:
    """What ``concat`` joins, with ``first`` in place of its first number."""
    import onnx_ir as ir

    joined = ir.Node("", "Concat", [first, *concat.inputs[1:]], [ir.AttrInt64("axis", 0)])
    concat.graph.insert_before(concat, joined)
    joined.outputs[0].shape, joined.outputs[0].type = concat.outputs[0].shape, concat.outputs[0].type
    return joined.outputs[0]


def _constant(model: Any, name: str, number: int) -> Any:
    """The constant of that name, made where it is not there yet."""
    import onnx_ir as ir

    if name not in model.graph.initializers:
        content = ir.tensor(np.array([number], dtype=np.int64), name=name)
        model.graph.register_initializer(ir.Value(name=name, const_value=content))
    return model.graph.initializers[name]
