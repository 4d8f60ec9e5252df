"""Quantize and dequantize at the border of a graph's integer region."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import Refusal
from fxquant.kernels.native.lines import Lines
from fxquant.kernels.native.operations import BorderOperation, Operation
from fxquant.kernels.operators import Operators
from fxquant.kernels.place import Place, Step
from fxquant.kernels.quantized import ATEN, to_bytes
from fxquant.kernels.storage import Storage
from fxquant.nn.form import Computation, Form, RealForm, TorchKernel, register_form
from fxquant.nn.integer import Dequantize, Quantize

__all__ = ["dequantize_step", "quantize_step"]


def quantize_step(place: Place) -> Step:
    """Where data enters: rounding, in the order of memory that convolutions read."""
    part: Quantize = place.part
    if part.scheme.storage_dtype not in (torch.uint8, torch.int8):
        raise Refusal(f"its result is {part.scheme.storage_dtype}")
    shift = 128 * part.scheme.signed
    form = Storage(float(part.scale), int(part.zero_point) + shift)
    low, high = (float((q + shift - form.zero_point) * form.scale) for q in (part.scheme.qmin, part.scheme.qmax))
    whole = part.scheme.bits == 8 and not part.scheme.narrow_range

    def run(x: Tensor) -> Tensor:
        x = x.float()
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        q = to_bytes(x, form.scale, form.zero_point)
        return q if whole else torch.clamp(q, low, high)

    return Step(run, form, ATEN)


def dequantize_step(place: Place) -> Step:
    """Where data leaves, in the order of memory that the user's code expects."""
    source = place.node.args[0]
    found = place.integers(source)
    form = Storage(float(place.part.scale), int(place.part.zero_point) + 128 * found.signed)
    dtype = place.part.dtype

    def run(q: Tensor) -> Tensor:
        return q.dequantize().contiguous().to(dtype)

    assert isinstance(source, fx.Node)
    return Step(run, None, ATEN, {source: form})


def _quantize(lines: Lines, node: fx.Node, part: Quantize) -> Operation:
    scheme = part.scheme
    lines.gives(node, scheme.storage_dtype)
    shift = 128 * scheme.signed
    bounds = scheme.qmin + shift, scheme.qmax + shift
    return BorderOperation(
        lines.operands(node.args), "quantize", float(part.scale), int(part.zero_point) + shift, bounds
    )


def _dequantize(lines: Lines, node: fx.Node, part: Dequantize) -> Operation:
    if part.dtype != torch.float32:
        raise Refusal(f"its result is {part.dtype}")
    zero_point = int(part.zero_point) + 128 * lines.is_signed(node.args[0])
    return BorderOperation(lines.operands(node.args), "dequantize", float(part.scale), zero_point, (0, 255))


def _entered(part: Quantize, input_scale: float) -> Computation:
    return Computation(border="enter")


def _left(part: Dequantize, input_scale: float) -> Computation:
    return Computation(border="leave", dtype=part.dtype)


def _expected(part: Any, operators: Operators) -> str:
    return ATEN


register_form(
    Form(
        arithmetic=Quantize,
        real=RealForm(_entered),
        torch=TorchKernel(quantize_step, _expected),
        native=_quantize,
        operators=("QuantizeLinear",),
    )
)
register_form(
    Form(
        arithmetic=Dequantize,
        real=RealForm(_left),
        torch=TorchKernel(dequantize_step, _expected),
        native=_dequantize,
        operators=("DequantizeLinear",),
    )
)
