"""LSQ: the scale is learned, from the rounding errors inside the range and from what is clipped beyond it.

Source: Esser et al., Learned Step Size Quantization, 1902.08153. Two things are otherwise than in the paper: the scale
starts where it makes the least squared error, since 2·E|x| / sqrt(qmax) is far too large above 4 bits; and a tensor with
numbers of both signs on an unsigned grid keeps the zero point that it started with.
"""

from __future__ import annotations

from fxquant.quantizers.learned import LearnedTensor, LearnedWeight
from fxquant.quantizers.registry import register

__all__ = ["LSQTensor", "LSQWeight"]


class LSQTensor(LearnedTensor):
    """The quantizer of a tensor whose scale is the parameter ``step``."""


class LSQWeight(LearnedWeight):
    """The quantizer of a weight whose scales are the parameter ``step``."""


register("lsq", tensor=LSQTensor, weight=LSQWeight)
