"""Roundings of what a Concat joins, in front of it: for OpenVINO.

    Dequantize(Quantize(Concat(a, b)))         →   Concat(Dequantize(Quantize(a)), Dequantize(Quantize(b)))
    Dequantize(Quantize(Relu(Concat(a, b))))   →   Concat(Dequantize(Quantize(Relu(a))), Dequantize(Quantize(Relu(b))))

Rounding looks at one number at a time, so no number changes; and what lies on the grid already is not rounded again.

OpenVINO 2026.4 does the same (``MoveFakeQuantize``), and ends the process where nothing is left of the Dequantize but its
conversion: the factor and the zero point were moved into a Quantize behind it, as with a batch norm between the two
(densenet121) or another grid. It looks for the factor and reads a node that is not there. What reads no Concat it leaves.
"""

from __future__ import annotations

from typing import Any

from fxquant.onnx.integer_moves import stand_in
from fxquant.onnx.repeated_roundings import have_same_grid

__all__ = ["round_before_joining"]


def round_before_joining(model: Any) -> bool:
    """Move each Quantize in ``model`` (an ``onnx_ir.Model``) that reads a Concat, with its Dequantize, to what is joined.

    Returns:
        Whether there was one.
    """
    from onnx_ir.passes import common

    moved = False
    for node in list(model.graph.all_nodes()):
        if node.op_type == "QuantizeLinear":
            moved |= _move(node)
    if moved:
        common.RemoveUnusedNodesPass()(model)
    return moved


def _move(quantize: Any) -> bool:
    """Let what reads ``quantize`` read a Concat of rounded tensors, where it reads a Concat itself."""
    import onnx_ir as ir

    relu, concat = None, quantize.inputs[0].producer()
    if concat is not None and concat.op_type == "Relu":
        relu, concat = concat, concat.inputs[0].producer()
    integers = quantize.outputs[0]
    readers = list(integers.consumers())
    is_concat = concat is not None and concat.op_type == "Concat"
    is_rounded = all(node.op_type == "DequantizeLinear" and have_same_grid(quantize, node) for node in readers)
    if not is_concat or not is_rounded or integers.is_graph_output():
        return False
    parts = [_rounded(part, relu, quantize) for part in concat.inputs]
    joined = ir.Node("", "Concat", parts, list(concat.attributes.values()), name=concat.name)
    quantize.graph.insert_before(quantize, joined)
    for reader in readers:
        stand_in(reader.outputs[0], joined.outputs[0])
    return True


def _rounded(part: Any, relu: Any, quantize: Any) -> Any:
    """``part`` behind its own ``relu``, if there is one, on the grid of ``quantize``."""
    import onnx_ir as ir

    def put(kind: str, *inputs: Any) -> Any:
        made = ir.Node("", kind, inputs)
        quantize.graph.insert_before(quantize, made)
        return made.outputs[0]

    made_by = part.producer()
    lies_there = made_by is not None and made_by.op_type == "DequantizeLinear" and have_same_grid(made_by, quantize)
    if relu is None and lies_there:
        return part
    x = part if relu is None else put("Relu", part)
    grid = quantize.inputs[1:]
    return put("DequantizeLinear", put("QuantizeLinear", x, *grid), *grid)
