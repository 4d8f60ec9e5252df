"""DoReFa: weights through tanh onto 2^k even levels of [-1, 1], activations onto 2^k levels of [0, 1].

    Q_k(r) = round((2^k - 1)·r) / (2^k - 1)
    ŵ = 2·Q_k(tanh w / (2·max |tanh w|) + ½) - 1,    â = Q_k(clamp(a, 0, 1))         ∂Q_k(r)/∂r = 1

A weight is an odd integer between -(2^k - 1) and 2^k - 1, times 1 / (2^k - 1): integers of k + 1 bits. The size of the
weights is lost, and wants a batch norm behind; the papers keep first and last layers and the input at 8 bits or more
(``fxquant.recipe.FIRST``, ``LAST``, ``INPUT``). Its gradients in k bits are ``fxquant.training.GradientRounding``.
Source: Zhou et al., DoReFa-Net, 1606.06160, eq. 5, 6, 9 and 11.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.errors import Refusal
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.nn.grid import Grid
from fxquant.numerics.scheme import Scheme
from fxquant.quantizers.registry import register
from fxquant.quantizers.straight_through import replaced

__all__ = ["DoReFaTensor", "DoReFaWeight", "of_unit_range"]

_MOST_BITS = 6
"""Odd integers of seven bits leave no room for sums of two products in 16 bits."""


class DoReFaWeight(WeightQuantize):
    """The quantizer of a weight. A weight of zeros stays at the level nearest to zero from above."""

    takes_estimator = False

    def rounded(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        steps = 2**self.scheme.bits - 1
        t = torch.tanh(x.float())
        r = t / (2 * t.abs().amax().clamp(min=torch.finfo(t.dtype).tiny)) + 0.5
        return (2 * replaced(r, torch.round(r * steps) / steps) - 1).to(x.dtype)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Take the one scale that there is."""
        self.take_grid(torch.full_like(self.scale, 1 / (2**self.scheme.bits - 1)), torch.zeros_like(self.scale))

    @property
    def grid(self) -> Grid:
        wide = Scheme.weight(self.scheme.bits + 1, per_channel=False, quantizer=self.scheme.quantizer)
        return Grid(self.scale.clone(), self.zero_point.clone(), wide)


class DoReFaTensor(FakeQuantize):
    """The quantizer of a tensor: the grid of [0, 1], whatever passes."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme, fixed_range=(0.0, 1.0))


def of_unit_range(scheme: Scheme) -> Refusal | None:
    """Why a tensor of ``scheme`` cannot have the range [0, 1]; None where it can."""
    if scheme.signed or scheme.symmetric:
        return Refusal("its tensors lie in [0, 1]: set signed=False, symmetric=False")
    return None


def _refuses(scheme: Scheme, kind: str) -> Refusal | None:
    if kind == "tensor":
        return of_unit_range(scheme)
    if scheme.bits > _MOST_BITS:
        return Refusal(
            f"its odd integers take one bit more, and kernels {_MOST_BITS + 1} at most: set bits to {_MOST_BITS} or fewer"
        )
    return Refusal("it has one scale: set per_channel=False") if scheme.per_channel else None


register("dorefa", tensor=DoReFaTensor, weight=DoReFaWeight, refuses=_refuses)
