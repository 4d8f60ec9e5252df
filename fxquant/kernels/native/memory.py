"""One block of memory for all tensors between the steps of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MEMORY_LINE", "Memory"]

MEMORY_LINE = 64
"""Bytes of a cache line: where tensors begin, and what a kernel may read behind one."""


@dataclass
class _Span:
    size: int
    first: int
    last: int
    offset: int = 0


class Memory:
    """A place for each tensor, from the first step that knows it to the last.

    Args:
        tensors: by the address of the memory that they have now.
        steps: the tensors of each step.
        borders: tensors that are written once with a number, and keep it at their border.

    Attributes:
        block: the memory.
        size: how much of it is used.
    """

    def __init__(
        self, tensors: dict[int, Tensor], steps: Sequence[Sequence[Tensor]], borders: Sequence[tuple[Tensor, int]]
    ) -> None:
        self.spans: dict[int, _Span] = {}
        for index, step in enumerate(steps):
            for x in step:
                key = x.untyped_storage().data_ptr()
                if key in tensors and tensors[key].dtype == torch.uint8:
                    span = self.spans.setdefault(
                        key, _Span(-(-(tensors[key].numel() + MEMORY_LINE) // MEMORY_LINE) * MEMORY_LINE, index, index)
                    )
                    span.last = index
        for x, _ in borders:
            span = self.spans[x.untyped_storage().data_ptr()]
            span.first, span.last = 0, len(steps)
        self.size = _arrange(list(self.spans.values()))
        self.block = torch.zeros(self.size + MEMORY_LINE, dtype=torch.uint8)
        self.start = -self.block.data_ptr() % MEMORY_LINE
        for x, number in borders:
            span = self.spans[x.untyped_storage().data_ptr()]
            self.block[self.start + span.offset : self.start + span.offset + span.size] = number

    def address(self, x: Tensor) -> int:
        """Where a tensor begins in the block."""
        storage = x.untyped_storage().data_ptr()
        return self.block.data_ptr() + self.start + self.spans[storage].offset + x.data_ptr() - storage


def _arrange(spans: list[_Span]) -> int:
    """Give each an offset, so that those that live at one time do not overlap; the largest first. The size of all."""
    placed: list[_Span] = []
    for span in sorted(spans, key=lambda s: -s.size):
        for other in sorted(placed, key=lambda s: s.offset):
            if other.last < span.first or span.last < other.first:
                continue
            if other.offset >= span.offset + span.size:
                break
            span.offset = max(span.offset, other.offset + other.size)
        placed.append(span)
    return max((s.offset + s.size for s in spans), default=0)
