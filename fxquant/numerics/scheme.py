"""What a quantized tensor looks like: bits, signedness, symmetry, granularity.

A scheme fixes the integer grid ``[qmin, qmax]``; ``affine`` turns an observed range into a scale and zero point on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxquant.errors import SchemeError

__all__ = ["ACTIVATION", "ESTIMATORS", "WEIGHT", "Scheme"]

ESTIMATORS = ("minmax", "moving_average", "percentile", "mse")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one kind of tensor is quantized.

    Args:
        bits: width of the integer, 2 to 16.
        symmetric: the zero point is fixed (0 for signed grids, ``2**(bits-1)`` for unsigned ones); otherwise it is chosen
            from the range (affine).
        signed: the grid is ``[-2**(bits-1), 2**(bits-1)-1]``; otherwise ``[0, 2**bits-1]``.
        per_channel: one scale per slice along the tensor's channel axis (weights only); otherwise one per tensor.
        narrow_range: drop the lowest level, so that a signed grid is ``[-qmax, qmax]``.
        estimator: how the range is found: ``minmax``, ``moving_average``, ``percentile`` or ``mse``.

    Raises:
        SchemeError: when the settings cannot describe a grid.
    """

    bits: int = 8
    symmetric: bool = False
    signed: bool = False
    per_channel: bool = False
    narrow_range: bool = False
    estimator: str = "minmax"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 16:
            raise SchemeError(f"bits={self.bits!r}: fxquant quantizes to 2…16 bits. Give an int in that range.")
        if self.estimator not in ESTIMATORS:
            raise SchemeError(f"estimator={self.estimator!r} is not known. Choose one of {', '.join(ESTIMATORS)}.")
        if self.per_channel and not self.symmetric:
            raise SchemeError(
                "per_channel=True with symmetric=False: integer kernels need zero point 0 on every channel. "
                "Set symmetric=True, or per_channel=False."
            )
        if self.narrow_range and not self.signed:
            raise SchemeError(
                "narrow_range=True with signed=False: dropping the lowest level makes a signed grid even around zero "
                "and only wastes a level of an unsigned one. Set signed=True, or narrow_range=False."
            )

    @property
    def qmin(self) -> int:
        """The smallest integer of the grid."""
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + int(self.narrow_range)

    @property
    def qmax(self) -> int:
        """The largest integer of the grid."""
        return (1 << (self.bits - int(self.signed))) - 1

    @property
    def storage_dtype(self) -> torch.dtype:
        """The smallest torch dtype that holds every integer of the grid."""
        if self.bits <= 8:
            return torch.int8 if self.signed else torch.uint8
        return torch.int16 if self.signed or self.bits < 16 else torch.int32

    def __str__(self) -> str:
        kind = f"{'s' if self.signed else 'u'}{self.bits}"
        shape = "per-channel" if self.per_channel else "per-tensor"
        return f"{kind} {'symmetric' if self.symmetric else 'affine'} {shape}{' narrow' if self.narrow_range else ''}"


ACTIVATION = Scheme(bits=8)
"""Unsigned affine per tensor: zero point 0 after a ReLU, the form that x86 and ARM integer kernels take."""

WEIGHT = Scheme(bits=8, symmetric=True, signed=True, per_channel=True, narrow_range=True)
"""Signed symmetric per output channel, ``[-127, 127]``."""
