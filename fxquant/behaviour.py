"""The closed set of behaviours: all that a pass may know of an op.

====================  ==================================================================================
``Weighted``          multiplies by parameters and accumulates wide; absorbs a per-channel affine and a clamp
``ChannelAffine``     y = k·x + c per channel, k and c known in eval mode; folds into a Weighted or stands alone
``Rescaling``         its result has a range of its own: it gets an output quantizer
``Passing``           values pass through: the output shares the input's quantizer
``Clamping``          passing, but narrows the range; merges into its producer
``Bounded``           output range known in advance: a fixed quantizer, nothing observed
``Measuring``         reads shapes or dtypes, no values: stays as it is and needs nothing
``FloatOnly``         stays in float, for a reason that the report shows
====================  ==================================================================================

Adding an op takes one of these; adding a behaviour is a design event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fxquant.errors import Refusal

__all__ = [
    "Behaviour",
    "Bounded",
    "ChannelAffine",
    "Clamping",
    "FloatOnly",
    "Measuring",
    "Passing",
    "Rescaling",
    "Weighted",
]


@dataclass(frozen=True)
class Behaviour:
    """The root; never used itself."""


@dataclass(frozen=True)
class Weighted(Behaviour):
    """Args:
    out_axis: the axis of the weight that runs over output channels (within a group).
    channels_last: channels are the last axis of input and output, and not axis 1 whatever their number of dimensions.
    """

    out_axis: int = 0
    channels_last: bool = False


@dataclass(frozen=True)
class ChannelAffine(Behaviour):
    """Batch normalization in eval mode, and whatever else is an affine map per channel (axis 1)."""


@dataclass(frozen=True)
class Rescaling(Behaviour):
    """Args: ``inputs``: the operands that must be quantized; None for all of them."""

    inputs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Passing(Behaviour):
    """Args: ``joins``: several inputs become one output, so that all of them share one quantizer."""

    joins: bool = False


@dataclass(frozen=True)
class Clamping(Behaviour):
    """Args: ``bounds``: from a ``Call`` to its ``(lower, upper)``, None where open; or a ``Refusal``."""

    bounds: Callable[[Any], tuple[float | None, float | None] | Refusal]


@dataclass(frozen=True)
class Bounded(Behaviour):
    """Args: ``low``, ``high``: every result lies between them."""

    low: float
    high: float


@dataclass(frozen=True)
class Measuring(Behaviour):
    """Shapes, dtypes, devices and arithmetic on them."""


@dataclass(frozen=True)
class FloatOnly(Behaviour):
    """Args: ``reason``: why it stays in float, in words for the user."""

    reason: str
