"""Binary weights: the sign of each, times 1 (BNN) or times the mean magnitude of its channel (XNOR-Net).

    BNN   ŵ = sign(w)             ∂ŵ/∂w = 1 where |w| ≤ 1, else 0
    XNOR  ŵ = α · sign(w),  α = mean |w|, which makes Σ (w - α·sign w)² least
          ∂ŵ/∂w = 1/n + α · 1[|w| ≤ 1],  n the numbers that share α

The integers are -1 and 1 of a 2-bit grid (``Scheme.weight(2, quantizer="xnor")``); sign(0) is 1. Source: Hubara et al.,
Binarized Neural Networks, 1602.02830, eq. 1 and 4; Rastegari et al., XNOR-Net, 1603.05279, eq. 6 and 10.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.errors import Refusal
from fxquant.nn.fake_quantize import WeightQuantize
from fxquant.numerics.affine import broadcast, smallest_scale
from fxquant.numerics.scheme import Scheme
from fxquant.quantizers.registry import register
from fxquant.quantizers.straight_through import per_row, replaced

__all__ = ["BNNWeight", "XNORWeight"]


class XNORWeight(WeightQuantize):
    """The quantizer of a weight whose scale is its mean magnitude."""

    takes_estimator = False

    def rounded(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        scale = broadcast(self.scale, x.ndim, self.axis)
        value = torch.where(x.detach() < 0, -scale, scale)
        return replaced(x, value, self.slope(x.detach(), scale))

    def slope(self, x: Tensor, scale: Tensor) -> Tensor:
        """The gradient of ``forward``."""
        count = x.numel() / self.scale.numel()
        return 1.0 / count + scale * (x.abs() <= 1.0)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Take the scale from ``weight``."""
        total, _ = per_row(weight, self.axis, weight.float().abs())
        mean = total * (self.scale.numel() / weight.numel())
        self.take_grid(mean.clamp(min=smallest_scale()), torch.zeros_like(mean))


class BNNWeight(XNORWeight):
    """The quantizer of a weight that becomes -1 and 1."""

    def slope(self, x: Tensor, scale: Tensor) -> Tensor:
        return (x.abs() <= 1.0).float()

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Take the scale 1."""
        self.take_grid(torch.ones_like(self.scale), torch.zeros_like(self.scale))


def _refuses(scheme: Scheme, kind: str) -> Refusal | None:
    return None if scheme.bits == 2 else Refusal("its two numbers are -1 and 1 of a 2-bit grid: set bits=2")


register("xnor", weight=XNORWeight, refuses=_refuses)
register("bnn", weight=BNNWeight, refuses=_refuses)
