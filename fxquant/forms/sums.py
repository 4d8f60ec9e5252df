"""Weighted sums of tensors and numbers, with one rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import Refusal
from fxquant.kernels.native.lines import Lines, operand_zero_point, tabulated, tensors_of
from fxquant.kernels.native.operations import Add, Operation
from fxquant.kernels.native.weights import addition
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
from fxquant.nn.accumulating import IntegerSum
from fxquant.nn.form import Form, RealForm, TorchKernel, own_function, register_form

__all__ = ["sum_step"]


def sum_step(place: Place) -> Step:
    """A weighted sum: torch's addition where the weights are 1 and the shapes equal, else in float32."""
    part, terms, given = place.part, terms_of(place), place.output_form()
    if len(part.multipliers) != len(terms) + 1:
        raise Refusal("it has fewer terms than its form")
    reals = torch.ldexp(part.multipliers.double(), part.shift - 31) * given.scale
    gains = [float(real) / form.scale for real, form in zip(reals, terms.values(), strict=False)]
    constant = float(reals[-1])
    takes = taken_by(place, *map(terms.get, range(len(place.node.args))))
    ratios = reals[:-1] / given.scale
    if float(ratios.abs().sum()) > _FINEST:
        raise Refusal("its result has so many steps to one of its operands' that float32 is not exact")
    ties = part.rounding != "float" and _meets_ties(ratios)
    plain = len(terms) == 2 and constant == 0.0 and not ties and all(abs(gain - 1) < 1e-6 for gain in gains)
    if plain and have_same_shapes(place):
        return Step(binary(place, place.operators.add, given), given, ATEN, takes)
    if ties:
        constant += _UP * given.scale
    positions = list(terms)

    def total(*operands: Any) -> Tensor:
        y = operands[positions[0]].dequantize() * gains[0]
        for index, gain in zip(positions[1:], gains[1:], strict=True):
            y = torch.add(y, operands[index].dequantize(), alpha=gain)
        return y + constant if constant else y

    return Step(rounded(place, lambda *operands, **_: total(*operands), given), given, FLOAT32, takes)


_PARTS = 16
"""Operands' steps in such parts of a result's: results lie on a tie, or a sixteenth of a step from the next one at least."""
_UP = 1 / 32
"""What takes a tie up, and leaves alone what is no tie, where float32 errs by less than a sixty-fourth of a step."""
_FINEST = 512.0
"""With 255 such steps float32's last digit is a sixty-fourth of a step of the result."""


def _meets_ties(ratios: Tensor) -> bool:
    """Whether results often lie half way between two integers: where steps of operands are halves or quarters of a result's.

    There torch rounds to even, and the reference up, as kernels in integers do (but for ``rounding="float"``): a step apart
    on a quarter of all values.
    """
    parts = ratios * _PARTS
    dyadic = bool(((parts - parts.round()).abs() < 1e-6).all())
    return dyadic and bool(((ratios - ratios.round()).abs() > 1e-6).any())


def _sum(lines: Lines, node: fx.Node, part: IntegerSum) -> Operation:
    if len(tensors_of(node)) == 1:
        return tabulated(lines, node, part)
    lines.gives(node, part.output_dtype)
    zero_points = operand_zero_point(lines, node, part, 0), operand_zero_point(lines, node, part, 1)
    return Add(lines.operands(node.args), addition(part, zero_points))


register_form(
    Form(
        arithmetic=IntegerSum,
        real=RealForm(own_function, ("multipliers", "shift")),
        torch=TorchKernel(sum_step, on_quantized),
        native=_sum,
        operators=Refusal("the standard has no sum of integers; it stays between Quantize and Dequantize"),
    )
)
