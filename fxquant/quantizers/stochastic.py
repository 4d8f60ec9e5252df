"""Stochastic rounding: in training, up or down with the probability that makes the mean the number itself.

    q = floor(x / s + u),  u uniform in [0, 1),   E[s·q] = x inside the range

Where gradients are small beside a step, rounding to nearest lets them vanish; this rounding keeps them on average. In eval
mode, and so in what is frozen, numbers are rounded to nearest. Ranges are observed. It draws from torch's own generator.
Source: Gupta et al., Deep Learning with Limited Numerical Precision, 1502.02551, §3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.numerics.affine import broadcast
from fxquant.quantizers.registry import register
from fxquant.quantizers.straight_through import replaced

__all__ = ["StochasticTensor", "StochasticWeight"]


def _rounded(
    quantizer: FakeQuantize, x: Tensor, lower: float | None, upper: float | None, noise: Tensor | None = None
) -> Tensor:
    """``noise``: u of each number; drawn where it is left out."""
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
    levels = torch.floor(v + (torch.rand_like(v) if noise is None else noise)).clamp(low, high)
    return replaced(x, levels * scale, passes.float())


class StochasticTensor(FakeQuantize):
    """The quantizer of a tensor."""

    def rounded(
        self, x: Tensor, lower: float | None = None, upper: float | None = None, inplace: bool = False
    ) -> Tensor:
        return _rounded(self, x, lower, upper) if self.training else super().rounded(x, lower, upper, inplace)


class StochasticWeight(WeightQuantize):
    """The quantizer of a weight. Layers and calls that share it round it alike, from its forward to its backward pass."""

    _drawn: tuple[int, int, Tensor] | None = None

    def rounded(
        self, x: Tensor, lower: float | None = None, upper: float | None = None, inplace: bool = False
    ) -> Tensor:
        if not self.training or self.pinned:
            return super().rounded(x, lower, upper, inplace)
        if not (self.is_shared and torch.is_grad_enabled() and x.requires_grad):
            return _rounded(self, x, lower, upper)
        result = _rounded(self, x, lower, upper, self._noise(x))
        result.register_hook(self._forget)
        return result

    def _noise(self, x: Tensor) -> Tensor:
        """The u of this pass. A forward pass inside a backward pass (activation checkpointing) draws it again."""
        when = (x._version, torch._C._current_graph_task_id())
        if self._drawn is None or self._drawn[:2] != when or self._drawn[2].shape != x.shape:
            self._drawn = (*when, torch.rand_like(x, dtype=torch.promote_types(x.dtype, torch.float32)))
        return self._drawn[2]

    def _forget(self, gradient: Tensor) -> None:
        self._drawn = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_drawn": None}


register("stochastic", tensor=StochasticTensor, weight=StochasticWeight, estimator="moving_average")
