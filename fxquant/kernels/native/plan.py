"""A native program for inputs like some: where every tensor lies, how each step is cut, and the steps themselves.

A plan is found by walking through the lines with tensors whose memory nobody touches: torch says what a view of them is,
and their addresses say who shares whose memory. Then memory that is not needed at the same time is shared in one block.
What is concatenated is written side by side from the start: a second walk knows the places that the first one found (a
DenseNet copies nothing). A tensor that a window reads by whole lines is written inside a border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxquant.errors import InputError
from fxquant.kernels.native.cut import cut
from fxquant.kernels.native.layout import Image, axes_of, image
from fxquant.kernels.native.library import KINDS, Step, TensorView, run_steps
from fxquant.kernels.native.lowering import Line, NativeProgram, Reference
from fxquant.kernels.native.memory import Memory
from fxquant.kernels.native.operations import Concatenation, Door, Operation
from fxquant.kernels.native.weighted import Weighted
from fxquant.kernels.native.weights import Unfit

__all__ = ["Plan"]

_AXES = 6


@dataclass
class _Recorded:
    """A step without addresses: tensors as the kernel sees them, the result last."""

    operation: Operation | None
    images: list[Image]


@dataclass
class _Home:
    """Where a result is to be written: a part of a concatenation, or the inside of a border."""

    line: int
    axis: int = 0
    start: int = 0


class _Walk:
    """One walk through the lines."""

    def __init__(self, program: NativeProgram, inputs: Sequence[Tensor], homes: dict[int, _Home], shapes: Any) -> None:
        self.program, self.homes, self.shapes = program, homes, shapes
        self.values: list[Any] = [None] * len(program.lines)
        self.native: set[int] = set()
        self.tensors: dict[int, Tensor] = {}
        """Tensors of our own by the address of their memory."""
        self.borders: list[tuple[Tensor, int]] = []
        self.steps: list[_Recorded] = []
        self.doors: dict[int, int] = {}
        """Lines whose results come from outside, by the address that they had."""
        self.wholes: dict[int, Tensor] = {}
        self.inside: dict[int, tuple[int, int]] = {}
        for line, value in zip(program.inputs, inputs, strict=True):
            self.values[line] = value
        for index, line_ in enumerate(program.lines):
            if not line_.gone and (line_.operation is not None or line_.run is not None):
                self._walk(index, line_)

    def _walk(self, index: int, line: Line) -> None:
        try:
            if line.operation is not None:
                self.values[index] = self._compute(index, line.operation)
                self.native.add(index)
                return
            assert line.run is not None
            args, kwargs = _filled(line.args, self.values), _filled(line.kwargs, self.values)
            mine = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and self.is_own(t)]
            if mine and not (line.moves or line.measures):
                raise Unfit("it computes outside the integers from what they gave")
            if mine and line.moves:
                self.values[index] = self._moved(line, args, kwargs, mine)
                self.native.add(index)
            else:
                self.values[index] = line.run(*args, **kwargs)
        except Unfit as reason:
            raise Unfit(f"{line.name} has no native kernel: {reason}") from None
        except InputError as error:
            raise InputError(f"{line.name}: {error}") from None

    def is_own(self, x: Tensor) -> bool:
        """Whether a tensor's memory is the plan's."""
        return x.untyped_storage().data_ptr() in self.tensors

    def _moved(self, line: Line, args: Any, kwargs: Any, mine: list[Tensor]) -> Any:
        """Views of our own tensors; where the function copies them, views of a copy whose elements follow each other."""
        assert line.run is not None
        if len(mine) != 1 or mine[0] is not args[0]:
            raise Unfit("how it moves numbers is not written natively")
        for first in (lambda: mine[0], lambda: self.copied(mine[0], torch.contiguous_format)):
            try:
                value = line.run(first(), *args[1:], **kwargs)
            except RuntimeError:  # its strides allow no such view
                continue
            if all(not isinstance(t, Tensor) or self.is_own(t) for t in pytree.tree_leaves(value)):
                return value
        raise Unfit("how it moves numbers is not written natively")

    # ---- results

    def _compute(self, index: int, operation: Operation) -> Tensor:
        tensors = [self._operand(line) for line in operation.operands]
        if isinstance(operation, Concatenation):
            return self._concatenated(index, operation, tensors)
        wanted = {"image": torch.channels_last, "rows": torch.contiguous_format}.get(operation.layout)
        if wanted is not None:
            tensors = [self._laid(t, wanted) for t in tensors]
        y = self._placed(index, operation.result(*tensors))
        images = operation.images(tensors, y)
        if images is None:
            tensors = [self._like(t, y) for t in tensors]
            images = operation.images(tensors, y)
            if images is None:
                raise Unfit("its tensors lie in memory as no kernel reads them")
        if isinstance(operation, Weighted) and operation.by_lines:
            images[0] = self._behind_border(tensors[0], operation)
        self.steps.append(_Recorded(operation, images))
        return y

    def _operand(self, line: int) -> Tensor:
        value = self.values[line]
        if not isinstance(value, Tensor):
            raise Unfit("an operand is no tensor")
        if not self.is_own(value) and line not in self.doors.values():
            value = self.values[line] = from_outside(value, self.program.lines[line].signed)
            self.doors[value.untyped_storage().data_ptr()] = line
        return value

    def _laid(self, x: Tensor, wanted: torch.memory_format) -> Tensor:
        """A tensor whose channels (or whose last axis) follow each other."""
        if x.dtype != torch.uint8:
            return x
        if wanted is torch.channels_last and x.ndim == 4:
            return x if image(x) is not None else self.copied(x, wanted)
        return x if x.stride(-1) == 1 or x.shape[-1] == 1 else self.copied(x, torch.contiguous_format)

    def _like(self, x: Tensor, y: Tensor) -> Tensor:
        """A copy of ``x`` that lies as ``y`` does, or just without gaps where their shapes differ."""
        if x.shape == y.shape and y.dtype == torch.uint8:
            return self._copy(x, self._own(torch.empty_like(y)))
        return self.copied(x, torch.contiguous_format)

    def copied(self, x: Tensor, wanted: torch.memory_format) -> Tensor:
        """A copy in that order of memory."""
        return self._copy(x, self._own(torch.empty(x.shape, dtype=torch.uint8, memory_format=wanted)))

    def _copy(self, x: Tensor, y: Tensor) -> Tensor:
        size = (1, 1, 1, 1)
        self.steps.append(_Recorded(None, [Image(x, size, (0, 0, 0)), Image(y, size, (0, 0, 0))]))
        return y

    def _own(self, x: Tensor) -> Tensor:
        self.tensors[x.untyped_storage().data_ptr()] = x
        return x

    # ---- places

    def _placed(self, index: int, fresh: Tensor) -> Tensor:
        """The memory for a result: its own, or where it is wanted."""
        home = self.homes.get(index)
        if home is None or fresh.dtype != torch.uint8:
            return self._own(fresh)
        consumer = self.program.lines[home.line].operation
        if isinstance(consumer, Weighted):
            return self._bordered(fresh, consumer)
        parent = self.wholes.get(home.line)
        if parent is None:
            shape, order = self.shapes[home.line]
            like = torch.empty(shape, dtype=torch.uint8, memory_format=order)
            parent = self.wholes[home.line] = self._placed(home.line, like)
        return parent.narrow(home.axis, home.start, fresh.shape[home.axis])

    def _concatenated(self, index: int, operation: Concatenation, tensors: list[Tensor]) -> Tensor:
        axis = operation.axis
        side_by_side = _joined(tensors, axis)
        y = self.wholes.get(index)
        if y is None and side_by_side is not None:
            return side_by_side
        if y is None:
            y = self._placed(index, operation.result(*tensors))
        at = 0
        for x in tensors:
            part = y.narrow(axis, at, x.shape[axis])
            if x.data_ptr() != part.data_ptr() or x.stride() != part.stride():
                self._copy(x, part)
            at += x.shape[axis]
        return y

    def _bordered(self, fresh: Tensor, consumer: Weighted) -> Tensor:
        """The inside of a tensor with a border of the consumer's zero point."""
        down, across = consumer.geometry.padding
        n, c, h, w = fresh.shape
        whole = torch.empty((n, c, h + 2 * down, w + 2 * across), dtype=torch.uint8, memory_format=torch.channels_last)
        self.borders.append((self._own(whole), consumer.zero_point))
        self.inside[whole.untyped_storage().data_ptr()] = (down, across)
        return whole[:, :, down : down + h, across : across + w]

    def _behind_border(self, x: Tensor, operation: Weighted) -> Image:
        down, across = operation.geometry.padding
        key = x.untyped_storage().data_ptr()
        if self.inside.get(key) != (down, across):
            inside = self._bordered(x, operation)
            x = self._copy(x, inside)
            key = x.untyped_storage().data_ptr()
        seen = image(self.tensors[key])
        assert seen is not None
        return seen


