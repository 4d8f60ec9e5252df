"""Gradients of activations in k bits, rounded at random, as DoReFa-Net trains with.

    f(g) = 2m · [Q_k(g / 2m + ½ + N) - ½],   m = max |g| of a sample,   N uniform in ±½ / (2^k - 1),   E[f(g)] = g

where Q_k rounds to the 2^k - 1 steps of [0, 1]. What a layer hands back through its result is rounded, so that the products
of the backward pass have few bits too. It is a simulation, of training on hardware that multiplies such integers: nothing
gets faster here, and what ships is the same. Source: Zhou et al., DoReFa-Net, 1606.06160, eq. 12.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import InputError
from fxquant.nn.modules import QuantWeighted, QuantWeightedOp

__all__ = ["GradientRounding", "rounded_gradient"]


def rounded_gradient(gradient: Tensor, bits: int, noise: Tensor | None = None) -> Tensor:
    """``f`` of a gradient ``(N, ...)``, each sample with its own m.

    Args:
        gradient: of any floating dtype; a sample without gradient stays so.
        bits: k, 2 to 16.
        noise: numbers in [0, 1) that N is made of, drawn if left out; of the gradient's shape.
    """
    wide = gradient.float()
    rest = tuple(range(1, wide.ndim))
    m = wide.abs().amax(rest, keepdim=True) if rest else wide.abs()
    steps = 2**bits - 1
    drawn = torch.rand_like(wide) if noise is None else noise
    r = (wide / (2 * torch.where(m > 0, m, torch.ones_like(m))) + 0.5) * steps + (drawn - 0.5)
    return (2 * m * (r.round().clamp_(0, steps) / steps - 0.5)).to(gradient.dtype)


class GradientRounding:
    """Rounds the gradients of the results of all weighted layers of a prepared model, until ``remove``.

    Args:
        prepared: what ``prepare(..., qat=True)`` returned.
        bits: k, 2 to 16.

    Example:
        >>> rounding = fxquant.training.GradientRounding(prepared, bits=6)

    Raises:
        InputError: the bits make no grid, or the model has no weighted layer of fxquant's.
    """

    def __init__(self, prepared: nn.Module, *, bits: int) -> None:
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
            raise InputError(f"GradientRounding(bits={bits!r}): gradients have 2 to 16 bits.")
        self.bits = bits
        layers = [part for part in prepared.modules() if isinstance(part, (QuantWeighted, QuantWeightedOp))]
        if not layers:
            raise InputError(
                f"this {type(prepared).__name__} has no weighted layer whose gradients could be rounded.\n"
                "  what to do: give what fxquant.prepare(model, qat=True) returned."
            )
        self._handles = [part.register_forward_hook(self._attach) for part in layers]

    def _attach(self, layer: nn.Module, inputs: Any, result: Any) -> None:
        if isinstance(result, Tensor) and result.requires_grad:
            result.register_hook(lambda gradient: rounded_gradient(gradient, self.bits))

    def remove(self) -> None:
        """Leave gradients as they are from now on."""
        for handle in self._handles:
            handle.remove()
