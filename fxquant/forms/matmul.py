"""Products of two quantized matrices, accumulated exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.errors import Refusal
from fxquant.kernels.place import Place, Step
from fxquant.kernels.quantized import FLOAT32, in_float32, rounded, taken_by
from fxquant.kernels.storage import Storage
from fxquant.nn.accumulating import IntegerMatmul
from fxquant.nn.form import Form, RealForm, TorchKernel, own_function, register_form

__all__ = ["matmul_step"]


def matmul_step(place: Place) -> Step:
    """A product of two matrices of integers, exact in float32 while its sums stay below 2^24."""
    part, given = place.part, place.output_form()
    forms = place.input_form(0), place.input_form(1)
    whole = [Storage(1.0, form.zero_point) for form in forms]
    unit = float(torch.ldexp(part.multiplier.double(), part.shift - 31))
    if unit <= 0:
        raise Refusal("its multiplier vanishes")

    def product(a: Tensor, b: Tensor, **dynamic: Any) -> Tensor:
        return part.entry.function(a.dequantize(), b.dequantize(), **part.attributes, **dynamic)

    return Step(rounded(place, product, given, 1.0 / unit), given, FLOAT32, taken_by(place, *whole))


register_form(
    Form(
        arithmetic=IntegerMatmul,
        real=RealForm(own_function, ("multiplier", "shift")),
        torch=TorchKernel(matmul_step, in_float32),
        native=Refusal("a product of two tensors that are not known before is not written natively"),
        operators=("QLinearMatMul",),
    )
)
