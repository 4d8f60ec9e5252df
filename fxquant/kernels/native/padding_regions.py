"""Which taps of a window count for which pixels of a convolution's result: those in the padding are not multiplied.

On 7 x 7 pixels, a padded 3 x 3 window has a fifth of its taps outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from fxquant.kernels.native.library import Step

__all__ = ["Part", "parts_of"]

_LINE = 28
"""Pixels that a line of the edge should have, over some images, to be worth a region."""
_FEWEST = 4
"""Pixels in a corner that are worth a region, for fewer leave the processor waiting for weights."""


@dataclass(frozen=True)
class Part:
    """A region without its numbers.

    Attributes:
        first, count: of images, lines and columns.
        taps: of the window, which count.
        inside: whether they lie in the tensor for all of these pixels.
    """

    first: tuple[int, int, int]
    count: tuple[int, int, int]
    taps: tuple[int, ...]
    inside: bool


@dataclass(frozen=True)
class _Span:
    first: int
    count: int
    taps: tuple[int, ...]


def parts_of(step: Step) -> list[Part]:
    """All pixels of a convolution's result, in the order in which they are best computed: images by images, line by line."""
    lines, columns = (_spans(step, axis) for axis in (0, 1))
    images = step.y.n if len(lines) == len(columns) == 1 else -(-_LINE // max(1, min(step.y.h, step.y.w)))
    narrowest = min(across.count for across in columns)
    parts = []
    for image in range(0, step.y.n, images):
        count = min(images, step.y.n - image)
        for down in lines:
            apart = len(columns) == 1 or count * down.count * narrowest >= _FEWEST
            for across in columns if apart else [_together(columns)]:
                taps = tuple(y * step.window.kernel[1] + x for y in down.taps for x in across.taps)
                parts.append(Part((image, down.first, across.first), (count, down.count, across.count), taps, apart))
    return parts


def _spans(step: Step, axis: int) -> list[_Span]:
    """Lines (or columns) of the result that follow each other, with the taps of the window that lie inside for them."""
    w, (out, size) = step.window, ((step.y.h, step.x.h), (step.y.w, step.x.w))[axis]
    kernel, stride, padding, dilation = w.kernel[axis], w.stride[axis], w.padding[axis], w.dilation[axis]

    def inside(index: int) -> tuple[int, ...]:
        return tuple(k for k in range(kernel) if 0 <= index * stride - padding + k * dilation < size)

    found = [(taps, list(indices)) for taps, indices in groupby(range(out), inside)]
    return [_Span(indices[0], len(indices), taps) for taps, indices in found]


def _together(spans: list[_Span]) -> _Span:
    last = spans[-1]
    return _Span(0, last.first + last.count, tuple(sorted(set[int]().union(*(span.taps for span in spans)))))
