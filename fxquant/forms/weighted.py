"""Convolutions and linear layers: integer weights and biases, one requantization.

A weight's scale, which an integer op does not keep, is its multiplier times the output's scale over the input's,

    s_w = M · s_y / s_x          M = Q · 2^(e - 31)

rounded to float32: the frozen weight's scale exactly where M has 31 bits (``rounding="double"`` and ``"float"``), and with
the odd 24 bits of ``"single"`` the scale that the integer model computes with, less than 1.5 · 2^-23 of itself from the
frozen one. Where the accumulator leaves as a float there is no M, but s_x · s_w in float32: within 2^-23.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from fxquant.errors import Refusal
from fxquant.kernels.native.lines import Lines, operand_zero_point
from fxquant.kernels.native.operations import Operation
from fxquant.kernels.native.weighted import Weighted
from fxquant.kernels.operators import Operators
from fxquant.kernels.quantized import REFERENCE
from fxquant.kernels.weighted import expected_engine, require_fit, require_scales, weighted_step
from fxquant.nn.accumulating import IntegerWeighted
from fxquant.nn.form import Computation, Form, HeldIntegers, RealForm, TorchKernel, register_form

__all__ = ["real_scales"]


def real_scales(part: IntegerWeighted, input_scale: float) -> tuple[Tensor, Tensor]:
    """The scales of a weighted op's weight, float32 and one per slice of its channel axis, and of its bias, s_x·s_w."""
    product = part.output_scale.double() if part.output_dtype is None else _multiplier(part) * float(part.scale)
    per_slice = product[: part.weight.shape[part.behaviour.out_axis]] if product.ndim else product
    return (per_slice / input_scale).float(), product


def _multiplier(part: IntegerWeighted) -> Tensor:
    """M, and where it is too small to have been kept, a number as small."""
    multiplier = torch.ldexp(part.multiplier.double(), part.shift - 31)
    return torch.where(part.multiplier == 0, torch.full_like(multiplier, 2.0**-33), multiplier)


def _computation(part: IntegerWeighted, input_scale: float) -> Computation:
    of_weight, of_bias = real_scales(part, input_scale)
    weight = HeldIntegers(part.weight, of_weight, part.behaviour.out_axis, part.weight_scheme)
    bias = None if part.bias is None else HeldIntegers(part.bias, of_bias, 0, None)
    made = Computation(parameters={"weight": weight, "bias": bias})
    return made if part.output_dtype is not None else replace(made, bounds=part.clamp, dtype=part.real_dtype)


def _native(lines: Lines, node: fx.Node, part: IntegerWeighted) -> Operation:
    if part.output_dtype is not None:
        lines.gives(node, part.output_dtype)
    elif part.real_dtype != torch.float32:
        raise Refusal(f"its result is {part.real_dtype}")
    if len(node.args) != 1 or node.kwargs:
        raise Refusal("it is called with more than its input")
    return Weighted(lines.operands(node.args), part, operand_zero_point(lines, node, part, 0), lines.library)


def _expected(part: IntegerWeighted, operators: Operators) -> str:
    try:
        require_fit(part)
        require_scales(part)
        return expected_engine(part, operators)
    except Refusal as refusal:
        return f"{REFERENCE}: {refusal.why}"


register_form(
    Form(
        arithmetic=IntegerWeighted,
        real=RealForm(_computation, ("weight", "bias", "multiplier", "shift", "output_scale", "in_float32")),
        torch=TorchKernel(weighted_step, _expected),
        native=_native,
        operators=("QLinearConv", "ConvInteger", "MatMulInteger"),
    )
)
