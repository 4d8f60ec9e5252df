"""Which weights could overflow sums of products: in 32 bits anywhere, and where pairs are added in 16 bits first.

x86 without VNNI does that: ``vpmaddubsw`` computes ``u0·s0 + u1·s1`` of unsigned bytes ``u`` and signed bytes ``s`` and
saturates the sum at ``[-2^15, 2^15 - 1]``. With ``u ≤ 255`` no pair can reach that as long as ``s0 + s1`` stays within
``[-128, 128]``. Which weights meet is the kernel's own choice, so the two largest and the two smallest of an output channel
are taken.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, PMADDUBSW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.nn.accumulating import IntegerWeighted, channels_first, weight_rows
from fxquant.nn.integer import multiplies
from fxquant.numerics.scheme import Scheme

__all__ = [
    "INT32",
    "can_saturate",
    "largest_pair",
    "largest_sum",
    "narrowed_channels",
    "one_sided_sums",
    "saturating_layers",
]

INT32 = 2**31 - 1
_LIMIT = 128


def one_sided_sums(part: IntegerWeighted) -> tuple[Tensor, Tensor]:
    """Of each output channel, the sum of its positive weights, and that of its negative ones' magnitudes."""
    rows = weight_rows(part)
    return rows.clamp(min=0).sum(1, dtype=torch.int64), -rows.clamp(max=0).sum(1, dtype=torch.int64)


def largest_sum(part: IntegerWeighted) -> int:
    """The largest magnitude that the sum of products with unsigned bytes reaches, before a zero point is taken off."""
    return 255 * int(torch.maximum(*one_sided_sums(part)).max())


def largest_pair(weight: Tensor) -> int:
    """The largest magnitude that the sum of two weights of one sign in one output channel (axis 0) reaches."""
    rows = weight.flatten(1).to(torch.int32)
    count = min(2, rows.shape[1])
    high = rows.topk(count, dim=1).values.clamp(min=0).sum(1).max()
    low = rows.topk(count, dim=1, largest=False).values.clamp(max=0).sum(1).min()
    return max(int(high), -int(low))


def narrowed_channels(rows: Tensor, scheme: Scheme) -> int:
    """How many output channels, one per row, use less of their grid than a range read off the weights would have given them.

    One of zeros has no range. A weight with one scale for all of it is narrowed as a whole.
    """
    rows = rows.to(torch.int32)
    rows = rows if scheme.per_channel else rows.reshape(1, -1)
    full = (rows.amax(1) >= scheme.qmax) | (rows.amin(1) <= scheme.qmin)
    short = int((~full & (rows != 0).any(1)).sum())
    return short if scheme.per_channel else short * rows.shape[0]


def saturating_layers(module: nn.Module) -> dict[str, int]:
    """Layers of an integer model whose weights could overflow 16-bit sums, by path, with their largest pair.

    Only machines that add products so are concerned; there these layers run by the reference, unless their weights have
    at most seven bits, whose pairs reach 126.
    """
    layers: dict[str, Any] = {path: part for path, part in module.named_modules() if multiplies(part) == "weights"}
    pairs = {
        path: largest_pair(channels_first(part)) for path, part in layers.items() if part.weight.dtype == torch.int8
    }
    return {path: pair for path, pair in pairs.items() if pair > _LIMIT}


def can_saturate(weight: Tensor) -> bool:
    """Whether inputs exist for which a 16-bit sum of two products overflows with these int8 weights."""
    return largest_pair(weight) > _LIMIT
