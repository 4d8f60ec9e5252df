"""Products of two tensors, or of a tensor and a number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import Refusal
from fxquant.kernels.native.lines import Lines, operand_zero_point, tabulated, tensors_of
from fxquant.kernels.native.operations import Operation, Product
from fxquant.kernels.native.weights import rescaling_of
from fxquant.kernels.place import Place, Step
from fxquant.kernels.quantized import (
    ATEN,
    FLOAT32,
    binary,
    have_same_shapes,
    on_quantized,
    rounded,
    taken_by,
    terms_of,
)
from fxquant.nn.accumulating import IntegerProduct
from fxquant.nn.form import Form, RealForm, TorchKernel, own_function, register_form

__all__ = ["product_step"]


def product_step(place: Place) -> Step:
    """A product: torch's own where shapes are equal, else in float32."""
    part, terms, given = place.part, terms_of(place), place.output_form()
    gain = float(torch.ldexp(part.multiplier.double(), part.shift - 31)) * float(part.sign) * given.scale
    for form in terms.values():
        gain /= form.scale
    takes = taken_by(place, *map(terms.get, range(len(place.node.args))))
    positions = list(terms)
    if len(terms) == 2 and abs(gain - 1) < 1e-6:
        if have_same_shapes(place):
            return Step(binary(place, place.operators.mul, given), given, ATEN, takes)
        run = rounded(place, lambda a, b: a.dequantize() * b.dequantize(), given)
        return Step(run, given, FLOAT32, takes)

    def product(*operands: Any) -> Tensor:
        y = operands[positions[0]].dequantize() * gain
        for index in positions[1:]:
            y = y * operands[index].dequantize()
        return y

    return Step(rounded(place, product, given), given, FLOAT32, takes)


def _product(lines: Lines, node: fx.Node, part: IntegerProduct) -> Operation:
    if len(tensors_of(node)) == 1:
        return tabulated(lines, node, part)
    if int(part.sign) < 0:
        raise Refusal("its factors have scales of different signs")
    lines.gives(node, part.output_dtype)
    zero_points = operand_zero_point(lines, node, part, 0), operand_zero_point(lines, node, part, 1)
    return Product(lines.operands(node.args), rescaling_of(part, 16, torch.tensor(255 * 255)), zero_points)


register_form(
    Form(
        arithmetic=IntegerProduct,
        real=RealForm(own_function, ("multiplier", "shift", "sign")),
        torch=TorchKernel(product_step, on_quantized),
        native=_product,
        operators=Refusal("the standard has no product of integers; it stays between Quantize and Dequantize"),
    )
)
