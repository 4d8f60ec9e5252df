"""What forms without weights share on torch: its operators on quantized tensors, or float32 between exact conversions.

Integers of a byte are exact in float32, and so is what a form says that they stand for up to one rounding. A function
evaluated there and quantized once differs from the reference only where a result lies within about 1e-6 steps of half way
between two integers. A table is compared with the reference's, entry by entry, when it is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import Refusal
from fxquant.kernels.operators import Operators
from fxquant.kernels.place import Place, clamped
from fxquant.kernels.storage import Storage, convert

__all__ = [
    "ATEN",
    "FLOAT32",
    "REFERENCE",
    "binary",
    "have_same_shapes",
    "in_float32",
    "on_quantized",
    "rounded",
    "taken_by",
    "terms_of",
    "to_bytes",
]

FLOAT32 = "float32 inside"
ATEN = "quantized"
REFERENCE = "reference"


def in_float32(part: Any, operators: Operators) -> str:
    """The kernel's name where a form is computed in float32."""
    return FLOAT32


def on_quantized(part: Any, operators: Operators) -> str:
    """The kernel's name where torch's operators on quantized tensors compute a form."""
    return ATEN


def to_bytes(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """float32 ``x`` rounded to unsigned bytes.

    With a zero point above 127 torch gives 0 from 2³¹ steps on, infinity included, in the place of 255.
    """
    if zero_point > 127:
        x = x.clamp(max=2.0**30 * scale)
    return torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)


def rounded(place: Place, function: Callable[..., Tensor], given: Storage, scale: float | None = None) -> Any:
    """``function``, whose real result is rounded to the grid of the result; ``scale`` is its unit where not the grid's."""
    unit, zero_point = given.scale if scale is None else scale, given.zero_point

    def run(*args: Any, **kwargs: Any) -> Tensor:
        y = to_bytes(function(*args, **kwargs), unit, zero_point)
        return y if unit == given.scale else convert(y, given, False)

    return clamped(place.part, given, run)


def taken_by(place: Place, *forms: Storage | None) -> dict[fx.Node, Storage | None]:
    """The form of each operand that is a node.

    Raises:
        Refusal: one tensor comes twice, and would be read by two scales.
    """
    pairs = [(node, form) for node, form in zip(place.node.args, forms, strict=False) if isinstance(node, fx.Node)]
    if len({node for node, _ in pairs}) != len(pairs) and len({form for _, form in pairs}) > 1:
        raise Refusal("one tensor comes twice, and would be read by two scales")
    return {node: form for node, form in pairs if form is not None}


def terms_of(place: Place) -> dict[int, Storage]:
    """The form of every operand that is a tensor, by its position.

    Raises:
        Refusal: one of them holds no bytes, or there is none.
    """
    forms = {i: place.input_form(i) for i, value in enumerate(place.node.args) if isinstance(value, fx.Node)}
    if not forms:
        raise Refusal("no operand is a tensor")
    return forms


def have_same_shapes(place: Place) -> bool:
    """Whether all operands have one shape."""
    return len({place.known[node].sample.shape for node in place.node.args if isinstance(node, fx.Node)}) == 1


def binary(place: Place, operator: Callable[..., Tensor], given: Storage) -> Callable[..., Tensor]:
    """torch's operator on two quantized tensors."""
    scale, zero_point = given
    return clamped(place.part, given, lambda a, b, **_: operator(a, b, scale, zero_point))
