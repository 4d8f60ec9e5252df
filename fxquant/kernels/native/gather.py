"""What moves numbers and is no view, as copies of views: rolled, repeated, enlarged, padded and shuffled tensors.

Such a function takes each axis by itself: ``y[.., j, ..] = x[.., m(j), ..]``, or a fixed number where ``m(j)`` is
nowhere. Or it gives numbers another order, in which each axis of ``y`` goes by steps through axes of ``x`` (a pixel
shuffle). Both are found by asking the function for tensors of indices, and what they give is compared with what it gives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fxquant.errors import Refusal

__all__ = ["Gathering", "Reordering", "gathering_of"]

_FIRST = 2**20
"""The index 0 as the function is given it: whatever is less was filled in."""
_PIECES = 64
"""Copies that one function may take."""


@dataclass(frozen=True)
class _Piece:
    """Elements of one axis: ``count`` times ``repeat`` equal ones from ``start`` on, ``step`` apart, written at ``at``."""

    at: int
    start: int
    count: int
    step: int
    repeat: int


@dataclass(frozen=True)
class Gathering:
    """How a function moves numbers.

    Attributes:
        shape: of its result.
        axes: the pieces of each axis.
        fills: whether a number is written where nothing is moved to, and ``filling`` which, as the function gives it.
    """

    shape: tuple[int, ...]
    axes: tuple[tuple[_Piece, ...], ...]
    fills: bool
    filling: int

    def views(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What is copied to where, as views of both tensors with the same shapes."""
        for pieces in itertools.product(*self.axes):
            sizes = [size for piece in pieces for size in (piece.count, piece.repeat)]
            yield (
                _view(x, sizes, pieces, lambda p, stride: (p.start * stride, p.step * stride, 0)),
                _view(y, sizes, pieces, lambda p, stride: (p.at * stride, p.repeat * stride, stride)),
            )


def _view(
    of: Tensor, sizes: Sequence[int], pieces: Sequence[_Piece], strides: Callable[[_Piece, int], tuple[int, int, int]]
) -> Tensor:
    """A view with two axes a piece, of which ``strides`` says where the first element lies and how far the others."""
    own = [strides(piece, stride) for piece, stride in zip(pieces, of.stride(), strict=True)]
    first = of.storage_offset() + sum(at for at, _, _ in own)
    return of.as_strided(sizes, [step for _, *steps in own for step in steps], first)


