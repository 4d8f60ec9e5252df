"""One walk through a native program's lines, with tensors whose memory nobody touches.

Torch says what a view of them is, and their addresses say who shares whose memory. What is concatenated is written side by
side from the start where the places are known from a walk before. A tensor that a window reads by whole lines is written
inside a border.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxquant.errors import InputError, Refusal
from fxquant.kernels.native.gather import gathering_of
from fxquant.kernels.native.layout import Image, image
from fxquant.kernels.native.lowering import Line, NativeProgram, filled, references
from fxquant.kernels.native.memory import MEMORY_LINE
from fxquant.kernels.native.operations import BorderOperation, Concatenation, Maximum, Operation
from fxquant.kernels.native.weighted import Weighted
from fxquant.kernels.native.winograd import steps_of

__all__ = ["OutputSlice", "Recorded", "Walk", "find_output_slices", "from_outside"]


CONSTANT = -1
"""In the place of a line: memory that the program has written itself."""


@dataclass
class Recorded:
    """A step without addresses: tensors as the kernel sees them, the result last, and memory that it needs besides."""

    operation: Operation | None
    images: list[Image]
    scratch: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All that it reads or writes."""
        return [*(seen.tensor for seen in self.images), *([] if self.scratch is None else [self.scratch])]


@dataclass
class OutputSlice:
    """Where a result is to be written: a part of a concatenation, or the inside of a border."""

    line: int
    axis: int = 0
    start: int = 0


