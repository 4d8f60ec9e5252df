"""Quantize and dequantize as operators of torch's own library, which ``torch.export`` keeps whole.

    fxquant::quantize                q = saturate(round(x / scale) + zero_point)      to the width and sign given
    fxquant::dequantize              x = (q - zero_point) * scale
    fxquant::dequantize_per_axis     x = q * scale along one axis, for weights and biases

They saturate to the bounds of the stored integer, as QuantizeLinear does; a narrower grid is the caller's clamp. Tensors
are stored in 8 or 16 bits: runtimes know 4 bits for weights only.
Source: ONNX operators QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.affine import broadcast

__all__ = ["dequantize_op", "dequantize_per_axis_op", "quantize_op", "stored_bits", "stored_bounds"]

_DTYPES = {
    (8, False): torch.uint8,
    (8, True): torch.int8,
    (16, False): torch.uint16,
    (16, True): torch.int16,
}


def stored_bits(bits: int) -> int:
    """The width that an integer of a tensor of ``bits`` bits is stored in."""
    return 8 if bits <= 8 else 16


def stored_bounds(bits: int, signed: bool) -> tuple[int, int]:
    """The smallest and largest integer of ``bits`` bits."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def _quantize(x: Tensor, scale: float, zero_point: int, bits: int, signed: bool) -> Tensor:
    return torch.clamp(torch.round(x / scale) + zero_point, *stored_bounds(bits, signed)).to(_DTYPES[bits, signed])


def _quantize_shape(x: Tensor, scale: float, zero_point: int, bits: int, signed: bool) -> Tensor:
    return torch.empty_like(x, dtype=_DTYPES[bits, signed])


def _dequantize(q: Tensor, scale: float, zero_point: int, bits: int, signed: bool) -> Tensor:
    return (q.float() - zero_point) * scale


def _dequantize_shape(q: Tensor, scale: float, zero_point: int, bits: int, signed: bool) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


def _dequantize_per_axis(q: Tensor, scale: Tensor, axis: int, bits: int) -> Tensor:
    return q.float() * broadcast(scale, q.ndim, axis)


def _dequantize_per_axis_shape(q: Tensor, scale: Tensor, axis: int, bits: int) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


quantize_op = torch.library.custom_op("fxquant::quantize", _quantize, mutates_args=())
quantize_op.register_fake(_quantize_shape)
dequantize_op = torch.library.custom_op("fxquant::dequantize", _dequantize, mutates_args=())
dequantize_op.register_fake(_dequantize_shape)
dequantize_per_axis_op = torch.library.custom_op("fxquant::dequantize_per_axis", _dequantize_per_axis, mutates_args=())
dequantize_per_axis_op.register_fake(_dequantize_per_axis_shape)
