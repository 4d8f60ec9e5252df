"""How torch's tensors look to the kernels: images of pixels of channels, with a stride for each but the channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["Image", "axes_of", "folded", "image", "merged", "rows"]


class Image(NamedTuple):
    """A tensor as n images of h lines of w pixels of c numbers that follow each other.

    Attributes:
        tensor: whose memory it is.
        sizes: n, h, w, c.
        strides: of images, lines and pixels, in elements.
    """

    tensor: Tensor
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def image(x: Tensor) -> Image | None:
    """An NCHW tensor; None where channels do not follow each other in memory.

    ``(n, c)`` is one pixel each, ``(n, c, length)`` one line; a volume's planes are lines where their own follow each other.
    """
    if x.ndim == 2:
        x = x[:, :, None, None]
    elif x.ndim == 3:
        x = x.unsqueeze(2)
    elif x.ndim == 5 and (1 in x.shape[3:] or x.stride(3) == x.shape[4] * x.stride(4)):
        x = x.flatten(3)
    if x.ndim != 4 or (x.stride(1) != 1 and x.shape[1] != 1):
        return None
    n, c, h, w = x.shape
    return Image(x, (n, h, w, c), (x.stride(0), x.stride(2), x.stride(3)))


def rows(x: Tensor, *others: Tensor) -> list[Image] | None:
    """Tensors of shapes that differ in the last axis alone, as pixels of that axis, in the order of the first one's memory.

    Returns:
        None where that cannot be.
    """
    if any(t.stride(-1) != 1 and t.shape[-1] != 1 for t in (x, *others)):
        return None
    lead = [axis for axis in axes_of(x) if axis != x.ndim - 1]
    tensors = [x, *others]
    sizes, strides = merged([x.shape[a] for a in lead], [[t.stride(a) for a in lead] for t in tensors])
    if len(sizes) > 3:
        return None
    fill = 3 - len(sizes)
    return [
        Image(t, (*[1] * fill, *sizes, t.shape[-1]), (*[0] * fill, *own))
        for t, own in zip(tensors, strides, strict=True)
    ]


def folded(*tensors: Tensor) -> list[Image] | None:
    """Tensors of one shape, element for element; None where no order of axes gives all of them numbers in a row."""
    order = axes_of(tensors[-1])
    shape = [tensors[-1].shape[axis] for axis in order]
    strides = [[t.stride(axis) for axis in order] for t in tensors]
    sizes, steps = merged(shape, strides)
    if len(sizes) > 4 or any(own[-1] != 1 for own in steps):
        return None
    fill = 4 - len(sizes)
    return [Image(t, (*[1] * fill, *sizes), (*[0] * fill, *own)[:3]) for t, own in zip(tensors, steps, strict=True)]


def axes_of(x: Tensor) -> list[int]:
    """The axes with more than one element, the one with the largest stride first."""
    return sorted((a for a in range(x.ndim) if x.shape[a] > 1), key=lambda axis: x.stride(axis), reverse=True)


def merged(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Sizes and strides with axes of one element left out, and neighbours joined that all tensors step through alike."""
    sizes: list[int] = []
    joined: list[list[int]] = [[] for _ in strides]
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(own[-1] == s[axis] * size for own, s in zip(joined, strides, strict=True)):
            sizes[-1] *= size
            for own, s in zip(joined, strides, strict=True):
                own[-1] = s[axis]
        else:
            sizes.append(size)
            for own, s in zip(joined, strides, strict=True):
                own.append(s[axis])
    if not sizes:
        return [1], [[1] for _ in strides]
    return sizes, joined
