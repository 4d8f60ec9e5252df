"""LSQ+: where the range of a tensor begins is learned beside its scale, for activations with a short negative tail.

    x̂ = s · clamp(round((x - β) / s), qmin, qmax) + β          ∂x̂/∂β = 1 where x is clipped, else 0

An integer model needs a zero point: β is rounded to a multiple of s in every pass, z = round(-β / s), so that what is
trained is what is deployed. Weights are LSQ's. Source: Bhalgat et al., LSQ+, 2004.09576, eq. 2 to 5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.errors import Refusal
from fxquant.numerics.learned_rounding import GradientRule
from fxquant.numerics.scheme import Scheme
from fxquant.quantizers.learned import LearnedTensor, learned_parameter
from fxquant.quantizers.lsq import LSQWeight
from fxquant.quantizers.registry import register

__all__ = ["LSQPlusTensor"]


class LSQPlusTensor(LearnedTensor):
    """The quantizer of a tensor.

    Parameters:
        step: the scale.
        beta: float32, ``(1,)``: the real number that stands for the integer 0.
    """

    gradients = GradientRule(floats=True)
    beta: nn.Parameter

    def make_grid(self, shape: tuple[int, ...]) -> None:
        super().make_grid(shape)
        self.beta = learned_parameter(shape)

    @torch.no_grad()
    def take_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        super().take_grid(scale, zero_point)
        self.beta.copy_((-self.origin * self.scale).reshape(self.beta.shape))

    def offset(self) -> Tensor:
        return -self.value_of(self.beta) / self.learned_scale()

    def _learned_offset(self) -> Tensor | None:
        return self.beta.reshape(self.origin.shape)


def _refuses(scheme: Scheme, kind: str) -> Refusal | None:
    if kind == "tensor" and scheme.symmetric:
        return Refusal("lsq+ learns a zero point: set symmetric=False, or quantizer='lsq'")
    return None


register("lsq+", tensor=LSQPlusTensor, weight=LSQWeight, refuses=_refuses)
