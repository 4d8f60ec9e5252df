"""Fake quantization: the affine map forward, a clipped straight-through estimate backward.

    y     = s · clamp(round(clamp(x, lower, upper) / s), qmin - z, qmax - z)         forward
    ∂L/∂x = ∂L/∂y  where qmin ≤ round(x / s) + z ≤ qmax and lower < x < upper,      backward
            0      elsewhere

Rounding is monotonic, so a clamp that stands before the quantizer (ReLU, ReLU6, hardtanh) costs nothing: it only
narrows the grid, ``clamp(round(clamp(x, a, b) / s)) = clamp(round(x / s), round(a / s), round(b / s))``. For the same
reason the set of ``x`` that lets the gradient through is one interval ``[low, high]`` of float32 numbers. On the CPU
with one scale its two ends are found exactly beforehand (``_interval``), and then

    t = clamp(x, low, high),   mask = (t = x),   y = s · round(t / s)

are vectorized passes over pieces of memory that stay in cache. One byte an element is kept for the backward pass.
Half-precision tensors are computed in float32 and rounded once at the end.
Source: straight-through estimate, Bengio et al., 1308.3432; its clipped form, Hubara et al., 1609.07061, eq. 4.
"""

from __future__ import annotations

import ctypes
import struct
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fxquant.numerics.affine import broadcast
from fxquant.numerics.memory import dense_view, flat_view, piece_size, pieces

__all__ = ["fake_quantize", "traces"]

_SMALL = 1 << 14
"""Up to so many elements the number of calls counts, not the number of bytes."""


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    *,
    axis: int | None = None,
    lower: float | None = None,
    upper: float | None = None,
    inplace: bool = False,
) -> Tensor:
    """``x`` clamped to ``[lower, upper]`` and rounded to its grid, with a clipped straight-through gradient.

    The result equals ``dequantize(quantize(clamp(x)))`` of :mod:`fxquant.numerics.affine` in float32 bit for bit (up
    to the sign of zero). NaN stays NaN. ``scale`` and ``zero_point`` receive no gradient.

    Args:
        x: real numbers of any shape and memory format; the result has the same shape, dtype and format.
        scale: positive, of one element or ``(C,)`` along ``axis``.
        zero_point: integers of the same shape as ``scale``.
        qmin, qmax: bounds of the grid.
        axis: the channel axis of ``x`` where scales are per channel.
        lower, upper: bounds of a clamp that is merged into the quantizer; at the bounds and beyond the gradient is
            zero, as in ``F.relu`` and ``F.hardtanh``.
        inplace: the memory of ``x`` may be overwritten. The caller warrants that nothing else reads ``x``; autograd
            raises where a backward formula would. Ignored where overwriting is not safe: for leaves that require a
            gradient, views and inference tensors. (``x.detach()`` shares memory without being a view: the caller's to know.)
    """
    if traces():
        return _in_tensors(x, scale, zero_point, qmin, qmax, axis, lower, upper)
    if x.numel() == 0:
        return x.clone()
    if flat_view(x) is None:
        x, inplace = x.contiguous(), True
    plan = _Plan(scale, zero_point, qmin, qmax, axis, lower, upper)
    inplace = inplace and _may_overwrite(x)
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _FakeQuantize.apply(x, plan, inplace)
        return result
    with torch.no_grad():
        return plan.forward(x, inplace=inplace, mask=None)


def traces() -> bool:
    """Whether what runs is to be a graph of tensors: under ``torch.compile``, and inside transforms of ``torch.func``."""
    return bool(torch.compiler.is_compiling()) or torch._C._functorch.peek_interpreter_stack() is not None


