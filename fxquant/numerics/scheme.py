"""What a quantized tensor looks like: bits, signedness, symmetry, granularity.

A scheme fixes the integer grid ``[qmin, qmax]``; ``affine`` turns an observed range into a scale and zero point on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fxquant.errors import SchemeError
from fxquant.numerics.estimator_names import ESTIMATORS, estimator_and_parameter

__all__ = ["ACTIVATION", "ESTIMATORS", "OBSERVED", "QUANTIZERS", "WEIGHT", "Scheme"]

OBSERVED = "observed"
"""The rule whose range is what the estimator finds in the values that pass."""

QUANTIZERS = {OBSERVED: "minmax"}
"""The names of quantizer rules, each with the estimator that it starts from where a scheme names none;
``fxquant.quantizers.register`` adds to them."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one kind of tensor is quantized.

    Example:
        >>> print(Scheme(bits=4, symmetric=True, signed=True))
        s4 symmetric per-tensor

    Args:
        bits: width of the integer, 2 to 16.
        symmetric: the zero point is fixed (0 for signed grids, ``2**(bits-1)`` for unsigned ones); otherwise it is chosen
            from the range (affine).
        signed: the grid is ``[-2**(bits-1), 2**(bits-1)-1]``; otherwise ``[0, 2**bits-1]``.
        per_channel: one scale per slice along the tensor's channel axis (weights only); otherwise one per tensor.
        narrow_range: drop the lowest level, so that a signed grid is ``[-qmax, qmax]``.
        estimator: how the range is found: ``minmax``, ``moving_average``, ``percentile`` (99.99) or ``percentile:99.9``,
            ``mse`` (the norm 2.4) or ``lp:2`` (any norm), ``kl`` (TensorRT's entropy calibration); ``auto``, which
            chooses for each tensor, while calibrating, the one with which the layers that read it lose least; or one
            that was registered. Left out, it is the quantizer's choice: ``minmax`` if ranges are observed, ``mse`` if
            learned.
        quantizer: the rule that makes scale and rounding: ``observed`` follows the estimator's range; ``lsq``, ``tqt`` and
            others learn it (``fxquant.quantizers`` has them all), or one that was registered.

    Raises:
        SchemeError: when the settings cannot describe a grid.
    """

    bits: int = 8
    symmetric: bool = False
    signed: bool = False
    per_channel: bool = False
    narrow_range: bool = False
    estimator: str = ""
    quantizer: str = OBSERVED

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 16:
            raise SchemeError(f"bits={self.bits!r}: fxquant quantizes to 2…16 bits. Give an int in that range.")
        if self.quantizer not in QUANTIZERS:
            raise SchemeError(_unknown("quantizer", self.quantizer, QUANTIZERS, "fxquant.quantizers.register"))
        if not self.estimator:
            object.__setattr__(self, "estimator", QUANTIZERS[self.quantizer])
        if estimator_and_parameter(self.estimator)[0] == "kl" and self.per_channel:
            raise SchemeError(
                "estimator='kl' with per_channel=True: a channel of a weight is too few numbers for a histogram of 2048 "
                "bins. Choose minmax, mse or lp:P for weights; kl is for tensors between ops."
            )
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

    @classmethod
    def weight(cls, bits: int = 8, **others: Any) -> Scheme:
        """The scheme of weights: signed, symmetric, one scale per channel, without the lowest integer.

        Args:
            bits: width of the integer, 2 to 16.
            others: fields that are to be otherwise, such as ``per_channel=False`` or ``estimator="mse"``.

        Example:
            >>> print(Scheme.weight(4))
            s4 symmetric per-channel narrow

        Raises:
            SchemeError: as of ``Scheme``.
        """
        usual = {
            "symmetric": True,
            "signed": True,
            "per_channel": True,
            "narrow_range": bool(others.get("signed", True)),
        }
        return cls(**{"bits": bits, **usual, **others})

    @classmethod
    def activation(cls, bits: int = 8, **others: Any) -> Scheme:
        """The scheme of tensors between ops: unsigned affine, one scale for all.

        Example:
            >>> print(Scheme.activation(8, signed=True))
            s8 affine per-tensor

        Args:
            bits: width of the integer, 2 to 16.
            others: fields that are to be otherwise, such as ``signed=True`` or ``estimator="percentile"``.

        Raises:
            SchemeError: as of ``Scheme``.
        """
        return cls(**{"bits": bits, **others})

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
        rule = "" if self.quantizer == OBSERVED else f" {self.quantizer}"
        narrow = " narrow" if self.narrow_range else ""
        return f"{kind} {'symmetric' if self.symmetric else 'affine'} {shape}{narrow}{rule}"


def _unknown(kind: str, name: object, known: Iterable[str], register: str) -> str:
    return (
        f"{kind}={name!r} is not known. Choose one of {', '.join(known)}.\n"
        f"  what to do: if it is one of your own, call {register} before it is named (in a new process too, before load)."
    )


ACTIVATION = Scheme(bits=8)
"""Unsigned affine per tensor: zero point 0 after a ReLU, the form that x86 and ARM integer kernels take."""

WEIGHT = Scheme(bits=8, symmetric=True, signed=True, per_channel=True, narrow_range=True)
"""Signed symmetric per output channel, ``[-127, 127]``."""