def from_outside(value: Tensor, signed: bool) -> Tensor:
    """A tensor that Python computed, as the kernels read it."""
    if value.is_floating_point():
        return value.float().contiguous()
    if signed and value.dtype == torch.int8:
        return torch.bitwise_xor(value, -128).view(torch.uint8).contiguous()
    if value.dtype != torch.uint8:
        raise Unfit(f"an operand is a {value.dtype} tensor")
    return value.contiguous()


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


def _homes(program: NativeProgram, walk: _Walk) -> dict[int, _Home]:
    """Where results are to be written, by line."""
    homes: dict[int, _Home] = {}
    uses: dict[int, int] = {}
    for line in program.lines:
        for used in _references(line):
            uses[used] = uses.get(used, 0) + 1
    for index in reversed(range(len(program.lines))):
        operation = program.lines[index].operation
        if isinstance(operation, Concatenation):
            at = 0
            for line in operation.operands:
                made = program.lines[line].operation
                if line not in homes and made is not None and not made.writes_floats:
                    homes[line] = _Home(index, operation.axis, at)
                at += walk.values[line].shape[operation.axis]
        elif isinstance(operation, Weighted) and operation.by_lines:
            (source, *_) = operation.operands
            if isinstance(program.lines[source].operation, Door) and uses[source] == 1:
                homes.setdefault(source, _Home(index))
    return homes


