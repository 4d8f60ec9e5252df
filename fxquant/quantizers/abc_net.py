"""ABC-Net: weights as a sum of several binary tensors, each with a factor of its own that is fitted to them.

    B_m = sign(w - mean w + u_m · std w),   u_m evenly from -1 to 1, 0 where there is one,   m = 1 … M
    α = argmin Σ (w - Σ_m α_m·B_m)²,   ŵ = Σ_m α_m·B_m                      ∂ŵ/∂w = Σ_m α_m:  sign passes gradients on

M is the number of bits. With a scale per channel, each channel has its own mean, deviation and factors. With one base and
mean 0 it is XNOR-Net's weight. Its numbers are sums of M factors, no multiples of one scale, and no kernel here adds M
binary convolutions: this rule is simulated. The paper's several binary activations are not here.
Source: Lin et al., Towards Accurate Binary Convolutional Neural Network, 1711.11294, eq. 2 to 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.errors import Refusal
from fxquant.nn.fake_quantize import WeightQuantize
from fxquant.numerics.affine import smallest_scale
from fxquant.numerics.scheme import Scheme
from fxquant.quantizers.registry import register
from fxquant.quantizers.straight_through import replaced

__all__ = ["ABCWeight", "binary_bases"]

_MOST_BASES = 8


@torch.no_grad()
def binary_bases(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The bases and factors of each row.

    Args:
        rows: ``(C, n)``.
        count: M.

    Returns:
        The bases, of -1 and 1, ``(C, n, M)``, and the factors, ``(C, M)``; both float64.
    """
    wide = rows.double()
    shifts = torch.linspace(-1, 1, count, dtype=torch.float64, device=rows.device) if count > 1 else wide.new_zeros(1)
    centred = wide - wide.mean(1, keepdim=True)
    spread = centred.square().mean(1, keepdim=True).sqrt()
    shifted = centred[..., None] + spread[..., None] * shifts
    bases = torch.where(shifted < 0, -1.0, 1.0).to(torch.float64)
    products = bases.transpose(1, 2)
    factors = torch.linalg.pinv(products @ bases, hermitian=True) @ (products @ wide[..., None])
    return bases, factors.squeeze(2)


class ABCWeight(WeightQuantize):
    """The quantizer of a weight; its ``scale`` is that of the grid which covers what the factors can sum up to."""

    takes_estimator = False
    keeps_bits = "it has as many bases as it was made with bits"

    def rounded(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        bases, factors = binary_bases(self._rows(x), self.scheme.bits)
        value = (bases @ factors[..., None]).squeeze(2)
        slope = factors.sum(1, keepdim=True).expand_as(value)
        return replaced(x, self._like(value, x), self._like(slope, x))

    def _rows(self, x: Tensor) -> Tensor:
        """A row for what shares its factors."""
        return x.detach().reshape(1, -1) if self.axis is None else x.detach().movedim(self.axis, 0).flatten(1)

    def _like(self, rows: Tensor, x: Tensor) -> Tensor:
        if self.axis is None:
            return rows.reshape(x.shape).float()
        return rows.reshape(x.movedim(self.axis, 0).shape).movedim(0, self.axis).float()

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Take the scale from the factors of ``weight``."""
        _, factors = binary_bases(self._rows(weight), self.scheme.bits)
        scale = (factors.abs().sum(1) / self.scheme.qmax).float().clamp(min=smallest_scale())
        self.take_grid(scale.reshape(self.scale.shape), torch.zeros_like(self.scale))


def _refuses(scheme: Scheme, kind: str) -> Refusal | None:
    return (
        None
        if scheme.bits <= _MOST_BASES
        else Refusal(f"it has a base for each bit: set bits to {_MOST_BASES} or fewer")
    )


register(
    "abc",
    weight=ABCWeight,
    refuses=_refuses,
    simulates=Refusal("its numbers are sums of several factors, no multiples of one scale"),
)
