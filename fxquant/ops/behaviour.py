"""``fxquant.behaviour``, where entries of the op table are written: all that a pass may know of an op."""

from __future__ import annotations

from fxquant.behaviour import (
    Behaviour,
    Bounded,
    ChannelAffine,
    Clamping,
    FloatOnly,
    Measuring,
    Passing,
    Rescaling,
    Weighted,
)

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
