"""What a native plan is made of, before shapes are known: one operation an integer form, its numbers laid out once.

An operation knows the shape of its result and what to write into a ``Step``; where tensors lie is the plan's business.
Values are numbered. A tensor of four axes is NCHW for torch and pixels of channels in memory; of any other, the last axis
is taken for channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxquant.kernels.native.library import FLAGS, KINDS, Step
from fxquant.kernels.native.weights import (
    Rescaling,
    Unfit,
    addition,
    dense_weight,
    columns_weight,
    depthwise_weight,
    folded_bias,
    per_block,
    rescaling_of,
    woven,
)
from fxquant.kernels.saturation import INT32, channels_first, largest_sum
from fxquant.kernels.weighted import Geometry, geometry_of, unfit
from fxquant.nn.accumulating import IntegerSum, IntegerWeighted

__all__ = ["Add", "Concatenate", "Flatten", "Operation", "Shape", "Simple", "Weighted", "as_image", "set_rescaling"]

Shape = tuple[int, ...]
_FLOAT_BOUNDS = (-math.inf, math.inf)


def as_image(shape: Shape) -> tuple[int, int, int, int]:
    """n, h, w and c of a tensor of that shape."""
    if len(shape) == 4:
        n, c, h, w = shape
        return n, h, w, c
    return math.prod(shape[:-1]), 1, 1, shape[-1]


@dataclass(eq=False)
class Operation:
    """One step to be.

    Attributes:
        name: of the graph's node.
        inputs, output: numbers of values.
    """

    name: str
    inputs: list[int]
    output: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of the result."""
        return shapes[0]

    def fill(self, step: Step, shapes: Sequence[Shape], result: Shape) -> None:
        """Write what the step computes; tensors and the cut are already there."""
        raise NotImplementedError


@dataclass(eq=False)
class Simple(Operation):
    """An operation that has all its numbers at hand.

    Attributes:
        kind: a name of ``KINDS``.
        write: sets the fields of a step, from the shapes of the inputs and of the result.
        of_shapes: gives the result's shape; that of the first input where None.
        keep: tensors whose memory the step reads.
        floats_in, floats_out: whether it reads or gives NCHW floats.
    """

    kind: str
    write: Callable[[Step, Sequence[Shape], Shape], Any]
    of_shapes: Callable[[Sequence[Shape]], Shape] | None = None
    keep: tuple[Tensor, ...] = ()
    floats_in: bool = False
    floats_out: bool = False

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0] if self.of_shapes is None else self.of_shapes(shapes)

    def fill(self, step: Step, shapes: Sequence[Shape], result: Shape) -> None:
        step.kind = KINDS[self.kind]
        found = self.write(step, shapes, result)
        if isinstance(found, Tensor):
            self.keep = (*self.keep, found)


@dataclass(eq=False)
class Concatenate(Operation):
    """Tensors side by side in their channels; a plan lets them be written there."""

    axis: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        first, axis = shapes[0], self.axis % len(shapes[0])
        if axis != (1 if len(first) == 4 else len(first) - 1):
            raise Unfit(f"it concatenates along axis {self.axis}, which is not that of the channels")
        return (*first[:axis], sum(s[axis] for s in shapes), *first[axis + 1 :])


@dataclass(eq=False)
class Flatten(Operation):
    """An image as a row of numbers."""

    function: Callable[..., Tensor]
    attributes: dict[str, Any]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        found = tuple(self.function(torch.empty(shapes[0], device="meta"), **self.attributes).shape)
        if len(shapes[0]) != 4 or found != (shapes[0][0], math.prod(shapes[0][1:])):
            raise Unfit(f"it makes {list(found)} of {list(shapes[0])}, which is no image as a row")
        return found


@dataclass(eq=False)
class Add(Operation):
    """A sum of two tensors of one shape."""

    part: IntegerSum
    zero_points: tuple[int, int]

    def __post_init__(self) -> None:
        self.numbers = addition(self.part, self.zero_points)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        if shapes[0] != shapes[1]:
            raise Unfit(f"it adds shapes {list(shapes[0])} and {list(shapes[1])}")
        return shapes[0]

    def fill(self, step: Step, shapes: Sequence[Shape], result: Shape) -> None:
        step.kind = KINDS["add"]
        set_addition(step, self.numbers)


def set_addition(step: Step, numbers: tuple[int, tuple[int, int], int, int, int]) -> None:
    """Write the rule of a sum."""
    step.add.constant, step.add.q[:], step.add.shift = numbers[0], numbers[1], numbers[2]
    step.add.low, step.add.high = numbers[3:]


def set_rescaling(step: Step, rescaling: Rescaling, constants: Tensor) -> None:
    """Write how sums become bytes."""
    step.out.constants, step.out.magic = constants.data_ptr(), rescaling.magic
    step.out.low, step.out.high = rescaling.low, rescaling.high
    step.flags |= FLAGS["ties"] * rescaling.ties


