"""Padding regions of a native convolution: every pixel once, and every tap of its window that lies inside."""

from __future__ import annotations

import pytest

from fxquant.kernels.native.library import Step
from fxquant.kernels.native.padding_regions import Part, parts_of

WINDOWS = {
    "1x1": ((1, 1), (1, 1), (0, 0), (1, 1)),
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, strided": ((3, 3), (2, 2), (1, 1), (1, 1)),
    "not padded": ((3, 3), (1, 1), (0, 0), (1, 1)),
    "padded on one side": ((3, 3), (1, 1), (1, 0), (1, 1)),
    "5x3, dilated": ((5, 3), (1, 2), (4, 3), (2, 3)),
    "7x1": ((7, 1), (1, 1), (3, 0), (1, 1)),
    "padded by more than it covers": ((3, 3), (1, 1), (5, 4), (1, 1)),
}


IMAGES = [(1, 1, 1), (1, 7, 7), (9, 7, 6), (3, 14, 15), (2, 40, 5), (1, 30, 33)]


def sizes_of(name: str, *sizes: int) -> list[int]:
    """Lines and columns of the result."""
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in zip(sizes, *WINDOWS[name], strict=True)]


def step_of(name: str, batch: int, high: int, wide: int) -> Step:
    """A step with the sizes of such a convolution."""
    kernel, stride, padding, dilation = WINDOWS[name]
    step = Step()
    step.window.kernel[:], step.window.stride[:] = kernel, stride
    step.window.padding[:], step.window.dilation[:] = padding, dilation
    step.x.n, step.x.h, step.x.w = batch, high, wide
    step.y.n, step.y.h, step.y.w = batch, *sizes_of(name, high, wide)
    return step


def inside(step: Step, y: int, x: int) -> set[int]:
    """The taps of one pixel's window that lie in the image, looked at one by one."""
    w = step.window
    return {
        a * w.kernel[1] + b
        for a in range(w.kernel[0])
        for b in range(w.kernel[1])
        if 0 <= y * w.stride[0] - w.padding[0] + a * w.dilation[0] < step.x.h
        and 0 <= x * w.stride[1] - w.padding[1] + b * w.dilation[1] < step.x.w
    }


FITTING = [(name, *image) for name in WINDOWS for image in IMAGES if min(sizes_of(name, *image[1:])) > 0]


@pytest.mark.parametrize("name, batch, high, wide", FITTING)
def test_each_pixel_once_with_the_points_inside(name, batch, high, wide):
    step = step_of(name, batch, high, wide)
    seen = set[tuple[int, int, int]]()
    for part in parts_of(step):
        for i, y, x in ((i, y, x) for i in span(part, 0) for y in span(part, 1) for x in span(part, 2)):
            assert (i, y, x) not in seen
            seen.add((i, y, x))
            needed = inside(step, y, x)
            assert needed == set(part.taps) if part.inside else needed <= set(part.taps)
    assert len(seen) == step.y.n * step.y.h * step.y.w


def span(part: Part, axis: int) -> range:
    return range(part.first[axis], part.first[axis] + part.count[axis])


@pytest.mark.parametrize("batch, size, share", [(8, 7, 361 / 441), (8, 14, 0.92), (8, 28, 0.96), (1, 7, 0.84)])
def test_points_in_the_padding_are_left_out(batch, size, share):
    """Of a 3 x 3 window all taps that lie outside, where there are images enough; single corners are not worth it."""
    step = step_of("3x3", batch, size, size)
    taps = sum(part.count[0] * part.count[1] * part.count[2] * len(part.taps) for part in parts_of(step))
    assert taps / (9 * batch * size * size) <= share + 1e-9
