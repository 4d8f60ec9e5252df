"""Rounding up or down as a number between 0 and 1 that is learned: AdaRound's relaxation.

    Ŵ = s · clip(⌊W/s⌋ + h(V), n, p),   h(V) = clip(σ(V)·(ζ - γ) + γ, 0, 1),   ζ = 1.1, γ = -0.1
    R(V) = Σ 1 - |2h(V) - 1|^β,   β from 20 down to 2

(Nagel et al., 2004.10568, §3.2, eq. 22–24.) V begins where h is the part that ⌊W/s⌋ leaves; at the end h is 0 or 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.algorithms.bias_correction import pinned_integers
from fxquant.nn.fake_quantize import WeightQuantize
from fxquant.numerics.pairs import scale_factor

__all__ = ["SoftRounding", "annealed"]

_ZETA, _GAMMA = 1.1, -0.1
_WARM_UP = 0.2
_MARGIN = 0.02
_PINNED_MARGIN = 0.2
"""How far from the middle a weight starts whose integer was pinned, so that it moves for a reason only."""


class SoftRounding:
    """The roundings of one weight while they are learned, on the scale that its quantizer has.

    A weight whose rounding is pinned starts from its integer, and may move by one towards the float weight; any other starts
    from the float weight.

    Attributes:
        v: what is learned, float32, of the weight's shape; a leaf.
        scale: of the weight's number of axes.
        start: the integers at the beginning, float32.
    """

    def __init__(self, quantizer: WeightQuantize, weight: Tensor) -> None:
        self.quantizer, scheme = quantizer, quantizer.scheme
        pinned = quantizer.integers is not None
        self.start = pinned_integers(quantizer, weight).float()
        shape = [1] * weight.ndim
        if quantizer.axis is not None and quantizer.scale.ndim:
            shape[quantizer.axis] = -1
        self.scale = quantizer.scale.detach().clone().reshape(shape)
        real = weight.detach().float() / self.scale
        if pinned:
            most = 0.5 - _PINNED_MARGIN
            real = torch.minimum(torch.maximum(real, self.start - most), self.start + most)
        self.low, self.high = scheme.qmin, scheme.qmax
        self.floor = torch.floor(real).clamp(self.low, self.high - 1)
        share = ((real - self.floor).clamp(_MARGIN, 1 - _MARGIN) - _GAMMA) / (_ZETA - _GAMMA)
        self.v = torch.log(share / (1 - share)).requires_grad_()

    def up(self) -> Tensor:
        """h(V)."""
        return (torch.sigmoid(self.v) * (_ZETA - _GAMMA) + _GAMMA).clamp(0.0, 1.0)

    def soft(self) -> Tensor:
        """The weight now, differentiable in ``v``."""
        return (self.floor + self.up()).clamp(self.low, self.high) * self.scale

    def penalty(self, beta: float) -> Tensor:
        """R(V)."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def integers(self) -> Tensor:
        """What is chosen: up where V ≥ 0; channels whose sums of two products would leave 16 bits keep their start."""
        chosen = (self.floor + (self.v >= 0)).clamp(self.low, self.high)
        own = self.quantizer
        if own.out_axis is None:
            return chosen
        bounds: dict[str, Any] = {"qmin": own.scheme.qmin, "qmax": own.scheme.qmax, "clipped": False}
        factor = scale_factor(chosen * self.scale, own.scale, own.reach, out_axis=own.out_axis, **bounds)
        shape = [1] * chosen.ndim
        if factor.ndim:
            shape[own.out_axis] = -1
        return torch.where(factor.reshape(shape) > 1 + 1e-6, self.start, chosen)


def annealed(step: int, steps: int) -> float | None:
    """β at a step: none while warming up, then from 20 to 2 along a line."""
    begin = _WARM_UP * steps
    if step < begin:
        return None
    return 2.0 + 18.0 * max(0.0, 1.0 - (step - begin) / max(1.0, steps - begin))
