"""Stochastic rounding: in training, up or down with the probability that makes the mean the number itself.

    q = floor(x / s + u),  u uniform in [0, 1),   E[s·q] = x inside the range

Where gradients are small beside a step, rounding to nearest lets them vanish; this rounding keeps them on average. In eval
mode, and so in what is frozen, numbers are rounded to nearest. Ranges are observed. It draws from torch's own generator.
Source: Gupta et al., Deep Learning with Limited Numerical Precision, 1502.02551, §3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.numerics.affine import broadcast
from fxquant.quantizers.registry import register
from fxquant.quantizers.straight_through import replaced

__all__ = ["StochasticTensor", "StochasticWeight"]


def _rounded(quantizer: FakeQuantize, x: Tensor, lower: float | None, upper: float | None) -> Tensor:
    scheme = quantizer.scheme
    scale = broadcast(quantizer.scale, x.ndim, quantizer.axis)
    zero = broadcast(quantizer.zero_point, x.ndim, quantizer.axis)
    bounded = x.detach().float()
    if lower is not None or upper is not None:
        bounded = bounded.clamp(lower, upper)
    v = bounded / scale
    low, high = scheme.qmin - zero, scheme.qmax - zero
    passes = (v >= low - 0.5) & (v <= high + 0.5)
    if lower is not None:
        passes &= x.detach() > lower
    if upper is not None:
        passes &= x.detach() < upper
    levels = torch.floor(v + torch.rand_like(v)).clamp(low, high)
    return replaced(x, levels * scale, passes.float())


class StochasticTensor(FakeQuantize):
    """The quantizer of a tensor."""

    def forward(
        self,
        x: Tensor,
        lower: float | None = None,
        upper: float | None = None,
        inplace: bool = False,
        observes: bool = True,
    ) -> Tensor:
        if not self.training:
            return super().forward(x, lower, upper, inplace, observes)
        if observes and self.enabled and (self.observing or self.tracking):
            self.observe(x, lower=lower, upper=upper)
        if not self.active or not x.is_floating_point():
            return x
        return _rounded(self, x, lower, upper)


class StochasticWeight(WeightQuantize):
    """The quantizer of a weight."""

    def forward(
        self,
        x: Tensor,
        lower: float | None = None,
        upper: float | None = None,
        inplace: bool = False,
        observes: bool = True,
    ) -> Tensor:
        if not self.training or self.pinned:
            return super().forward(x, lower, upper, inplace, observes)
        if self.enabled:
            self.refresh(x)
        return _rounded(self, x, lower, upper) if self.active else x


register("stochastic", tensor=StochasticTensor, weight=StochasticWeight, estimator="moving_average")
