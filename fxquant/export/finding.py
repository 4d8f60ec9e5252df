"""A runtime that gives other results than the integer model, in words: what went wrong in it, and what to do."""

from __future__ import annotations

from typing import Any

from fxquant import processor
from fxquant.capture.islands import graphs_of
from fxquant.export.agreement import GOOD_SQNR
from fxquant.kernels.audit import audit
from fxquant.nn.integer import Quantize, multiplies

__all__ = ["finding"]

_SHOWN = 4


def finding(title: str, sqnr: float, int8: Any, least: float, *, outside: str | None = None) -> str | None:
    """What to say of a runtime whose outputs agree to ``sqnr`` decibels with those of ``int8``; None where that is good.

    Args:
        title: the runtime.
        sqnr: the least of its outputs, see ``agreement.together``.
        int8: the converted model, whose numbers tell whether sums of two products can leave 16 bits.
        least: what one more rounding of each tensor leaves, see ``tolerance.least_sqnr``.
        outside: for a runtime whose kernels add products in 32 bits on every processor (XNNPACK), what it computes outside
            of these.
    """
    if sqnr >= GOOD_SQNR:
        return None
    if sqnr >= least:
        return (
            f"{title} agrees with the integer model to {sqnr:.1f} dB, which is within one more rounding of each tensor: in "
            f"this network, on these inputs, that leaves {least:.1f} dB"
        )
    said = f"{title} agrees with the integer model to {sqnr:.1f} dB only"
    if outside is not None:
        where = (
            f"what computes outside of its integer kernels ({outside})" if outside else "its own roundings or operators"
        )
        return (
            f"{said}: {where} may be why. What to do: export the parts of the model one by one to find the one that "
            "differs, and leave that one in float by a recipe"
        )
    layers = [layer for layer in audit(graphs_of(int8).values()).layers if layer.pairs_saturate]
    products = _signed_products(int8)
    if processor.adds_pairs_in_16_bits() and products and not layers:
        return (
            f"{said}: this processor (x86 without VNNI) adds two products in 16 bits, and can saturate in products of "
            f"signed tensors ({', '.join(products[:_SHOWN])}). What to do: give these unsigned activations"
        )
    if not processor.adds_pairs_in_16_bits() or not layers:
        why = "no weights here make them leave 16 bits" if not layers else "this processor adds products in 32 bits"
        own = "its own roundings or operators do; export_onnx(..., verify='nodes') shows where it begins"
        return f"{said}; saturated sums of two products do not explain it ({why}), {own}"
    paths = ", ".join(layer.path for layer in layers[:_SHOWN])
    more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
    where = f"this processor (x86 without VNNI) adds two products in 16 bits, and can saturate in {paths}{more}"
    if all(layer.limited for layer in layers):
        return (
            f"{said}; {where} where inputs reach beyond those of calibration. What to do: calibrate on data that reaches "
            "as far; if it does, the runtime's own roundings or operators explain it"
        )
    return f"{said}: {where}. What to do: prepare(..., processor='any'), or weights of 7 bits"


def _signed_products(int8: Any) -> list[str]:
    """Products of two tensors where integers enter signed; OpenVINO 2026.4 saturates there, ONNX Runtime does not."""
    parts = dict(int8.named_modules())
    if not any(isinstance(part, Quantize) and part.scheme.signed for part in parts.values()):
        return []
    return [path for path, part in parts.items() if multiplies(part) == "tensors"]
