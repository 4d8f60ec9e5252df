"""Reading a tensor in the order of its memory, in pieces that stay in cache.

An elementwise map or a full reduction does not care about the order of elements. A dense tensor (contiguous,
channels_last, or any permutation of a contiguous one) can therefore be taken as one flat vector without a copy, and
several passes over pieces of that vector cost little more than one pass over memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["dense_view", "flat_view", "piece_size", "pieces"]

_ELEMENTS_PER_THREAD = 1 << 18
"""Of float32, a megabyte: the operands of a few passes stay within a core's own cache, or its share of the last. Smaller
pieces gain little, and every op on a piece is one more time that all threads wait for each other, slow on shared cores."""


def flat_view(x: Tensor) -> Tensor | None:
    """The elements of ``x`` in the order of its memory as a view ``(n,)``; None where it has gaps or overlaps."""
    if x.is_contiguous():
        return x.view(-1)
    stride = x.stride()
    ordered = x.permute(sorted(range(x.ndim), key=stride.__getitem__, reverse=True))
    return ordered.view(-1) if ordered.is_contiguous() else None


def dense_view(x: Tensor) -> Tensor:
    """The same of a tensor that was made dense before."""
    flat = flat_view(x)
    assert flat is not None, "a tensor with gaps or overlaps has no flat view"
    return flat


def piece_size() -> int:
    """How many elements all threads together work on at a time."""
    return _ELEMENTS_PER_THREAD * torch.get_num_threads()


def pieces(*flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut flat tensors of one length, on the CPU, into pieces; elsewhere and for small ones there is one piece."""
    size, count = piece_size(), flat[0].numel()
    if count <= size or flat[0].device.type != "cpu":
        yield flat
        return
    for start in range(0, count, size):
        yield tuple(f[start : start + size] for f in flat)