@dataclass
class Plan:
    """Steps for inputs of these shapes.

    Attributes:
        program: what to compute.
        count: how many steps there are.
        memory: bytes of all tensors between them.
    """

    program: NativeProgram
    inputs: Sequence[Any]
    count: int = 0
    memory: int = 0
    kept: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        first = _Walk(self.program, self.inputs, {}, {})
        shapes = {i: (tuple(v.shape), _order(v)) for i, v in enumerate(first.values) if isinstance(v, Tensor)}
        walk = _Walk(self.program, self.inputs, _homes(self.program, first), shapes)
        self.inputs = ()
        arena = Memory(walk.tensors, [[i.tensor for i in s.images] for s in walk.steps], walk.borders)
        self.arena, self.memory = arena.block, arena.size
        varying = _varying(self.program, walk)
        self.results = self._results(walk)
        self.steps, self.count = (Step * len(walk.steps))(), len(walk.steps)
        self.doors: list[tuple[Any, int, int]] = []
        for step, recorded in zip(self.steps, walk.steps, strict=True):
            self._fill(step, recorded, walk, arena, varying)
        self.outside = self._outside(walk, varying)
        self.values = [None if i in walk.native else v for i, v in enumerate(walk.values)]

    def _results(self, walk: _Walk) -> dict[int, tuple[int, ...]]:
        """Lines whose floats the caller gets, with their shapes."""
        found = {}
        for line in sorted(_references(self.program.result) & walk.native):
            operation = self.program.lines[line].operation
            if operation is None or not operation.writes_floats:
                raise Unfit(f"{self.program.lines[line].name}, which the model returns, is no tensor of floats")
            found[line] = tuple(walk.values[line].shape)
        self.addresses = {walk.values[line].untyped_storage().data_ptr(): line for line in found}
        return found

    def _fill(self, step: Step, recorded: _Recorded, walk: _Walk, arena: Memory, varying: set[int]) -> None:
        views = []
        for seen in recorded.images:
            storage = seen.tensor.untyped_storage().data_ptr()
            constant = storage in walk.doors and walk.doors[storage] not in varying
            if constant:
                self.kept.append(seen.tensor)
            known = constant or storage in self.addresses or storage in walk.doors
            address = seen.tensor.data_ptr() if known else arena.address(seen.tensor)
            views.append(TensorView(address, *seen.strides[::-1], *seen.sizes))
        step.x, step.y = views[0], views[-1]
        if len(views) > 2:
            step.z = views[1]
        step.groups = 1
        if recorded.operation is None:
            step.kind = KINDS["copy"]
            self.kept.append(_axes(step, *(i.tensor for i in recorded.images)))
        else:
            self.kept.append((recorded.operation, recorded.operation.fill(step, views)))
        cut(step)
        for place, seen in zip(("x", "z"), recorded.images[:-1], strict=False):
            self._watch(step, place, seen, walk, varying)
        self._watch(step, "y", recorded.images[-1], walk, varying)

    def _watch(self, step: Step, place: str, seen: Image, walk: _Walk, varying: set[int]) -> None:
        """Remember a tensor of a step whose address is known in each call only."""
        storage = seen.tensor.untyped_storage().data_ptr()
        line = walk.doors.get(storage, self.addresses.get(storage))
        if line is not None and (line in varying or line in self.results):
            self.doors.append((getattr(step, place), line, seen.tensor.data_ptr() - storage))

    def _outside(self, walk: _Walk, varying: set[int]) -> list[int]:
        """The lines that Python computes in each call, in order."""
        wanted = {*walk.doors.values(), *_references(self.program.result)} & varying
        for index in reversed(range(len(self.program.lines))):
            if index in wanted:
                wanted |= _references(self.program.lines[index]) & varying
        return sorted(wanted - set(self.program.inputs))

    def run(self, inputs: Sequence[Any]) -> Any:
        """The result, in new tensors; one call at a time."""
        values = list(self.values)
        for line, value in zip(self.program.inputs, inputs, strict=True):
            values[line] = value
        for index in self.outside:
            line_ = self.program.lines[index]
            assert line_.run is not None
            values[index] = line_.run(*_filled(line_.args, values), **_filled(line_.kwargs, values))
        held = {}
        for line, shape in self.results.items():
            values[line] = held[line] = torch.empty(shape)
        for view, line, offset in self.doors:
            if line not in held:
                held[line] = from_outside(values[line], self.program.lines[line].signed)
            view.data = held[line].data_ptr() + offset
        run_steps(self.steps, self.count)
        return _filled(self.program.result, values)