@dataclass(eq=False)
class Weighted(Operation):
    """A convolution over two dimensions, or a linear layer; what follows it may be done on the way out.

    Attributes:
        zero_point: of the input, as held.
        table: 256 bytes that the result is looked up in.
        added: the sum that the result goes into, and whether it is its second operand.
        to_float: whether the sums leave as floats.
    """

    part: IntegerWeighted
    zero_point: int
    table: Tensor | None = None
    added: tuple[Add, bool] | None = None
    to_float: bool = field(init=False)
    by_lines: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        part = self.part
        weight, reason = channels_first(part), unfit(part)
        self.largest = largest_sum(part) + (0 if part.bias is None else int(part.bias.long().abs().max()))
        if reason is not None or self.largest > INT32:
            raise Unfit(reason or "its sums could overflow 32 bits")
        self.to_float = part.output_dtype is None
        self.is_linear = weight.ndim == 2
        if weight.ndim not in (2, 4) or (self.to_float and not self.is_linear):
            raise Unfit("only convolutions over two dimensions and linear layers are written natively")
        geometry = Geometry([1, 1], [0, 0], [1, 1], 1) if self.is_linear else geometry_of(part)
        assert geometry is not None
        self.geometry, self.channels, self.kernel = geometry, weight.shape[0], tuple(weight.shape[2:]) or (1, 1)
        self.depth = weight.shape[1]
        self.depthwise = geometry.groups > 1 and self.depth == 1 and geometry.groups == self.channels
        stride = geometry.stride
        self.three = self.depthwise and self.kernel == (3, 3) and geometry.dilation == [1, 1]
        self.three = self.three and stride[0] == stride[1] and stride[1] in (1, 2)
        self.lines = 64 // (16 if self.channels <= 16 else 32 if self.channels <= 32 else 64) if self.three else 1
        self.by_lines = geometry.groups == 1 and self.depth < 4 and self.kernel[1] > 1 and geometry.dilation[1] == 1
        self._lay_out(weight)

    def _lay_out(self, weight: Tensor) -> None:
        groups = 1 if self.depthwise else self.geometry.groups
        size = 64 // self.lines if self.depthwise else 16
        order = woven if self.depthwise else torch.Tensor.contiguous

        def spread(values: Tensor, fill: int = 0) -> Tensor:
            return order(torch.cat([per_block(v, size, fill) for v in values.chunk(groups)]).repeat(self.lines))

        self.bias = spread(folded_bias(self.part, weight, self.zero_point)).to(torch.int32)
        if self.to_float:
            scale = self.part.output_scale.double().reshape(-1).expand(self.channels)
            self.constants = per_block(scale, size).contiguous()
        else:
            self.rescaling = rescaling_of(self.part, self.channels, self.largest)
            self.constants = self.rescaling.laid_out(spread)
        points = weight.reshape(self.channels, self.depth, -1).transpose(1, 2)
        if self.three:
            lines = weight.reshape(-1, 9)
            filled = torch.nn.functional.pad(lines, (0, 0, 0, -len(lines) % size)).repeat(self.lines, 1)
            self.weight = columns_weight(filled.reshape(-1, 3, 3))
        elif self.depthwise:
            self.weight = depthwise_weight(points[:, :, 0])
        elif self.by_lines:
            self.weight = dense_weight(weight.permute(0, 2, 3, 1).flatten(2), 1)
        else:
            self.weight = dense_weight(points, groups)
        self.border = torch.full((self.depth * self.geometry.groups + 64,), self.zero_point, dtype=torch.uint8)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        first = shapes[0]
        if self.is_linear:
            return (*first[:-1], self.channels)
        if len(first) != 4:
            raise Unfit(f"its input has {len(first)} axes")
        g = self.geometry
        spans = zip(first[2:], self.kernel, g.stride, g.padding, g.dilation, strict=True)
        sizes = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in spans]
        return (first[0], self.channels, *sizes)

    def fill(self, step: Step, shapes: Sequence[Shape], result: Shape) -> None:
        g, (high, wide) = self.geometry, self.kernel
        three = self.three and as_image(result)[2] > 1
        step.kind = KINDS["depthwise three" if three else "depthwise" if self.depthwise else "convolution"]
        step.flags = FLAGS["grouped"] if g.groups > 1 else 0
        step.window.stride[:], step.window.dilation[:] = g.stride, g.dilation
        step.window.kernel[:] = (high, 1) if self.by_lines else (high, wide)
        step.window.padding[:] = [0, 0] if self.by_lines else g.padding
        step.groups = self.lines if self.depthwise else g.groups
        step.taps, step.depth = (high, wide * self.depth) if self.by_lines else (high * wide, self.depth)
        step.blocks = 0 if self.depthwise else -(-(self.channels // g.groups) // 16)
        step.weight, step.bias, step.border = self.weight.data_ptr(), self.bias.data_ptr(), self.border.data_ptr()
        if self.to_float:
            low, high_bound = self.part.clamp
            step.flags |= FLAGS["to_float"]
            step.numbers = self.constants.data_ptr()
            step.scale[:] = [-math.inf if low is None else low, math.inf if high_bound is None else high_bound]
            return
        set_rescaling(step, self.rescaling, self.constants)
        if self.table is not None:
            step.out.table = self.table.data_ptr()
        if self.added is not None:
            add, second = self.added
            constant, q, *rest = add.numbers
            step.flags |= FLAGS["adds"]
            set_addition(step, (constant, q[::-1] if second else q, *rest))  # type: ignore[arg-type]
