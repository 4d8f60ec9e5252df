"""What a native plan is made of: one operation an integer form, its numbers laid out once, for inputs of any shape.

An operation makes its result (a tensor whose memory is not used), says how the kernel is to see its tensors, and writes
what a ``Step`` needs besides their addresses.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from fxquant.errors import InputError, Refusal
from fxquant.kernels.native.layout import Image, folded, image, rows
from fxquant.kernels.native.library import FLAGS, KINDS, AttentionNumbers, Step, TensorView
from fxquant.kernels.native.weights import Rescaling

__all__ = [
    "Add",
    "Attention",
    "Average",
    "Concatenation",
    "BorderOperation",
    "Maximum",
    "Operation",
    "Pointwise",
    "Product",
    "check_channels",
    "pool_of",
    "set_addition",
    "set_rescaling",
]

_AXES = {"": 2, "lines": 1, "volumes": 3}
Images = list[Image] | None
Sum = tuple[int, tuple[int, int], int, int, int]
"""constant, q of both, shift, low, high: see ``weights.addition``."""


@dataclass(eq=False)
class Operation:
    """One step to be.

    Attributes:
        operands: numbers of the lines whose results it reads.
    """

    operands: list[int]

    @property
    def layout(self) -> str:
        """How the operands must lie: ``image`` (NCHW with channels in a row), ``rows`` (the last axis) or ``any``."""
        return "any"

    @property
    def writes_floats(self) -> bool:
        """Whether the result is a tensor of floats."""
        return False

    @property
    def moves(self) -> bool:
        """Whether numbers move before or behind what the kernel computes, so that it cannot write where one likes."""
        return False

    def result(self, x: Tensor, *others: Tensor) -> Tensor:
        """A tensor for the result."""
        return torch.empty_like(x)

    def images(self, tensors: Sequence[Tensor], y: Tensor) -> Images:
        """The operands and the result as the kernel sees them; None where their memory does not allow it."""
        return folded(*tensors, y)

    def fill(self, step: Step, views: Sequence[TensorView]) -> Any:
        """Write what the step computes; ``views`` are the operands and the result. What is returned is kept."""
        raise NotImplementedError


@dataclass(eq=False)
class BorderOperation(Operation):
    """Floats to bytes, or bytes to floats; floats are NCHW and without gaps."""

    kind: str
    scale: float
    zero_point: int
    bounds: tuple[int, int]

    @property
    def writes_floats(self) -> bool:
        return self.kind == "dequantize"

    def result(self, x: Tensor, *others: Tensor) -> Tensor:
        if self.writes_floats:
            return torch.empty(x.shape)
        last = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        return torch.empty(x.shape, dtype=torch.uint8, memory_format=last)

    def images(self, tensors: Sequence[Tensor], y: Tensor) -> Images:
        (x,) = tensors
        bytes_ = x if self.writes_floats else y
        seen = (image(bytes_) if bytes_.ndim == 4 else None) or _lines(bytes_) or image(bytes_)
        if seen is None:
            return None
        _, h, w, c = seen.sizes
        floats = Image(y if self.writes_floats else x, seen.sizes, (4 * c * h * w, 4 * w * c, 4 * c))
        return [seen, floats] if self.writes_floats else [floats, seen]

    def fill(self, step: Step, views: Sequence[TensorView]) -> None:
        step.kind, step.scale[0], step.zero_point[0] = KINDS[self.kind], self.scale, self.zero_point
        step.out.low, step.out.high = self.bounds


_ROW = 2**11
"""Numbers of a row where bytes and floats follow each other alike and any row would do."""


def _lines(x: Tensor) -> Image | None:
    if not x.is_contiguous():
        return None
    size = _ROW if x.numel() % _ROW == 0 else x.shape[-1] if x.ndim else 1
    return Image(x, (x.numel() // size, 1, size, 1), (size, size, 1))


@dataclass(eq=False)
class Pointwise(Operation):
    """A function of one number or one channel, and what looks at all numbers along an axis.

    Attributes:
        kind: ``table``, ``affine``, ``layer norm`` or ``softmax``.
        write: sets the fields of a step.
        keep: tensors whose memory the step reads.
        channels: how many there must be, where that matters.
        axis: along which it works, where that is not the same for all.
    """

    kind: str
    write: Callable[[Step], None]
    keep: tuple[Tensor, ...]
    channels: int | None = None
    axis: int | None = None

    @property
    def layout(self) -> str:
        return {"affine": "image", "layer norm": "rows"}.get(self.kind, "any")

    def result(self, x: Tensor, *others: Tensor) -> Tensor:
        check_channels(x, -1 if self.kind == "layer norm" else 1, self.channels)
        return torch.empty_like(x)

    def images(self, tensors: Sequence[Tensor], y: Tensor) -> Images:
        along = self.axis is not None and self.axis % max(1, y.ndim) != y.ndim - 1
        if along and (y.ndim != 4 or self.axis not in (1, -3)):
            raise Refusal(f"it works along axis {self.axis} of {list(y.shape)}")
        if self.kind == "affine" or along:
            x, result = image(tensors[0]), image(y)
            return None if x is None or result is None else [x, result]
        return rows(*tensors, y) if self.kind in ("layer norm", "softmax") else folded(*tensors, y)

    def fill(self, step: Step, views: Sequence[TensorView]) -> None:
        step.kind = KINDS[self.kind]
        self.write(step)


@dataclass(eq=False)
class Maximum(Operation):
    """The largest of a window over ``dims`` axes; ``function`` is torch's own, for the shape."""

    function: Callable[..., Tensor]
    attributes: dict[str, Any]
    dims: int

    @property
    def layout(self) -> str:
        return "image"

    @property
    def moves(self) -> bool:
        return self.dims == 3 and type(self) is Maximum

    def apart(self) -> tuple[Maximum, Maximum]:
        """A pool over volumes as one over the images of all planes, and one over images whose lines are planes."""
        attributes = self.attributes

        def triple(name: str, otherwise: Any) -> list[int]:
            value = attributes.get(name)
            value = otherwise if value is None or value == [] else value
            return [value] * 3 if isinstance(value, int) else list(value)

        kernel = triple("kernel_size", None)
        rest = {"stride": triple("stride", kernel), "padding": triple("padding", 0), "dilation": triple("dilation", 1)}
        common = {"ceil_mode": attributes.get("ceil_mode", False)}
        across = {"kernel_size": kernel[1:], **{name: own[1:] for name, own in rest.items()}, **common}
        idle = {"stride": 1, "padding": 0, "dilation": 1}
        through = {
            "kernel_size": [kernel[0], 1],
            **{name: [own[0], idle[name]] for name, own in rest.items()},
            **common,
        }
        first, second = (Maximum(self.operands, max_pool2d, own, 2) for own in (across, through))
        return first, second

    def result(self, x: Tensor, *others: Tensor) -> Tensor:
        shape = self.function(torch.empty(x.shape, device="meta"), **self.attributes).shape
        axes = 2 + self.dims
        if x.ndim != axes or len(shape) not in (2, axes) or shape[:2] != x.shape[:2]:
            raise Refusal(f"it makes {list(shape)} of {list(x.shape)}")
        if self.dims == 3 and math.prod(shape[2:]) > 1:
            raise Refusal("over volumes, only averages of the whole are written natively")
        if self.dims != 2:
            return torch.empty((shape[0], *shape[2:], shape[1]), dtype=torch.uint8).movedim(-1, 1)
        last = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=torch.uint8, memory_format=last)

    def images(self, tensors: Sequence[Tensor], y: Tensor) -> Images:
        x, result = image(tensors[0]), image(y)
        return None if x is None or result is None else [x, result]

    def fill(self, step: Step, views: Sequence[TensorView]) -> Any:
        step.kind = KINDS["maximum"]
        self._set_window(step)

    def _set_window(self, step: Step) -> None:
        """Write a pool's window."""

        def pair(value: Any, free: int) -> list[int]:
            values = [int(value)] if isinstance(value, int) else [int(v) for v in value]
            return [free, *values] if self.dims == 1 else values * (3 - len(values))

        kernel, stride = self.attributes["kernel_size"], self.attributes.get("stride")
        step.window.kernel[:] = pair(kernel, 1)
        step.window.stride[:] = pair(kernel if stride is None or stride == [] else stride, 1)
        step.window.padding[:] = pair(self.attributes.get("padding", 0), 0)
        step.window.dilation[:] = pair(self.attributes.get("dilation", 1), 1)


