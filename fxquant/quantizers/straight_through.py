"""Values from one computation, gradients from another: what straight-through estimates are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.numerics.affine import broadcast

__all__ = ["Replaced", "per_row", "replaced"]


class Replaced(torch.autograd.Function):
    """``value``, with the gradient of ``x`` times ``slope``."""

    @staticmethod
    def forward(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        return value.to(x.dtype, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (gradient * slope).to(gradient.dtype), None, None


def replaced(x: Tensor, value: Tensor, slope: Tensor | None = None) -> Tensor:
    """``value`` in the dtype of ``x``, bit for bit, with the gradient of ``x`` times ``slope``, 1 where it is left out."""
    slope = torch.ones((), device=x.device) if slope is None else slope
    result: Tensor = Replaced.apply(x, value.detach(), slope.detach())
    return result


def per_row(weight: Tensor, axis: int | None, of: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of ``of`` over what shares a scale, in the scale's shape; and how many numbers that are, in ``of``'s."""
    if axis is None:
        return of.sum(), torch.tensor(float(weight.numel()), device=weight.device)
    total = of.movedim(axis, 0).flatten(1).sum(1)
    return total, broadcast(torch.full_like(total, weight.numel() / len(total)), weight.ndim, axis)
