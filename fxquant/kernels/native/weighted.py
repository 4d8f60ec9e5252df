"""Convolutions and linear layers, and their epilogues."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import InputError, Refusal
from fxquant.kernels.native.as_images import AsImages, Moves, as_images
from fxquant.kernels.native.layout import image, rows
from fxquant.kernels.native.library import FLAGS, KINDS, Library, PaddingRegion, Step, TensorView
from fxquant.kernels.native.operations import Images, Operation, Sum, check_channels, set_addition, set_rescaling
from fxquant.kernels.native.padding_regions import parts_of
from fxquant.kernels.native.weights import (
    Halves,
    columns_weight,
    dense_weight,
    depthwise_weight,
    folded_bias,
    in_order,
    interleaved,
    per_block,
    rescaling_of,
)
from fxquant.kernels.native.winograd_rules import may_take
from fxquant.kernels.saturation import INT32, one_sided_sums
from fxquant.kernels.weighted import require_bytes
from fxquant.nn.accumulating import IntegerWeighted

__all__ = ["Weighted"]


@dataclass(eq=False)
class Weighted(Operation):
    """A layer with weights, of which it keeps its own order.

    Attributes:
        part: the integer form.
        zero_point: of the input, as held.
        library: whose instruction set the weights are laid out for.
        table: 256 bytes that the result is looked up in.
        added: the sum that the result goes into.
        window: the weights of a layer that tiles may compute (``winograd.py``), int8 ``(channels, depth, 3, 3)``; else None.
        reach: the largest magnitude of its sums of products, before biases.
        transformed: its weights by the size of tiles, made by the plans that take them.
        spelled: how it is a convolution over images, whose weights and channels these are.
    """

    part: InitVar[IntegerWeighted]
    zero_point: int
    library: Library
    table: Tensor | None = None
    added: Sum | None = None
    to_float: bool = field(init=False)
    window: Tensor | None = field(init=False, default=None)
    transformed: dict[int, Tensor] = field(init=False, default_factory=dict)
    spelled: AsImages = field(init=False)

    def __post_init__(self, part: IntegerWeighted) -> None:
        require_bytes(part)
        self.spelled = as_images(part, self.zero_point)
        weight, order = self.spelled.weight, self.spelled.order
        bias = folded_bias(self._own_bias(part), weight, self.zero_point)
        above, below = (own if order is None else own[order] for own in one_sided_sums(part))
        ends = bias - 255 * below, bias + 255 * above
        largest = torch.maximum(*(end.abs() for end in ends))
        if int(largest.max()) > INT32:
            raise Refusal("its sums could overflow 32 bits")
        self.to_float, self.linear = part.output_dtype is None, weight.ndim == 2
        self.geometry, self.axes = self.spelled.geometry, part.weight.ndim
        self.inputs = part.weight.shape[0] if part.behaviour.out_axis else part.weight.shape[1] * self.geometry.groups
        self.channels, self.depth = weight.shape[0], weight.shape[1]
        self.kernel = (1, 1) if self.linear else (int(weight.shape[2]), int(weight.shape[3]))
        self._choose_form()
        g, self.reach = self.geometry, 255 * int(torch.maximum(above, below).max())
        is_plain = self.kernel == (3, 3) and g.groups == 1 and g.stride == g.dilation == [1, 1] and not self.by_lines
        if is_plain and may_take(self.library.name, self.depth, self.channels):
            self.window = weight.clone()
        if self.depthwise and self.to_float:
            raise Refusal("its sums leave as floats, and each channel has a filter of its own")
        self._lay_out(part, weight, bias, ends)
        self.clamp = part.clamp if self.to_float else (None, None)

    @property
    def moves(self) -> bool:
        """Whether numbers move before or behind the convolution."""
        return self.spelled.before is not None or self.spelled.after is not None

    def _own_bias(self, part: IntegerWeighted) -> Tensor | None:
        return part.bias if part.bias is None or self.spelled.order is None else part.bias[self.spelled.order]

    def before(self, moves: Moves, x: Tensor) -> Tensor:
        """The images that the convolution takes, of the layer's input."""
        if self.spelled.before is None:
            return x
        self._require_axes(x)
        check_channels(x, 1, self.inputs)
        return self.spelled.before(moves, x)

    def after(self, moves: Moves, y: Tensor, x: Tensor) -> Tensor:
        """The layer's result, of the convolution's and the layer's input."""
        return y if self.spelled.after is None else self.spelled.after(moves, y, x)

    def _require_axes(self, x: Tensor) -> None:
        if x.ndim != self.axes:
            raise Refusal(f"its input has {x.ndim} axes")

    def _choose_form(self) -> None:
        g = self.geometry
        self.depthwise = g.groups > 1 and self.depth == 1 and g.groups == self.channels
        self.three = self.depthwise and self.kernel == (3, 3) and g.dilation == [1, 1] and g.stride in ([1, 1], [2, 2])
        self.lines = 64 // (16 if self.channels <= 16 else 32 if self.channels <= 32 else 64) if self.three else 1
        self.by_lines = g.groups == 1 and self.depth < 4 and self.kernel[1] > 1 and g.dilation[1] == 1

    def _lay_out(self, part: IntegerWeighted, weight: Tensor, bias: Tensor, ends: tuple[Tensor, Tensor]) -> None:
        groups, size = self._blocks()
        self.bias = self._spread(bias).to(torch.int32)
        zero_point = self.zero_point - self.library.centre  # as dot products see it
        # What leaves 32 bits here comes back in the sum.
        self.centred_bias = self._spread(folded_bias(self._own_bias(part), weight, zero_point)).to(torch.int32)
        if self.to_float:
            scale = in_order(part.output_scale.double(), self.channels, self.spelled.order)
            self.constants = per_block(scale, size).contiguous()
        else:
            largest = torch.maximum(*(end.abs() for end in ends))
            self.rescaling = rescaling_of(part, self.channels, largest, ends, self.spelled.order)
            self.constants = self.rescaling.laid_out(self._spread)
        taps = weight.reshape(self.channels, self.depth, -1).transpose(1, 2)
        # What each tap adds to a sum where it lies outside.
        self.at_zero = zero_point * taps.sum(2, dtype=torch.int32)
        if self.three:
            filled = torch.nn.functional.pad(taps[:, :, 0], (0, 0, 0, -self.channels % size)).repeat(self.lines, 1)
            laid, self.rests = columns_weight(filled.reshape(-1, 3, 3), self.library)
            self.direct = laid, None
        elif self.depthwise:
            laid, self.rests = depthwise_weight(taps[:, :, 0], self.library)
            self.direct = laid, None
        elif self.by_lines:
            self.direct = dense_weight(weight.permute(0, 2, 3, 1).flatten(2), 1, self.library)
        elif self.window is None:
            self.direct = dense_weight(taps, groups, self.library)
        self.border = torch.full((self.depth * self.geometry.groups + 64,), self.zero_point, dtype=torch.uint8)

    @cached_property
    def direct(self) -> tuple[Tensor, Halves | None]:
        """The weights as the direct kernels read them, and halves of some; of a window by the first plan that reads them."""
        assert self.window is not None
        return dense_weight(self.window.flatten(2).transpose(1, 2), 1, self.library)

    @property
    def weight(self) -> Tensor:
        """The weights as the direct kernels read them."""
        return self.direct[0]

    @property
    def halves(self) -> Halves | None:
        """Of weights that are multiplied in pairs, see ``weights.Halves``."""
        return self.direct[1]

    def _blocks(self) -> tuple[int, int]:
        """Groups that are laid out apart, and channels in a block."""
        return (1, 64 // self.lines) if self.depthwise else (self.geometry.groups, 16)

    def _spread(self, values: Tensor, fill: int = 0) -> Tensor:
        """One number per channel, in the order of the kernels."""
        groups, size = self._blocks()
        filled = torch.cat([per_block(v, size, fill) for v in values.chunk(groups)]).repeat(self.lines)
        return interleaved(filled) if self.depthwise else filled.contiguous()

    @property
    def layout(self) -> str:
        return "rows" if self.linear else "image"

    @property
    def writes_floats(self) -> bool:
        return self.to_float

    def result(self, x: Tensor, *others: Tensor) -> Tensor:
        if not self.linear and not self.moves:
            self._require_axes(x)
        check_channels(x, -1 if self.linear else 1, self.depth * self.geometry.groups)
        y = self._own_result(x)
        if any(torch.broadcast_shapes(y.shape, t.shape) != y.shape for t in others):
            raise Refusal(f"it is added to a tensor of shape {[list(t.shape) for t in others]}, which is larger")
        return y

    def _own_result(self, x: Tensor) -> Tensor:
        if self.linear:
            return torch.empty((*x.shape[:-1], self.channels), dtype=torch.float32 if self.to_float else torch.uint8)
        g = self.geometry
        spans = zip(x.shape[2:], self.kernel, g.stride, g.padding, g.dilation, strict=True)
        sizes = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in spans]
        if min(sizes) < 1:
            raise InputError(f"a window of {list(self.kernel)} is larger than its input of {list(x.shape)}.")
        shape = (x.shape[0], self.channels, *sizes)
        dtype = torch.float32 if self.to_float else torch.uint8
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)

    def images(self, tensors: Sequence[Tensor], y: Tensor) -> Images:
        if self.linear:
            found = rows(tensors[0], *(t.expand(y.shape) for t in tensors[1:]), y)
        else:
            seen = [image(tensors[0]), *(image(t.expand(y.shape)) for t in tensors[1:]), image(y)]
            found = [s for s in seen if s is not None] if None not in seen else None
        if found is not None and self.to_float:
            found[-1] = found[-1]._replace(strides=tuple(4 * s for s in found[-1].strides))
        return found

    def fill(self, step: Step, views: Sequence[TensorView]) -> Any:
        g, (high, wide) = self.geometry, self.kernel
        step.kind = KINDS["depthwise three" if self.three else "depthwise" if self.depthwise else "convolution"]
        step.flags = FLAGS["grouped"] if g.groups > 1 else 0
        step.window.stride[:], step.window.dilation[:] = g.stride, g.dilation
        step.window.kernel[:] = (high, 1) if self.by_lines else (high, wide)
        step.window.padding[:] = [0, 0] if self.by_lines else g.padding
        step.groups = self.lines if self.depthwise else g.groups
        step.taps, step.depth = (high, wide * self.depth) if self.by_lines else (high * wide, self.depth)
        step.blocks = 0 if self.depthwise else -(-(self.channels // g.groups) // 16)
        step.weight, step.bias, step.border = (
            self.weight.data_ptr(),
            self.centred_bias.data_ptr(),
            self.border.data_ptr(),
        )
        if self.halves is not None:
            step.halves, step.half_four = self.halves.weight.data_ptr(), self.halves.four.data_ptr()
            step.half_first = self.halves.first.data_ptr()
        self.fill_end(step)
        if not self.depthwise:
            return self._fill_zones(step)
        if self.rests is not None:
            step.half_first = self.rests.data_ptr()
        return None

    def _fill_zones(self, step: Step) -> Any:
        """Write which taps count where; the biases of the regions know the zero points of the others."""
        parts = parts_of(step)
        regions, kept = (PaddingRegion * len(parts))(), dict[tuple[int, ...], tuple[Tensor, Tensor]]()
        for region, part in zip(regions, parts, strict=True):
            if part.taps not in kept:
                kept[part.taps] = torch.tensor(part.taps, dtype=torch.int32), self._bias_without(step, part.taps)
            tap, bias = kept[part.taps]
            (region.i, region.y, region.x), (region.n, region.h, region.w) = part.first, part.count
            region.taps, region.inside = len(part.taps), part.inside
            region.tap, region.bias = tap.data_ptr(), bias.data_ptr()
        step.regions, step.region_count = ctypes.addressof(regions), len(regions)
        return regions, kept

    def _bias_without(self, step: Step, taps: tuple[int, ...]) -> Tensor:
        missing = sorted(set(range(step.taps)) - set(taps))
        if not missing or self.zero_point == self.library.centre:
            return self.centred_bias
        return self.centred_bias + self._spread(self.at_zero[:, missing].sum(1, dtype=torch.int32))

    def fill_end(self, step: Step) -> None:
        """Write what becomes of the sums."""
        if self.to_float:
            low, most = self.clamp
            step.flags |= FLAGS["to_float"]
            step.numbers = self.constants.data_ptr()
            step.scale[:] = [-math.inf if low is None else low, math.inf if most is None else most]
            return
        set_rescaling(step, self.rescaling, self.constants)
        if self.table is not None:
            step.out.table = self.table.data_ptr()
        if self.added is not None:
            step.flags |= FLAGS["adds"]
            set_addition(step, self.added)
