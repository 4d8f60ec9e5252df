"""Rounding to a grid whose scale is learned: the value of ``fake_quantize``, with a gradient for the scale as well.

    t = clamp(x, lower, upper)          a ReLU that is merged into the quantizer
    v = t / s,   r = round(v),   n = qmin - z,   p = qmax - z
    y = s · clamp(r, n, p)

    ∂y/∂x = 1 where n ≤ v ≤ p and lower < x < upper, else 0
    ∂y/∂s = r - v  where n < v < p;   n  where v ≤ n;   p  where v ≥ p

The last line is that of LSQ (Esser et al., 1902.08153, eq. 3): the straight-through estimate applied to ``round`` alone. The
other rules differ from it in one of these:

    residual = False      PACT (1805.06085, eq. 3): 0 in the place of r - v
    by_level = True       TQT (1903.08066, eq. 8): r is compared with n and p, not v
    floats = True         LSQ+ (2004.09576, eq. 4, 5): the grid begins at an offset β = -s·z that is learned too: ∂y/∂β is
                          1 where x is clipped, else 0, and n, p in ∂y/∂s are qmin, qmax
    element_gain = δ      EWGS (2104.00903, eq. 3): ∂y/∂x times 1 + δ·sign(g)·(v - r)/(p - n), g the incoming gradient

All of it is elementwise and on the device; nothing is read back. On the CPU, where that costs nothing, the numbers of one
scale are, and the backward pass works on pieces that stay in cache, without masks: ``hardtanh_backward(a, b, low, high)`` is
``a`` where ``low < b < high``, else 0, in one pass, and with it

    ∂y/∂s = clamp(r, n, p) - (v where n < v < p, else 0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from fxquant.numerics.affine import broadcast
from fxquant.numerics.gradients import fake_quantize, traces
from fxquant.numerics.memory import dense_view, flat_view, pieces

__all__ = ["GradientRule", "round_to_learned_grid"]


@dataclass(frozen=True, kw_only=True)
class GradientRule:
    """Which of the gradients above a rule has.

    Args:
        residual: whether the rounding error reaches the scale.
        by_level: whether rounded numbers are compared with the ends of the grid.
        floats: whether the offset of the grid is learned beside the scale.
        element_gain: δ of element-wise gradient scaling; 0 for none.
    """

    residual: bool = True
    by_level: bool = False
    floats: bool = False
    element_gain: float = 0.0


def round_to_learned_grid(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    *,
    rule: GradientRule,
    offset: Tensor | None = None,
    axis: int | None = None,
    lower: float | None = None,
    upper: float | None = None,
    gain: float = 1.0,
) -> Tensor:
    """``x`` clamped to ``[lower, upper]`` and rounded to its grid, in ``x``'s dtype; bit for bit as ``fake_quantize``.

    Args:
        x: real numbers of any shape.
        scale: positive float32, ``()`` or ``(C,)`` along ``axis``; gets a gradient.
        zero_point: integers of the same shape; gets none.
        qmin, qmax: bounds of the grid.
        rule: which gradient.
        offset: the number that gets the offset's gradient where ``rule.floats``; its value is not read.
        axis: the channel axis of ``x`` where scales are per channel.
        lower, upper: bounds of a merged clamp.
        gain: factor on the gradients of scale and offset.
    """
    learns = scale.requires_grad or (offset is not None and offset.requires_grad)
    if not (torch.is_grad_enabled() and (x.requires_grad or learns)) or x.numel() == 0:
        with torch.no_grad():
            return fake_quantize(x, scale, zero_point, qmin, qmax, axis=axis, lower=lower, upper=upper)
    call = _Call(qmin, qmax, rule, axis, lower, upper, gain)
    result: Tensor = _Rounded.apply(x, scale, offset, zero_point, call)
    return result


@dataclass(frozen=True)
class _Call:
    """What of one call is no tensor."""

    qmin: int
    qmax: int
    rule: GradientRule
    axis: int | None
    lower: float | None
    upper: float | None
    gain: float

    def levels(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``v``, ``n``, ``p`` and the scale in the shape of ``x``; at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        s = broadcast(scale, x.ndim, self.axis).to(dtype)
        z = broadcast(zero_point, x.ndim, self.axis).to(dtype)
        t = x.to(dtype)
        if self.lower is not None or self.upper is not None:
            t = t.clamp(self.lower, self.upper)
        return t / s, self.qmin - z, self.qmax - z, s


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, scale: Tensor, offset: Tensor | None, zero_point: Tensor, call: _Call) -> Tensor:
        if x.numel() > _SMALL and not traces():
            with torch.no_grad():
                return fake_quantize(
                    x, scale, zero_point, call.qmin, call.qmax, axis=call.axis, lower=call.lower, upper=call.upper
                )
        v, n, p, s = call.levels(x, scale, zero_point)
        return v.round_().clamp_(n, p).mul_(s).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, _, zero_point, ctx.call = inputs
        ctx.save_for_backward(x, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, scale, zero_point = ctx.saved_tensors
        call: _Call = ctx.call
        if _fits_pieces(x, scale, gradient):
            piecewise = _PiecewiseBackward(scale, zero_point, call)
            return *piecewise.gradients(x, gradient, *ctx.needs_input_grad[:3]), None, None
        rule = call.rule
        v, n, p, _ = call.levels(x, scale, zero_point)
        r = torch.round(v)
        below, above = (r < n, r > p) if rule.by_level else (v <= n, v >= p)
        g = gradient.to(v.dtype)
        to_x = _to_input(g, v, r, n, p, x, call) if ctx.needs_input_grad[0] else None
        to_scale = to_offset = None
        if ctx.needs_input_grad[1]:
            low, high = (call.qmin, call.qmax) if rule.floats else (n, p)
            inside = r.sub_(v) if rule.residual else torch.zeros_like(v)
            slope = torch.where(below, low, torch.where(above, high, inside))
            to_scale = _reduced(slope * g if traces() else slope.mul_(g), scale, call)
        if rule.floats and ctx.needs_input_grad[2]:
            to_offset = _reduced(g * (below | above), scale, call)
        return None if to_x is None else to_x.to(x.dtype), to_scale, to_offset, None, None


def _to_input(g: Tensor, v: Tensor, r: Tensor, n: Tensor, p: Tensor, x: Tensor, call: _Call) -> Tensor:
    level = r if call.rule.by_level else v
    passes = (level >= n) & (level <= p)
    if call.lower is not None:
        passes &= x > call.lower
    if call.upper is not None:
        passes &= x < call.upper
    if call.rule.element_gain:
        g = g * (1.0 + call.rule.element_gain * g.sign() * (v - r) / (p - n))
    return torch.where(passes, g, 0.0)


def _reduced(slope: Tensor, scale: Tensor, call: _Call) -> Tensor:
    """The sum over all that shares a scale, in the scale's shape and dtype."""
    if call.axis is None or scale.ndim == 0:
        total = slope.sum()
    else:
        rest = [d for d in range(slope.ndim) if d != call.axis % slope.ndim]
        total = slope.sum(rest) if rest else slope
    return (total * call.gain).reshape(scale.shape).to(scale.dtype)


