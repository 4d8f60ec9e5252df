"""Which files OpenVINO may be asked to compile for fixed sizes.

Its code for fixed sizes is faster, and two things in a file keep it from being made (OpenVINO 2026.4):

    Concat → … → Quantize → Dequantize → … → Quantize             ends the process, see ``concat_inputs``
    Quantize(what follows from sizes alone) → Dequantize → Add    is refused: an Add of a constant with a scale (BERT)

The first where it removes what is between, or makes it a part of the rounding behind: a factor, a batch norm, a Relu in
front of a grid that ends at zero, a Reshape to the same shape. Nothing can be caught there, so whatever computes from one
tensor counts, but for what it was seen to keep. Where a rounding reads the Concat itself, ``round_before_joining`` has put
it elsewhere.
"""

from __future__ import annotations

from typing import Any

__all__ = ["takes_fixed_sizes"]

_KEPT = (
    *("QuantizeLinear", "DequantizeLinear", "Conv", "ConvTranspose", "Gemm", "MatMul", "LayerNormalization", "Softmax"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "Sigmoid", "HardSwish", "Erf"),
)
"""Operators that OpenVINO neither removes nor makes a part of a rounding beside them."""
_TAKE_TWO = ("Add", "Sub", "Mul", "Div")
_SIZES = ("Shape", "Size")
"""Operators whose result is constant once sizes are fixed."""


def takes_fixed_sizes(model: Any) -> bool:
    """Whether OpenVINO may compile ``model`` (an ``onnx_ir.Model``) for fixed sizes."""
    moving = _followers(model, _SIZES)
    sized = _followers(model) - moving
    for node in model.graph.all_nodes():
        if node.op_type != "QuantizeLinear":
            continue
        if node.inputs[0] in sized and any(reader.op_type in _TAKE_TWO for reader in _readers(node)):
            return False
        if node.inputs[0] in moving and _reads_a_concat(node.inputs[0], moving) and _is_rounded_again(node, moving):
            return False
    return True


def _followers(model: Any, ends: tuple[str, ...] = ()) -> set[Any]:
    """The tensors that follow from the inputs, not counting what ``ends`` make of them."""
    found = set(model.graph.inputs)
    for node in model.graph.all_nodes():
        if node.op_type not in ends and any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def _readers(quantize: Any) -> list[Any]:
    """What reads the numbers that ``quantize`` rounds."""
    return [reader for node in quantize.outputs[0].consumers() for reader in node.outputs[0].consumers()]


def _is_rounded_again(quantize: Any, moving: set[Any]) -> bool:
    """Whether another rounding follows, behind operators on one tensor that may become a part of it."""
    left = _readers(quantize)
    while left:
        node = left.pop()
        if node.op_type == "QuantizeLinear":
            return True
        if node.op_type not in _KEPT and sum(value in moving for value in node.inputs) == 1:
            left += [reader for value in node.outputs for reader in value.consumers()]
    return False


def _reads_a_concat(value: Any, moving: set[Any]) -> bool:
    """Whether ``value`` comes from a Concat through operators on one tensor that may be removed."""
    node = value.producer()
    while node is not None and node.op_type not in _KEPT:
        if node.op_type == "Concat":
            return True
        sources = [given for given in node.inputs if given in moving]
        if len(sources) != 1:
            return False
        node = sources[0].producer()
    return False
