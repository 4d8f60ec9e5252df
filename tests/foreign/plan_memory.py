"""The memory that a plan knows, as bytes for ``run_plan.cpp``, and back: how a plan is computed in another process.

Python fills structures with pointers into memory that its tensors and structures own. Here every pointer is followed, from
the steps on. Memory that no live object owns is an error; a pointer that stands elsewhere than in a field of pointers points
nowhere in the other process.
"""

from __future__ import annotations

import bisect
import ctypes
import gc
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Memory"]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Block:
    """Memory of one object; ``kind`` is the structure that lies in it, over and over, or None for numbers."""

    address: int
    size: int
    kind: Any = None


def _block(owner: Any) -> Block:
    if isinstance(owner, Tensor):
        storage = owner.untyped_storage()
        return Block(storage.data_ptr(), storage.nbytes())
    element = owner._type_ if isinstance(owner, ctypes.Array) else type(owner)
    structure = element if issubclass(element, ctypes.Structure) else None
    return Block(ctypes.addressof(owner), ctypes.sizeof(owner), structure)


def _owned() -> list[Block]:
    """All memory of live tensors on the CPU and of ctypes' objects, in ascending order, none within another."""
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, (ctypes.Structure, ctypes.Array))}
    kinds |= {Tensor, nn.Parameter}
    owners = [owner for owner in objects if type(owner) in kinds]
    found = [_block(owner) for owner in owners if getattr(owner, "device", _CPU) == _CPU]
    outer = list[Block]()
    for block in sorted(found, key=lambda b: (b.address, -b.size, b.kind is None)):
        if block.size and not (outer and block.address < outer[-1].address + outer[-1].size):
            outer.append(block)
    return outer


def _pointers(kind: Any, start: int = 0) -> Iterator[int]:
    """Where in a type its fields of pointers are."""
    if kind is ctypes.c_void_p:
        yield start
    elif issubclass(kind, ctypes.Array):
        for i in range(kind._length_):
            yield from _pointers(kind._type_, start + i * ctypes.sizeof(kind._type_))
    elif issubclass(kind, ctypes.Structure):
        for name, field in kind._fields_:
            yield from _pointers(field, start + getattr(kind, name).offset)


class Memory:
    """What the steps of a plan reach.

    Args:
        steps: an array of ``Step``.
        count: how many there are.
    """

    def __init__(self, steps: Any, count: int) -> None:
        self.steps, self.count = ctypes.addressof(steps), count
        owned = _owned()
        starts = [block.address for block in owned]
        self.pointers = list[int]()
        reached, left = dict[int, Block](), [self.steps]
        while left:
            address = left.pop()
            block = owned[bisect.bisect_right(starts, address) - 1]
            assert block.address <= address < block.address + block.size, f"no live object owns {address:#x}"
            if block.address in reached:
                continue
            reached[block.address] = block
            if block.kind is None:
                continue
            for start in range(block.address, block.address + block.size, ctypes.sizeof(block.kind)):
                for place in _pointers(block.kind, start):
                    target = ctypes.c_void_p.from_address(place).value
                    if target:
                        self.pointers.append(place)
                        left.append(target)
        self.blocks = sorted(reached.values(), key=lambda b: b.address)

    def dump(self, threads: int) -> bytes:
        """All of it, as ``run_plan`` reads it."""
        head = [len(self.blocks), len(self.pointers), self.steps, self.count, threads]
        for block in self.blocks:
            head += [block.address, block.size]
        numbers = head + self.pointers
        content = [ctypes.string_at(block.address, block.size) for block in self.blocks]
        return struct.pack(f"<{len(numbers)}Q", *numbers) + b"".join(content)

    def restore(self, content: bytes) -> None:
        """Write what ``run_plan`` left into this process's memory, but for structures, whose pointers are another's."""
        assert len(content) == sum(block.size for block in self.blocks), "run_plan gave something else than the blocks"
        at = 0
        for block in self.blocks:
            if block.kind is None:
                ctypes.memmove(block.address, content[at : at + block.size], block.size)
            at += block.size
