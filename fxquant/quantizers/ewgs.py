"""EWGS: LSQ's range, with each gradient scaled by how far its number was rounded.

A gradient that pulls a number over the middle between two levels grows with the distance to its level; one that pushes it
back shrinks. Source: Lee et al., Network Quantization with Element-wise Gradient Scaling, 2104.00903, eq. 3.
"""

from __future__ import annotations

from fxquant.numerics.learned_rounding import GradientRule
from fxquant.quantizers.lsq import LSQTensor, LSQWeight
from fxquant.quantizers.registry import register

__all__ = ["EWGSTensor", "EWGSWeight"]

_ELEMENT_GAIN = 1e-3
"""δ as a constant, the paper's value where it is not taken from the Hessian. A subclass may set another."""


class EWGSTensor(LSQTensor):
    """The quantizer of a tensor."""

    gradients = GradientRule(element_gain=_ELEMENT_GAIN)


class EWGSWeight(LSQWeight):
    """The quantizer of a weight."""

    gradients = GradientRule(element_gain=_ELEMENT_GAIN)


register("ewgs", tensor=EWGSTensor, weight=EWGSWeight)