_hardtanh_backward: Any = torch.ops.aten.hardtanh_backward
_SMALL = 1 << 14
"""Up to so many elements pieces gain nothing."""


def _fits_pieces(x: Tensor, scale: Tensor, gradient: Tensor) -> bool:
    one_scale = x.device.type == "cpu" and scale.numel() == 1 and x.numel() > _SMALL
    return one_scale and x.dtype == gradient.dtype == torch.float32 and not (traces() or torch.is_grad_enabled())


class _PiecewiseBackward:
    """The backward pass of one scale on the CPU, over pieces of float32 numbers."""

    def __init__(self, scale: Tensor, zero_point: Tensor, call: _Call) -> None:
        self.scale, self.call = scale, call
        self.s, self.z = float(scale), int(zero_point)
        self.n, self.p = float(call.qmin - self.z), float(call.qmax - self.z)
        lower = -math.inf if call.lower is None else call.lower
        upper = math.inf if call.upper is None else call.upper
        # Two levels beyond the grid are as far out as infinity, and 0 times them is 0.
        self.least = min(max(lower, (self.n - 2) * self.s), upper)
        self.most = max(min(upper, (self.p + 2) * self.s), lower)

    def gradients(
        self, x: Tensor, gradient: Tensor, to_input: bool, to_scale: bool, to_offset: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients that are asked for."""
        flat_x = flat_view(x)
        if flat_x is None:
            x = x.contiguous()
            flat_x = x.view(-1)
        result = torch.empty_like(x)
        if gradient.stride() != result.stride():
            gradient = result.copy_(gradient).clone()
        flat_g, flat_result = (dense_view(t) for t in (gradient, result))
        by_scale, by_offset = [], []
        for part, g, target in pieces(flat_x, flat_g, flat_result):
            v = part.clamp(self.least, self.most).div_(self.s)
            r = torch.round(v)
            if to_input:
                self._to_input(part, v, r, g, target)
            outside = g.sum() - self._inside(g, v, r).sum() if self.call.rule.floats else None
            if outside is not None:
                by_offset.append(outside)
            if to_scale:
                total = torch.dot(self._slope(v, r), g)
                by_scale.append(total if outside is None else total + self.z * outside)
        return (
            result if to_input else None,
            self._total(by_scale) if to_scale else None,
            self._total(by_offset) if to_offset and by_offset else None,
        )

    def _to_input(self, x: Tensor, v: Tensor, r: Tensor, g: Tensor, target: Tensor) -> None:
        """Into ``target``: the gradient of ``x``."""
        rule, call = self.call.rule, self.call
        if rule.element_gain:
            factor = torch.sub(v, r).mul_(rule.element_gain / (self.p - self.n)).mul_(g.sign()).add_(1.0)
            g = factor.mul_(g)
        level, low, high = (r, self.n - 0.5, self.p + 0.5) if rule.by_level else (v, _below(self.n), -_below(-self.p))
        _hardtanh_backward.grad_input(g, level, low, high, grad_input=target)
        if call.lower is not None or call.upper is not None:
            low = -math.inf if call.lower is None else call.lower
            high = math.inf if call.upper is None else call.upper
            _hardtanh_backward.grad_input(target, x, low, high, grad_input=target)

    def _inside(self, taken: Tensor, v: Tensor, r: Tensor) -> Tensor:
        """``taken`` where a number is not clipped, else 0."""
        if self.call.rule.by_level:
            return _hardtanh_backward(taken, r, self.n - 0.5, self.p + 0.5)
        return _hardtanh_backward(taken, v, self.n, self.p)

    def _slope(self, v: Tensor, r: Tensor) -> Tensor:
        """``∂y/∂s``, in the memory of ``r``."""
        inside = self._inside(v if self.call.rule.residual else r, v, r)
        return r.clamp_(self.n, self.p).sub_(inside)

    def _total(self, parts: list[Tensor]) -> Tensor:
        total = torch.stack(parts).double().sum() * self.call.gain
        return total.reshape(self.scale.shape).to(self.scale.dtype)


def _below(x: float) -> float:
    """The float32 number before ``x``."""
    return float(numpy.nextafter(numpy.float32(x), numpy.float32(-math.inf)))
