"""A native program for inputs like some: where every tensor lies, how each step is cut, and the steps themselves.

Two walks through the lines find the steps and their tensors, the second one with the places that the first one found (a
DenseNet's concatenations copy nothing). Then memory that is not needed at the same time is shared in one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from fxquant.errors import Refusal
from fxquant.kernels.native.cut import cut
from fxquant.kernels.native.layout import Image, axes_of, merged
from fxquant.kernels.native.library import KINDS, Step, TensorView
from fxquant.kernels.native.lowering import NativeProgram, filled, references
from fxquant.kernels.native.memory import Memory
from fxquant.kernels.native.operations import Operation
from fxquant.kernels.native.slices import in_slices
from fxquant.kernels.native.walk import Recorded, Walk, find_output_slices, from_outside
from fxquant.kernels.native.weighted import Weighted
from fxquant.kernels.native.winograd import Winograd

__all__ = ["Plan"]

_AXES = 6


@dataclass
class Plan:
    """Steps for inputs of these shapes.

    Attributes:
        program: what to compute.
        count: how many steps there are.
        memory: bytes of all tensors between them.
        threads: that compute it, for which scratch memory is laid out.
        ways: of each layer with weights, by the name of its line: ``direct``, ``winograd 2 x 2`` or ``winograd 4 x 4``.
    """

    program: NativeProgram
    inputs: Sequence[Any]
    count: int = 0
    memory: int = 0
    threads: int = 1
    ways: dict[str, str] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.threads = torch.get_num_threads()
        first = Walk(self.program, self.inputs, {}, {})
        shapes = {i: (tuple(v.shape), _order(v)) for i, v in enumerate(first.values) if isinstance(v, Tensor)}
        walk = Walk(self.program, self.inputs, find_output_slices(self.program, first), shapes)
        self.inputs = ()
        order = in_slices(walk)
        arena = Memory(order.tensors, order.together, walk.borders)
        self.arena, self.memory = arena.block, arena.size
        varying = _varying(self.program, walk)
        self.results = self._results(walk)
        self.steps, self.count = (Step * len(order.steps))(), len(order.steps)
        self.border: list[tuple[Any, int, int]] = []
        for step, recorded in zip(self.steps, order.steps, strict=True):
            self._fill(step, recorded, walk, arena, varying)
        self.ways = self._ways([step.operation for step in order.steps])
        self.outside, self.after = self._outside(walk, varying), walk.after
        dead = walk.native | varying | set(walk.after)
        self.values = [None if i in dead else v for i, v in enumerate(walk.values)]

    def _results(self, walk: Walk) -> dict[int, Tensor]:
        """Lines whose floats or bytes leave, each with a tensor like them."""
        found = dict(walk.leaving)
        for line in set[int]().union(*(references(self.program.lines[i]) for i in walk.after)) & walk.native:
            operation = self.program.lines[line].operation
            if operation is None or not operation.writes_floats:
                raise Refusal("it leaves the integers and is no tensor of floats", where=self.program.lines[line].name)
            found[line] = walk.values[line]
        self.addresses = {value.untyped_storage().data_ptr(): line for line, value in found.items()}
        return found

    def _ways(self, computing: Sequence[Operation | None]) -> dict[str, str]:
        tiles = {id(own.layer): own.tile for own in computing if isinstance(own, Winograd)}
        layers = [line for line in self.program.lines if isinstance(line.operation, Weighted)]
        found = {line.name: tiles.get(id(line.operation)) for line in layers}
        return {name: f"winograd {tile} x {tile}" if tile else "direct" for name, tile in found.items()}

    def _fill(self, step: Step, recorded: Recorded, walk: Walk, arena: Memory, varying: set[int]) -> None:
        views = []
        for seen in recorded.images:
            storage = seen.tensor.untyped_storage().data_ptr()
            constant = storage in walk.border and walk.border[storage] not in varying
            if constant:
                self.kept.append(seen.tensor)
            known = constant or storage in self.addresses or storage in walk.border
            address = seen.tensor.data_ptr() if known else arena.address(seen.tensor)
            views.append(TensorView(address, *seen.strides[::-1], *seen.sizes))
        step.x, step.y = views[0], views[-1]
        if len(views) > 2:
            step.z = views[1]
        step.groups = 1
        if recorded.scratch is not None:
            step.scratch = arena.address(recorded.scratch)
        if recorded.operation is None:
            step.kind = KINDS["copy"]
            self.kept.append(_axes(step, *(i.tensor for i in recorded.images)))
        else:
            self.kept.append((recorded.operation, recorded.operation.fill(step, views)))
        cut(step)
        for place, seen in zip(("x", "z"), recorded.images[:-1], strict=False):
            self._watch(step, place, seen, walk, varying)
        self._watch(step, "y", recorded.images[-1], walk, varying)

    def _watch(self, step: Step, place: str, seen: Image, walk: Walk, varying: set[int]) -> None:
        """Remember a tensor of a step whose address is known in each call only."""
        storage = seen.tensor.untyped_storage().data_ptr()
        line = walk.border.get(storage, self.addresses.get(storage))
        if line is not None and (line in varying or line in self.results):
            self.border.append((getattr(step, place), line, seen.tensor.data_ptr() - storage))

    def _outside(self, walk: Walk, varying: set[int]) -> list[int]:
        """The lines that Python computes in each call, in order."""
        wanted = {*walk.border.values(), *references(self.program.result)} & varying
        wanted |= set[int]().union(*(references(self.program.lines[i]) for i in walk.after)) & varying
        for index in reversed(range(len(self.program.lines))):
            if index in wanted:
                wanted |= references(self.program.lines[index]) & varying
        return sorted(wanted - set(self.program.inputs))

    def _compute(self, lines: Sequence[int], values: list[Any]) -> None:
        """What Python does."""
        for index in lines:
            line = self.program.lines[index]
            assert line.run is not None
            values[index] = line.run(*filled(line.arguments, values), **filled(line.keywords, values))

    def run(self, inputs: Sequence[Any]) -> Any:
        """The result, in new tensors; one call at a time."""
        values = list(self.values)
        for line, value in zip(self.program.inputs, inputs, strict=True):
            values[line] = value
        self._compute(self.outside, values)
        held: dict[int, Tensor] = {}
        for line, like in self.results.items():
            values[line] = held[line] = torch.empty_like(like)
        for view, line, offset in self.border:
            if line not in held:
                held[line] = from_outside(cast(Tensor, values[line]), self.program.lines[line].signed)
            view.data = held[line].data_ptr() + offset
        self.program.library.run(self.steps, self.count, self.threads)
        for line in self.results:
            values[line] = _given(held[line], self.program.lines[line].signed)
        self._compute(self.after, values)
        return filled(self.program.result, values)


def _given(x: Tensor, signed: bool) -> Tensor:
    """A result as the reference gives it: floats in their logical order, of which Python may take views; signed bytes."""
    if x.is_floating_point():
        return x.contiguous()
    return x.view(torch.int8).bitwise_xor_(-128) if signed else x


def _varying(program: NativeProgram, walk: Walk) -> set[int]:
    """Lines whose results differ from call to call although Python computes them: not from shapes alone."""
    varying = set(program.inputs)
    for index, line in enumerate(program.lines):
        if index not in walk.native and index not in walk.after and not line.measures and references(line) & varying:
            varying.add(index)
    return varying


def _order(x: Tensor) -> torch.memory_format:
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _axes(step: Step, x: Tensor, y: Tensor) -> Tensor:
    """Write the axes of a copy: sizes and strides, neighbours joined where both step through them alike."""
    order = axes_of(y)
    sizes, (from_, to) = merged([y.shape[a] for a in order], [[t.stride(a) for a in order] for t in (x, y)])
    if len(sizes) > _AXES:
        raise Refusal(f"it copies along {len(sizes)} axes")
    numbers = torch.tensor([sizes, from_, to], dtype=torch.int64).t().contiguous()
    step.taps, step.numbers = len(numbers), numbers.data_ptr()
    return numbers
