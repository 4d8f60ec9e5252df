"""Affine quantization: the map between real numbers and an integer grid.

    q = clamp(round(x / scale) + zero_point, qmin, qmax)          quantize
    x̂ = (q - zero_point) * scale                                  dequantize

``round`` is round-half-to-even and the division is a true division, as ONNX QuantizeLinear prescribes. Every other
module that rounds calls the functions of this file, so the rule stands once.
Source: Jacob et al., 1712.05877, eq. 1; ONNX operator QuantizeLinear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.scheme import Scheme

__all__ = ["broadcast", "dequantize", "in_float32", "quantize", "scale_and_zero_point", "smallest_scale"]


def smallest_scale(dtype: torch.dtype = torch.float32) -> float:
    """The smallest scale that is used: small enough for any real signal, large enough that ``1/scale`` stays finite."""
    return float(torch.finfo(dtype).tiny) * 2**16


def broadcast(per_channel: Tensor, ndim: int, axis: int | None) -> Tensor:
    """Shape a vector of per-channel numbers ``(C,)`` so that it broadcasts along ``axis`` of an ``ndim`` tensor."""
    if axis is None or per_channel.ndim == 0:
        return per_channel
    shape = [1] * ndim
    shape[axis] = -1
    return per_channel.reshape(shape)


def in_float32(x: Tensor) -> Tensor:
    """``x`` itself, or in float32 where it is in half precision, which holds neither scales nor the integers of a grid."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, *, axis: int | None = None) -> Tensor:
    """The integers of ``x``, in ``x``'s float dtype, at least float32 (cast them to the storage dtype you want).

    Args:
        x: real numbers, any shape.
        scale: one positive number, or ``(C,)`` for one per channel along ``axis``.
        zero_point: integers of the same shape as ``scale``.
        qmin, qmax: bounds of the grid.
        axis: the channel axis of ``x`` where scales are per channel.
    """
    scale, zero_point = broadcast(scale, x.ndim, axis), broadcast(zero_point, x.ndim, axis)
    return torch.clamp(torch.round(in_float32(x) / scale) + zero_point, qmin, qmax)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, *, axis: int | None = None) -> Tensor:
    """The real numbers that the integers ``q`` stand for, in ``scale``'s dtype."""
    scale, zero_point = broadcast(scale, q.ndim, axis), broadcast(zero_point, q.ndim, axis)
    return (q.to(scale.dtype) - zero_point) * scale


def scale_and_zero_point(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The finest grid of ``scheme`` that covers ``[low, high]`` and holds zero exactly.

    The range is first widened to contain zero, so that padding and ReLU stay exact. An empty or all-zero range gets
    scale 1, on which every value it has seen is exact.

    Args:
        low, high: range bounds, scalars or ``(C,)``; finite.
        scheme: the grid.

    Returns:
        scale (float32) and zero point (int32), of the shape of ``low``.

    Source: Krishnamoorthi, 1806.08342, §2; nudging as in 1712.05877, §3.1.
    """
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    qmin, qmax = scheme.qmin, scheme.qmax
    if scheme.symmetric:
        middle = 0 if scheme.signed else 2 ** (scheme.bits - 1)
        # The negative side has one level more than the positive one unless the range is narrow.
        scale = torch.maximum(high / (qmax - middle), -low / (middle - qmin))
        zero_point = torch.full_like(scale, float(middle))
    else:
        scale = high / (qmax - qmin) - low / (qmax - qmin)
        zero_point = torch.round(qmin - low / scale.clamp(min=smallest_scale())).clamp(qmin, qmax)
    empty = scale < smallest_scale()
    scale = torch.where(empty, torch.ones_like(scale), scale)
    if not scheme.symmetric:
        zero_point = torch.where(empty, torch.full_like(zero_point, float(qmin)), zero_point)
    return scale, zero_point.to(torch.int32)
