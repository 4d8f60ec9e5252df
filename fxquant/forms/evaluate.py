"""Integers in, integers out, and the function itself evaluated in float64 between."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.behaviour import ChannelAffine
from fxquant.errors import Refusal
from fxquant.kernels.native.library import Step as PlanStep
from fxquant.kernels.native.lines import Lines, operand_zero_point
from fxquant.kernels.native.operations import Attention, Operation, Pointwise
from fxquant.kernels.native.weights import channel_affine_numbers, held
from fxquant.kernels.place import Place, Step, clamped
from fxquant.kernels.quantized import ATEN, FLOAT32, in_float32, rounded, taken_by
from fxquant.kernels.storage import Storage
from fxquant.nn.form import Computation, Form, RealForm, TorchKernel, register_form
from fxquant.nn.integer import IntegerEvaluate

__all__ = ["evaluate_step"]


def _computation(part: IntegerEvaluate, input_scale: float) -> Computation:
    parameters = {name: getattr(part, f"parameter_{name}").float() for name in part.parameter_names}
    return Computation(None if part.function is part.entry.function else part.function, parameters)


def evaluate_step(place: Place) -> Step:
    """A function evaluated between integers: float32 where the reference takes float64."""
    part, given = place.part, place.output_form()
    count = len(part.quantized_inputs)
    operands = place.node.args
    wanted = [isinstance(v, fx.Node) and i < count and part.quantized_inputs[i] for i, v in enumerate(operands)]
    takes = taken_by(place, *(place.input_form(i) if want else None for i, want in enumerate(wanted)))
    named = {name: getattr(part, f"parameter_{name}").float() for name in part.parameter_names}
    affine = place.operators.affine
    if affine is not None and isinstance(part.entry.behaviour, ChannelAffine) and place.holds_bytes(operands[0]):
        if place.integers(operands[0]).sample.ndim == 4:
            return Step(_channel_affine(place, affine, given, **named), given, ATEN, takes)
    function = part.function or part.entry.function

    def evaluated(*values: Any, **dynamic: Any) -> Tensor:
        real = [_real(value, want) for value, want in zip(values, wanted, strict=True)]
        return function(*real, **named, **part.attributes, **dynamic)

    def bounded(*values: Any, **dynamic: Any) -> Tensor:
        """Infinities and 0 / 0 as the reference has them: the ends of the grid, and 0."""
        low, high = (-given.zero_point * given.scale, (255 - given.zero_point) * given.scale)
        return torch.nan_to_num(evaluated(*values, **dynamic)).clamp_(low, high)

    run = rounded(place, bounded if part.may_fail else evaluated, given)
    return Step(run, given, FLOAT32, takes)


def _channel_affine(place: Place, operator: Any, given: Storage, gain: Tensor, offset: Tensor) -> Callable[..., Tensor]:
    """torch's batch norm of integers, whose mean is 0 and variance 1."""
    mean, variance, (scale, zero_point) = torch.zeros_like(gain), torch.ones_like(gain), given
    run = partial(_normed, operator, (gain, offset, mean, variance, 0.0, scale, zero_point))
    return clamped(place.part, given, run)


def _normed(operator: Any, numbers: tuple[Any, ...], q: Tensor, **_: Any) -> Tensor:
    y: Tensor = operator(q, *numbers)
    return y


def _real(value: Any, quantized: bool) -> Any:
    if quantized:
        return value.dequantize()
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _native(lines: Lines, node: fx.Node, part: IntegerEvaluate) -> Operation:
    entry: Any = part.entry
    if not isinstance(entry.behaviour, ChannelAffine):
        raise Refusal("how it computes inside is not written natively")
    lines.gives(node, part.output_dtype)
    return _affine(lines, node, part)


def _parameters(part: IntegerEvaluate) -> dict[str, Tensor]:
    return {name: getattr(part, f"parameter_{name}").double() for name in part.parameter_names}