def _references(source: Any) -> set[int]:
    """The lines that a line, or a template, takes results from."""
    template = (source.args, source.kwargs) if isinstance(source, Line) else source
    found = list[int]()
    fx.node.map_aggregate(template, lambda leaf: found.append(leaf.line) if isinstance(leaf, Reference) else None)
    return set(found)


def _varying(program: NativeProgram, walk: _Walk) -> set[int]:
    """Lines whose results differ from call to call although Python computes them: not from shapes alone."""
    varying = set(program.inputs)
    for index, line in enumerate(program.lines):
        if index not in walk.native and not line.measures and _references(line) & varying:
            varying.add(index)
    return varying


def _filled(template: Any, values: Sequence[Any]) -> Any:
    if isinstance(template, Reference):
        return values[template.line]
    if isinstance(template, (tuple, list)):
        return type(template)(_filled(item, values) for item in template)
    if isinstance(template, dict):
        return {key: _filled(value, values) for key, value in template.items()}
    if isinstance(template, slice):
        return slice(*(_filled(v, values) for v in (template.start, template.stop, template.step)))
    return template


def _order(x: Tensor) -> torch.memory_format:
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _axes(step: Step, x: Tensor, y: Tensor) -> Tensor:
    """Write the axes of a copy: sizes and strides, neighbours joined where both step through them alike."""
    found: list[list[int]] = []
    for axis in axes_of(y):
        size, from_, to = y.shape[axis], x.stride(axis), y.stride(axis)
        if found and found[-1][1] == from_ * size and found[-1][2] == to * size:
            found[-1] = [found[-1][0] * size, from_, to]
        else:
            found.append([size, from_, to])
    if len(found) > _AXES:
        raise Unfit(f"it copies along {len(found)} axes")
    numbers = torch.tensor(found or [[1, 1, 1]], dtype=torch.int64)
    step.taps, step.numbers = len(numbers), numbers.data_ptr()
    return numbers
