"""TWN: ternary weights, -α, 0 and α, with a threshold in proportion to the mean magnitude.

    Δ = 0.7 · mean |w|,   ŵ = α · sign(w) where |w| > Δ, else 0,   α = mean of |w| where |w| > Δ        ∂ŵ/∂w = 1

For this threshold α makes Σ (w - ŵ)² least. The paper has one Δ and α for a layer (``per_channel=False``); with a scale
per channel each has its own. Source: Li et al., Ternary Weight Networks, 1605.04711, eq. 5, 6 and 9.
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

__all__ = ["TWNWeight"]

_FACTOR = 0.7


class TWNWeight(WeightQuantize):
    """The quantizer of a weight."""

    takes_estimator = False

    def rounded(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return replaced(x, broadcast(self.scale, x.ndim, self.axis) * self._signs(x.detach()))

    def _signs(self, weight: Tensor) -> Tensor:
        """-1, 0 or 1 for each number."""
        total, count = per_row(weight, self.axis, weight.float().abs())
        threshold = _FACTOR * broadcast(total, weight.ndim, self.axis) / count
        return weight.float().sign() * (weight.float().abs() > threshold)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Take threshold and scale from ``weight``."""
        signs = self._signs(weight)
        total, _ = per_row(weight, self.axis, weight.float() * signs)
        beyond, _ = per_row(weight, self.axis, signs.abs())
        scale = (total / beyond.clamp(min=1.0)).clamp(min=smallest_scale())
        self.take_grid(scale, torch.zeros_like(scale))


def _refuses(scheme: Scheme, kind: str) -> Refusal | None:
    return None if scheme.bits == 2 else Refusal("its numbers are -1, 0 and 1 of a 2-bit grid: set bits=2")


register("twn", weight=TWNWeight, refuses=_refuses)
