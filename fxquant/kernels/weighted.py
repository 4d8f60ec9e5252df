"""Convolutions and linear layers with torch's packed int8 operators.

With integers ``q`` held, zero points ``z`` and real scales ``s``, the operator computes

    q_y = clamp(round((Σ (q_x - z_x) · q_w) · s_x s_w / s_y + b / s_y) + z_y, 0, 255)         b = s_x s_w · q_b

which is the reference's result; a ReLU is the bound of an unsigned byte. Telling a convolution the zero points costs
nothing as long as nothing is padded. What the padding misses of ``z_x Σ q_w`` is summed up in each call: where that is much,
the operator is told ``z_x = 0``, ``b`` has ``- s_x s_w · z_x Σ q_w`` in it, and the border, which is ``z_x`` itself, is
written before. So is a linear layer of onednn, which has no kernel for another zero point of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxquant.errors import Refusal
from fxquant.kernels.operators import ENGINES, Engine, Operators, engine_named, quantized_weight
from fxquant.kernels.place import Known, Place, Step, clamped, zero_point_held
from fxquant.kernels.quantized import FLOAT32
from fxquant.kernels.saturation import INT32, can_saturate, largest_sum
from fxquant.kernels.storage import Storage, convert
from fxquant.nn.accumulating import IntegerWeighted, channels_first, padding_sides

__all__ = [
    "Geometry",
    "expected_engine",
    "geometry_of",
    "require_bytes",
    "require_fit",
    "require_scales",
    "weighted_step",
]

_SATURATES = "sums of its products could overflow 16 bits on this machine"
_FEW_ROWS = 16
_MANY_WEIGHTS = 2**18
"""More weights than an input's values and that: summing them up for the padding takes longer than writing a border."""