class Walk:
    """One walk through the lines."""

    def __init__(
        self, program: NativeProgram, inputs: Sequence[Tensor], output_slices: dict[int, OutputSlice], shapes: Any
    ) -> None:
        self.program, self.output_slices, self.shapes = program, output_slices, shapes
        self.values: list[Any] = [None] * len(program.lines)
        self.native: set[int] = set()
        self.after: list[int] = []
        """Lines that Python computes from floats that the integers gave."""
        self.tensors: dict[int, Tensor] = {}
        """Tensors of our own by the address of their memory."""
        self.borders: list[tuple[Tensor, int]] = []
        self.steps: list[Recorded] = []
        self.border: dict[int, int] = {}
        """Lines whose results come from outside, by the address that they had."""
        self.wholes: dict[int, Tensor] = {}
        self.inside: dict[int, tuple[int, int]] = {}
        for line, value in zip(program.inputs, inputs, strict=True):
            self.values[line] = value
        for index, line_ in enumerate(program.lines):
            if not line_.gone and (line_.operation is not None or line_.run is not None):
                self._walk(index, line_)
        self.leaving = {line: self._leaving(line) for line in sorted(references(program.result) & self.native)}
        """The tensors of lines whose results leave: floats where they are written, bytes as copies."""

    def _walk(self, index: int, line: Line) -> None:
        try:
            if line.operation is not None:
                self.values[index] = self._compute(index, line.operation)
                self.native.add(index)
                return
            assert line.run is not None
            args, kwargs = filled(line.arguments, self.values), filled(line.keywords, self.values)
            mine = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and self.is_own(t)]
            if mine and not (line.moves or line.measures):
                if any(t.dtype == torch.uint8 for t in mine):
                    raise Refusal("it computes outside the integers from what they gave")
                self.after.append(index)
            elif any(i in self.after for i in references(line)):
                self.after.append(index)
            if mine and line.moves:
                self.values[index] = self._moved(line, args, kwargs, mine)
                self.native.add(index)
            else:
                self.values[index] = line.run(*args, **kwargs)
        except Refusal as refusal:
            raise refusal.at(line.name) from None
        except InputError as error:
            raise InputError(f"{line.name}: {error}") from None

    def is_own(self, x: Tensor) -> bool:
        """Whether a tensor's memory is the plan's."""
        return x.untyped_storage().data_ptr() in self.tensors

    def _moved(self, line: Line, args: Any, kwargs: Any, mine: list[Tensor]) -> Any:
        """Views of our own tensors; where the function copies them, views of a copy whose elements follow each other."""
        run = line.run
        assert run is not None
        ways: list[Callable[[], Any]] = [lambda: args]
        if len(mine) == 1 and mine[0] is args[0]:
            ways.append(lambda: (self.copied(mine[0], torch.contiguous_format), *args[1:]))
        for way in ways:
            try:
                value = run(*way(), **kwargs)
            except RuntimeError:  # its strides allow no such view
                continue
            if all(not isinstance(t, Tensor) or self.is_own(t) for t in pytree.tree_leaves(value)):
                return value
        if len(mine) > 1 or mine[0] is not args[0]:
            raise Refusal("how it moves numbers is not written natively")
        return self.gathered(mine[0], lambda x: run(x, *args[1:], **kwargs), line.signed)

    def gathered(self, x: Tensor, function: Callable[[Tensor], Any], signed: bool = False) -> Tensor:
        """What a function gives that takes each axis by itself, by copies."""
        found = gathering_of(function, tuple(x.shape), torch.int8 if signed else torch.uint8)
        if isinstance(found, Refusal):
            raise found
        last = x.ndim == 4 and image(x) is not None
        order = torch.channels_last if last else torch.contiguous_format
        y = self.own(torch.empty(found.shape, dtype=torch.uint8, memory_format=order))
        if found.fills:
            self.fill(found.filling + 128 * signed, y)
        for source, target in found.views(x, y):
            self.copy(source, target)
        return y

    # ---- results

    def _compute(self, index: int, operation: Operation) -> Tensor:
        tensors = [self._operand(line) for line in operation.operands]
        if isinstance(operation, Weighted) and operation.moves:
            return self._spelled(index, operation, tensors[0])
        if isinstance(operation, Maximum) and operation.moves:
            return self._through_planes(operation, tensors[0])
        if isinstance(operation, Concatenation):
            some = [t for t in tensors if t.numel()] or tensors
            return self._concatenated(index, operation, operation.side_by_side(some))
        if not all(t.numel() for t in tensors):
            raise Refusal("an operand is empty")
        return self._step(index, operation, tensors)

    def _spelled(self, index: int, operation: Weighted, x: Tensor) -> Tensor:
        """A layer that numbers move before or behind."""
        if not x.numel():
            raise Refusal("an operand is empty")
        images = operation.before(self, x)
        if images.untyped_storage().data_ptr() not in self.tensors.keys() | self.border.keys():
            raise Refusal("its tensors lie in memory as no kernel reads them")
        return operation.after(self, self._step(index, operation, [images]), x)

    def _through_planes(self, operation: Maximum, x: Tensor) -> Tensor:
        """A pool over volumes: over each plane, then through the planes."""
        if x.ndim != 5 or not x.numel():
            raise Refusal(f"its input has the shape {list(x.shape)}")
        across, through = operation.apart()
        x = self._laid(x, torch.channels_last)
        planes = x.transpose(1, 2).flatten(0, 1)
        if planes.data_ptr() != x.data_ptr():
            raise Refusal("its tensors lie in memory as no kernel reads them")
        y = self._step(CONSTANT, across, [planes]).unflatten(0, (len(x), -1)).transpose(1, 2)
        return self._step(CONSTANT, through, [y.flatten(3)]).unflatten(3, y.shape[3:])

    def _step(self, index: int, operation: Operation, tensors: list[Tensor]) -> Tensor:
        wanted = {"image": torch.channels_last, "rows": torch.contiguous_format}.get(operation.layout)
        if wanted is not None:
            tensors = [self._laid(t, wanted) for t in tensors]
        fresh = operation.result(*tensors)
        passing = isinstance(operation, Weighted) and operation.spelled.copies and fresh.dtype != torch.uint8
        y = self._floats_between(fresh) if passing else self._placed(index, fresh)
        images, wanted_at = operation.images(tensors, y), None
        if images is None and index in self.output_slices:  # a kernel writes no such part of a tensor, a copy does
            wanted_at, y = y, self.own(fresh)
            images = operation.images(tensors, y)
        if images is None:
            tensors = [self._like(t, y) for t in tensors]
            images = operation.images(tensors, y)
            if images is None:
                raise Refusal("its tensors lie in memory as no kernel reads them")
        if isinstance(operation, Weighted) and operation.by_lines:
            images[0] = self._behind_border(tensors[0], operation)
        operations, scratch = steps_of(operation, images) if isinstance(operation, Weighted) else ([operation], 0)
        own = self.own(torch.empty(scratch, dtype=torch.uint8)) if scratch else None
        self.steps += [Recorded(each, images, own) for each in operations]
        return y if wanted_at is None else self.copy(y, wanted_at)

    def _operand(self, line: int) -> Tensor:
        value = self.values[line]
        if not isinstance(value, Tensor):
            raise Refusal("an operand is no tensor")
        if line in self.after or (self.is_own(value) and value.dtype != torch.uint8):
            raise Refusal("an operand was a float between two parts in integers")
        if not self.is_own(value) and line not in self.border.values():
            own = from_outside(value, self.program.lines[line].signed)
            # Floats are cloned, as bytes are copied: a caller's tensors may be parts of one, or one and the same.
            value = self.values[line] = own.clone() if own.is_floating_point() else own
            self.border[value.untyped_storage().data_ptr()] = line
        return value

    def _laid(self, x: Tensor, wanted: torch.memory_format) -> Tensor:
        """A tensor whose channels (or whose last axis) follow each other."""
        if x.dtype != torch.uint8:
            return x
        if wanted is torch.channels_last and x.ndim in (3, 4, 5):
            if image(x) is not None:
                return x
            n, c, *sizes = x.shape
            return self.copy(x, self.own(torch.empty((n, *sizes, c), dtype=torch.uint8)).movedim(-1, 1))
        return x if x.stride(-1) == 1 or x.shape[-1] == 1 else self.copied(x, torch.contiguous_format)

    def _like(self, x: Tensor, y: Tensor) -> Tensor:
        """A copy of ``x`` that lies as ``y`` does, or just without gaps where their shapes differ."""
        if x.shape == y.shape and y.dtype == torch.uint8:
            return self.copy(x, self.own(torch.empty_like(y)))
        return self.copied(x, torch.contiguous_format)

    def copied(self, x: Tensor, wanted: torch.memory_format) -> Tensor:
        """A copy in that order of memory."""
        return self.copy(x, self.own(torch.empty(x.shape, dtype=torch.uint8, memory_format=wanted)))

    def copy(self, x: Tensor, y: Tensor) -> Tensor:
        """Copy bytes to a view of a tensor of our own."""
        if not x.numel():
            raise Refusal("an operand is empty")
        size = (1, 1, 1, 1)
        self.steps.append(Recorded(None, [Image(x, size, (0, 0, 0)), Image(y, size, (0, 0, 0))]))
        return y

    def fill(self, value: int, y: Tensor) -> None:
        """Write one byte everywhere in a view of a tensor of our own."""
        filling = torch.full((1,), value, dtype=torch.int16).to(torch.uint8)
        self.border[filling.untyped_storage().data_ptr()] = CONSTANT
        self.copy(filling.expand(y.shape), y)

    def own(self, x: Tensor) -> Tensor:
        """A tensor whose memory is the plan's."""
        self.tensors[x.untyped_storage().data_ptr()] = x
        return x

    def _leaving(self, line: int) -> Tensor:
        value, operation = self.values[line], self.program.lines[line].operation
        if isinstance(value, Tensor) and value.dtype == torch.uint8:
            return self.copy(value, torch.empty_like(value))
        if operation is None or not operation.writes_floats:
            raise Refusal("it leaves the integers and is no tensor of floats", where=self.program.lines[line].name)
        return value

    # ---- places

    def _placed(self, index: int, fresh: Tensor) -> Tensor:
        """The memory for a result: its own, or where it is wanted."""
        output_slice = self.output_slices.get(index)
        if fresh.dtype != torch.uint8:
            return self.own(fresh.zero_())  # what Python computes from it now should be of no harm
        if output_slice is None:
            return self.own(fresh)
        consumer = self.program.lines[output_slice.line].operation
        if isinstance(consumer, Weighted):
            return self._bordered(fresh, consumer)
        parent = self.wholes.get(output_slice.line)
        if parent is None:
            shape, order = self.shapes[output_slice.line]
            like = torch.empty(shape, dtype=torch.uint8, memory_format=order)
            parent = self.wholes[output_slice.line] = self._placed(output_slice.line, like)
        return parent.narrow(output_slice.axis, output_slice.start, fresh.shape[output_slice.axis])

    def _floats_between(self, fresh: Tensor) -> Tensor:
        """Memory of the plan's for floats that do not leave."""
        held = self.own(torch.zeros(fresh.nbytes, dtype=torch.uint8))
        return held.view(fresh.dtype).as_strided(fresh.shape, fresh.stride())

    def _concatenated(self, index: int, operation: Concatenation, tensors: list[Tensor]) -> Tensor:
        axis = operation.axis
        side_by_side = _joined(tensors, axis)
        y = self.wholes.get(index)
        if y is None and side_by_side is not None and self.is_own(side_by_side):
            return side_by_side
        if y is None:
            y = self._placed(index, operation.result(*tensors))
        at = 0
        for x in tensors:
            part = y.narrow(axis, at, x.shape[axis])
            if x.data_ptr() != part.data_ptr() or x.stride() != part.stride():
                self.copy(x, part)
            at += x.shape[axis]
        return y

    def _bordered(self, fresh: Tensor, consumer: Weighted) -> Tensor:
        """The inside of a tensor with a border of the consumer's zero point."""
        down, across = consumer.geometry.padding
        n, c, h, w = fresh.shape
        whole = torch.empty((n, c, h + 2 * down, w + 2 * across), dtype=torch.uint8, memory_format=torch.channels_last)
        self.borders.append((self.own(whole), consumer.zero_point))
        self.inside[whole.untyped_storage().data_ptr()] = (down, across)
        return whole[:, :, down : down + h, across : across + w]

    def _behind_border(self, x: Tensor, operation: Weighted) -> Image:
        down, across = operation.geometry.padding
        key = x.untyped_storage().data_ptr()
        if self.inside.get(key) != (down, across):
            inside = self._bordered(x, operation)
            x = self.copy(x, inside)
            key = x.untyped_storage().data_ptr()
        seen = image(self.tensors[key])
        assert seen is not None
        return seen


