"""TTQ: ternary weights with a learned number for each sign.

    Δ = 0.05 · max |w|,   ŵ = W⁺ where w > Δ;  -W⁻ where w < -Δ;  else 0
    ∂ŵ/∂w = W⁺,  W⁻  or 1 in these three cases,   ∂ŵ/∂W⁺ = 1[w > Δ],   ∂ŵ/∂W⁻ = -1[w < -Δ]

-W⁻, 0 and W⁺ are no multiples of one scale, so that no integer kernel computes with them: this rule is simulated. Both start
as the mean magnitude on their side. The paper has one pair for a layer (``per_channel=False``). Source: Zhu et al., Trained
Ternary Quantization, 1612.01064, eq. 6 to 9.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import Refusal
from fxquant.numerics.affine import broadcast, in_float32, smallest_scale
from fxquant.numerics.scheme import Scheme
from fxquant.quantizers.learned import LearnedWeight, learned_parameter
from fxquant.quantizers.registry import register
from fxquant.quantizers.straight_through import per_row, replaced

__all__ = ["TTQWeight"]

_FACTOR = 0.05


class TTQWeight(LearnedWeight):
    """The quantizer of a weight.

    Parameters:
        step: W⁺, float32, ``(1,)`` or ``(channels,)``.
        negative: W⁻, likewise.
    """

    negative: nn.Parameter
    takes_estimator = False

    def make_grid(self, shape: tuple[int, ...]) -> None:
        super().make_grid(shape)
        self.negative = learned_parameter(shape)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.enabled and not self._ready:
            self.refresh(x)
        if not self.active:
            return x
        above, below = self._sides(x.detach())
        sides = (self.decode(self.value_of(parameter)) for parameter in (self.step, self.negative))
        up, down = (broadcast(side, x.ndim, self.axis) for side in sides)
        slope = torch.where(above, up, torch.where(below, down, torch.ones_like(up)))
        latent = replaced(x, torch.zeros_like(x), slope)
        return (up * above - down * below).to(x.dtype) + latent

    def _sides(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = in_float32(weight)
        rest = tuple(d for d in range(weight.ndim) if d != self.axis)
        largest = weight.abs().amax() if self.axis is None else weight.abs().amax(rest, keepdim=True)
        return weight > _FACTOR * largest, weight < -_FACTOR * largest

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Start from ``weight``, unless there is a range already."""
        if self.ready:
            return
        for parameter, side in zip((self.step, self.negative), self._sides(weight), strict=True):
            total, _ = per_row(weight, self.axis, weight.float().abs() * side)
            count, _ = per_row(weight, self.axis, side.float())
            mean = total / count.clamp(min=1.0)
            parameter.copy_(mean.clamp(min=smallest_scale()).reshape(parameter.shape))
        self.known.fill_(1.0)
        self._ready = True


def _refuses(scheme: Scheme, kind: str) -> Refusal | None:
    return None if scheme.bits == 2 else Refusal("it has three numbers: set bits=2")


register(
    "ttq",
    weight=TTQWeight,
    refuses=_refuses,
    simulates=Refusal("its numbers -W⁻, 0 and W⁺ are no multiples of one scale"),
)