def _affine(lines: Lines, node: fx.Node, part: IntegerEvaluate) -> Operation:
    """As the reference computes it, but with its constants multiplied out; compared with it for every byte."""
    zero_point, least, most = held(part)
    unit = float(part.output_scale)
    gain, offset = _parameters(part).values()
    signed = lines.is_signed(node.args[0])
    gain = gain * float(part.input_scale[0]) / unit
    offset = offset / unit - gain * operand_zero_point(lines, node, part, 0)
    every = torch.arange(256)
    found = (torch.round(every.double()[:, None] * gain + offset) + zero_point).clamp(least, most)
    source = (every - 128 * signed).to(torch.int8 if signed else torch.uint8)
    wanted = part(source[:, None].expand(-1, len(gain))).to(torch.int32) + 128 * (part.output_dtype == torch.int8)
    if not torch.equal(found.to(torch.int32), wanted):
        raise Refusal("its gains leave results half way between two integers")
    numbers = channel_affine_numbers(gain, offset)

    def write(step: PlanStep) -> None:
        step.numbers, step.out.magic = numbers.data_ptr(), 1.5 * 2**52 + zero_point
        step.out.low, step.out.high = least, most

    return Pointwise(lines.operands(node.args), "affine", write, (numbers,), channels=len(gain))


def _layer_norm(lines: Lines, node: fx.Node, part: IntegerEvaluate) -> Operation:
    lines.gives(node, part.output_dtype)
    shape = tuple(part.attributes["normalized_shape"])
    if len(shape) != 1 or len(node.args) != 1 or node.kwargs:
        raise Refusal("it normalizes over more than the last axis")
    zero_point, least, most = held(part)
    found, unit = _parameters(part), float(part.output_scale)
    gain = found.get("weight", torch.ones(shape, dtype=torch.float64)) / unit
    offset = found.get("bias", torch.zeros(shape, dtype=torch.float64)) / unit
    numbers = torch.stack([gain, offset]).float().contiguous()
    epsilon = float(part.attributes.get("eps", 1e-5)) / float(part.input_scale[0]) ** 2

    def write(step: PlanStep) -> None:
        step.numbers, step.scale[0], step.zero_point[1] = numbers.data_ptr(), epsilon, zero_point
        step.out.low, step.out.high = least, most

    return Pointwise(lines.operands(node.args), "layer norm", write, (numbers,), channels=shape[0])


def _attention(lines: Lines, node: fx.Node, part: IntegerEvaluate) -> Operation:
    lines.gives(node, part.output_dtype)
    a = part.attributes
    if len(node.args) != 3 or node.kwargs or a.get("enable_gqa") or a.get("attn_mask") is not None:
        raise Refusal("it has a mask, or shares keys between heads")
    zero_point, least, most = held(part)
    before = [operand_zero_point(lines, node, part, i) for i in range(3)]
    zero_points = before[0], before[1], before[2], zero_point
    query, key, value = (float(s) for s in part.input_scale[:3])
    units = query * key, value / float(part.output_scale)
    scale, causal = a.get("scale"), bool(a.get("is_causal", False))
    if scale is not None and scale < 0:
        raise Refusal("its scale is negative")
    return Attention(lines.operands(node.args), zero_points, units, scale, causal, (least, most))


def _softmax(lines: Lines, node: fx.Node, part: IntegerEvaluate) -> Operation:
    lines.gives(node, part.output_dtype)
    entry: Any = part.entry
    if len(node.args) != 1 or node.kwargs or not isinstance(part.attributes.get("dim"), int):
        raise Refusal("along which axis it sums is not known")
    zero_point, least, most = held(part)
    steps = float(part.input_scale[0]), 1 / float(part.output_scale)
    logarithm = entry.native == "log softmax"

    def write(step: PlanStep) -> None:
        step.scale[:], step.zero_point[1], step.taps = steps, zero_point, int(logarithm)
        step.out.low, step.out.high = least, most

    return Pointwise(lines.operands(node.args), "softmax", write, (), axis=int(part.attributes["dim"]))


register_form(
    Form(
        arithmetic=IntegerEvaluate,
        real=RealForm(_computation, ("input_scale", "output_scale")),
        torch=TorchKernel(evaluate_step, in_float32),
        native=_native,
        native_ops={"layer norm": _layer_norm, "attention": _attention, "softmax": _softmax, "log softmax": _softmax},
        operators=Refusal("the standard has no such function of integers; it stays between Quantize and Dequantize"),
    )
)