def from_outside(value: Tensor, signed: bool) -> Tensor:
    """A tensor that Python computed, as the kernels read it: bytes have room behind them, those of images channels last."""
    if value.is_floating_point():
        return value.float().contiguous()
    if value.dtype not in (torch.uint8, torch.int8) or signed != (value.dtype == torch.int8):
        raise Refusal(f"an operand is a {value.dtype} tensor")
    room = torch.empty(value.numel() + MEMORY_LINE, dtype=torch.uint8)
    held = room[: value.numel()]
    if value.ndim == 4:
        n, c, h, w = value.shape
        held = held.view(n, h, w, c).permute(0, 3, 1, 2)
    else:
        held = held.view(value.shape)
    return held.copy_(torch.bitwise_xor(value, -128).view(torch.uint8) if signed else value)


def _joined(tensors: Sequence[Tensor], axis: int) -> Tensor | None:
    """The tensors as one, if they lie side by side in one memory."""
    first, at = tensors[0], tensors[0].data_ptr()
    for x in tensors:
        if x.data_ptr() != at or x.stride() != first.stride():
            return None
        at += x.shape[axis] * x.stride(axis)
    if any(x.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for x in tensors):
        return None
    shape = list(first.shape)
    shape[axis] = sum(x.shape[axis] for x in tensors)
    return first.as_strided(shape, first.stride())


def find_output_slices(program: NativeProgram, walk: Walk) -> dict[int, OutputSlice]:
    """Where results are to be written, by line."""
    output_slices: dict[int, OutputSlice] = {}
    uses: dict[int, int] = {}
    for line in program.lines:
        for used in references(line):
            uses[used] = uses.get(used, 0) + 1
    for index in reversed(range(len(program.lines))):
        operation = program.lines[index].operation
        if isinstance(operation, Concatenation) and not operation.stacked:
            at = 0
            for part in operation.operands:
                made = program.lines[part].operation
                placed = made is not None and not made.writes_floats and not made.moves
                if part not in output_slices and placed:
                    output_slices[part] = OutputSlice(index, operation.axis, at)
                at += walk.values[part].shape[operation.axis]
        elif isinstance(operation, Weighted) and operation.by_lines and not operation.moves:
            (source, *_) = operation.operands
            if isinstance(program.lines[source].operation, BorderOperation) and uses[source] == 1:
                output_slices.setdefault(source, OutputSlice(index))
    return output_slices
