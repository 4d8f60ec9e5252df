"""INQ: weights that are zero or powers of two, of 2^(b-2) sizes for each sign.

    P = {0, ±2^n2, …, ±2^n1},   n1 = floor(log2(4·s / 3)),   n2 = n1 + 1 - 2^(b-2),   s = max |w|
    ŵ = β · sign(w)  where (α + β) / 2 ≤ |w| < 3·β / 2,  α and β neighbours in P;   0 below half of 2^n2        ∂ŵ/∂w = 1

n1 and n2 are the layer's, from when its weight is first seen. The paper does not round all weights at once:
``fxquant.training.IncrementalQuantization`` freezes the largest on their powers of two and trains the rest in float, share
by share; until the last share training mode passes what is not frozen, and eval mode rounds all. Integers are 0 and powers
of two up to 2^(2^(b-2) - 1): 1, 2 or 8 for 2, 3 and 4 bits. The paper's 5 bits would make 128, which int8 lacks on one side.
Source: Zhou et al., Incremental Network Quantization, 1702.03044, eq. 1 to 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.errors import Refusal
from fxquant.nn.fake_quantize import WeightQuantize
from fxquant.nn.grid import Grid
from fxquant.nn.switch import Switch
from fxquant.numerics.affine import smallest_scale
from fxquant.numerics.scheme import Scheme
from fxquant.quantizers.registry import register
from fxquant.quantizers.straight_through import replaced

__all__ = ["INQWeight"]


class INQWeight(WeightQuantize):
    """The quantizer of a weight.

    Attributes:
        partial: whether training mode passes weights as they are, some of which were frozen on their powers of two.
    """

    keeps_bits = "its powers of two are fixed when its weight is first seen"
    partial = Switch("is_partial", initial=False)

    def __init__(self, scheme: Scheme, *, axis: int | None = None, channels: int | None = None) -> None:
        super().__init__(scheme, axis=axis, channels=channels)
        self.partial = False

    @property
    def sizes(self) -> int:
        """How many powers of two there are."""
        return int(2 ** (self.scheme.bits - 2))

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.enabled and not self.pinned:
            self.refresh(x)
        if not self.active or (self.training and self.partial):
            return x
        return self.as_pinned(x) if self.integers is not None else replaced(x, self.on_powers(x.detach()))

    def on_powers(self, weight: Tensor) -> Tensor:
        """Every number as zero or a power of two."""
        powers = 2.0 ** torch.arange(self.sizes, device=weight.device)
        edges = torch.cat([powers.new_tensor([0.5]), powers[:-1] * 1.5])
        at = torch.bucketize(weight.float().abs() / self.scale, edges, right=True)
        sizes = torch.cat([powers.new_zeros(1), powers])[at] * self.scale
        return (sizes * weight.float().sign()).to(weight.dtype)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Take 2^n2 from ``weight``, unless it is known already."""
        if not self.ready:
            largest = weight.abs().amax().float().clamp(min=smallest_scale())
            n1 = torch.floor(torch.log2(4 * largest / 3))
            self.take_grid(torch.exp2(n1 + 1 - self.sizes), torch.zeros_like(self.scale))

    @property
    def grid(self) -> Grid:
        wide = Scheme.weight(max(2, self.sizes + 1), per_channel=False, quantizer=self.scheme.quantizer)
        return Grid(self.scale.clone(), self.zero_point.clone(), wide)


def _refuses(scheme: Scheme, kind: str) -> Refusal | None:
    if scheme.bits > 4:
        return Refusal("its integers are powers of two up to 8 with 4 bits, and 128 with 5: set bits to 4 or fewer")
    return Refusal("its powers are the layer's: set per_channel=False") if scheme.per_channel else None


register("inq", weight=INQWeight, refuses=_refuses)