@dataclass(frozen=True)
class Reordering:
    """How a function gives numbers another order.

    Attributes:
        shape: of its result.
        first: where the first number is, by axes of what it is given.
        axes: of each axis of the result what it goes through, the outermost first: how many, which axis, by what steps.
    """

    shape: tuple[int, ...]
    first: tuple[int, ...]
    axes: tuple[tuple[tuple[int, int, int], ...], ...]
    fills: ClassVar[bool] = False
    filling: ClassVar[int] = 0

    def views(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What is copied to where, as views of both tensors with the same shape."""
        sizes, read, written = list[int](), list[int](), list[int]()
        for own, stride in zip(self.axes, y.stride(), strict=True):
            inner = [math.prod(count for count, _, _ in own[i + 1 :]) for i in range(len(own))]
            sizes += [count for count, _, _ in own]
            read += [x.stride(axis) * step for _, axis, step in own]
            written += [stride * many for many in inner]
        start = x.storage_offset() + sum(at * stride for at, stride in zip(self.first, x.stride(), strict=True))
        yield x.as_strided(sizes, read, start), y.as_strided(sizes, written)


_NOT_NATIVE = "how it moves numbers is not written natively"


def gathering_of(
    function: Callable[[Tensor], Any], shape: Sequence[int], dtype: torch.dtype
) -> Gathering | Reordering | Refusal:
    """How ``function`` moves the numbers of a tensor of ``shape`` and ``dtype``, ``uint8`` or ``int8``.

    Returns:
        A refusal where it does so in neither way.
    """
    numbers = torch.randint(0, 128, tuple(shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    result = function(numbers)
    if not isinstance(result, Tensor) or not result.numel():
        return Refusal(_NOT_NATIVE)
    by_axes = _by_axes(function, numbers, result) if result.ndim == len(shape) else None
    found = by_axes or _reordering(function, numbers, result)
    return found if found is not None and _whatever_they_are(found, function, shape) else Refusal(_NOT_NATIVE)


def _whatever_they_are(found: Gathering | Reordering, function: Callable[[Tensor], Any], shape: Sequence[int]) -> bool:
    """Whether numbers move so in rising and in falling order: a maximum or a sort of few numbers may look like a move."""
    rising = torch.arange(math.prod(shape), dtype=torch.float64)
    for numbers in (rising.reshape(tuple(shape)), rising.flip(0).reshape(tuple(shape))):
        moved = torch.full(found.shape, float(found.filling), dtype=torch.float64)
        for source, target in found.views(numbers, moved):
            target.copy_(source)
        if not torch.equal(moved, function(numbers)):
            return False
    return True


def _reordering(function: Callable[[Tensor], Any], numbers: Tensor, result: Tensor) -> Reordering | None:
    if result.numel() > numbers.numel():
        return None
    index = function(torch.arange(numbers.numel(), dtype=torch.float64).reshape(numbers.shape)).long()
    first, axes = int(index.flatten()[0]), list[tuple[tuple[int, int, int], ...]]()
    for axis, size in enumerate(index.shape):
        steps = _steps([int(i) for i in index[tuple([0] * axis)].reshape(size, -1)[:, 0]], numbers.shape)
        if steps is None:
            return None
        axes.append(tuple(steps))
    at = tuple(int(i) for i in np.unravel_index(first, numbers.shape))
    found = Reordering(tuple(result.shape), at, tuple(axes))
    ((moved, _),) = found.views(numbers, torch.empty(result.shape))
    return found if torch.equal(moved.reshape(result.shape), result) else None


def _steps(line: Sequence[int], shape: Sequence[int]) -> list[tuple[int, int, int]] | None:
    """A line of indices into a tensor of ``shape`` as nested runs through its axes, the outermost first."""
    steps = list[tuple[int, int, int]]()
    while len(line) > 1:
        step = line[1] - line[0]
        count = next((k for k in range(1, len(line)) if line[k] - line[k - 1] != step), len(line))
        through = _through(count, step, shape) if len(line) % count == 0 else None
        if through is None:
            return None
        steps = through + steps
        line = line[::count]
    return steps


def _through(count: int, step: int, shape: Sequence[int]) -> list[tuple[int, int, int]] | None:
    """A run through the axes of a tensor of ``shape``; None where it leaves one between two of its numbers."""
    found, stride = list[tuple[int, int, int]](), 1
    for axis in reversed(range(len(shape))):
        whole = stride * shape[axis]
        if stride <= step < whole and step % stride == 0:
            if (count - 1) * step < whole:
                return [(count, axis, step // stride), *found]
            if whole % step or count % (whole // step):
                return None
            found.insert(0, (whole // step, axis, step // stride))
            count, step = count // (whole // step), whole
        stride = whole
    return None


def _by_axes(function: Callable[[Tensor], Any], numbers: Tensor, result: Tensor) -> Gathering | None:
    shape, maps = numbers.shape, list[Tensor]()
    for axis in range(len(shape)):
        index = torch.arange(shape[axis], dtype=torch.float32) + _FIRST
        found = function(index.reshape([-1 if a == axis else 1 for a in range(len(shape))]).expand(*shape).contiguous())
        others = [a for a in range(len(shape)) if a != axis]
        maps.append((found.amax(others) if others else found).long() - _FIRST)
    inside = [own >= 0 for own in maps]
    fills = not all(bool(own.all()) for own in inside)
    outside = result[~_grid(inside)]
    filling = int(outside[0]) if fills else 0
    expected = _taken(numbers, maps).masked_fill(~_grid(inside), filling)
    axes = tuple(tuple(_pieces(own.tolist())) for own in maps)
    if not torch.equal(result, expected) or math.prod(map(len, axes)) > _PIECES:
        return None
    return Gathering(tuple(result.shape), axes, fills, filling)


def _grid(along: Sequence[Tensor]) -> Tensor:
    """Where all of them hold, each along its own axis."""
    shape = [len(own) for own in along]
    found = torch.ones(shape, dtype=torch.bool)
    for axis, own in enumerate(along):
        found = found & own.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return found


def _taken(x: Tensor, maps: Sequence[Tensor]) -> Tensor:
    for axis, own in enumerate(maps):
        x = x.index_select(axis, own.clamp(min=0))
    return x


def _pieces(indices: Sequence[int]) -> Iterator[_Piece]:
    """The runs of one axis, each as long as it can be; what lies outside is left out."""
    at = 0
    while at < len(indices):
        if indices[at] < 0:
            at += 1
            continue
        piece = max(
            (_piece(indices, at, repeat) for repeat in (1, _equal(indices, at))), key=lambda p: p.count * p.repeat
        )
        yield piece
        at += piece.count * piece.repeat


def _equal(indices: Sequence[int], at: int) -> int:
    end = at
    while end < len(indices) and indices[end] == indices[at]:
        end += 1
    return end - at


def _piece(indices: Sequence[int], at: int, repeat: int) -> _Piece:
    def whole(k: int) -> bool:
        own = indices[at + k * repeat : at + (k + 1) * repeat]
        return len(own) == repeat and own[0] >= 0 and len(set(own)) == 1

    count, step = 1, 0
    if whole(1):
        step = indices[at + repeat] - indices[at]
        while step >= 0 and whole(count) and indices[at + count * repeat] == indices[at] + count * step:
            count += 1
    return _Piece(at, indices[at], count, step if count > 1 else 0, repeat)
