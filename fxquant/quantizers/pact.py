"""PACT: the clipping level α of an activation is learned, from what is clipped alone.

    y = clamp(x, 0, α),   ŷ = round(y / s) · s,   s = α / qmax          ∂ŷ/∂α = 1 where x ≥ α, else 0

Source: Choi et al., PACT, 1805.06085, eq. 1 to 3. For a tensor of both signs, which the paper does not have, α is the width
of the range, and both of its ends move with it. As in the paper α decays as weights do, which keeps it from growing; and it
starts where the range makes the least squared error.
"""

from __future__ import annotations

from torch import Tensor

from fxquant.numerics.affine import smallest_scale
from fxquant.numerics.learned_rounding import GradientRule
from fxquant.quantizers.learned import LearnedTensor
from fxquant.quantizers.registry import register

__all__ = ["PACTTensor"]


class PACTTensor(LearnedTensor):
    """The quantizer of a tensor whose parameter ``step`` is α, the width of its range."""

    gradients = GradientRule(residual=False)
    decays = True
    holds_range = True

    @property
    def levels(self) -> int:
        """How many steps the range has."""
        return self.scheme.qmax - self.scheme.qmin

    def encode(self, scale: Tensor) -> Tensor:
        return scale * self.levels

    def decode(self, step: Tensor) -> Tensor:
        return (step.abs() / self.levels).clamp(min=smallest_scale())

    def gain(self, x: Tensor) -> float:
        return 1.0


register("pact", tensor=PACTTensor)
