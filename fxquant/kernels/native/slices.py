"""The first steps of a plan for some images at a time, where the tensors of all images leave the cache between two steps.

What lies between these steps then needs memory for these images only, which stays in the cache; weights are read anew for
each slice, so that the steps behind, with smaller images and larger weights, work on all images at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fxquant.kernels.native.layout import Image
from fxquant.kernels.native.operations import Add, BorderOperation, Maximum, Operation, Pointwise
from fxquant.kernels.native.walk import Recorded, Walk
from fxquant.kernels.native.weighted import Weighted
from fxquant.kernels.native.winograd import Winograd

__all__ = ["Order", "in_slices"]

_IMAGES = 2
"""In a slice: one for each of two threads."""
_CACHE = 2**22
"""Bytes of a step's tensors that are still near when the next one reads them; found by measuring."""


@dataclass(frozen=True)
class Order:
    """Steps as they are computed.

    Attributes:
        steps: some of them once a slice.
        tensors: the memory that is needed, as ``Walk.tensors``.
        together: tensors in use at one time, for one time after the other.
    """

    steps: list[Recorded]
    tensors: dict[int, Tensor]
    together: list[list[Tensor]]


def in_slices(walk: Walk) -> Order:
    """The steps of a walk, the first of them in slices where that is worth it."""
    steps = walk.steps
    together = [step.tensors for step in steps]
    batch = steps[0].images[0].tensor.shape[0] if steps[0].images[0].tensor.ndim == 4 else 0
    count = _worth(steps[: _separable(walk, batch)], -(-batch // _IMAGES)) if batch > _IMAGES else 0
    if not count:
        return Order(steps, walk.tensors, together)
    later = {_memory(x) for own in together[count:] for x in own}
    read = [seen.tensor for step in steps[:count] for seen in step.images]
    inner = {_memory(x) for x in read if _memory(x) in walk.tensors} - later
    slices = [
        replace(step, images=[_part(seen, batch, at, _memory(seen.tensor) in inner) for seen in step.images])
        for at in range(0, batch, _IMAGES)
        for step in steps[:count]
    ]
    tensors = {key: x.narrow(0, 0, _IMAGES) if key in inner else x for key, x in walk.tensors.items()}
    leaving = [x for own in together[:count] for x in own if _memory(x) in later]
    together[0], together[count - 1] = together[0] + leaving, together[count - 1] + leaving
    return Order([*slices, *steps[count:]], tensors, together)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _separable(walk: Walk, batch: int) -> int:
    """How many of the first steps compute each image from the same image alone, each in its own part of the memory."""
    for index, step in enumerate(walk.steps):
        if not _by_images(step.operation) or not all(_is_apart(walk, seen, batch) for seen in step.images):
            return index
    return len(walk.steps)


def _by_images(operation: Operation | None) -> bool:
    if operation is None or operation.writes_floats:
        return False
    if isinstance(operation, Pointwise):
        return operation.kind in ("table", "affine")
    return isinstance(operation, (BorderOperation, Add, Maximum, Winograd)) or (
        isinstance(operation, Weighted) and not operation.linear
    )


def _is_apart(walk: Walk, seen: Image, batch: int) -> bool:
    x, axis = seen.tensor, _outermost(seen)
    if x.ndim != 4 or x.shape[0] != batch or seen.sizes[axis] % batch:
        return False
    if (*seen.strides, 1)[axis] * (seen.sizes[axis] // batch) != x.stride(0) * x.element_size():
        return False
    whole = walk.tensors.get(_memory(x))
    if whole is None:
        return True
    reach = x.data_ptr() - _memory(x) + sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True))
    return whole.shape[0] == batch and x.stride(0) == whole.stride(0) == whole.numel() // batch and reach < x.stride(0)


def _outermost(seen: Image) -> int:
    return next((axis for axis, size in enumerate(seen.sizes) if size > 1), 0)


def _part(seen: Image, batch: int, first: int, again: bool) -> Image:
    """A slice of an image, at the place of the first slice where its memory is used again."""
    count, axis = min(_IMAGES, batch - first), _outermost(seen)
    sizes = list(seen.sizes)
    sizes[axis] = sizes[axis] // batch * count
    return seen._replace(tensor=seen.tensor.narrow(0, 0 if again else first, count), sizes=tuple(sizes))


def _worth(steps: list[Recorded], slices: int) -> int:
    """How many steps are best computed in slices, by the bytes that need not be fetched and the weights that must be."""
    best = gain = count = 0
    for index, step in enumerate(steps):
        bytes_ = sum(seen.tensor.numel() * seen.tensor.element_size() for seen in step.images)
        gain += bytes_ * (bytes_ > _CACHE) - _weights_of(step.operation) * (slices - 1)
        if gain > best:
            best, count = gain, index + 1
    return count


def _weights_of(operation: Operation | None) -> int:
    if isinstance(operation, Winograd):
        return operation.weight.nbytes
    return operation.weight.numel() if isinstance(operation, Weighted) else 0
