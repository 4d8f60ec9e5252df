"""Requantization: an integer times a real number, rounded to an integer, in integer arithmetic.

    m = Q · 2^(e - 31),   2^30 ≤ Q < 2^31            a multiplier: up to 31 significant bits Q and a shift e

    single:  floor((a · Q + 2^(30 - e)) / 2^(31 - e))           one rounding, ties towards +∞
    double:  R(H(a · 2^max(e, 0), Q), max(-e, 0))               two roundings
             H(a, b) = round(a · b / 2^31)                      ties towards +∞
             R(a, n) = round(a / 2^n)                           ties away from zero
    float:   round(a · m)                                       float64, ties to even

``single`` and ``double`` are bit-exact with the two builds of TFLite, ``float`` is what runtimes with a floating-point
epilogue do. Multipliers of 24 bits (``SIGNIFICANT_BITS``) are odd unless a quotient of scales has fewer bits, so that no sum
is a tie: with ``|a| < 2^24`` a float32 fused multiply-add gives what ``single`` gives. Adding the output zero point and
clamping to the grid is left to the caller.
A product of more than 63 bits does not fit into an int64, so wide accumulators are split into two limbs (``_scaled``).
Source: Jacob et al., 1712.05877, §2.2; gemmlowp fixedpoint.h and the TFLite kernels define the rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.errors import SchemeError
from fxquant.numerics.affine import broadcast

__all__ = ["ROUNDINGS", "SIGNIFICANT_BITS", "combine", "common_multipliers", "quantize_multiplier", "requantize"]

SIGNIFICANT_BITS = {"single": 24, "double": 31, "float": 31}
"""Of the multipliers that the integer forms use with each rounding."""
ROUNDINGS = tuple(SIGNIFICANT_BITS)

_INT32_MAX = 2**31 - 1
_INT32_MIN = -(2**31)


def quantize_multiplier(m: Tensor, bits: int = 31) -> tuple[Tensor, Tensor]:
    """``(Q, e)`` with ``m ≈ Q · 2^(e - 31)``.

    Args:
        m: positive finite numbers of any shape; they are read as float64.
        bits: significant bits of ``Q``, at most 31; those below are 0. With 31, ``Q`` is the nearest number. With fewer, a
            number that does not fit becomes the odd one of its two neighbours: sums times an odd ``Q`` are no ties, so
            that rounding in floating point and in integers agrees.

    Returns:
        ``Q`` in ``[2^30, 2^31 - 1]`` and ``e``, int64, of the shape of ``m``. Where ``m < 2^-32`` both are 0; above
        ``2^30`` they are the largest pair, ``(2^31 - 1, 30)``.

    Raises:
        SchemeError: where ``m`` is negative, infinite or NaN.
    """
    m = m.double()
    if not bool((torch.isfinite(m) & (m >= 0)).all()):
        raise SchemeError(
            f"requantization multipliers must be finite and not negative, got {_examples(m)}. They are quotients of "
            "scales: check that every scale is finite and positive."
        )
    fraction, exponent = torch.frexp(m)
    scaled, shift = fraction * 2.0**bits, exponent.long()
    below = torch.floor(scaled)
    q = torch.floor(scaled + 0.5).long() if bits == 31 else below.long() | (scaled > below).long()
    q = q << (31 - bits)
    carried = q == 2**31
    q, shift = torch.where(carried, q // 2, q), torch.where(carried, shift + 1, shift)
    tiny, huge = (shift < -31) | (q == 0), shift > 30
    q = q.masked_fill(tiny, 0).masked_fill(huge, _INT32_MAX)
    return q, shift.masked_fill(tiny, 0).clamp(max=30)


def requantize(
    acc: Tensor, multiplier: Tensor, shift: Tensor, *, axis: int | None = None, rounding: str = "single"
) -> Tensor:
    """``round(acc · Q · 2^(e - 31))`` as int64.

    Args:
        acc: integers of any shape. ``single`` is exact while ``|acc| < 2^62`` and the result is below ``2^62``.
            ``double`` is exact for ``|acc| < 2^31`` and agrees with TFLite wherever its int32 arithmetic does not
            overflow. ``float`` rounds the float64 product: exact for ``|acc| < 2^22``, beyond that a product may be
            taken for a tie. An int32 tensor takes a shorter way to the same result.
        multiplier, shift: what :func:`quantize_multiplier` gives, of one element or ``(C,)`` along ``axis``.
        axis: the channel axis of ``acc``.
        rounding: one of ``ROUNDINGS``.

    Raises:
        SchemeError: where ``rounding`` is not known.
    """
    q, e = broadcast(multiplier, acc.ndim, axis), broadcast(shift, acc.ndim, axis)
    if rounding == "single":
        if acc.dtype == torch.int32:
            return _round_half_up(acc.long() * q, 31 - e)
        return _scaled(acc.long(), q, 31 - e)
    acc = acc.long()
    if rounding == "double":
        high = _scaled(acc << e.clamp(min=0), q, torch.full_like(e, 31))
        return _round_half_away(high, (-e).clamp(min=0))
    if rounding == "float":
        return torch.round(acc.double() * torch.ldexp(q.double(), e - 31)).long()
    raise SchemeError(f"rounding={rounding!r} is not known. Choose one of {', '.join(ROUNDINGS)}.")


def common_multipliers(m: Tensor) -> tuple[Tensor, Tensor]:
    """``(Q, e)`` with ``m_i ≈ Q_i · 2^(e - 31)`` and one shift for all, for :func:`combine`.

    Args:
        m: finite numbers of either sign, ``(n,)``, read as float64.

    Returns:
        ``Q`` int64 ``(n,)``, ``|Q| ≤ 2^31 - 1``, 31 significant bits for the largest, and ``e`` int64 of shape ``()``.
        Each ``m_i`` is off by at most ``2^(e - 32)``, which is ``2^-31`` of the largest.

    Raises:
        SchemeError: where ``m`` is infinite or NaN.
    """
    m = m.double()
    if not bool(torch.isfinite(m).all()):
        raise SchemeError(f"multipliers must be finite, got {_examples(m)}. Check the scales they come from.")
    _, shift = quantize_multiplier(m.abs().amax())
    return torch.round(torch.ldexp(m, 31 - shift)).long().clamp(-_INT32_MAX, _INT32_MAX), shift


def combine(integers: Sequence[Tensor], multipliers: Tensor, shift: Tensor, *, rounding: str = "single") -> Tensor:
    """``round(Σ_i d_i · Q_i · 2^(e - 31))`` as int64, with one rounding at the end: an integer addition.

    Args:
        integers: ``d_i``, integers with ``Σ |d_i| < 2^31``, of shapes that broadcast.
        multipliers, shift: what :func:`common_multipliers` gives.
        rounding: ``single`` and ``double`` both round the exact sum once, ties towards +∞; ``float`` rounds it half to
            even.

    Raises:
        SchemeError: where ``rounding`` is not known.
    """
    if rounding not in ROUNDINGS:
        raise SchemeError(f"rounding={rounding!r} is not known. Choose one of {', '.join(ROUNDINGS)}.")
    total = integers[0].long() * multipliers[0]
    for d, q in zip(integers[1:], multipliers[1:], strict=True):
        total = total + d.long() * q
    bits = 31 - shift
    if rounding == "float":
        return _round_half_even(total, bits)
    return _round_half_up(total, bits)


def _scaled(a: Tensor, q: Tensor, bits: Tensor) -> Tensor:
    """``floor(a · q / 2^bits + 1/2)`` for ``bits ≥ 1`` without the whole product.

    With ``a = h · 2^k + l``, ``k = min(bits, 31)`` and ``0 ≤ l < 2^k``, the floor of the sum may be taken limb by limb:
    ``floor((h · q + floor((l · q + 2^(bits-1)) / 2^k)) / 2^(bits-k))``, and every term stays below ``2^63``.
    """
    k = bits.clamp(max=31)
    one = torch.ones_like(bits)
    low = ((a & ((one << k) - 1)) * q + (one << (bits - 1))) >> k
    return ((a >> k) * q + low) >> (bits - k)


def _round_half_up(a: Tensor, bits: Tensor) -> Tensor:
    """``a / 2^bits`` rounded, ties towards +∞; ``bits ≥ 1`` and ``|a| ≤ 2^62``."""
    return (a + (torch.ones_like(bits) << (bits - 1))) >> bits


def _round_half_even(a: Tensor, bits: Tensor) -> Tensor:
    """``a / 2^bits`` rounded, ties to even; ``bits ≥ 1`` and ``|a| ≤ 2^62``."""
    half = torch.ones_like(bits) << (bits - 1)
    rounded = (a + half) >> bits
    is_tie = (a & (2 * half - 1)) == half
    return rounded - (is_tie & (rounded & 1).bool()).long()


def _round_half_away(a: Tensor, bits: Tensor) -> Tensor:
    """``a / 2^bits`` rounded, ties away from zero; ``bits ≥ 0``."""
    rest_mask = (torch.ones_like(bits) << bits) - 1
    threshold = (rest_mask >> 1) + (a < 0).long()
    return (a >> bits) + ((a & rest_mask) > threshold).long()


def _examples(m: Tensor) -> str:
    """The first offending numbers, for a message."""
    flat = m.reshape(-1)
    bad = flat[~torch.isfinite(flat) | (flat < 0)][:3].tolist()
    return ", ".join(f"{v:g}" for v in bad)
