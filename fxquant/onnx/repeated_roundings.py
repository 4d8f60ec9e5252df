"""Roundings in a file that round what lies on their grid already.

    Quantize(s, z) → Dequantize(s, z) → Quantize(s, z) → Dequantize(s, z)   →   Quantize(s, z) → Dequantize(s, z)

They come from ops that move nothing (a crop to the full size, a ``contiguous``). ``Q(D(q)) = q`` exactly: ``(q - z)·s/s``
is off by less than 2^-6 for 16 bits in float32. Runtimes need not find that out: OpenVINO 2026.4 ends its process when it
compiles such a pair behind a ``roll`` (swin_t).
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["drop_repeated_roundings", "have_same_grid"]


def drop_repeated_roundings(model: Any) -> None:
    """Drop each Quantize in ``model`` (an ``onnx_ir.Model``) whose input is dequantized from the same grid."""
    from onnx_ir.passes import common

    dropped = False
    for node in list(model.graph.all_nodes()):
        before = node.inputs[0].producer() if node.op_type == "QuantizeLinear" else None
        if before is not None and before.op_type == "DequantizeLinear" and have_same_grid(before, node):
            node.outputs[0].replace_all_uses_with(before.inputs[0])
            dropped = True
    if dropped:
        common.RemoveUnusedNodesPass()(model)


def have_same_grid(one: Any, other: Any) -> bool:
    """Whether two nodes, each a Quantize or Dequantize, have one scale and zero point, of the same values and types."""
    ours, theirs = one.inputs[1:], other.inputs[1:]
    if len(ours) != 2 or len(theirs) != 2 or any(value is None or value.const_value is None for value in ours + theirs):
        return False
    pairs = [(a.const_value, b.const_value) for a, b in zip(ours, theirs, strict=True)]
    return all(a.dtype == b.dtype and a.size == 1 and np.array_equal(a.numpy(), b.numpy()) for a, b in pairs)
