"""A native program for inputs of certain shapes: where every tensor lies, how each step is cut, and the steps themselves.

Tensors share one block of memory, each from its first writer to its last reader. What is concatenated is written side by
side from the start: the last concatenation that a tensor goes into gives it a place, and an earlier one whose tensors
already stand side by side is nothing but a view (a DenseNet copies nothing).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxquant.kernels.native.library import FLAGS, KINDS, Step, TensorView, run_steps
from fxquant.kernels.native.lowering import NativeProgram
from fxquant.kernels.native.operations import Concatenate, Flatten, Operation, Shape, Simple, Weighted, as_image

__all__ = ["Plan"]

_SLACK = 64
"""Bytes behind a tensor that a kernel may read."""
_UNIT = 2**19
"""Multiplications that are worth a unit of work of their own, at least."""
_WEIGHTS_IN_CACHE = 2**18
_PIXELS_IN_CACHE = 2**16


@dataclass
class _Place:
    """A tensor's memory.

    Attributes:
        home: the value whose memory it is, its own or that of a concatenation.
        channel: where in its home's channels it begins.
    """

    home: int
    channel: int = 0


@dataclass
class _Line:
    """A step before it has addresses."""

    operation: Operation | None
    kind: str
    reads: list[int]
    writes: int


@dataclass
class _Buffer:
    size: int
    first: int = 0
    last: int = -1
    offset: int = 0
    fill: int | None = None
    keep: list[Tensor] = field(default_factory=list)


class Plan:
    """Steps for inputs of these shapes.

    Args:
        program: what to compute.
        shapes: of the graph's inputs.

    Attributes:
        memory: bytes of all tensors between the steps.
        count: steps.
    """

    def __init__(self, program: NativeProgram, shapes: Sequence[Shape]) -> None:
        self.program = program
        self.shapes: dict[int, Shape] = dict(zip(program.inputs, shapes, strict=True))
        self.lines: list[_Line] = []
        self.borders: dict[int, tuple[int, int, int]] = {}
        for operation in program.operations:
            self.shapes[operation.output] = operation.shape([self.shapes[v] for v in operation.inputs])
        self.places = self._find_homes()
        self._write_lines()
        self._allocate()
        self.steps = (Step * len(self.lines))()
        self.count = len(self.lines)
        for step, line in zip(self.steps, self.lines, strict=True):
            self._fill(step, line)

    # ---- where tensors lie

    def _find_homes(self) -> dict[int, _Place]:
        places: dict[int, _Place] = {}
        made = {o.output: o for o in self.program.operations}
        fixed = {*self.program.inputs, *self.program.outputs}
        for operation in reversed(self.program.operations):
            place = places.setdefault(operation.output, _Place(operation.output))
            if not isinstance(operation, Concatenate):
                continue
            at = place.channel
            for value in operation.inputs:
                if value not in places and value not in fixed and not isinstance(made[value], Flatten):
                    places[value] = _Place(place.home, at)
                at += as_image(self.shapes[value])[3]
        for operation in self.program.operations:
            if isinstance(operation, Concatenate):
                self._make_view(operation, places)
            elif isinstance(operation, Flatten) and math.prod(self.shapes[operation.inputs[0]][2:]) == 1:
                source = places[operation.inputs[0]]
                if places[operation.output].home == operation.output:
                    places[operation.output] = source
        return places

    def _make_view(self, operation: Concatenate, places: dict[int, _Place]) -> None:
        """Where all tensors stand side by side already, the concatenation is there without being made."""
        start = places[operation.inputs[0]]
        at = start.channel
        for value in operation.inputs:
            if (places[value].home, places[value].channel) != (start.home, at):
                return
            at += as_image(self.shapes[value])[3]
        if places[operation.output].home == operation.output:
            places[operation.output] = start

    # ---- which steps there are

    def _write_lines(self) -> None:
        uses: dict[int, int] = {}
        for operation in self.program.operations:
            for value in operation.inputs:
                uses[value] = uses.get(value, 0) + 1
        self.made = {o.output: o for o in self.program.operations}
        self.fresh = max(self.shapes) + 1
        for operation in self.program.operations:
            if isinstance(operation, Concatenate):
                self._copy_into(operation)
            elif isinstance(operation, Flatten):
                self._flatten(operation)
            elif isinstance(operation, Weighted) and operation.by_lines:
                self._behind_border(operation, uses)
            else:
                self.lines.append(_Line(operation, "", operation.inputs, operation.output))

    def _copy_into(self, operation: Concatenate) -> None:
        at = self.places[operation.output].channel
        for value in operation.inputs:
            place = self.places[value]
            if (place.home, place.channel) != (self.places[operation.output].home, at):
                part = self._extra(self.shapes[value], _Place(self.places[operation.output].home, at))
                self.lines.append(_Line(None, "copy", [value], part))
            at += as_image(self.shapes[value])[3]

    def _flatten(self, operation: Flatten) -> None:
        source, target = self.places[operation.inputs[0]], self.places[operation.output]
        if source is not target:
            self.lines.append(_Line(None, "transpose", operation.inputs, operation.output))

    def _behind_border(self, operation: Weighted, uses: dict[int, int]) -> None:
        """A window's line is read at once, across the border: the input is written inside of one."""
        source, padding = operation.inputs[0], operation.geometry.padding
        border = (padding[0], padding[1], operation.zero_point)
        reads = list(operation.inputs)
        producer = self.made.get(source)
        writer = next((line for line in self.lines if line.writes == source), None)
        alone = uses[source] == 1 and self.places[source].home == source and source not in self.program.outputs
        if alone and writer is not None and isinstance(producer, Simple):
            self.borders[source] = border
        else:
            reads[0] = self._extra(self.shapes[source])
            self.borders[reads[0]] = border
            self.lines.append(_Line(None, "copy", [source], reads[0]))
        self.lines.append(_Line(operation, "", reads, operation.output))

    def _extra(self, shape: Shape, place: _Place | None = None) -> int:
        """A value that the program does not know."""
        value, self.fresh = self.fresh, self.fresh + 1
        self.shapes[value] = shape
        self.places[value] = place or _Place(value)
        return value

    # ---- memory

    def _allocate(self) -> None:
        buffers: dict[int, _Buffer] = {}
        for index, line in enumerate(self.lines):
            for value in (*line.reads, line.writes):
                if self._is_float(value):
                    continue
                home = self.places[value].home
                if home not in buffers:
                    buffers[home] = _Buffer(self._bytes(home), first=index)
                buffers[home].last = index
        self.buffers = buffers
        for home in buffers:
            if home in self.borders:  # its border is written once
                buffers[home].first, buffers[home].last = 0, len(self.lines)
        self.memory = _arrange(list(buffers.values()))
        self.arena = torch.zeros(self.memory + 64, dtype=torch.uint8)
        self.base = -(-self.arena.data_ptr() // 64) * 64
        start = self.base - self.arena.data_ptr()
        for home, (_, _, zero_point) in self.borders.items():
            buffer = buffers[home]
            self.arena[start + buffer.offset : start + buffer.offset + buffer.size] = zero_point

    def _is_float(self, value: int) -> bool:
        operation = self.made.get(value)
        if value in self.program.inputs:
            return True
        return (isinstance(operation, Weighted) and operation.to_float) or (
            isinstance(operation, Simple) and operation.floats_out
        )

    def _bytes(self, home: int) -> int:
        n, h, w, c = as_image(self.shapes[home])
        down, across, _ = self.borders.get(home, (0, 0, 0))
        return n * (h + 2 * down) * (w + 2 * across) * c + _SLACK

    def _view(self, value: int, inside: bool = True) -> TensorView:
        """A value's tensor; the whole of it with its border where not ``inside``."""
        n, h, w, c = as_image(self.shapes[value])
        if self._is_float(value):
            return TensorView(None, 4 * c, 4 * w * c, 4 * h * w * c, n, h, w, c)
        place = self.places[value]
        pixel = as_image(self.shapes[place.home])[3]
        down, across, _ = self.borders.get(place.home, (0, 0, 0))
        row = (w + 2 * across) * pixel
        image = (h + 2 * down) * row
        data = self.base + self.buffers[place.home].offset + place.channel
        if not inside:
            return TensorView(data, pixel, row, image, n, h + 2 * down, w + 2 * across, c)
        return TensorView(data + down * row + across * pixel, pixel, row, image, n, h, w, c)

    # ---- steps

    def _fill(self, step: Step, line: _Line) -> None:
        operation = line.operation
        by_lines = isinstance(operation, Weighted) and operation.by_lines
        step.x = self._view(line.reads[0], inside=not by_lines)
        if len(line.reads) > 1:
            step.z = self._view(line.reads[1])
        step.y = self._view(line.writes)
        step.groups = 1
        if operation is None:
            step.kind = KINDS[line.kind]
        else:
            shapes = [self.shapes[v] for v in operation.inputs]
            operation.fill(step, shapes, self.shapes[operation.output])
        _cut(step, self.shapes[line.reads[0]])

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results, as new tensors; one call at a time."""
        addresses = dict(zip(self.program.inputs, (x.data_ptr() for x in inputs), strict=True))
        results = [torch.empty(self.shapes[v]) for v in self.program.outputs]
        addresses.update(zip(self.program.outputs, (y.data_ptr() for y in results), strict=True))
        for step, reads, writes in self._doors():
            if reads is not None:
                step.x.data = addresses[reads]
            if writes is not None:
                step.y.data = addresses[writes]
        run_steps(self.steps, self.count)
        return results

    def _doors(self) -> list[tuple[Any, int | None, int | None]]:
        """The steps that read the caller's floats or write the floats that it gets."""
        if not hasattr(self, "_found_doors"):
            self._found_doors = [
                (
                    step,
                    line.reads[0] if self._is_float(line.reads[0]) else None,
                    line.writes if self._is_float(line.writes) else None,
                )
                for step, line in zip(self.steps, self.lines, strict=True)
                if self._is_float(line.reads[0]) or self._is_float(line.writes)
            ]
        return self._found_doors


def _arrange(buffers: list[_Buffer]) -> int:
    """Give each buffer an offset, so that those that live at one time do not overlap; the largest first. The whole size."""
    placed: list[_Buffer] = []
    for buffer in sorted(buffers, key=lambda b: -b.size):
        buffer.size = -(-buffer.size // 64) * 64
        offset = 0
        for other in sorted(placed, key=lambda b: b.offset):
            if other.last < buffer.first or buffer.last < other.first:
                continue
            if other.offset >= offset + buffer.size:
                break
            offset = max(offset, other.offset + other.size)
        buffer.offset = offset
        placed.append(buffer)
    return max((b.offset + b.size for b in buffers), default=0)


def _is_row(step: Step) -> bool:
    """Whether pixel i of the result depends on pixel i alone, and the pixels of all tensors follow each other."""
    tensors = [step.x, step.y, *([step.z] if step.flags & FLAGS["adds"] else [])]
    dense = all(t.row == t.w * t.pixel and t.image == t.h * t.row for t in tensors)
    return dense and all((t.n, t.h, t.w) == (step.y.n, step.y.h, step.y.w) for t in tensors)


def _cut(step: Step, read: Shape) -> None:
    """How a step's work is shared: units small enough to keep all threads busy, and what they read in cache."""
    y, kind = step.y, step.kind
    pixels = y.n * y.h * y.w
    if kind == KINDS["convolution"]:
        per_pixel = step.taps * step.depth * y.c // step.groups
        columns = -(-step.blocks // 4) * step.groups
        weights = step.blocks * 16 * step.groups * step.taps * step.depth
        stride = step.window.stride[0] * step.window.stride[1]
        if step.taps == 1 and _is_row(step):
            step.flags |= FLAGS["linear"]
        step.outer = int(weights > _WEIGHTS_IN_CACHE)
        in_cache = _PIXELS_IN_CACHE // max(1, step.x.c * stride) * (4 if step.outer else 1)
        share = columns if step.outer else 1
        fair = -(-pixels * share // 16)
        enough = -(-_UNIT * share // max(1, per_pixel))
        chunks = -(-pixels // max(24, min(max(in_cache, 24), max(enough, fair))))
        step.units = chunks * share
    elif kind == KINDS["depthwise three"]:
        lines = -(-y.n * y.h // step.groups)
        step.units = min(lines, max(1, min(32, pixels * y.c // 2**13)))
    elif kind == KINDS["quantize"]:
        step.units = y.n * y.h
    elif kind in (KINDS["dequantize"], KINDS["transpose"]):
        step.units = step.x.n * step.x.c
    elif kind == KINDS["average"]:
        step.units = y.n * y.h * -(-y.c // 64)
    else:
        cost = y.c * (step.taps if kind == KINDS["depthwise"] else step.window.kernel[0] * step.window.kernel[1] or 1)
        step.units = -(-pixels // max(1, 2**14 // max(1, cost), -(-pixels // 16)))