@dataclass(frozen=True)
class Geometry:
    """A convolution's arguments for two dimensions."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def geometry_of(part: IntegerWeighted) -> Geometry:
    """The arguments of a convolution over one or two dimensions.

    Raises:
        Refusal: they fit no packed operator.
    """
    attributes, dims = part.attributes, part.weight.ndim - 2
    sides = padding_sides(attributes.get("padding", 0), part.weight.shape[2:], attributes.get("dilation", 1))
    if attributes.get("padding_mode", "zeros") != "zeros" or any(before != behind for before, behind in sides):
        raise Refusal("its padding is no number of zeros on both sides")

    def pair(value: Any, free: int) -> list[int]:
        values = [int(value)] * dims if isinstance(value, int) else [int(v) for v in value]
        return values if dims == 2 else [free, *values]

    stride, dilation = pair(attributes.get("stride", 1), 1), pair(_without_idle_dilation(part)["dilation"], 1)
    return Geometry(stride, pair([before for before, _ in sides], 0), dilation, int(attributes.get("groups", 1)))


def require_bytes(part: IntegerWeighted) -> None:
    """Refuse a layer whose weights or results are no bytes, or whose sums could overflow.

    Raises:
        Refusal: says which.
    """
    if part.weight.dtype != torch.int8:
        raise Refusal(f"its weights are {part.weight.dtype}")
    if largest_sum(part) > INT32 or (part.bias is not None and part.bias.dtype != torch.int32):
        raise Refusal("its sums could overflow 32 bits")
    if part.output_dtype not in (None, torch.uint8, torch.int8):
        raise Refusal(f"its result is {part.output_dtype}")


def require_fit(part: IntegerWeighted) -> None:
    """Refuse a layer that no packed operator computes.

    Raises:
        Refusal: says why.
    """
    require_bytes(part)
    behaviour = part.behaviour
    if part.output_dtype is None or behaviour.channels_last:
        return
    if behaviour.out_axis != 0 or part.weight.ndim not in (3, 4):
        raise Refusal("it is a transposed convolution" if behaviour.out_axis else "it has three dimensions")
    geometry_of(part)


def require_scales(part: IntegerWeighted) -> None:
    """Refuse a layer with a channel whose scale torch's packed weights cannot hold.

    Raises:
        Refusal: says so.
    """
    if part.output_dtype is not None and not bool((part.multiplier > 0).all()):
        raise Refusal("a channel's scale vanishes")


def weighted_step(place: Place) -> Step:
    """A packed convolution or linear layer for ``place``.

    Raises:
        Refusal: the reference is needed.
    """
    part: IntegerWeighted = place.part
    x, taken = place.integers(place.node.args[0]), place.input_form(0)
    require_fit(part)
    require_scales(part)
    if place.node.kwargs or x.sample.numel() == 0:
        raise Refusal("it is called with more than its input" if place.node.kwargs else "its input is empty")
    if not part.behaviour.channels_last:
        return _convolution(place, x, taken) if part.output_dtype is not None else _float_convolution(place, taken)
    return _float_linear(place, taken) if part.output_dtype is None else _linear(place, x, taken)


def expected_engine(part: IntegerWeighted, operators: Operators) -> str:
    """The engine that a layer is for, where shapes allow it.

    A convolution whose accumulator leaves as a float is computed in float32, for want of an operator that gives one.

    Raises:
        Refusal: every engine's sums could overflow.
    """
    if part.output_dtype is None and not part.behaviour.channels_last:
        return FLOAT32
    names = ENGINES if part.output_dtype is not None else ("fbgemm",)
    found = next((name for name in names if _right(part, operators, name) is not None), None)
    if found is None:
        raise Refusal(_SATURATES)
    return found


def _usable(place: Place, name: str) -> Engine | None:
    return _right(place.part, place.operators, name)


def _right(part: IntegerWeighted, operators: Operators, name: str) -> Engine | None:
    """The engine of that name if it is right for these weights."""
    engine, weight = engine_named(operators, name), channels_first(part)
    groups = int(part.attributes.get("groups", 1))
    kind = "dense" if groups == 1 else "depthwise" if weight.shape[1] == 1 else "grouped"
    return None if engine is None or (kind in engine.saturates and can_saturate(weight)) else engine


def _folded(part: IntegerWeighted, x_scale: float, hidden: int, y_scale: float) -> tuple[Tensor, Tensor]:
    """The weight with its scales, and the real bias; ``hidden`` is what the operator is not told of the zero point."""
    real = torch.ldexp(part.multiplier.double(), part.shift - 31) * y_scale
    weight = channels_first(part)
    real = real.expand(weight.shape[0])
    bias = torch.zeros_like(real) if part.bias is None else part.bias.double()
    if hidden:
        bias = bias - hidden * weight.double().flatten(1).sum(1)
    weight = weight.unsqueeze(2) if weight.ndim == 3 else weight
    return quantized_weight(weight, real / x_scale), (bias * real).float()


def _step(place: Place, run: Callable[..., Tensor], taken: Storage, given: Storage, kernel: str, packed: Any) -> Step:
    source = place.node.args[0]
    assert isinstance(source, fx.Node)
    return Step(clamped(place.part, given, run), given, kernel, {source: taken}, packed)


def _convolution(place: Place, x: Known, told: Storage) -> Step:
    part, geometry = place.part, geometry_of(place.part)
    if x.sample.ndim != part.weight.ndim:
        raise Refusal("its input has no batch")
    few = x.sample.shape[0] * x.sample[0, 0].numel() <= _FEW_ROWS
    engine = _engine(place, few=few, misread=_is_misread(part, geometry, x.sample.shape))
    given, padding = Storage(float(part.scale), zero_point_held(part)), geometry.padding
    many = part.weight.numel() > _MANY_WEIGHTS + x.sample.numel()
    bordered = engine.name == "onednn" and told.zero_point != 0 and any(padding) and many
    taken = Storage(told.scale, 0) if bordered else told
    weight, bias = _folded(part, told.scale, told.zero_point - taken.zero_point, given.scale)
    arguments = (geometry.stride, [0, 0] if bordered else padding, geometry.dilation, geometry.groups)
    packed = place.pack("conv2d", engine, weight, bias, *arguments)
    run = _operator(place.operators.conv2d, packed, given)
    if bordered:
        run = _behind_border(run, padding, told)
    return _step(place, _flat(run) if part.weight.ndim == 3 else run, taken, given, engine.name, packed)


def _engine(place: Place, *, few: bool, misread: bool = False) -> Engine:
    """fbgemm where a call costs more than its sums (``few``), or where onednn cannot be used; else onednn."""
    onednn, fbgemm = None if misread else _usable(place, "onednn"), _usable(place, "fbgemm")
    engine = (fbgemm or onednn) if few or onednn is None else onednn
    if engine is None:
        raise Refusal("torch computes it wrongly" if misread else _SATURATES)
    return engine


def _is_misread(part: IntegerWeighted, geometry: Geometry, shape: Sequence[int]) -> bool:
    """Whether oneDNN computes a convolution with one channel of the input a group wrongly.

    torch 2.14 and 2.15: a result one pixel wide that wider strides would leave, of an image in channels last, in integers
    and in floats; windows that lie in the padding as a whole, in integers.
    """
    if part.behaviour.out_axis or channels_first(part).shape[1] != 1:
        return False
    kernel = [1, *part.weight.shape[2:]][-2:]
    reach = [gap * (size - 1) + 1 for gap, size in zip(geometry.dilation, kernel, strict=True)]
    if any(padding >= size for padding, size in zip(geometry.padding, reach, strict=True)):
        return True
    return geometry.stride[1] > 1 and (shape[-1] + 2 * geometry.padding[1] - reach[1]) // geometry.stride[1] == 0


def _operator(operator: Callable[..., Tensor], packed: Any, given: Storage) -> Callable[..., Tensor]:
    """``operator`` with packed weights; what these keep is for the first shape that they see."""
    scale, zero_point = given

    def run(x: Tensor) -> Tensor:
        return operator(x, packed, scale, zero_point)

    return run


def _behind_border(run: Callable[..., Tensor], padding: list[int], told: Storage) -> Callable[..., Tensor]:
    """``run`` on an input with a border of its zero point; the form says 0 for it."""
    sides, border, form = [padding[1], padding[1], padding[0], padding[0]], told.zero_point, Storage(told.scale, 0)

    def bordered(x: Tensor) -> Tensor:
        wide = F.pad(convert(x, None, False), sides, value=border)
        return run(convert(wide, form, False))

    return bordered


def _flat(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A convolution over one dimension, as one over two of which the first has one element."""

    def flat(x: Tensor) -> Tensor:
        return run(x.unsqueeze(2)).squeeze(2)

    return flat