def _in_tensors(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    lower: float | None,
    upper: float | None,
) -> Tensor:
    """The same in tensor arithmetic alone, whose gradient autograd, compilers and transforms find themselves.

    Where the gradient passes, x is finite, so that what carries it adds an exact zero.
    """
    plan = _Plan(scale, zero_point, qmin, qmax, axis, lower, upper)
    with torch.no_grad():
        dtype = torch.promote_types(x.dtype, torch.float32)
        s = broadcast(scale, x.ndim, axis).to(dtype)
        t = torch.round(x.to(dtype) / s)
        levels = torch.clamp(t, *plan._levels(s, x.ndim))
        y, passes, inside = (levels * s).to(x.dtype), t == levels, plan._strictly_inside(x)
        passes = passes if inside is None else passes & inside
    carried = torch.where(passes, x, 0.0)
    return y.detach() + (carried - carried.detach())


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, inplace: bool) -> Tensor:
        mask = torch.empty_like(x, dtype=torch.bool)
        y = plan.forward(x, inplace=inplace, mask=mask)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(mask)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return _where(mask, grad), None, None


class _Plan:
    """The grid and the merged clamp of one call."""

    __slots__ = ("axis", "lower", "qmax", "qmin", "scale", "upper", "zero_point")

    def __init__(
        self,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        axis: int | None,
        lower: float | None,
        upper: float | None,
    ) -> None:
        self.scale, self.zero_point, self.qmin, self.qmax = scale, zero_point, qmin, qmax
        self.axis, self.lower, self.upper = axis, lower, upper

    def forward(self, x: Tensor, *, inplace: bool, mask: Tensor | None) -> Tensor:
        """The quantized ``x``; fills ``mask`` with where the gradient passes."""
        if x.device.type == "cpu" and x.dtype != torch.float64 and self.scale.numel() == 1:
            scale, zero_point = self.scale.item(), int(self.zero_point.item())
            interval = _interval(scale, self.qmin - zero_point, self.qmax - zero_point, self.lower, self.upper)
            if interval is not None:
                return _by_interval(x, scale, *interval, inplace=inplace, mask=mask)
        return self._by_level(x, inplace=inplace, mask=mask)

    def _by_level(self, x: Tensor, *, inplace: bool, mask: Tensor | None) -> Tensor:
        """Any device, any granularity: compares the rounded levels with their bounds; reads nothing back."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide, s = x.to(dtype), broadcast(self.scale, x.ndim, self.axis).to(dtype)
        bottom, top = self._levels(s, x.ndim)
        inside = None if mask is None else self._strictly_inside(x)
        t = torch.div(wide, s, out=wide) if inplace or wide is not x else wide / s
        t.round_()
        if mask is None:
            y = t.clamp_(bottom, top).mul_(s)
        else:
            y = torch.clamp(t, bottom, top)
            if mask.device.type == "cpu":  # comparing into floats and narrowing them is the faster way there
                mask.view(torch.int8).copy_(t.eq_(y))
            else:
                torch.eq(t, y, out=mask)
            if inside is not None:
                mask.logical_and_(inside)
            y = torch.mul(y, s, out=t)
        return x.copy_(y) if inplace and y is not x else y.to(x.dtype)

    def _strictly_inside(self, x: Tensor) -> Tensor | None:
        """Where the merged clamp lets the gradient through."""
        inside = None if self.lower is None else x > self.lower
        if self.upper is not None:
            inside = x < self.upper if inside is None else inside.logical_and_(x < self.upper)
        return inside

    def _levels(self, s: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """The lowest and highest multiple of the scale, of the shape of ``s``."""
        z = broadcast(self.zero_point, ndim, self.axis).to(s.dtype)
        bottom, top = self.qmin - z, self.qmax - z
        least, most = bottom, top
        if self.lower is not None:
            least = torch.round(self.lower / s).clamp(bottom, top)
        if self.upper is not None:
            most = torch.round(self.upper / s).clamp(bottom, top)
        return least, most


def _may_overwrite(x: Tensor) -> bool:
    """Whether autograd allows ``x`` to be changed in place. Inference tensors do not know whether they are views."""
    return not (x._is_view() or x.is_inference() or (x.is_leaf and x.requires_grad))


def _by_interval(x: Tensor, s: float, low: float, high: float, *, inplace: bool, mask: Tensor | None) -> Tensor:
    """One scale on the CPU: ``s * round(clamp(x, low, high) / s)``, piece by piece, and ``mask = low ≤ x ≤ high``."""
    if x.dtype == torch.float32 and x.numel() <= _SMALL:
        t = torch.clamp(x, low, high)
        if mask is not None:
            torch.eq(x, t, out=mask)
        return torch.div(t, s, out=x if inplace else t).round_().mul_(s)
    y = x if inplace else torch.empty_like(x)
    flat_x, flat_y = dense_view(x), dense_view(y)
    is_wide = x.dtype == torch.float32
    spare = torch.empty(min(x.numel(), piece_size()))
    wide = spare if is_wide else torch.empty_like(spare)
    passes = () if mask is None else (dense_view(mask).view(torch.int8),)
    for source, target, *passing in pieces(flat_x, flat_y, *passes):
        t = spare[: source.numel()]
        u = target if is_wide else wide[: source.numel()].copy_(source)
        torch.clamp(source if is_wide else u, low, high, out=t)
        if passing:
            passing[0].copy_(torch.eq(source if is_wide else u, t, out=u))
        torch.div(t, s, out=u).round_().mul_(s)
        if not is_wide:
            target.copy_(u)
    return y


def _where(mask: Tensor, grad: Tensor) -> Tensor:
    """``grad`` where ``mask``, 0 elsewhere: as a select, so that it hides no more and no less than ``F.relu`` does."""
    if mask.device.type != "cpu" or mask.numel() <= _SMALL or torch.is_grad_enabled():
        return torch.where(mask, grad, 0.0)
    result = torch.empty_like(mask, dtype=grad.dtype)
    flat_result = dense_view(result)
    flat_grad = dense_view(grad) if grad.stride() == mask.stride() else dense_view(result.copy_(grad))
    spare = torch.empty(min(mask.numel(), piece_size()), dtype=grad.dtype)
    for passes, incoming, outgoing in pieces(dense_view(mask).view(torch.int8), flat_grad, flat_result):
        t = spare[: passes.numel()].copy_(passes)
        torch.ops.aten.threshold_backward.grad_input(incoming, t, 0.0, grad_input=outgoing)
    return result


@lru_cache(maxsize=1024)
def _interval(
    scale: float, bottom: int, top: int, lower: float | None, upper: float | None
) -> tuple[float, float] | None:
    """The float32 numbers ``low ≤ x ≤ high`` whose gradient passes, such that clamping to them clamps the levels.

    None where no interval does both: a merged clamp that leaves no level, or that ends on the middle of two levels.
    """
    try:
        low = _first(bottom, scale)
        if lower is not None and _level(lower, scale) >= bottom:
            low = _beyond(lower, scale)
        high = -_first(-top, scale)
        if upper is not None and _level(upper, scale) <= top:
            high = -_beyond(-upper, scale)
        return (low, high) if low <= high else None
    except (ArithmeticError, ValueError):
        return None


def _beyond(lower: float, scale: float) -> float:
    """The first float32 number above ``lower``."""
    above = _next(_float32(lower), 1)
    if _level(above, scale) != _level(lower, scale):
        raise ArithmeticError("the merged clamp ends where rounding jumps")
    return above


def _first(level: int, scale: float) -> float:
    """The smallest float32 number that rounds to ``level`` or higher."""
    x = _float32((level - 0.5) * scale)
    steps = 0
    while _level(x, scale) >= level and (steps := steps + 1) < 16:
        x = _next(x, -1)
    while _level(x, scale) < level and (steps := steps + 1) < 32:
        x = _next(x, 1)
    if _level(x, scale) != level or _level(_next(x, -1), scale) >= level:
        raise ArithmeticError("scale too small for float32")
    return x


def _level(x: float, scale: float) -> int:
    """``round(x / scale)`` as float32 tensors compute it: a quotient of two float32 numbers in double precision rounds
    to float32 correctly, as 53 ≥ 2 · 24 + 2."""
    return round(_float32(_float32(x) / scale))


def _float32(x: float) -> float:
    return ctypes.c_float(x).value


def _next(x: float, direction: int) -> float:
    """The float32 number next to ``x`` upwards (1) or downwards (-1)."""
    if x == 0.0:
        return direction * 2.0**-149
    (code,) = struct.unpack("<i", struct.pack("<f", x))
    (result,) = struct.unpack("<f", struct.pack("<i", code + (direction if x > 0 else -direction)))
    return float(result)