@dataclass(eq=False)
class Average(Maximum):
    """The mean of a window, of a part of the image (``adaptive average``) or of all of it (``mean``)."""

    form: str
    ratio: float
    zero_points: tuple[int, int]
    bounds: tuple[int, int]

    def result(self, x: Tensor, *others: Tensor) -> Tensor:
        y = super().result(x)
        if self.form == "mean" and math.prod(y.shape[2:]) != 1:
            raise Refusal(f"it makes {list(y.shape)} of {list(x.shape)}")
        return y

    def fill(self, step: Step, views: Sequence[TensorView]) -> Any:
        step.kind, step.zero_point[:], step.scale[0] = KINDS["average"], self.zero_points, self.ratio
        step.out.low, step.out.high = self.bounds
        if self.form == "average":
            self._set_window(step)
            step.flags = FLAGS["counts_padding"] * bool(self.attributes.get("count_include_pad", True))
            return None
        x, y = views
        spans = [
            (i * size // out, -((-(i + 1) * size) // out)) for size, out in ((x.h, y.h), (x.w, y.w)) for i in range(out)
        ]
        windows = torch.tensor(spans, dtype=torch.int32)
        step.numbers = windows.data_ptr()
        return windows


class Concatenation(Operation):
    """Tensors side by side along an axis, or stacked; a plan lets them be written there, or copies them."""

    def __init__(self, operands: list[int], axis: int, stacked: bool = False) -> None:
        super().__init__(operands)
        self.axis, self.stacked = axis, stacked

    def side_by_side(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors with the axis along which they are joined."""
        return [x.unsqueeze(self.axis) for x in tensors] if self.stacked else tensors

    def result(self, x: Tensor, *others: Tensor) -> Tensor:
        shape = torch.cat([torch.empty(t.shape, device="meta") for t in (x, *others)], self.axis).shape
        last = all(image(t) is not None for t in (x, *others)) and len(shape) == 4
        return torch.empty(
            shape, dtype=torch.uint8, memory_format=torch.channels_last if last else torch.contiguous_format
        )


def _as_large(x: Tensor, *others: Tensor) -> Tensor:
    """A tensor of the shape that all have together, in the order of memory of one that has it."""
    shape = torch.broadcast_shapes(*(t.shape for t in (x, *others)))
    whole = next((t for t in (x, *others) if t.shape == shape and 0 not in t.stride()), None)
    return torch.empty(shape, dtype=torch.uint8) if whole is None else torch.empty_like(whole)


@dataclass(eq=False)
class Add(Operation):
    """A sum of two tensors."""

    numbers: Sum

    @property
    def by_halves(self) -> bool:
        """Whether both multipliers fit into two halves of 16 bits, as the fast way wants them."""
        return max(self.numbers[1]) < 0x7FFF8000 and min(self.numbers[1]) >= -0x80000000

    def result(self, x: Tensor, *others: Tensor) -> Tensor:
        return _as_large(x, *others)

    def images(self, tensors: Sequence[Tensor], y: Tensor) -> Images:
        return folded(*(t.expand(y.shape) for t in tensors), y)

    def fill(self, step: Step, views: Sequence[TensorView]) -> None:
        step.kind = KINDS["add"]
        step.flags = FLAGS["ties"] * (not self.by_halves)
        set_addition(step, self.numbers)


def pool_of(native: str) -> tuple[str, int]:
    """A pool's kernel and its axes, of its name in the op table, such as ``average over lines``."""
    kind, _, over = native.partition(" over ")
    return kind, _AXES[over]


def check_channels(x: Tensor, axis: int, channels: int | None) -> None:
    """Refuse an input with another number of channels.

    Raises:
        InputError: it has one.
    """
    if channels is not None and (x.ndim <= max(axis, 0) or x.shape[axis] != channels):
        raise InputError(f"a layer for {channels} channels is given a tensor of shape {list(x.shape)}.")


def set_addition(step: Step, numbers: Sum) -> None:
    """Write the rule of a sum."""
    step.add.constant, step.add.q[:], step.add.shift = numbers[0], numbers[1], numbers[2]
    step.add.low, step.add.high = numbers[3:]


def set_rescaling(step: Step, rescaling: Rescaling, constants: Tensor) -> None:
    """Write how sums become bytes."""
    step.out.constants, step.out.magic = constants.data_ptr(), rescaling.magic
    step.out.low, step.out.high = rescaling.low, rescaling.high
    step.flags |= {"integers": FLAGS["ties"], "float64": FLAGS["in_float64"], "float32": 0}[rescaling.rule]


@dataclass(eq=False)
class Product(Add):
    """A product of two tensors, of which one may have a single number for all pixels of an image."""

    numbers: Any
    zero_points: tuple[int, int]
    constants: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.constants = self.numbers.laid_out(lambda values, _: values.contiguous())

    def fill(self, step: Step, views: Sequence[TensorView]) -> None:
        step.kind, step.zero_point[:] = KINDS["multiply"], self.zero_points
        set_rescaling(step, self.numbers, self.constants)


@dataclass(eq=False)
class Attention(Operation):
    """Scaled dot-product attention of ``(batch, heads, tokens, numbers)``."""

    zero_points: tuple[int, int, int, int]
    units: tuple[float, float]
    scale: float | None
    causal: bool
    bounds: tuple[int, int]

    @property
    def layout(self) -> str:
        return "rows"

    def result(self, x: Tensor, *others: Tensor) -> Tensor:
        key, value = others
        if not (x.ndim == key.ndim == value.ndim == 4 and x.shape[:2] == key.shape[:2] == value.shape[:2]):
            raise Refusal("its operands are not (batch, heads, tokens, numbers) of one batch and number of heads")
        b, h, t, _ = x.shape
        return torch.empty(b, t, h, value.shape[3], dtype=torch.uint8).transpose(1, 2)

    def images(self, tensors: Sequence[Tensor], y: Tensor) -> Images:
        return [Image(t, tuple(t.shape), t.stride()[:3]) for t in (*tensors, y)]

    def fill(self, step: Step, views: Sequence[TensorView]) -> Any:
        step.kind = KINDS["attention"]
        depth = views[0].c
        score = self.units[0] * (1 / math.sqrt(depth) if self.scale is None else self.scale)
        query, key, value, result = self.zero_points
        numbers = AttentionNumbers(views[2], query, key, value, int(self.causal), score, self.units[1])
        step.numbers, step.zero_point[1] = ctypes.addressof(numbers), result
        step.out.low, step.out.high = self.bounds
        return numbers