def _linear(place: Place, x: Known, told: Storage) -> Step:
    part, engine = place.part, _engine(place, few=x.sample.numel() <= _FEW_ROWS * x.sample.shape[-1])
    taken = told if engine.name == "fbgemm" else Storage(told.scale, 0)
    given = Storage(float(part.scale), zero_point_held(part))
    weight, bias = _folded(part, told.scale, told.zero_point - taken.zero_point, given.scale)
    packed = place.pack("linear", engine, weight, bias)
    return _step(place, _operator(place.operators.linear, packed, given), taken, given, engine.name, packed)


def _float_linear(place: Place, told: Storage) -> Step:
    """A linear layer whose accumulator leaves as a float."""
    part, operator, engine = place.part, place.operators.linear_float, _usable(place, "fbgemm")
    if operator is None or engine is None or not bool((part.output_scale > 0).all()):
        raise Refusal(_SATURATES if operator is not None and engine is None else "torch has no kernel for it")
    weight = channels_first(part)
    real = part.output_scale.double().expand(weight.shape[0])
    bias = torch.zeros_like(real) if part.bias is None else part.bias.double() * real
    packed = place.pack("linear", engine, quantized_weight(weight, real / told.scale), bias.float())
    scale, zero_point = told
    bounds, dtype = part.clamp, part.real_dtype

    def run(x: Tensor) -> Tensor:
        y = operator(x.dequantize(), scale, zero_point, packed).to(dtype)
        return y if bounds == (None, None) else torch.clamp(y, *bounds)

    source = place.node.args[0]
    assert isinstance(source, fx.Node)
    return Step(run, None, engine.name, {source: told}, packed)


def _float_convolution(place: Place, told: Storage) -> Step:
    """A convolution whose accumulator leaves as a float: of integers, with weights in units of the result."""
    part, taken, source = place.part, Storage(1.0, told.zero_point), place.node.args[0]
    shape = [-1] + [1] * (part.weight.ndim - 1)
    scale, weight = part.output_scale.double(), channels_first(part).double()
    each = scale if scale.ndim == 0 else scale[: weight.shape[0]].reshape(shape)
    weight = (weight * each).transpose(0, part.behaviour.out_axis).float().contiguous()
    bias = None if part.bias is None else (part.bias.double() * scale).float()
    bounds, dtype, attributes = part.clamp, part.real_dtype, _without_idle_dilation(part)
    strides = attributes.get("stride", 1)
    misread = weight.shape[1] == 1 and strides not in (1, (1,) * (part.weight.ndim - 2))  # see _is_misread

    def run(q: Tensor) -> Tensor:
        x = q.dequantize()
        x = x.clone(memory_format=torch.contiguous_format) if misread else x
        y = part.entry.function(x, weight, bias, **attributes).contiguous().to(dtype)
        return y if bounds == (None, None) else torch.clamp(y, *bounds)

    assert isinstance(source, fx.Node)
    return Step(run, None, FLOAT32, {source: taken})


def _without_idle_dilation(part: IntegerWeighted) -> dict[str, Any]:
    """The attributes, with a dilation of 1 where the kernel has one tap: the same sums.

    torch 2.14 crashes there on images in channels last whose other side is as short (oneDNN: in floats with AVX2, in
    integers with AVX512).
    """
    sides, dilation = part.weight.shape[2:], part.attributes.get("dilation", 1)
    given = [dilation] * len(sides) if isinstance(dilation, int) else list(dilation)
    return {**part.attributes, "dilation": tuple(1 if side == 1 else d for side, d in zip(sides, given, strict=True))}
