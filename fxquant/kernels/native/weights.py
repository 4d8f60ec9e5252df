"""Numbers of integer forms, laid out as the native kernels read them.

Signed integers are held 128 higher throughout, so every tensor is of unsigned bytes. Blocks are 16 output channels, a vector
of 32-bit sums. How wide a weight is, and how many blocks lie beside each other, the instruction set says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import Refusal
from fxquant.kernels.native.library import Library
from fxquant.nn.accumulating import IntegerSum
from fxquant.numerics.requantize import requantize

__all__ = [
    "Halves",
    "Rescaling",
    "addition",
    "channel_affine_numbers",
    "columns_weight",
    "dense_weight",
    "depthwise_weight",
    "folded_bias",
    "held",
    "in_order",
    "per_block",
    "rescaling_of",
    "interleaved",
    "words_weight",
]


_TYPE = {1: torch.int8, 2: torch.int16}


def held(part: Any) -> tuple[int, int, int]:
    """Zero point and bounds of a result as they are held."""
    shift = 128 * (part.output_dtype == torch.int8)
    return int(part.zero_point) + shift, int(part.low) + shift, int(part.high) + shift


def interleaved(values: Tensor) -> Tensor:
    """The last axis, of whole 64s, in the order in which unpacking bytes twice leaves them (see vectors.h)."""
    return values.unflatten(-1, (-1, 4, 4, 4)).transpose(-2, -3).flatten(-4).contiguous()


def per_block(values: Tensor, size: int, fill: int = 0) -> Tensor:
    """Values of channels, filled up to a multiple of ``size``."""
    return torch.nn.functional.pad(values, (0, -len(values) % size), value=fill)


@dataclass(frozen=True)
class Rescaling:
    """How sums of 32 bits become bytes; the rules are told in tensor.h.

    Attributes:
        rule: ``float32``, ``float64`` or ``integers``.
        channels: of each output channel, one number of that type, or q, r and s as int64 ``(channels, 3)``.
        magic: what the first two add.
        low, high: bounds.
    """

    rule: str
    channels: Tensor
    magic: float
    low: int
    high: int

    def laid_out(self, spread: Callable[[Tensor, int], Tensor]) -> Tensor:
        """The numbers as the kernels read them, where ``spread`` orders channels and fills them up to whole blocks."""
        if self.rule != "integers":
            return spread(self.channels, 0)
        columns = [spread(c, fill) for c, fill in zip(self.channels.unbind(1), (0, 0, 1), strict=True)]
        return torch.stack(columns, dim=1).reshape(-1, 8, 2, 3).permute(0, 2, 3, 1).contiguous()


def in_order(values: Tensor, channels: int, order: Tensor | None) -> Tensor:
    """One value, or one of each channel of a form, as one of each of the kernels' channels; ``order`` is ``AsImages``'."""
    flat = values.reshape(-1)
    return flat[order] if order is not None and len(flat) > 1 else flat.expand(channels)


def rescaling_of(
    part: Any,
    channels: int,
    largest: Tensor,
    ends: tuple[Tensor, Tensor] | None = None,
    order: Tensor | None = None,
) -> Rescaling:
    """How an integer form requantizes its sums.

    Args:
        part: the form.
        channels: how many it has.
        largest: of each channel, or of all, the magnitude that no sum can exceed, int64.
        ends: of each channel the least and the largest that a sum can be, int64; None where that is not known.
        order: of each channel, the form's own; None where they are the same.
    """
    if part.rounding != "single":
        raise Refusal(f"its recipe rounds as {part.rounding!r}")
    zero_point, low, high = held(part)
    multiplier, shift = (in_order(own, channels, order) for own in (part.multiplier, part.shift))
    q, s = multiplier.long(), 31 - shift.long()
    numbers = torch.ldexp(q.double(), -s)
    reach = largest * numbers
    if float(reach.max()) >= 2**30:
        raise Refusal("its scale and those of its operands are too far apart")
    # acc · q is an odd multiple of 2^(s - 1) only if both have that many factors of two together.
    twos = torch.where(q == 0, 0, torch.log2((q & -q).clamp(min=1).double()).long())
    if bool((twos + torch.frexp(largest.double()).exponent >= s).any()):
        never = reach < 0.5  # all of such a channel's sums round to nothing, and its s may be large
        q, s = q.masked_fill(never, 0), s.masked_fill(never, 1)
        r = (torch.ones_like(s) << (s - 1).clamp(max=54)) + (zero_point << s.clamp(max=54))
        if ends is not None and int(s.max()) > 54:
            # A dead channel: a bias beside which no weight counts, so that all of its sums give one integer.
            least, greatest = (requantize(end, multiplier, shift, axis=0) for end in ends)
            constant = (least == greatest) & (s > 54)
            r = torch.where(constant, (least + zero_point).clamp(low, high) << 1, r)
            q, s = q.masked_fill(constant, 0), s.masked_fill(constant, 1)
        if int(s.max()) > 54:
            raise Refusal("its scale and those of its operands are too far apart")
        return Rescaling("integers", torch.stack([q, r, s], dim=1), 0.0, low, high)
    single = numbers.float()
    if int(largest.max()) < 2**24 and float(reach.max()) < 2**15 - 256 and torch.equal(single.double(), numbers):
        return Rescaling("float32", single, 1.5 * 2**23 + zero_point, low, high)
    return Rescaling("float64", numbers, 1.5 * 2**52 + zero_point, low, high)


@dataclass(frozen=True)
class Halves:
    """Halves of weights that are multiplied apart from the others (see ``Step`` in tensor.h).

    Attributes:
        weight: int8 ``(number, 16, 4)``.
        four: which four channels each is of, int32.
        first: of each block and tap the number of the first one, int32, and how many there are.
    """

    weight: Tensor
    four: Tensor
    first: Tensor


_MOST_HALVES = 0.45
"""Of the fours of channels: with more, words are faster than bytes in pairs. Measured on mobilenet_v2's layers with AVX2:
bytes are 1.04 times as fast at 0.44, and 0.93 times at 0.60."""
_PAIR = 128
"""Two bytes of 255 by weights of one sign that sum to so much fit into 16 bits."""


def dense_weight(weight: Tensor, groups: int, library: Library) -> tuple[Tensor, Halves | None]:
    """Weights ``(channels, taps, depth)`` as tiles of blocks, ``[tap][four bytes of depth][block][16][four]`` each."""
    if library.pairs_of_bytes:
        found = _in_pairs(_by_blocks(weight.to(torch.int16), groups, 4))
        if found is not None:
            whole, halves = found
            return whole.permute(0, 2, 3, 1, 4).to(torch.int8).contiguous(), halves
    size = 4 // library.weight_size
    rows = _by_blocks(weight.to(_TYPE[library.weight_size]), groups, size)
    return _in_tiles(rows, groups, library), None


def words_weight(weight: Tensor, library: Library) -> Tensor:
    """Words ``(channels, positions, depth)`` as tiles of blocks, ``[position][two of depth][block][16][two]`` each."""
    return _in_tiles(_by_blocks(weight.to(torch.int16), 1, 2), 1, library)


def _in_tiles(rows: Tensor, groups: int, library: Library) -> Tensor:
    """Blocks of all groups, as many beside each other as a kernel multiplies at once."""
    tiles = [
        tile.permute(2, 3, 0, 1, 4).flatten()
        for own in rows.chunk(groups)
        for tile in own.split(library.blocks_together)
    ]
    return torch.cat(tiles).contiguous()


def _by_blocks(weight: Tensor, groups: int, size: int) -> Tensor:
    """Weights ``(channels, taps, depth)`` as ``(blocks of all groups, 16, taps, fours, size)``, filled up with zeros."""
    channels, taps, depth = weight.shape
    weight = weight.unflatten(0, (groups, channels // groups))
    filled = torch.nn.functional.pad(weight, (0, -depth % size, 0, 0, 0, -(channels // groups) % 16))
    return filled.reshape(-1, 16, taps, filled.shape[3] // size, size)


def _in_pairs(weight: Tensor) -> tuple[Tensor, Halves] | None:
    """Weights of which no two neighbours can leave 16 bits, and halves of those that could; None where those are many."""
    pairs = weight.unflatten(-1, (2, 2))
    leaves = (pairs.clamp(min=0).sum(-1) > _PAIR) | (pairs.clamp(max=0).sum(-1) < -_PAIR)
    half = torch.where(leaves[..., None], torch.div(pairs, 2, rounding_mode="trunc"), 0).flatten(-2)
    some = half.ne(0).any(-1).any(1)
    if float(some.float().mean()) > _MOST_HALVES:
        return None
    counts = some.sum(2).flatten().cumsum(0)
    first = torch.nn.functional.pad(counts, (1, 0)).to(torch.int32)
    four = some.nonzero()[:, 2].to(torch.int32)
    return weight - half, Halves(
        half.permute(0, 2, 3, 1, 4)[some].to(torch.int8).contiguous(), four.contiguous(), first
    )


def depthwise_weight(weight: Tensor, library: Library) -> tuple[Tensor, Tensor | None]:
    """Weights ``(channels, taps)`` as ``[64 channels][four taps][64][4]``, channels interleaved; see ``_fours``."""
    channels, taps = weight.shape
    weight = torch.nn.functional.pad(weight, (0, -taps % 4, 0, -channels % 64))
    return _fours(interleaved(weight.t()).t().reshape(-1, 64, weight.shape[1] // 4, 4).transpose(1, 2), library)


def columns_weight(weight: Tensor, library: Library) -> tuple[Tensor, Tensor | None]:
    """Weights ``(channels, 3, 3)``, channels whole 64s, as ``[64 channels][column][64][line]``; see ``_fours``.

    The fourth line is the second one again, which in pairs leaves it what the first one has no room for.
    """
    weight = interleaved(weight.permute(2, 1, 0)).permute(2, 0, 1).reshape(-1, 64, 3, 3).transpose(1, 2).to(torch.int16)
    first, second, third = weight.unbind(-1)
    own = _beside(second, first) if library.pairs_of_bytes else second
    return _fours(torch.stack([first, own, third, second - own], dim=-1), library)


def _fours(weight: Tensor, library: Library) -> tuple[Tensor, Tensor | None]:
    """Weights ``(blocks of 64 channels, number, 64, 4)`` as ``dot_taps`` reads them.

    Words are 16 times the even ones, then 16 times the odd ones. Bytes in pairs are what fits into 16 bits, then the rest.

    Returns:
        Them, and of each number which sixteens of channels have such a rest, int32 bits; None where there is none.
    """
    if library.weight_size == 1:
        return weight.to(torch.int8).contiguous(), None
    pairs = weight.to(torch.int16).unflatten(-1, (2, 2))
    if not library.pairs_of_bytes:
        return pairs.unflatten(-3, (4, 16)).movedim(-1, -3).contiguous(), None
    first, second = pairs.unbind(-1)
    own = torch.stack([first, _beside(second, first)], dim=-1)
    rest = (pairs - own).flatten(-2)
    some = rest.ne(0).unflatten(-2, (4, 16)).flatten(-2).any(-1)
    bits = (some * torch.tensor([1, 2, 4, 8])).sum(-1, dtype=torch.int32)
    return torch.stack([own.flatten(-2), rest], dim=2).to(torch.int8).contiguous(), bits


def _beside(weight: Tensor, other: Tensor) -> Tensor:
    """What of a weight fits into 16 bits beside another one, by bytes."""
    return torch.minimum(torch.maximum(weight, -_PAIR - other.clamp(max=0)), _PAIR - other.clamp(min=0))


def folded_bias(bias: Tensor | None, weight: Tensor, zero_point: int) -> Tensor:
    """The bias with what the held zero point of the input adds to each sum taken off, int64 ``(channels,)``."""
    own = torch.zeros(len(weight), dtype=torch.int64) if bias is None else bias.long()
    return own - zero_point * weight.flatten(1).sum(1, dtype=torch.int64)


def addition(part: IntegerSum, zero_points: tuple[int, int]) -> tuple[int, tuple[int, int], int, int, int]:
    """``(constant, q, shift, low, high)`` of a sum of two tensors with these held zero points."""
    if part.rounding == "float":
        raise Refusal("its recipe rounds as 'float'")
    zero_point, low, high = held(part)
    a, b, one = (int(q) for q in part.multipliers)
    shift = 31 - int(part.shift)
    constant = one - a * zero_points[0] - b * zero_points[1] + (1 << (shift - 1)) + (zero_point << shift)
    if not 17 <= shift <= 40 or abs(constant) >= 2**46:
        raise Refusal("the scales of its operands and of its result are too far apart")
    return constant, (a, b), shift, low, high


def channel_affine_numbers(gain: Tensor, offset: Tensor) -> Tensor:
    """Gains and offsets of channels, float64, as ``[64 channels][gain, offset][64]``, interleaved."""
    return torch.stack([interleaved(per_block(v, 64)).reshape(-1, 64) for v in (gain, offset)], dim=1).contiguous()
