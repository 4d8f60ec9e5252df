"""Layers over lines and volumes, transposed ones and ones with other paddings, as convolutions over images.

The products are the same, in another order, so the integers are. What is needed around the convolution moves numbers:

- over lines: images of one line;
- over volumes: of each plane of the result, the planes that its window sees, as channels beside each other; a window of one
  pixel by several planes sees an image whose lines are planes;
- transposed with stride s: s * s convolutions of the window's every s-th taps, whose results lie between each other (Shi et
  al., "Is the deconvolution layer the same as a convolutional layer?", 1609.07009);
- a padding that a kernel does not have is written before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.errors import InputError, Refusal
from fxquant.kernels.weighted import Geometry
from fxquant.nn.accumulating import IntegerWeighted, channels_first, padding_sides

__all__ = ["AsImages", "Moves", "as_images"]


class Moves(Protocol):
    """What a plan does with numbers that move."""

    def own(self, x: Tensor) -> Tensor:
        """A tensor whose memory is to be the plan's."""

    def copy(self, x: Tensor, y: Tensor) -> Tensor:
        """Copy bytes to a view of a tensor of the plan's, of the same shape."""

    def fill(self, value: int, y: Tensor) -> None:
        """Write one byte everywhere in a view of a tensor of the plan's."""

    def gathered(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """What a function gives that takes each axis by itself."""


Before = Callable[[Moves, Tensor], Tensor]
After = Callable[[Moves, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AsImages:
    """A layer as the kernels compute it.

    Attributes:
        weight: int8 ``(channels, depth, height, width)``, of a linear layer ``(channels, depth)``.
        geometry: of the convolution.
        order: of each of these channels, the layer's own; None where they are the same.
        before: makes images of the layer's input; None where it has them.
        after: makes the layer's result of images and of its input; None where it is one.
        copies: whether ``after`` does so in other memory.
    """

    weight: Tensor
    geometry: Geometry
    order: Tensor | None = None
    before: Before | None = None
    after: After | None = None
    copies: bool = False


def as_images(part: IntegerWeighted, zero_point: int) -> AsImages:
    """The layer ``part``, whose input has this zero point as held.

    Raises:
        Refusal: it is transposed, dilated and strided.
    """
    if part.behaviour.channels_last:
        return AsImages(channels_first(part), Geometry([1, 1], [0, 0], [1, 1], 1))
    return _transposed(part, zero_point) if part.behaviour.out_axis else _convolution(part, zero_point)


def _each(value: Any, dims: int) -> list[int]:
    return [int(value)] * dims if isinstance(value, int) else [int(v) for v in value]


# ---- convolutions


def _convolution(part: IntegerWeighted, zero_point: int) -> AsImages:
    attributes, weight = part.attributes, part.weight
    dims, groups = weight.ndim - 2, int(attributes.get("groups", 1))
    stride, dilation = (_each(attributes.get(name, 1), dims) for name in ("stride", "dilation"))
    padding, written = _paddings(attributes, weight.shape[2:], dilation)
    mode = attributes.get("padding_mode", "zeros")

    def padded(moves: Moves, x: Tensor) -> Tensor:
        return _written(moves, x, written, mode, zero_point) if any(map(any, written)) else x

    if dims == 2:
        geometry = Geometry(stride, padding, dilation, groups)
        return AsImages(weight, geometry, None, padded if any(map(any, written)) else None)
    if dims == 1:
        geometry = Geometry([1, *stride], [0, *padding], [1, *dilation], groups)
        return AsImages(
            weight.unsqueeze(2),
            geometry,
            before=lambda moves, x: padded(moves, x).unsqueeze(2),
            after=lambda moves, y, x: y.squeeze(2),
        )
    return _over_volumes(weight, _Window(stride, padding, dilation), groups, padded, written, zero_point)


Sides = list[tuple[int, int]]


def _paddings(attributes: dict[str, Any], kernel: Sequence[int], dilation: Sequence[int]) -> tuple[list[int], Sides]:
    """What a kernel takes for outside on both sides of each axis, and what must be written before and behind."""
    sides = padding_sides(attributes.get("padding", 0), kernel, dilation)
    if attributes.get("padding_mode", "zeros") != "zeros":
        return [0] * len(kernel), sides
    return [left for left, _ in sides], [(0, right - left) for left, right in sides]


def _written(moves: Moves, x: Tensor, sides: Sides, mode: str, zero_point: int) -> Tensor:
    """``x`` with a border."""
    amounts = [amount for side in reversed(sides) for amount in side]
    if mode == "zeros":
        return moves.gathered(x, lambda t: F.pad(t, amounts, value=zero_point))
    return moves.gathered(x, lambda t: F.pad(t.float(), amounts, mode=mode).to(t.dtype))


# ---- over volumes


@dataclass(frozen=True)
class _Window:
    stride: list[int]
    padding: list[int]
    dilation: list[int]


def _over_volumes(
    weight: Tensor, window: _Window, groups: int, padded: Before, written: Sides, zero_point: int
) -> AsImages:
    deep, *kernel = weight.shape[2:]
    (step, *stride), (pad, *padding), (gap, *dilation) = window.stride, window.padding, window.dilation
    if kernel == [1, 1] and stride == [1, 1] and padding == [0, 0]:
        more = sum(written[2])
        return AsImages(
            weight.flatten(3),
            Geometry([step, 1], [pad, 0], [gap, 1], groups),
            before=lambda moves, x: padded(moves, x).flatten(3),
            after=lambda moves, y, x: y.unflatten(3, (-1, x.shape[4] + more)),
        )

    def planes(moves: Moves, x: Tensor) -> Tensor:
        return _seen_planes(moves, padded(moves, x), _Axis(deep, step, pad, gap), groups, zero_point)

    return AsImages(
        weight.transpose(1, 2).flatten(1, 2),
        Geometry(stride, padding, dilation, groups),
        before=planes,
        after=lambda moves, y, x: y.unflatten(0, (x.shape[0], -1)).transpose(1, 2),
    )


@dataclass(frozen=True)
class _Axis:
    kernel: int
    stride: int
    padding: int
    dilation: int


def _seen_planes(moves: Moves, x: Tensor, axis: _Axis, groups: int, zero_point: int) -> Tensor:
    """Of each plane of the result the planes of ``x`` that its window sees, as channels of an image."""
    n, channels, depth, height, width = x.shape
    count = (depth + 2 * axis.padding - axis.dilation * (axis.kernel - 1) - 1) // axis.stride + 1
    if count < 1:
        raise InputError(f"a window of {axis.kernel} planes is larger than its input of {list(x.shape)}.")
    if axis == _Axis(1, 1, 0, axis.dilation) and (n == 1 or x.stride(0) == depth * x.stride(2)):
        return x.transpose(1, 2).flatten(0, 1)
    seen = moves.own(torch.empty((n, count, height, width, groups, axis.kernel, channels // groups), dtype=torch.uint8))
    source = x.unflatten(1, (groups, -1)).permute(0, 3, 4, 5, 1, 2)
    for tap in range(axis.kernel):
        first = tap * axis.dilation - axis.padding
        low = min(count, max(0, -(first // axis.stride)))
        high = max(low, min(count, (depth - 1 - first) // axis.stride + 1))
        own = seen[:, :, :, :, :, tap]
        for outside in (own[:, :low], own[:, high:]):
            if outside.numel():
                moves.fill(zero_point, outside)
        if high > low:
            inside = source[:, low * axis.stride + first : (high - 1) * axis.stride + first + 1 : axis.stride]
            moves.copy(inside, own[:, low:high])
    return seen.flatten(4).flatten(0, 1).permute(0, 3, 1, 2)


# ---- transposed


@dataclass(frozen=True)
class _Phases:
    """One axis of a transposed convolution as ``stride`` convolutions.

    Attributes:
        kernel: taps of each.
        padding: of each, on both sides.
        behind: what must be written behind the input besides.
        skipped: results before the first that is wanted.
        reach: the size of the result is ``(size - 1) * stride + reach``.
    """

    stride: int
    kernel: int
    dilation: int
    padding: int
    behind: int
    skipped: int
    reach: int

    def size(self, size: int) -> int:
        return (size - 1) * self.stride + self.reach

    def between(self, phase: int, size: int) -> tuple[int, int, int]:
        """Where a phase's first result is and lies, and how many there are of a result of ``size``."""
        first = max(0, -((phase - self.skipped) // self.stride))
        at = first * self.stride + phase - self.skipped
        return first, at, max(0, -((at - size) // self.stride))


def _phases(kernel: int, stride: int, padding: int, more: int, dilation: int) -> _Phases:
    if stride > 1 and dilation > 1:
        raise Refusal("it is a transposed convolution with a stride and a dilation")
    taps = -(-kernel // stride)
    reach, last = dilation * (taps - 1), dilation * (kernel - 1) + more - padding
    first = min(padding // stride, reach)
    behind = max(0, first + last // stride - reach)
    size = dilation * (kernel - 1) + more + 1 - 2 * padding
    return _Phases(stride, taps, dilation, reach - first, behind, padding - first * stride, size)


def _transposed(part: IntegerWeighted, zero_point: int) -> AsImages:
    attributes, weight = part.attributes, part.weight
    dims, groups, each = weight.ndim - 2, int(attributes.get("groups", 1)), weight.shape[1]
    values = [_each(attributes.get(name, free), dims) for name, free in _TRANSPOSED]
    along = [_phases(*own) for own in zip(weight.shape[2:], *values, strict=True)]
    behind = [(0, own.behind) for own in along]

    def before(moves: Moves, x: Tensor) -> Tensor:
        x = _written(moves, x, behind, "zeros", zero_point) if any(map(any, behind)) else x
        if dims < 3:
            return x.unsqueeze(2) if dims == 1 else x
        deep = along[0]
        return _seen_planes(moves, x, _Axis(deep.kernel, 1, deep.padding, deep.dilation), groups, zero_point)

    def after(moves: Moves, y: Tensor, x: Tensor) -> Tensor:
        sizes = [own.size(size) for own, size in zip(along, x.shape[2:], strict=True)]
        if min(sizes) < 1:
            raise InputError(f"its result would have the size {sizes}.")
        made = _between(moves, y.unflatten(0, (len(x), -1)), axes, [1] * (3 - dims) + sizes, groups)
        return made.reshape(made.shape[:2] + torch.Size(sizes))

    axes = [_phases(1, 1, 0, 0, 1)] * (3 - dims) + along
    phases = math.prod(own.stride for own in axes)
    return AsImages(
        _by_phases(weight[_NO_CHANNELS + (None,) * (3 - dims)], axes, groups),
        Geometry([1, 1], [own.padding for own in axes[1:]], [own.dilation for own in axes[1:]], groups),
        torch.arange(groups * each).reshape(groups, 1, each).expand(groups, phases, each).flatten(),
        before,
        after,
        copies=True,
    )


_NO_CHANNELS = slice(None), slice(None)
_TRANSPOSED = (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))


def _by_phases(weight: Tensor, axes: Sequence[_Phases], groups: int) -> Tensor:
    """Weights ``(inputs, results of a group, depth, height, width)`` as those of images, of groups by phases by results."""
    more = [own.kernel * own.stride - size for own, size in zip(axes, weight.shape[2:], strict=True)]
    filled = F.pad(weight.unflatten(0, (groups, -1)).transpose(1, 2), [n for own in reversed(more) for n in (0, own)])
    for axis, own in reversed(list(enumerate(axes, 3))):
        filled = filled.unflatten(axis, (own.kernel, own.stride))
    # (groups, results, inputs) and of each axis (taps, phases), the last tap first
    taps = filled.flip(3, 5, 7).permute(0, 4, 6, 8, 1, 3, 2, 5, 7)
    return taps.flatten(5, 6).flatten(0, 4).contiguous()


def _between(moves: Moves, y: Tensor, axes: Sequence[_Phases], sizes: Sequence[int], groups: int) -> Tensor:
    """The results of all phases, ``(n, depth, channels, height, width)``, between each other, as a volume."""
    if all(own.stride == 1 and not own.skipped for own in axes) and [y.shape[1], *y.shape[3:]] == list(sizes):
        return y.transpose(1, 2)
    phases = [range(own.stride) for own in axes]
    apart = y.unflatten(2, (groups, math.prod(map(len, phases)), -1)).movedim(4, -1).movedim(1, 3)
    made = moves.own(torch.zeros((len(y), *sizes, groups, apart.shape[-1]), dtype=y.dtype))
    whole = made.movedim(4, 1)
    for number, of_axes in enumerate(itertools.product(*phases)):
        places = [own.between(phase, size) for own, phase, size in zip(axes, of_axes, sizes, strict=True)]
        read = tuple(slice(first, first + count) for first, _, count in places)
        written = tuple(slice(at, None, own.stride) for (_, at, _), own in zip(places, axes, strict=True))
        source, target = apart[:, :, number][_NO_CHANNELS + read], whole[_NO_CHANNELS + written]
        if target.numel():
            moves.copy(source.view(torch.uint8), target.view(torch.uint8))
    return made.flatten(4).movedim(-1, 1)
