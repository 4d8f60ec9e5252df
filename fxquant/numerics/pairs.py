"""Sums of two products in 16 bits: which weights leave them, and how much coarser a scale has to be so that none does.

x86 without dot products multiplies unsigned bytes ``u`` by signed bytes ``q`` and adds neighbours in 16 bits, with
saturation (``vpmaddubsw``). Which two products of an output channel meet is the kernel's choice (neighbouring taps, or
neighbouring input channels), so a channel is safe where the two largest products of one sign fit:

    P = max over i ≠ j of  u_i·|q_i| + u_j·|q_j|,   q_i and q_j of one sign,   P ≤ 2^15 - 1

``u_i`` is the largest byte that input channel i is expected to hold, its *reach*. With weights ``x = w / s`` before
rounding, a scale that is ``f`` times as large gives ``|q| ≤ |x|/f + 1/2``, hence ``P ≤ P(x)/f + U`` with ``U`` the largest
reach, and

    f = P(x) / (2^15 - 1 - U)

is enough: at most about 2 (one bit), since a single product of bytes always fits.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, PMADDUBSW.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.gradients import traces
from fxquant.numerics.scheme import Scheme

__all__ = ["LIMIT", "channel_pairs", "largest_byte", "reach_of", "scale_factor", "two_largest"]

LIMIT = 2**15 - 1
"""The largest sum that 16 bits hold; one more below zero, which nothing here uses."""
_FLOOR = 32
_BLOCK, _FEW = 16, 128
_STEPS = 12
"""Halvings of the interval of factors, for weights that a range estimator clips."""


def largest_byte(scheme: Scheme) -> int:
    """The largest unsigned byte in which a kernel holds integers of ``scheme``; 0 where they take more than a byte."""
    return 0 if scheme.bits > 8 else scheme.qmax + _offset(scheme)


def _offset(scheme: Scheme) -> int:
    """What kernels of unsigned bytes add to signed integers."""
    return 128 if scheme.signed else 0


def reach_of(high: Tensor, samples: int, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """The largest byte that a channel is expected to hold.

    What unseen data may add to the largest of ``samples`` falls with their number: above the byte of zero (which padding
    shows), 1 + 2/√samples times as much, and an eighth of the grid at least, since a channel that none of them excited is
    not known to stay silent. It only matters where two bytes beyond this meet under the two largest weights of a channel.

    Args:
        high: the largest real number that calibration saw, channel by channel.
        samples: of how many rows of a batch.
        scale, zero_point, scheme: the grid of the input.
    """
    above = (high.clamp(min=0) / scale * (1 + 2 * samples**-0.5)).clamp(min=_FLOOR)
    return (zero_point + _offset(scheme) + above).ceil().clamp(max=largest_byte(scheme))


def two_largest(rows: Tensor, sign: int = 1) -> Tensor:
    """The sum of the two largest numbers of each row of ``sign * rows``, ``(R, K)``, negative ones counted as 0.

    Maxima of strided blocks first, which vectorizes: of the block with the largest each number is a candidate, of the
    others their maximum. Forty times as fast as ``topk`` on rows of thousands.
    """
    count = rows.shape[1] // _BLOCK
    if rows.shape[1] < _FEW:
        return (rows * sign).topk(min(2, rows.shape[1]), dim=1).values.clamp(min=0).sum(1)
    blocks = rows[:, : count * _BLOCK].unflatten(1, (_BLOCK, count))
    largest = blocks.amax(1) if sign > 0 else -blocks.amin(1)
    which = largest.argmax(1, keepdim=True)
    members = blocks.gather(2, which.unsqueeze(1).expand(-1, _BLOCK, 1)).squeeze(2)
    others = largest.scatter(1, which, float("-inf"))
    return two_largest(torch.cat([others, members * sign, rows[:, count * _BLOCK :] * sign], 1))


def channel_pairs(weight: Tensor, reach: Tensor, out_axis: int) -> Tensor:
    """``P`` of each output channel, for weights that are integers or real numbers.

    Args:
        weight: as its op takes it: ``(O, I, ...)`` where ``out_axis`` is 0, ``(C, O, ...)`` where it is 1.
        reach: ``(groups, I)``, the largest byte of each input channel, group by group.
        out_axis: the axis of the weight that runs over output channels.

    Returns:
        ``(channels along out_axis,)``; over all groups where these share them.
    """
    groups, each = reach.shape
    if out_axis == 0:
        rows = weight.reshape(groups, -1, each, weight[0, 0].numel())
    else:
        rows = weight.reshape(groups, each, weight.shape[1], -1).transpose(1, 2)
    first = reach.flatten()[0]
    same = not traces() and reach.device.type == "cpu" and bool((reach == first).all())
    if not same:
        rows = rows * reach[:, None, :, None].to(rows.dtype)
    rows = rows.flatten(2).flatten(0, 1)
    found = torch.maximum(two_largest(rows), two_largest(rows, -1))
    found = found * first.to(found.dtype) if same else found
    return found if out_axis == 0 else found.unflatten(0, (groups, -1)).amax(0)


def scale_factor(
    weight: Tensor, scale: Tensor, reach: Tensor, *, out_axis: int, qmin: int, qmax: int, clipped: bool
) -> Tensor:
    """What each scale has to be multiplied by so that no pair leaves 16 bits; 1 where none does.

    Args:
        weight, reach, out_axis: as of ``channel_pairs``.
        scale: ``()`` or one for each channel along ``out_axis``.
        qmin, qmax: bounds of the grid, around zero point 0.
        clipped: whether weights may lie beyond the grid, so that a larger scale also brings them back into it.

    Returns:
        of the shape of ``scale``.
    """
    room = float(LIMIT - 1) - (reach.max() if traces() else float(reach.max()))

    def needed(x: Tensor, unit: Tensor) -> Tensor:
        pairs = channel_pairs(x, reach, out_axis) / unit
        return pairs if scale.ndim else pairs.amax()

    factor = (needed(weight, scale) / room).clamp(min=1.0)
    if not clipped or (not traces() and not bool((factor > 1).any())):
        return factor
    shape = [1] * weight.ndim
    if scale.ndim:
        shape[out_axis] = -1

    def fits(factor: Tensor) -> Tensor:
        x = (weight / (scale * factor).reshape(shape)).clamp(qmin, qmax)
        return needed(x, torch.ones_like(scale)) <= room

    low = torch.ones_like(factor)
    factor = torch.where(fits(low), low, factor)
    for _ in range(_STEPS):
        middle = (low + factor) / 2
        enough = fits(middle)
        low, factor = torch.where(enough, low, middle), torch.where(enough, middle, factor)
    return factor
