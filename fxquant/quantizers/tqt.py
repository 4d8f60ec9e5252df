"""TQT: scales that are powers of two, so that integer hardware only shifts; the logarithm of the threshold is learned.

    s = 2^ceil(log2 t) / 2^(bits - 1)  for signed grids,  2^ceil(log2 t) / 2^bits  for unsigned ones
    ∂x̂/∂(log2 t) = s · ln 2 · (round(v) - v,  n,  p)         inside, below, above; round and ceil as if they were not there

Where all scales are powers of two, every other requantization is a tie: it goes to the even number here and in ``convert``,
whose ``rounding`` is ``float`` for that reason unless it is told otherwise.

Source: Jain et al., Trained Quantization Thresholds, 1903.08066, eq. 4 to 8. The paper trains log2 t with Adam, at 1e-2. A
batch norm that trains behind the weight (``prepare(qat=True)``) is folded into its scales when the model is frozen, which
are then no powers of two; fold it before where the hardware needs them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.numerics.learned_rounding import GradientRule
from fxquant.quantizers.learned import LearnedRange, LearnedTensor, LearnedWeight
from fxquant.quantizers.registry import register

__all__ = ["TQTTensor", "TQTWeight"]

_LEAST, _MOST = -100.0, 100.0
"""Exponents of two that float32 has, with room for the width of the grid."""


class _Ceiling(torch.autograd.Function):
    """The next whole number, with the gradient of the number itself."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.ceil()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Threshold(LearnedRange):
    """``step`` is log2 t."""

    gradients = GradientRule(by_level=True)
    holds_range = True

    @property
    def _width(self) -> int:
        return self.scheme.bits - int(self.scheme.signed)

    def encode(self, scale: Tensor) -> Tensor:
        return torch.log2(scale) + self._width

    def decode(self, step: Tensor) -> Tensor:
        exponent: Tensor = _Ceiling.apply(step.clamp(_LEAST, _MOST))
        return torch.exp2(exponent - self._width)

    def gain(self, x: Tensor) -> float:
        return 1.0


class TQTTensor(_Threshold, LearnedTensor):
    """The quantizer of a tensor whose parameter ``step`` is log2 of its threshold."""


class TQTWeight(_Threshold, LearnedWeight):
    """The quantizer of a weight whose parameter ``step`` is log2 of its thresholds."""


register("tqt", tensor=TQTTensor, weight=TQTWeight, rounding="float")
