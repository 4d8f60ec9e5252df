"""The entry of all readings of shapes and types, see ``capture.measuring``."""

from __future__ import annotations

from fxquant.behaviour import Measuring
from fxquant.ops.entry import OpEntry
from fxquant.ops.example import example

__all__ = ["MEASURING"]

MEASURING = OpEntry(
    name="measure",
    function=getattr,
    signature="input*, attribute",
    behaviour=Measuring(),
    onnx="Shape",
    example=example(lambda x: x.reshape(x.shape[0], x.size(1) * 2, -1), (2, 3, 4), behind_op=True),
)
"""Any reading of a shape or type, and arithmetic on such readings."""
