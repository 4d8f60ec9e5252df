"""Which weights could overflow where products of bytes are added in pairs in 16 bits: x86 without VNNI.

There ``vpmaddubsw`` computes ``u0·s0 + u1·s1`` of unsigned bytes ``u`` and signed bytes ``s`` and saturates the sum at
``[-2^15, 2^15 - 1]``. With ``u ≤ 255`` no pair can reach that as long as ``s0 + s1`` stays within ``[-128, 128]``. Which
weights meet is the kernel's own choice, so the two largest and the two smallest of an output channel are taken.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, PMADDUBSW.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["can_saturate", "largest_pair"]

_LIMIT = 128


def largest_pair(weight: Tensor) -> int:
    """The largest magnitude that the sum of two weights of one sign in one output channel (axis 0) reaches."""
    rows = weight.flatten(1).to(torch.int32)
    count = min(2, rows.shape[1])
    high = rows.topk(count, dim=1).values.clamp(min=0).sum(1).max()
    low = rows.topk(count, dim=1, largest=False).values.clamp(max=0).sum(1).min()
    return max(int(high), -int(low))


def can_saturate(weight: Tensor) -> bool:
    """Whether inputs exist for which a 16-bit sum of two products overflows with these int8 weights."""
    return largest_pair(weight) > _LIMIT
