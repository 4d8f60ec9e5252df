"""Which kernel computes an integer form: by its class, as the ops table builds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fxquant.kernels.elementwise import (
    FLOAT32,
    dequantize_step,
    evaluate_step,
    linear_map_step,
    matmul_step,
    passing_step,
    product_step,
    quantize_step,
    sum_step,
    table_step,
)
from fxquant.kernels.operators import operators
from fxquant.kernels.place import Place, Step
from fxquant.kernels.weighted import expected_engine, unfit, weighted_step
from fxquant.nn.accumulating import IntegerMatmul, IntegerProduct, IntegerSum, IntegerWeighted
from fxquant.nn.integer import (
    Dequantize,
    IntegerEvaluate,
    IntegerLinearMap,
    IntegerOp,
    IntegerPass,
    IntegerTable,
    Quantize,
)

__all__ = ["REFERENCE", "STEPS", "expected_kernel"]

REFERENCE = "reference"

STEPS: dict[type[nn.Module], Callable[[Place], Step | None]] = {
    Quantize: quantize_step,
    Dequantize: dequantize_step,
    IntegerWeighted: weighted_step,
    IntegerTable: table_step,
    IntegerSum: sum_step,
    IntegerProduct: product_step,
    IntegerMatmul: matmul_step,
    IntegerLinearMap: linear_map_step,
    IntegerEvaluate: evaluate_step,
    IntegerPass: passing_step,
}
"""From an integer form to its fast one; a form of another class, or a place that gets None, runs as it is."""


def expected_kernel(part: Any) -> str:
    """The kernel of an integer form before it has run: what it asks for, where shapes and machine allow it."""
    found = operators()
    if found is None or not isinstance(part, IntegerOp) or type(part) not in STEPS:
        return REFERENCE
    if isinstance(part, IntegerWeighted):
        reason, engine = unfit(part), expected_engine(part, found)
        if reason is None and engine is None:
            reason = "sums of its products could overflow 16 bits on this machine"
        return str(engine) if reason is None else f"{REFERENCE}: {reason}"
    if isinstance(part, IntegerPass):
        return "quantized" if getattr(part.entry, "quantized", False) else REFERENCE
    return (
        FLOAT32 if isinstance(part, (IntegerTable, IntegerLinearMap, IntegerEvaluate, IntegerMatmul)) else "quantized"
    )
