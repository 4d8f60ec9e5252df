"""fxquant's own kernels against the reference, bit for bit: every op and shape, real models, and every way to call them."""

from __future__ import annotations

import copy
import gc
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from comparisons import assert_same_bits
from native_oracle import ROUNDED, Function, integers_of, require_same, signal
from op_cases import COMPUTING, example_of, inputs_like, recipe_with
from torch import Tensor, nn

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.errors import InputError, SpecializationError
from fxquant.kernels.native import library
from fxquant.kernels.native.model import NativeModel, Unfit
from fxquant.kernels.native.weighted import Weighted
from fxquant.nn.accumulating import IntegerProduct, IntegerSum, IntegerWeighted
from fxquant.nn.integer import IntegerEvaluate, IntegerLinearMap

REASON = library.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels here: {REASON}")


REFUSED = re.compile(r"\w+( \([\w ]+\))?(:| has|,) .{8,}")
"""A reason names the node first."""
SIGNED = Recipe(default=Setting(activation=Scheme(symmetric=True, signed=True)), quantize_outputs=True)


# --- convolutions ------------------------------------------------------------------------------------------------------

CONVOLUTIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "1x1": ((5, 7, 1), {}, (2, 7, 9)),
    "1x1, strided": ((17, 33, 1), {"stride": 2}, (2, 7, 9)),
    "1x1, strided and padded to its own size": ((5, 7, 1), {"stride": 2, "padding": 1}, (2, 3, 3)),
    "1x1, one line, strided": ((5, 7, 1), {"stride": (2, 1)}, (2, 1, 9)),
    "1x1, one column, strided": ((5, 7, 1), {"stride": (1, 2)}, (5, 9, 1)),
    "1x1, padded": ((5, 7, 1), {"padding": (2, 1)}, (2, 3, 4)),
    "3x3": ((6, 11, 3), {}, (2, 7, 9)),
    "3x3, padded": ((16, 16, 3), {"padding": 1}, (1, 7, 9)),
    "3x3, strided": ((9, 31, 3), {"stride": (2, 3), "padding": 1}, (2, 11, 13)),
    "3x3, stride 3": ((9, 31, 3), {"stride": 3}, (2, 11, 13)),
    "3x3, dilated": ((4, 8, 3), {"dilation": (1, 2), "padding": (0, 3)}, (2, 9, 8)),
    "3x3, padded by more than it covers": ((5, 6, 3), {"padding": (4, 5)}, (2, 3, 2)),
    "3x3, no bias": ((7, 5, 3), {"bias": False, "padding": 1}, (2, 5, 5)),
    "5x5": ((5, 18, 5), {"padding": 2}, (1, 6, 5)),
    "7x7, strided": ((3, 16, 7), {"stride": 2, "padding": 3}, (2, 15, 18)),
    "7x7, on 4": ((4, 10, 7), {"stride": 2, "padding": 3}, (2, 8, 9)),
    "1x3": ((6, 6, (1, 3)), {"padding": (0, 1)}, (2, 5, 6)),
    "3x1": ((6, 6, (3, 1)), {"padding": (1, 0), "stride": (2, 1)}, (2, 6, 5)),
    "2x4": ((6, 6, (2, 4)), {"padding": (1, 2)}, (2, 6, 5)),
    "groups of odd size": ((15, 21, 3), {"padding": 1, "groups": 3}, (2, 5, 6)),
    "2 groups": ((34, 66, 3), {"padding": 1, "groups": 2}, (1, 5, 6)),
    "3 groups, 1x1": ((9, 51, 1), {"groups": 3}, (2, 5, 6)),
    "2 groups, wide": ((10, 200, 3), {"groups": 2}, (1, 5, 6)),
    "groups of 1, 2 each": ((6, 12, 3), {"padding": 1, "groups": 6}, (2, 5, 6)),
    "groups of 1, 17 each": ((3, 51, 3), {"padding": 1, "groups": 3}, (2, 5, 6)),
    "groups of 2": ((6, 6, 3), {"padding": 1, "groups": 3, "stride": 2}, (2, 7, 6)),
    "many weights": ((160, 200, 3), {"padding": 1}, (1, 4, 5)),
    "many weights, many pixels": ((131, 261, 3), {"padding": 1}, (1, 9, 9)),
    "many weights, 1x1": ((600, 515, 1), {}, (2, 2, 3)),
    "many small images": ((16, 24, 3), {"padding": 1}, (9, 5, 4)),
    "many small images, strided": ((16, 24, 3), {"padding": 1, "stride": 2}, (9, 6, 7)),
    "5x5, many images": ((8, 70, 5), {"padding": 2}, (7, 7, 7)),
    "7x1": ((8, 16, (7, 1)), {"padding": (3, 0)}, (2, 9, 8)),
    "dilated as far as it is padded": ((8, 8, 3), {"padding": 6, "dilation": 6}, (1, 17, 15)),
    "groups, many images": ((32, 48, 3), {"padding": 1, "groups": 2}, (5, 7, 6)),
    "many groups and weights": ((256, 520, 3), {"padding": 1, "groups": 2}, (1, 3, 5)),
}


@pytest.mark.parametrize("first", ["the input", "behind relu", "signed"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, first):
    arguments, options, (n, h, w) = CONVOLUTIONS[name]
    conv = nn.Conv2d(*arguments, **options)
    model = nn.Sequential(nn.ReLU(), conv) if first == "behind relu" else conv
    x = signal(n, arguments[0], h, w, offset=0.5)
    integer = integers_of(model, x, recipe=SIGNED if first == "signed" else ROUNDED)
    require_same(integer, (x,), (signal(1, arguments[0], h + 3, w + 1, seed=4),), values=5)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 2), (2, 1)])
def test_few_input_channels(depth, kernel):
    for stride, padding in ((1, 0), (2, 1), ((1, 2), (0, 3)), ((3, 1), (2, 0))):
        x = signal(2, depth, 6, 7)
        integer = integers_of(nn.Conv2d(depth, 9, kernel, stride=stride, padding=padding), x)
        require_same(integer, (x,), (signal(1, depth, 3, 4),))


@pytest.mark.parametrize("channels", [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 79, 96, 113, 128, 129, 193])
def test_output_channels(channels):
    x = signal(2, 6, 5, 5)
    model = nn.Sequential(nn.Conv2d(6, channels, 1), nn.ReLU6(), nn.Conv2d(channels, channels, 3, padding=1))
    require_same(integers_of(model, x), (x,), (signal(5, 6, 1, 1),), (signal(1, 6, 2, 3),), values=min(5, channels))


TURNS: dict[str, tuple[int, int, int | tuple[int, int], int]] = {
    "1x1": (64, 64, 1, 1),
    "1x1, 61 of 64": (61, 128, 1, 1),
    "1x1, strided": (72, 130, 1, 2),
    "1x1, long": (768, 64, 1, 1),
    "1x1, sums of 25 bits": (768, 64, 1, 1),
    "3x3": (64, 64, 3, 1),
    "3x3, few channels": (16, 64, 3, 1),
    "3x3, strided": (20, 192, 3, 2),
    "1x2": (40, 64, (1, 2), 1),
    "1x3": (64, 64, (1, 3), 1),
    "7x7 of three": (3, 64, 7, 2),
}
"""Input and output channels, window and stride: 64 channels whose sums are finished while the next ones are added up."""


@pytest.mark.parametrize("behind", ["nothing", "a sum", "a table"])
@pytest.mark.parametrize("name", TURNS)
def test_pixels_in_turns(name, behind):
    """All numbers of pixels that may be left behind the fours, by rows of one pixel and of more than eight."""
    depth, channels, kernel, stride = TURNS[name]
    conv = nn.Conv2d(depth, channels, kernel, stride=stride, padding=tuple(k // 2 for k in _pair(kernel)))
    functions: dict[str, Callable[..., Tensor]] = {
        "nothing": lambda m, x: m.conv(x),
        "a sum": lambda m, x: m.conv(x) + m.other(x),
        "a table": lambda m, x: F.hardswish(m.conv(x)),
    }
    other = nn.Conv2d(depth, channels, kernel, stride=stride, padding=conv.padding)
    x = signal(2, depth, 5, 9, offset=0.3)
    if is_large := name.endswith("25 bits"):  # the largest weights and inputs, all of one sign
        x, conv.weight.data = x.abs(), torch.full_like(conv.weight, 0.02)
    integer = integers_of(Function(functions[behind], conv=conv, other=other), x)
    sizes = [(1, 1, 1), (1, 7, 1), (1, 1, 8), (3, 3, 1), (1, 2, 5), (1, 1, 11), (4, 3, 3), (2, 9, 13)]
    native = require_same(integer, (x,), *((signal(n, depth, stride * h, stride * w, seed=h),) for n, h, w in sizes))
    operations = [line.operation for line in native.program.lines if isinstance(line.operation, Weighted)]
    rules = {operation.rescaling.rule for operation in operations}
    assert rules <= {"float32", "float64"} and ("float64" in rules) == is_large


def _pair(kernel: int | tuple[int, int]) -> tuple[int, int]:
    return kernel if isinstance(kernel, tuple) else (kernel, kernel)


@pytest.mark.parametrize("channels", [1, 3, 8, 16, 17, 32, 33, 64, 65, 96, 144])
def test_depthwise(channels):
    """All strides and widths, the narrowest above all, where a result has fewer pixels than the kernels take at once."""
    x = signal(2, channels, 7, 8, offset=0.3)
    for stride in (1, 2, (1, 2)):
        conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels)
        integer = integers_of(conv, x)
        sizes = [(1, 1), (2, 3), (5, 1), (1, 5), (4, 2), (3, 3), (7, 11)]
        require_same(integer, (x,), *((signal(n % 2 + 1, channels, *s),) for n, s in enumerate(sizes)))


DEPTHWISE: dict[str, tuple[Any, dict[str, Any]]] = {
    "no padding": (3, {}),
    "padded by 2": (3, {"padding": 2}),
    "padded by 3, strided": (3, {"padding": 3, "stride": 2}),
    "padded unequally": (3, {"padding": (0, 1)}),
    "padded unequally, strided": (3, {"padding": (1, 0), "stride": 2}),
    "stride 3": (3, {"padding": 1, "stride": 3}),
    "dilated": (3, {"padding": 2, "dilation": 2}),
    "dilated across": (3, {"padding": (1, 2), "dilation": (1, 2)}),
    "no bias": (3, {"bias": False}),
    "1x1": (1, {}),
    "2x2": (2, {"padding": 1}),
    "5x5": (5, {"padding": 2}),
    "5x5, strided": (5, {"padding": 2, "stride": 2}),
    "7x7": (7, {"padding": 3}),
    "9x1": ((9, 1), {"padding": (4, 0)}),
    "1x3": ((1, 3), {"padding": (0, 1)}),
}


@pytest.mark.parametrize("recipe", [ROUNDED, SIGNED], ids=["unsigned", "signed"])
@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_windows(name, recipe):
    kernel, options = DEPTHWISE[name]
    for channels in (5, 24, 70):
        x = signal(2, channels, 9, 8)
        conv = nn.Conv2d(channels, channels, kernel, groups=channels, **options)
        require_same(integers_of(nn.Sequential(conv, nn.ReLU()), x, recipe=recipe), (x,), (signal(1, channels, 9, 3),))


def test_depthwise_behind_and_before_others():
    """A depthwise convolution reads channels of a concatenation, writes into another, and adds what it read."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        a, b = F.relu(m.a(x)), F.relu(m.b(x))
        both = torch.cat([a, b], 1)
        return torch.cat([m.d(both) + both, m.e(b) + b, F.hardswish(m.f(a))], 1)

    for c in (5, 16, 40):
        parts = {"a": nn.Conv2d(3, c, 1), "b": nn.Conv2d(3, c + 1, 1)}
        parts["d"] = nn.Conv2d(2 * c + 1, 2 * c + 1, 3, padding=1, groups=2 * c + 1)
        parts["e"] = nn.Conv2d(c + 1, c + 1, 3, padding=1, groups=c + 1)
        parts["f"] = nn.Conv2d(c, c, 3, padding=1, groups=c)
        x = signal(2, 3, 5, 7)
        require_same(integers_of(Function(forward, **parts), x), (x,), (signal(3, 3, 6, 1),), (signal(1, 3, 1, 2),))


ACTIVATIONS = {
    "relu": nn.ReLU(), "relu6": nn.ReLU6(), "hardswish": nn.Hardswish(), "silu": nn.SiLU(), "sigmoid": nn.Sigmoid(),
    "hardsigmoid": nn.Hardsigmoid(), "tanh": nn.Tanh(), "gelu": nn.GELU(), "leaky": nn.LeakyReLU(0.1),
    "hardtanh": nn.Hardtanh(-0.3, 0.2),
}  # fmt: skip


@pytest.mark.parametrize("recipe", [ROUNDED, SIGNED], ids=["unsigned", "signed"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_behind_weights(name, recipe):
    for conv in (nn.Conv2d(5, 19, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1, groups=5), nn.Conv2d(5, 5, 5, groups=5)):
        x = signal(2, 5, 6, 7)
        require_same(integers_of(nn.Sequential(conv, ACTIVATIONS[name]), x, recipe=recipe), (x,))
    x = signal(4, 5)
    require_same(integers_of(nn.Sequential(nn.Linear(5, 19), ACTIVATIONS[name]), x, recipe=recipe), (x,))


# --- numbers -----------------------------------------------------------------------------------------------------------


def weight_of(bits: int, **options: Any) -> Scheme:
    return Scheme(bits=bits, symmetric=True, signed=True, narrow_range=True, **options)


RECIPES = {
    "weights per tensor": Recipe(default=Setting(weight=weight_of(8)), quantize_outputs=True),
    "4-bit weights": Recipe(default=Setting(weight=weight_of(4, per_channel=True)), quantize_outputs=True),
    "2-bit weights": Recipe(default=Setting(weight=weight_of(2, per_channel=True)), quantize_outputs=True),
    "4-bit activations": Recipe(default=Setting(activation=Scheme(bits=4)), quantize_outputs=True),
    "5-bit signed": Recipe(
        default=Setting(activation=Scheme(bits=5, signed=True, symmetric=True, narrow_range=True)),
        quantize_outputs=True,
    ),
    "signed": SIGNED,
    "signed affine": Recipe(default=Setting(activation=Scheme(signed=True)), quantize_outputs=True),
    "unsigned symmetric": Recipe(default=Setting(activation=Scheme(symmetric=True)), quantize_outputs=True),
}


def mixed() -> nn.Module:
    """Every kind of kernel in one small model."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        a = F.relu6(m.first(x))
        b = m.second(a) + a
        c = torch.cat([b, m.third(F.max_pool2d(b, 3, 1, 1)), F.avg_pool2d(a, 3, 1, 1)], 1)
        gate = torch.sigmoid(m.gate(F.adaptive_avg_pool2d(c, 1)))
        return m.head(torch.flatten(F.adaptive_avg_pool2d(F.hardswish(m.norm(c * gate)), (2, 1)), 1))

    return Function(
        forward,
        first=nn.Conv2d(3, 9, 3, stride=2, padding=1),
        second=nn.Conv2d(9, 9, 3, padding=1, groups=9),
        third=nn.Conv2d(9, 5, 1),
        gate=nn.Conv2d(23, 23, 1),
        norm=nn.BatchNorm2d(23),
        head=nn.Linear(46, 7),
    )


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    x = signal(2, 3, 15, 17)
    require_same(integers_of(mixed(), x, recipe=RECIPES[name]), (x,), (signal(1, 3, 8, 4, seed=5, gain=3),))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt", "xnnpack", "tflite"])
def test_targets(target):
    """A target's own grids and rounding: the same bits, or a reason."""
    x = signal(2, 3, 15, 17)
    integer = integers_of(mixed(), x, recipe=Recipe(), target=target)
    require_same_or_reason(integer, (x,))


def require_same_or_reason(integer: Any, *calls: tuple[Any, ...]) -> str | None:
    """The reason why there is no native form, which has to name a node; None where the bits were the same."""
    try:
        require_same(integer, *calls)
    except Unfit as reason:
        assert REFUSED.match(str(reason)), reason
        return str(reason)
    return None


@pytest.mark.parametrize("rounding", ["double", "float"])
def test_other_roundings_are_right_or_refused(rounding):
    x = signal(2, 3, 15, 17)
    reason = require_same_or_reason(integers_of(mixed(), x, rounding=rounding), (x,))
    assert reason is None or rounding in reason


@pytest.mark.parametrize("rounding", ["double", "float"])
@pytest.mark.parametrize("op", ["add", "mul", "mean", "sigmoid", "number"])
def test_other_roundings_without_weights(op, rounding):
    function: dict[str, Callable[..., Tensor]] = {
        "add": lambda m, x, y: x + y,
        "mul": lambda m, x, y: x * y,
        "mean": lambda m, x, y: torch.cat([x, y], 1).mean((2, 3)),
        "sigmoid": lambda m, x, y: torch.sigmoid(torch.cat([x, y], 1)),
        "number": lambda m, x, y: 0.3 * torch.cat([x, y], 1) + 1,
    }
    x, y = signal(2, 3, 15, 17), signal(2, 3, 15, 17, seed=7)
    require_same_or_reason(integers_of(Function(function[op]), x, y, rounding=rounding), (x, y))


@pytest.mark.parametrize("zero_point", [0, 1, 128, 254, 255])
def test_zero_points_and_bounds(zero_point):
    """The result's zero point anywhere, and bounds that are not the grid's."""
    x = signal(2, 5, 6, 7, offset={0: 4, 255: -4}.get(zero_point, 0))
    model = nn.Sequential(
        nn.Conv2d(5, 18, 3, padding=1), nn.Conv2d(18, 18, 3, groups=18, padding=1), nn.Conv2d(18, 3, 1)
    )
    integer = integers_of(model, x)
    for part in weighted(integer):
        part.zero_point.fill_(zero_point)
        part.low.fill_(7)
        part.high.fill_(201)
    for part in weighted(integer)[1:]:
        part.offset.fill_(zero_point)
    require_same(integer, (x,))


def weighted(integer: nn.Module) -> list[IntegerWeighted]:
    return [part for part in integer.modules() if isinstance(part, IntegerWeighted)]


def of_kind(integer: nn.Module, kind: type) -> list[Any]:
    return [part for part in integer.modules() if isinstance(part, kind)]


FORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Conv2d(9, 35, 3, padding=1), (2, 9, 6, 7)),
    "pointwise": (lambda: nn.Conv2d(9, 35, 1), (2, 9, 6, 7)),
    "by lines": (lambda: nn.Conv2d(3, 35, 3), (2, 3, 8, 9)),
    "grouped": (lambda: nn.Conv2d(9, 33, 3, groups=3), (2, 9, 8, 9)),
    "depthwise": (lambda: nn.Conv2d(35, 35, 3, padding=1, groups=35), (2, 35, 6, 7)),
    "depthwise, few": (lambda: nn.Conv2d(9, 9, 3, padding=1, groups=9), (2, 9, 6, 7)),
    "depthwise, wide window": (lambda: nn.Conv2d(35, 35, 5, padding=2, groups=35), (2, 35, 6, 7)),
    "linear": (lambda: nn.Linear(9, 35), (50, 9)),
}


@pytest.mark.parametrize("factor", [1, 2, 5, 9])
@pytest.mark.parametrize("form", FORMS)
def test_ties(form, factor):
    """Multipliers that are powers of two: many sums lie exactly half way between two integers."""
    build, shape = FORMS[form]
    x = signal(*shape)
    integer, most = integers_of(build(), x), min(factor, 2)
    for part in weighted(integer):
        part.weight.copy_(torch.randint(-most, most + 1, part.weight.shape))
        part.bias.copy_(torch.randint(-99, 99, part.bias.shape))
        part.multiplier.fill_(2**30)
        part.shift.fill_(1 - factor)
    require_same(integer, (x,), values=5 if factor < 9 else 2)
    if factor < 9:
        expected = integer(x)
        for part in weighted(integer):
            part.rounding = "float"
        assert (integer(x) != expected).any(), "no sum was half way"


@pytest.mark.parametrize("form", FORMS)
def test_multipliers_with_any_number_of_factors_of_two(form):
    """Between those that make ties and those that cannot, one a channel."""
    build, shape = FORMS[form]
    x = signal(*shape)
    for seed in range(4):
        torch.manual_seed(seed)
        integer = integers_of(build(), x)
        for part in weighted(integer):
            zeros = torch.randint(0, 31, part.multiplier.shape)
            part.multiplier.copy_((part.multiplier >> zeros << zeros) | 2**30)
            part.shift.copy_(torch.randint(-12, 0, part.shift.shape))
        require_same(integer, (x,), values=5)


WAYS: dict[str, tuple[int, int, int, str]] = {
    "all of 31 bits": (20, -13, 1, "float64"),
    "sums of 24 bits": (24, -13, 0, "float32"),
    "sums of 25 bits": (25, -13, 0, "float64"),
    "results of 15 bits": (24, -9, 0, "float32"),
    "results of 16 bits": (24, -8, 0, "float64"),
}
"""Bits of the largest sum, shift, lowest bit of the multipliers, and how sums are rescaled then."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_each_way_of_rescaling(form, way):
    """Float32 where it is exact, and float64 as soon as it is not."""
    build, shape = FORMS[form]
    x = signal(*shape)
    integer = integers_of(build(), x)
    bits, shift, odd, rule = WAYS[way]
    for part in weighted(integer):
        reach = 255 * int(part.weight.long().abs().flatten(1).sum(1).max())
        most = 2**bits - 1 - reach
        part.bias.copy_(torch.where(torch.arange(len(part.bias)) % 2 == 0, most, -most))
        mantissa = torch.randint(2**23, 2**24 - 2**18, part.multiplier.shape) | 1  # no sum is half way
        part.multiplier.copy_(mantissa << 7 | odd)
        part.shift.fill_(shift)
    native = NativeModel(integer)
    operations = [line.operation for line in native.program.lines if isinstance(line.operation, Weighted)]
    assert {operation.rescaling.rule for operation in operations} == {rule}
    for call in (x, signal(*shape, seed=4, gain=30)):
        assert torch.equal(native(call), integer(call))


def test_large_biases():
    """Sums near the ends of 32 bits, brought back by small multipliers."""
    for form, (build, shape) in FORMS.items():
        x = signal(*shape)
        integer = integers_of(build(), x)
        for part in weighted(integer):
            part.bias.copy_(torch.randint(-(2**31) + 2**22, 2**31 - 2**22, part.bias.shape))
            part.shift.fill_(-23)
        require_same(integer, (x,), values=5), form


def test_the_largest_weights_and_inputs():
    """No sum saturates on its way where all weights and inputs are at their ends."""
    for form, (build, shape) in FORMS.items():
        x = torch.where(signal(*shape) > -1, 5.0, -5.0)
        integer = integers_of(build(), x)
        for part in weighted(integer):
            part.weight.copy_(torch.where(torch.rand(part.weight.shape) < 0.1, -128, 127))
            part.shift.copy_(part.shift - 3)
        require_same(integer, (x,)), form


def test_scales_far_apart_are_right_or_refused():
    for shift in (-31, -24, -20, 5, 12, 25):
        for form, (build, shape) in FORMS.items():
            x = signal(*shape)
            integer = integers_of(build(), x)
            for part in weighted(integer):
                part.shift.fill_(shift)
            try:
                native = NativeModel(integer)
            except Unfit as reason:
                assert "too far apart" in str(reason) or "vanishes" in str(reason), reason
                continue
            assert torch.equal(native(x), integer(x)), form


SUMS: dict[str, tuple[list[int], int]] = {
    "ones": ([2**30, 2**30, 0], 1),
    "halves": ([2**30, 2**30, 0], 0),
    "a half taken off": ([2**30, -(2**30), 0], 0),
    "the largest": ([2**31 - 1, 2**30 + 12345, 0], 0),
    "the largest, twice": ([2**31 - 1, -(2**31) + 1, 99], 0),
    "nearly the largest": ([2**31 - 2**15, 2**31 - 2**16 + 2**15 - 1, 0], 0),
    "a number": ([3, 2**30, 2**30 - 7], 0),
    "small": ([2**30 + 1, 2**21 + 3, 5], -2),
    "large": ([2**30 + 1, -(2**21) + 3, 5], 4),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("fused", [False, True], ids=["alone", "behind a convolution"])
def test_sums_for_all_bytes(name, fused):
    """Every pair of bytes, by multipliers that are hard: ties, ends of the range, different signs."""
    multipliers, shift = SUMS[name]
    bytes_ = torch.arange(256.0)
    x = bytes_.reshape(1, 1, 256, 1).expand(1, 2, 256, 256)
    y = bytes_.reshape(1, 1, 1, 256).expand(1, 2, 256, 256)
    conv = nn.Conv2d(2, 2, 1, groups=2, bias=False)
    nn.init.ones_(conv.weight)
    model = Function((lambda m, x, y: m.conv(x) + y) if fused else (lambda m, x, y: x + y), conv=conv)
    integer = integers_of(model, x, y)
    for part in of_kind(integer, IntegerSum):
        part.multipliers.copy_(torch.tensor(multipliers))
        part.shift.fill_(shift)
        part.zero_point.fill_(100)
    require_same(integer, (x, y), values=20)


@pytest.mark.parametrize("shift", [-13, -12, -9, -7])
@pytest.mark.parametrize("multiplier", [2**30, 2**30 + 2**20, 2**30 + 1, 2**31 - 1])
def test_products_for_all_bytes(multiplier, shift):
    bytes_ = torch.arange(256.0) - 77
    x = bytes_.reshape(1, 1, 256, 1).expand(1, 2, 256, 256)
    y = bytes_.flip(0).reshape(1, 1, 1, 256).expand(1, 2, 256, 256)
    integer = integers_of(Function(lambda m, x, y: x * y), x, y)
    for part in of_kind(integer, IntegerProduct):
        part.multiplier.fill_(multiplier)
        part.shift.fill_(shift)
    require_same(integer, (x, y), values=2)


def test_inputs_beyond_every_bound():
    """Infinities and the ends of float32 are clamped as the reference clamps them; halves round to even."""
    ends = torch.tensor(
        [float("inf"), -float("inf"), 3e38, -3e38, 1e-45, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 254.5, 255.5]
    )
    same = nn.Conv2d(3, 3, 1, groups=3, bias=False)
    nn.init.ones_(same.weight)
    for recipe in (ROUNDED, SIGNED):
        x = torch.arange(-100.0, 156.0).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
        integer = integers_of(same, x, recipe=recipe)
        require_same(integer, (ends.repeat(6).reshape(2, 3, 13, 1),), (signal(1, 3, 7, 9, gain=1e4),))


# --- graphs ------------------------------------------------------------------------------------------------------------


def conv(depth: int, channels: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(depth, channels, kernel, padding=kernel // 2, **options)


def linear_parts() -> dict[str, nn.Module]:
    return {
        "a": conv(5, 11),
        "b": conv(5, 11, 3),
        "c": conv(11, 11),
        "d": conv(11, 11, 3, groups=11),
        "drop": nn.Dropout2d(),
    }


GRAPHS: dict[str, Callable[[Any, Tensor], Any]] = {
    "sum of two convolutions": lambda m, x: m.a(x) + m.b(x),
    "sum of two, the other order": lambda m, x: m.b(x) + m.a(x),
    "sum with what was convolved": lambda m, x: m.c(m.a(x)) + m.a(x),
    "residual first": lambda m, x: (lambda y: y + m.c(y))(F.relu(m.a(x))),
    "residual last": lambda m, x: (lambda y: m.d(y) + y)(F.relu(m.a(x))),
    "residual, then relu": lambda m, x: (lambda y: F.relu(m.d(m.c(y)) + y))(F.relu6(m.a(x))),
    "a tensor twice": lambda m, x: (lambda y: m.c(y + y))(m.a(x)),
    "a sum used twice": lambda m, x: (lambda y: m.c(y) + m.d(y) + y)(m.a(x) + m.b(x)),
    "a chain of sums": lambda m, x: (m.a(x) + m.b(x)) + (m.c(m.a(x)) + m.d(m.b(x))),
    "a sum of a concatenation": lambda m, x: torch.cat([m.a(x), m.b(x)], 1) + torch.cat([m.b(x), m.a(x)], 1),
    "a difference": lambda m, x: m.a(x) - m.c(m.b(x)),
    "a difference of the same": lambda m, x: (lambda y: m.c(y) - y)(m.a(x)),
    "a weighted sum": lambda m, x: torch.add(m.a(x), m.b(x), alpha=3),
    "numbers": lambda m, x: 2 - 0.3 * m.c((m.a(x) + 1.5) * -0.7),
    "a table, then a sum": lambda m, x: F.silu(m.a(x)) + F.hardswish(m.c(F.relu(m.b(x)))),
    "a table used twice": lambda m, x: (lambda y: torch.cat([m.c(y), y], 1))(F.hardswish(m.a(x))),
    "two tables": lambda m, x: torch.sigmoid(F.silu(m.a(x))),
    "a convolution, its table and itself": lambda m, x: (lambda y: torch.sigmoid(y) * y)(m.a(x)),
    "concatenation": lambda m, x: torch.cat([m.a(x), m.b(x), m.c(m.a(x))], 1),
    "concatenation of the input": lambda m, x: torch.cat([x, m.b(x), x], 1),
    "the same tensor twice": lambda m, x: (lambda y: torch.cat([y, m.b(x), y], 1))(m.a(x)),
    "nested concatenations": lambda m, x: torch.cat([torch.cat([m.a(x), x], 1), torch.cat([m.b(x), m.a(x)], 1)], 1),
    "a concatenation in two": lambda m, x: (lambda y: torch.cat([torch.cat([y, x], 1), torch.cat([x, y], 1)], 1))(
        m.a(x)
    ),
    "a concatenation used by many": lambda m, x: (lambda y: torch.cat([F.max_pool2d(y, 3, 1, 1), y, m.a(x)], 1))(
        torch.cat([m.b(x), m.a(x)], 1)
    ),
    "growing": lambda m, x: (lambda y: torch.cat([y, F.max_pool2d(y, 3, 1, 1)], 1))(
        torch.cat([torch.cat([x, m.a(x)], 1), m.c(m.b(x))], 1)
    ),
    "a part convolved, and the whole": lambda m, x: (lambda y, z: torch.cat([m.c(y), m.d(z), torch.cat([y, z], 1)], 1))(
        m.a(x), m.b(x)
    ),
    "parts in another order": lambda m, x: (lambda y, z: torch.cat([y, z], 1) * torch.cat([z, y], 1))(m.a(x), m.b(x)),
    "a sum into a concatenation": lambda m, x: torch.cat([m.a(x) + m.b(x), m.c(m.a(x)) + m.b(x)], 1),
    "a gate": lambda m, x: (lambda y: y * torch.sigmoid(m.c(F.adaptive_avg_pool2d(y, 1))))(m.b(x)),
    "a gate first": lambda m, x: (lambda y: torch.sigmoid(m.c(y.mean((2, 3), keepdim=True))) * y)(m.b(x)),
    "a gate on a concatenation's part": lambda m, x: (
        lambda y: torch.cat([y * F.hardsigmoid(m.c(F.adaptive_avg_pool2d(y, 1))), x, y], 1)
    )(m.b(x)),
    "a gate for each line": lambda m, x: m.b(x) * torch.sigmoid(m.a(F.adaptive_avg_pool2d(x, (None, 1)))),
    "a gate for each column": lambda m, x: torch.sigmoid(m.a(F.adaptive_avg_pool2d(x, (1, None)))) * m.b(x),
    "a square": lambda m, x: (lambda y: m.c(y * y))(m.a(x)),
    "a product": lambda m, x: m.a(x) * m.b(x),
    "a product, negative": lambda m, x: m.c(m.a(x) * F.relu(m.b(x))),
    "several results": lambda m, x: (m.a(x), {"b": m.b(x), "c": [m.c(m.a(x))]}),
    "a result used inside": lambda m, x: (lambda y: (y, m.c(y)))(m.a(x)),
    "a result of a concatenation's part": lambda m, x: (lambda y: (y, torch.cat([y, m.b(x)], 1)))(m.a(x)),
    "the same result twice": lambda m, x: (lambda y: (y, y))(m.a(x)),
    "the input as a result": lambda m, x: (x, m.a(x)),
    "the input as the last result": lambda m, x: {"y": m.a(x), "x": x},
    "the quantized input as a result": lambda m, x: (F.relu(x), m.a(F.relu(x))),
    "what nobody uses": lambda m, x: (m.b(x), m.c(m.a(x)))[1],
    "dropout": lambda m, x: F.dropout(m.c(m.drop(m.a(x))), 0.2, m.training),
}


@pytest.mark.parametrize("recipe", [ROUNDED, SIGNED], ids=["unsigned", "signed"])
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name, recipe):
    x = signal(2, 5, 5, 7)
    integer = integers_of(Function(GRAPHS[name], **linear_parts()), x, recipe=recipe)
    require_same(integer, (x,), (signal(1, 5, 1, 2),), (signal(3, 5, 9, 4),))


def test_a_network_that_grows():
    """As in DenseNet: every layer reads all that came before it."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        found = m.stem(x)
        for layer in m.layers:
            found = torch.cat([found, layer(found)], 1)
        return m.head(F.adaptive_avg_pool2d(F.relu(m.norm(found)), 1).flatten(1))

    sizes = [7 + 5 * i for i in range(5)]
    layers = [
        nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), conv(c, 9), nn.BatchNorm2d(9), nn.ReLU(), conv(9, 5, 3))
        for c in sizes
    ]
    parts = {
        "stem": conv(3, 7, 3),
        "layers": nn.ModuleList(layers),
        "norm": nn.BatchNorm2d(32),
        "head": nn.Linear(32, 9),
    }
    x = signal(2, 3, 8, 9)
    require_same(integers_of(Function(forward, **parts), x), (x,), (signal(1, 3, 5, 3),), values=5)


def test_several_inputs():
    parts = linear_parts()
    x, y = signal(2, 5, 5, 7), signal(2, 5, 5, 7, seed=9, gain=4)
    for function in (
        lambda m, x, y: m.a(x) + m.b(y),
        lambda m, x, y: torch.cat([torch.relu(x), m.a(y), torch.relu(y)], 1),
        lambda m, x, y: (x + y, m.a(y) * m.b(x)),
        lambda m, x, y: {"of the second": m.a(y), "of both": torch.relu(x) - y},
    ):
        integer = integers_of(Function(function, **parts), x, y)
        require_same(integer, (x, y), (y, x), (x[:1, :, :2], y[:1, :, :2]))


POOLS: dict[str, nn.Module] = {
    "max 2": nn.MaxPool2d(2),
    "max 3, padded": nn.MaxPool2d(3, 2, 1),
    "max, ceiling": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "max, dilated": nn.MaxPool2d(2, 1, 1, dilation=3),
    "max, unequal": nn.MaxPool2d((1, 3), (2, 1), (0, 1), (1, 2), ceil_mode=True),
    "max 5": nn.MaxPool2d(5, 1, 2),
    "max 1": nn.MaxPool2d(1, 2),
    "average 2": nn.AvgPool2d(2),
    "average, padded": nn.AvgPool2d(3, 2, 1),
    "average, not counting": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "average, ceiling": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "average, ceiling, not counting": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "average, ceiling, far": nn.AvgPool2d(2, 4, 1, ceil_mode=True),
    "average, unequal": nn.AvgPool2d((3, 1), (1, 2), (1, 0)),
    "adaptive 1": nn.AdaptiveAvgPool2d(1),
    "adaptive 2": nn.AdaptiveAvgPool2d(2),
    "adaptive 3": nn.AdaptiveAvgPool2d(3),
    "adaptive, more than there are": nn.AdaptiveAvgPool2d((13, 4)),
    "adaptive, unequal": nn.AdaptiveAvgPool2d((None, 3)),
}


@pytest.mark.parametrize("recipe", [ROUNDED, SIGNED], ids=["unsigned", "signed"])
@pytest.mark.parametrize("name", POOLS)
def test_pools(name, recipe):
    for channels in (1, 19, 70):
        x = signal(2, 3, 9, 11)
        for first, last in ((conv(3, channels), conv(channels, 3)), (nn.ReLU(), conv(3, channels))):
            integer = integers_of(nn.Sequential(first, POOLS[name], last), x, recipe=recipe)
            require_same(integer, (x,), (signal(1, 3, 5, 8),), (signal(3, 3, 7, 7),), values=min(2, channels))


@pytest.mark.parametrize("name", [name for name in POOLS if "average" in name or "adaptive" in name])
def test_averages_half_way(name):
    """Scales in a ratio that is a power of two, or such that a quotient is not exact and its product nearly a half."""
    x = torch.randint(0, 256, (2, 7, 9, 12)).float()
    for ratio in (1.0, 0.5, 2.0, 3.0, 4.5, 0.75, 9.0, 6.0, 5.0, 1.5, 7 / 2):
        model = Function(lambda m, x: m.last(m.pool(m.first(x))), first=conv(7, 7), pool=POOLS[name], last=conv(7, 5))
        integer = integers_of(model, x)
        for part in of_kind(integer, IntegerLinearMap):
            part.ratio.fill_(ratio)
        require_same(integer, (x,), (x[:, :, :7, :5],))


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dims", [(2, 3), (-1, -2), [3, 2]])
def test_means(dims, keepdim):
    x = signal(3, 6, 5, 7)
    model = Function(lambda m, x: torch.sigmoid(m.a(x).mean(dims, keepdim=keepdim)), a=conv(6, 21))
    require_same(integers_of(model, x), (x,), (signal(1, 6, 1, 1),), (signal(2, 6, 13, 11),))


NORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "behind a pool": lambda m, x: m.norm(F.max_pool2d(m.a(x), 2)),
    "behind a concatenation": lambda m, x: m.norm(torch.cat([m.e(x), m.f(x)], 1)),
    "behind an average": lambda m, x: F.relu(m.norm(F.avg_pool2d(m.a(x), 2))),
    "behind the input": lambda m, x: m.second(m.b(x)),
    "behind relu": lambda m, x: m.norm(F.relu(m.a(x))),
    "behind a sum": lambda m, x: F.hardswish(m.norm(m.a(x) + m.c(x))),
    "on rows": lambda m, x: m.row(torch.flatten(F.adaptive_avg_pool2d(m.a(x), 1), 1)),
}


@pytest.mark.parametrize("recipe", [ROUNDED, SIGNED], ids=["unsigned", "signed"])
@pytest.mark.parametrize("name", NORMS)
def test_batch_norms_on_their_own(name, recipe):
    parts = {"a": conv(5, 70), "c": conv(5, 70), "e": conv(5, 30), "f": conv(5, 40), "norm": nn.BatchNorm2d(70)}
    parts |= {"row": nn.BatchNorm1d(70), "second": nn.BatchNorm2d(5), "b": nn.ReLU()}
    x = signal(2, 5, 10, 12)
    require_same(integers_of(Function(NORMS[name], **parts), x, recipe=recipe), (x,), (signal(3, 5, 7, 3),))


GAINS = (1.0, 0.5, -0.5, 0.25, 1.5, 3.0, 0.0, -2.25, 1e-3, 7.0, 0.75, 1 / 3, -1.0)
OFFSETS = (0.0, 0.5, 1.0, 0.25, -0.75, 10.0, 200.0, -3.5, 1e-9, 0.125, 2.0, -100.0, 255.0)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.25), (0.1, 0.3), (0.03, 0.01)])
def test_batch_norms_half_way(scales):
    """All bytes by gains and offsets that put many results half way between two integers."""
    count = len(GAINS)
    x = torch.arange(256.0).reshape(1, 1, 16, 16).expand(2, count, 16, 16)
    integer = integers_of(Function(lambda m, x: m.norm(F.relu(x)), norm=nn.BatchNorm2d(count)), x)
    for part in of_kind(integer, IntegerEvaluate):
        part.parameter_gain.copy_(torch.tensor(GAINS))
        part.parameter_offset.copy_(torch.tensor(OFFSETS))
        part.input_scale.fill_(scales[0])
        part.output_scale.fill_(scales[1])
    reason = require_same_or_reason(integer, (x,))
    assert reason is None or "half way" in reason


def test_batch_norms_of_many_numbers():
    """All bytes through 3,000 channels of random gains and offsets."""
    x = torch.arange(256.0).reshape(1, 1, 16, 16).expand(1, 3000, 16, 16)
    integer = integers_of(Function(lambda m, x: m.norm(F.relu(x)), norm=nn.BatchNorm2d(3000)), x)
    for part in of_kind(integer, IntegerEvaluate):
        part.parameter_offset.mul_(50)
    require_same(integer, (x,), values=50)


ROWS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "rows": (nn.Sequential(nn.Linear(7, 19), nn.ReLU(), nn.Linear(19, 5)), (6, 7)),
    "one row": (nn.Sequential(nn.Linear(7, 70), nn.Hardswish(), nn.Linear(70, 5, bias=False)), (1, 7)),
    "sequences": (nn.Sequential(nn.Linear(7, 19), nn.GELU(), nn.Linear(19, 65)), (3, 5, 7)),
    "five axes": (nn.Sequential(nn.Linear(7, 19), nn.ReLU(), nn.Linear(19, 5)), (2, 2, 3, 2, 7)),
    "clamped at the end": (nn.Sequential(nn.Linear(7, 33), nn.ReLU6()), (4, 7)),
    "wide": (nn.Linear(1030, 1003), (3, 1030)),
    "flattened image": (nn.Sequential(conv(3, 9), nn.ReLU(), nn.Flatten(), nn.Linear(180, 5)), (2, 3, 4, 5)),
    "flattened pixel": (
        nn.Sequential(conv(3, 9), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 5)),
        (2, 3, 4, 5),
    ),
    "flattened input": (nn.Sequential(nn.Flatten(), nn.Linear(60, 5)), (2, 3, 4, 5)),
    "flattened batch of one": (nn.Sequential(nn.Flatten(), nn.Linear(60, 5)), (1, 3, 4, 5)),
}


@pytest.mark.parametrize("recipe", [Recipe(), ROUNDED, SIGNED], ids=["float result", "unsigned", "signed"])
@pytest.mark.parametrize("name", ROWS)
def test_rows(name, recipe):
    model, shape = ROWS[name]
    x = signal(*shape)
    require_same(integers_of(model, x, recipe=recipe), (x,), (signal(shape[0] + 3, *shape[1:], seed=8),))


def test_rows_side_by_side():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        flat = torch.flatten(F.adaptive_avg_pool2d(m.a(x), 1), 1)
        whole = torch.flatten(F.adaptive_avg_pool2d(m.a(x), (1, 2)), 1)
        return m.head(torch.cat([flat, whole, torch.relu(flat)], 1)) + 1

    x = signal(3, 5, 6, 7)
    integer = integers_of(Function(forward, a=conv(5, 11), head=nn.Linear(44, 3)), x)
    require_same(integer, (x,), (signal(1, 5, 1, 2),))


UNUSUAL: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear on images": (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), (2, 3, 4, 6)),
    "pool without a batch": (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Sigmoid()), (5, 6, 8)),
    "average without a batch": (nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.Sigmoid()), (5, 6, 8)),
    "convolution without a batch": (nn.Sequential(conv(5, 6, 3), nn.ReLU()), (5, 6, 8)),
    "norm of lines": (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), (2, 3, 16)),
    "norm of volumes": (nn.Sequential(nn.ReLU(), nn.BatchNorm3d(3)), (2, 3, 4, 5, 6)),
    "convolution over lines": (nn.Conv1d(3, 5, 3), (2, 3, 16)),
    "convolution over volumes": (nn.Conv3d(3, 5, 3), (2, 3, 4, 5, 6)),
    "transposed": (nn.ConvTranspose2d(3, 5, 3), (2, 3, 4, 5)),
    "reflected": (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (2, 3, 4, 5)),
    "same": (nn.Conv2d(3, 5, 3, padding="same"), (2, 3, 4, 5)),
    "valid": (nn.Conv2d(3, 5, 3, padding="valid"), (2, 3, 4, 5)),
    "lines side by side": (Function(lambda m, x: torch.cat([x, torch.sigmoid(x)], 1)), (2, 3, 5)),
    "batches side by side": (Function(lambda m, x: torch.cat([x, torch.sigmoid(x)], 0)), (2, 3, 5, 4)),
    "columns side by side": (Function(lambda m, x: torch.cat([x, torch.sigmoid(x)], -1)), (2, 3, 5, 4)),
    "volumes side by side": (Function(lambda m, x: torch.cat([x, torch.sigmoid(x)], 1)), (2, 3, 5, 4, 2)),
    "a sum that spreads": (Function(lambda m, x: torch.sigmoid(x) + F.adaptive_avg_pool2d(x, 1)), (2, 3, 5, 4)),
    "a product that spreads both": (
        Function(lambda m, x: x.mean(2, keepdim=True) * x.mean(3, keepdim=True)),
        (2, 3, 5, 4),
    ),
    "a product over channels": (Function(lambda m, x: x * torch.sigmoid(m.a(x)), a=conv(3, 1)), (2, 3, 5, 4)),
    "a mean of lines": (Function(lambda m, x: torch.sigmoid(x.mean(1))), (2, 3, 5, 4)),
    "a mean of all": (Function(lambda m, x: torch.sigmoid(x.mean())), (2, 3, 5, 4)),
    "flattened in part": (Function(lambda m, x: torch.sigmoid(torch.flatten(torch.relu(x), 2))), (2, 3, 5, 4)),
    "flattened in whole": (Function(lambda m, x: torch.sigmoid(torch.flatten(torch.relu(x)))), (2, 3, 5, 4)),
    "rows flattened": (Function(lambda m, x: torch.sigmoid(torch.flatten(torch.relu(x), 1))), (2, 3, 5)),
    "a line": (Function(lambda m, x: torch.sigmoid(x) + x), (9,)),
    "a number": (Function(lambda m, x: torch.sigmoid(x) + x), ()),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_right_or_refused(name):
    model, shape = UNUSUAL[name]
    x = signal(*shape)
    integer = integers_of(model, x)
    try:
        found = NativeModel(integer)(x)
    except Unfit as reason:
        assert str(reason).count(" ") > 3, reason
        return
    assert_same_bits(found, integer(x))


# --- the whole table, and views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("name", COMPUTING)
def test_every_op_is_right_or_refused(name, signed):
    """What the op table knows, on its own example: the same bits at several batch sizes, or the reason why not."""
    example = example_of(name)
    recipe = recipe_with(Scheme(signed=True, symmetric=True)) if signed else ROUNDED
    prepared = fxquant.calibrate(fxquant.prepare(example.module, example.inputs, recipe=recipe), [example.inputs])
    integer = fxquant.convert(prepared, kernels="reference")
    for rows in (1, 3):
        call = inputs_like(example, rows, seed=5)
        try:
            found = NativeModel(integer)(*call)
        except Unfit as reason:
            assert REFUSED.match(str(reason)), reason
            continue
        with torch.no_grad():
            assert_same_bits(found, integer(*call))
    assert_accounted(name, integer, example.inputs)


NATIVE_OPS = (
    "conv2d", "linear", "add", "sub", "mul", "cat", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean", "relu",
    "hardswish", "sigmoid", "silu", "flatten", "batch_norm",
)  # fmt: skip


def assert_accounted(name: str, integer: Any, inputs: tuple[Any, ...]) -> None:
    """The ops that the kernels are for are not among the refused ones."""
    if name in NATIVE_OPS:
        NativeModel(integer)(*inputs)


VIEWS: dict[str, Callable[[Any, Tensor], Any]] = {
    "halves": lambda m, x: (lambda p: m.ten(torch.cat([p[1], p[0]], 1)))(m.even(x).chunk(2, 1)),
    "a slice of channels": lambda m, x: m.five(m.even(x)[:, 3:8]),
    "a slice of pixels": lambda m, x: m.c(m.a(x)[:, :, 1:-1, ::2]),
    "a slice of images": lambda m, x: m.c(m.a(x)[1:]) + m.c(m.b(x)[:-1]),
    "one image": lambda m, x: torch.sigmoid(m.a(x)[0]),
    "a shuffle": lambda m, x: m.ten(
        m.even(x).view(x.shape[0], 2, 5, x.shape[2], x.shape[3]).transpose(1, 2).flatten(1, 2)
    ),
    "turned": lambda m, x: m.c(m.a(x).transpose(2, 3)),
    "channels last": lambda m, x: m.row(m.a(x).permute(0, 2, 3, 1)),
    "sequences": lambda m, x: m.row(m.a(x).flatten(2).transpose(1, 2)),
    "sequences and back": lambda m, x: m.c(
        m.row(m.a(x).flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape[0], 11, *x.shape[2:])
    ),
    "reshaped": lambda m, x: torch.sigmoid(m.a(x).reshape(x.shape[0], -1)),
    "as rows": lambda m, x: m.row(m.a(x).mean((2, 3)).reshape(-1, 11)),
    "an axis more": lambda m, x: torch.sigmoid(m.a(x).unsqueeze(1)).squeeze(1),
    "spread": lambda m, x: m.a(x) + m.b(x).mean((2, 3), keepdim=True).expand(-1, -1, x.shape[2], x.shape[3]),
    "padded": lambda m, x: m.c(F.pad(m.a(x), (1, 2, 0, 3))),
    "rolled": lambda m, x: m.c(torch.roll(m.a(x), (1, 2), (2, 3))),
    "flipped": lambda m, x: m.c(torch.flip(m.a(x), (3,))),
    "stacked": lambda m, x: torch.sigmoid(torch.stack([m.a(x), m.b(x)], 1)),
    "a part of a part": lambda m, x: m.five(torch.cat([m.even(x)[:, 2:], m.a(x)], 1)[:, 6:11]),
    "a part and the whole": lambda m, x: (lambda y: torch.cat([y, torch.relu(y[:, :3]), y[:, 8:]], 1))(m.a(x)),
    "norm of rows": lambda m, x: m.row(m.layer(m.a(x).permute(0, 2, 3, 1))),
    "softmax": lambda m, x: torch.softmax(m.a(x).flatten(2), -1),
    "upsampled": lambda m, x: m.c(F.interpolate(m.a(x), scale_factor=2)),
    "a gate by channels of a part": lambda m, x: (lambda y: y[:, :5] * torch.sigmoid(y[:, 5:]))(m.even(x)),
}


@pytest.mark.parametrize("recipe", [ROUNDED, SIGNED], ids=["unsigned", "signed"])
@pytest.mark.parametrize("name", VIEWS)
def test_views_are_right_or_refused(name, recipe):
    parts = linear_parts() | {
        "even": conv(5, 10),
        "five": conv(5, 7, 3),
        "ten": conv(10, 6, 3),
        "row": nn.Linear(11, 11),
    }
    parts["layer"] = nn.LayerNorm(11)
    x = signal(2, 5, 6, 7)
    integer = integers_of(Function(VIEWS[name], **parts), x, recipe=recipe)
    for call in (x, signal(3, 5, 4, 9), signal(2, 5, 5, 3)):
        try:
            require_same(integer, (call,))
        except Unfit as reason:
            assert REFUSED.match(str(reason)), reason


class Attention(nn.Module):
    """Self-attention written out, as transformers do."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(y.transpose(1, 2).reshape(n, t, c))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "width, heads, length", [(12, 3, 5), (64, 2, 17), (40, 1, 70), (32, 4, 1), (66, 1, 197), (70, 1, 13)]
)
def test_attention(width, heads, length, causal):
    """Keys of one block, of a bundle of four and of more; heads of fewer numbers than a vector and of more."""
    model = nn.Sequential(nn.Linear(7, width), Attention(width, heads, causal), nn.GELU(), nn.Linear(width, 3))
    x = signal(2, length, 7)
    for recipe in (ROUNDED, SIGNED):
        require_same(integers_of(model, x, recipe=recipe), (x,), (signal(1, length + 3, 7),))


def test_attention_that_looks_for_what_is_unlike_is_refused():
    x = signal(2, 3, 9, 16)
    attention = Function(lambda m, x: F.scaled_dot_product_attention(x, x + 1, x, scale=-0.3))
    reason = require_same_or_reason(integers_of(attention, x), (x,))
    assert reason is not None and "negative" in reason


def test_rows_in_another_order():
    """Batch and tokens change places, as attention of torch's own has them."""
    layers = {"a": nn.Linear(6, 70), "b": nn.Linear(70, 5), "norm": nn.LayerNorm(70)}
    model = Function(lambda m, x: m.b(m.norm(m.a(x.transpose(0, 1)))) + 1, **layers)
    x = signal(3, 11, 6)
    require_same(integers_of(model, x), (x,), (signal(1, 5, 6),), (signal(7, 2, 6),))


# --- models ------------------------------------------------------------------------------------------------------------

NATIVE_MODELS = {
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "googlenet", "densenet121", "squeezenet1_1", "efficientnet_b0",
    "regnet_y_400mf", "mnasnet0_5",
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", [*zoo.NAMES, "resnext50_32x4d"])
def test_models(name):
    """torchvision's own, at another batch and another image size; those of ``NATIVE_MODELS`` have to have kernels."""
    x = zoo.images(2)[:, :, :48, :48] if name not in ("vgg11_bn",) else zoo.images(2)
    model = zoo.build(name)
    integer = fxquant.convert(fxquant.calibrate(fxquant.prepare(model, x), [x], progress=False), kernels="reference")
    try:
        native = NativeModel(integer)
        native(x)
    except Unfit as reason:
        assert name not in NATIVE_MODELS and REFUSED.match(str(reason)), reason
        return
    for call in (x, zoo.images(1, seed=5), zoo.images(3, seed=6)[:, :, :40, :56]):
        with torch.no_grad():
            assert_same_bits(native(call), integer(call))


# --- calls -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    x = signal(2, 3, 31, 33)
    return integers_of(mixed(), x), x


def test_thread_counts_give_the_same_bits(digits, threads):
    integer, _ = digits
    x = signal(5, 3, 63, 61, seed=4)
    expected = integer(x)
    native = NativeModel(integer)
    for count in (1, 2, 3, 2, 1, 5):
        threads(count)
        for _ in range(5):
            assert_same_bits(native(x), expected)


def test_two_callers_at_once(digits):
    """Threads of Python that call one model, with shapes that differ."""
    integer, _ = digits
    native, wrong = NativeModel(integer), list[str]()
    calls = [signal(1 + i % 3, 3, 9 + i, 21 - i, seed=i) for i in range(6)]
    with torch.no_grad():
        expected = [integer(x) for x in calls]

    def work(offset: int) -> None:
        for i in range(40):
            at = (i * offset) % len(calls)
            if not torch.equal(native(calls[at]), expected[at]):
                wrong.append(f"call {i}")

    callers = [threading.Thread(target=work, args=(offset,)) for offset in (1, 5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_two_models_at_once(digits, threads):
    integer, x = digits
    expected, wrong = integer(x), list[int]()
    models = [NativeModel(integer) for _ in range(2)]

    def work(native: NativeModel) -> None:
        torch.set_num_threads(2)
        wrong.extend(i for i in range(30) if not torch.equal(native(x), expected))

    callers = [threading.Thread(target=work, args=(native,)) for native in models]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
    threads(1)


def test_many_shapes_in_turn(digits):
    """More than are kept, twice over."""
    integer, _ = digits
    native = NativeModel(integer)
    calls = [signal(1 + i % 3, 3, 8 + i, 30 - i, seed=i) for i in range(12)]
    with torch.no_grad():
        expected = [integer(x) for x in calls]
    for _ in range(2):
        for x, y in zip(calls, expected, strict=True):
            assert_same_bits(native(x), y)


def test_results_are_the_callers_own(digits):
    """A later call does not write into them, and what is done to them or to the input does not matter later."""
    integer, x = digits
    native = NativeModel(integer)
    expected = integer(x)
    first = native(x)
    native(signal(2, 3, 31, 33, seed=9))
    assert_same_bits(first, expected)
    first.fill_(7)
    given = x.clone()
    assert_same_bits(native(given), expected)
    assert torch.equal(given, x), "the input was changed"
    given.zero_()
    assert_same_bits(native(x), expected)


def test_any_order_of_memory_and_any_float(digits):
    integer, x = digits
    native, expected = NativeModel(integer), integer(x)
    wide = torch.zeros(4, 3, 62, 33)
    wide[::2, :, ::2] = x
    for given in (
        x.contiguous(memory_format=torch.channels_last),
        wide[::2, :, ::2],
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.flip(3).flip(3),
        x.clone().requires_grad_(),
        nn.Parameter(x),
    ):
        found = native(given)
        assert_same_bits(found, expected)
        assert not found.requires_grad and found.is_contiguous()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert_same_bits(native(x.to(dtype)), integer(x.to(dtype)))
    one = signal(1, 3, 31, 33)
    assert_same_bits(native(one.expand(3, -1, -1, -1)), integer(one.expand(3, -1, -1, -1)))
    with torch.inference_mode():
        assert_same_bits(native(x), expected)


def attempt(model: Any, *call: Any) -> Any:
    """What a call gives, or the error that it raises."""
    try:
        with torch.no_grad():
            return model(*call)
    except Exception as error:
        return error


IMAGE = (1, 3, 31, 33)
BAD_CALLS: dict[str, tuple[tuple[int, ...], ...]] = {
    "channels": ((1, 4, 31, 33), (1, 1, 31, 33), (2, 300, 31, 33)),
    "axes": ((3, 31, 33), (31, 33), (), (1, 1, 3, 31, 33)),
    "nothing": ((0, 3, 31, 33), (1, 0, 31, 33), (1, 3, 0, 33)),
    "sizes": ((1, 3, 1, 1), (1, 3, 2, 40), (1, 3, 3, 3)),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("form", [*FORMS, "flattened", "pooled", "norm", "all"])
def test_shapes_that_do_not_fit_are_errors(form, name):
    """Where the reference raises, the native model does too, and never computes from what is not there."""
    models: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "flattened": (lambda: nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(3132, 3)), IMAGE),
        "pooled": (
            lambda: Function(lambda m, x: torch.sigmoid(F.max_pool2d(F.avg_pool2d(torch.relu(x), 3), 5))),
            IMAGE,
        ),
        "norm": (lambda: Function(lambda m, x: m.norm(torch.relu(x)), norm=nn.BatchNorm2d(3)), IMAGE),
        "all": (mixed, IMAGE),
    }
    build, shape = (FORMS | models)[form]
    model = build().eval()
    integer = integers_of(model, signal(*shape))
    native = NativeModel(integer)
    for bad in BAD_CALLS[name]:
        require_same_or_error(model, integer, native, signal(*bad))
        assert_same_bits(native(signal(*shape)), integer(signal(*shape)), "after an error")


ERRORS = (Unfit, InputError, RuntimeError, IndexError)
"""What a call that torch refuses may raise."""


def require_same_or_error(model: nn.Module, integer: Any, native: NativeModel, *call: Any) -> None:
    """A call that the float model takes is right or refused; one that it does not take is an error, or right."""
    found = attempt(native, *call)
    if isinstance(found, Tensor):
        assert_same_bits(found, attempt(integer, *call))
        return
    taken = attempt(model, *call)
    is_empty = not isinstance(taken, Tensor) or not taken.numel()
    assert isinstance(found, ERRORS if is_empty else Unfit), f"{[tuple(x.shape) for x in call]}: {found!r}"


@pytest.mark.parametrize(
    "op",
    [
        "cat",
        "add",
        "mul",
        "cat of convolutions",
        "residual",
    ],
)
def test_inputs_that_do_not_fit_each_other_are_errors(op):
    function: dict[str, Callable[..., Tensor]] = {
        "cat": lambda m, x, y: torch.cat([F.relu(x), F.relu(y)], 1),
        "add": lambda m, x, y: x + y,
        "mul": lambda m, x, y: x * y,
        "cat of convolutions": lambda m, x, y: m.b(torch.cat([m.a(x), F.relu(y)], 1)),
        "residual": lambda m, x, y: m.c(x) + y,
    }
    parts = {"a": conv(3, 5), "b": conv(8, 4, 3), "c": conv(3, 3)}
    x, y = signal(1, 3, 8, 8), signal(1, 3, 8, 8, seed=4)
    model = Function(function[op], **parts)
    integer = integers_of(model, x, y)
    native = NativeModel(integer)
    for bad in ((1, 3, 4, 4), (1, 3, 80, 80), (2, 3, 8, 8), (1, 3, 8, 9), (1, 1, 8, 8), (1, 3, 1, 1), (3, 8, 8)):
        for call in ((x, signal(*bad)), (signal(*bad), y)):
            require_same_or_error(model, integer, native, *call)
    assert_same_bits(native(x, y), integer(x, y), "after errors")


def test_calls_that_are_none(digits):
    native = NativeModel(digits[0])
    x = digits[1]
    for call in ((), (x, x), (None,), ("x",), (x.to(torch.complex64),), (x.to("meta"),), ([x],)):
        found = attempt(native, *call)
        assert isinstance(found, (TypeError, InputError, SpecializationError, Unfit)), repr(found)


class Named(nn.Module):
    """Arguments by name, a default, and a dataclass-like result."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 5, 3), conv(3, 5)

    def forward(self, pixels: Tensor, other: Tensor | None = None) -> dict[str, Tensor]:
        y = F.relu(self.a(pixels))
        return {"first": y, "second": y if other is None else y + self.b(other)}


def test_arguments_by_name():
    x, y = signal(2, 3, 6, 7), signal(2, 3, 6, 7, seed=8)
    prepared = fxquant.prepare(Named().eval(), {"pixels": x, "other": y}, recipe=ROUNDED)
    integer = fxquant.convert(
        fxquant.calibrate(prepared, [{"pixels": x, "other": y}], progress=False), kernels="reference"
    )
    native = NativeModel(integer)
    for found in (native(x, y), native(x, other=y), native(other=y, pixels=x)):
        assert_same_bits(found, integer(x, y))
        assert type(found) is dict


def test_copies_and_files(digits, tmp_path):
    """A copied, pickled, saved and loaded model has the same kernels; so has one whose plans exist already."""
    integer, x = digits
    expected = integer(x)
    native = NativeModel(integer)
    native(x)
    twin = copy.deepcopy(integer)
    for part in weighted(twin):
        part.weight.zero_()
    assert_same_bits(native(x), expected)
    assert_same_bits(NativeModel(copy.deepcopy(integer))(x), expected)
    prepared = fxquant.prepare(Plain().eval(), signal(2, 3, 9, 9))
    saved = fxquant.convert(fxquant.calibrate(prepared, [signal(2, 3, 9, 9)], progress=False))
    fxquant.save(saved, tmp_path / "int8.pt")
    loaded = fxquant.load(Plain(), tmp_path / "int8.pt")
    reference = fxquant.convert(prepared, kernels="reference")
    y = signal(3, 3, 12, 8)
    assert_same_bits(NativeModel(loaded)(y), reference(y))


class Plain(nn.Sequential):
    """A network that can be built anew."""

    def __init__(self) -> None:
        generator = torch.get_rng_state()
        torch.manual_seed(5)
        super().__init__(conv(3, 17, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(17, 4))
        torch.set_rng_state(generator)


def test_the_model_may_go(digits):
    """Nothing that the kernels read belongs to the integer model alone."""
    integer, x = copy.deepcopy(digits[0]), digits[1]
    expected = integer(x)
    native = NativeModel(integer)
    del integer
    gc.collect()
    rubbish = [torch.full((n,), 0x55, dtype=torch.uint8) for n in range(1, 4000, 7)]
    assert_same_bits(native(x), expected)
    del rubbish


def test_what_is_no_integer_graph_is_refused():
    model = Plain().eval()
    prepared = fxquant.calibrate(fxquant.prepare(model, signal(2, 3, 9, 9)), [signal(2, 3, 9, 9)], progress=False)
    for other in (prepared, fxquant.freeze(prepared)):
        with pytest.raises(Unfit):
            NativeModel(other)(signal(2, 3, 9, 9))


# --- the library -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Asks for the library as a process would that has an empty cache, with other environment variables."""

    def ask(**environment: str) -> str | None:
        for name, value in {"XDG_CACHE_HOME": str(tmp_path), **environment}.items():
            monkeypatch.setenv(name, value)
        library._attempt.cache_clear()
        return library.missing()

    yield ask
    monkeypatch.undo()
    library._attempt.cache_clear()


def test_without_a_compiler_there_is_a_reason(fresh, tmp_path):
    assert "/nonexistent/compiler" in str(fresh(CXX="/nonexistent/compiler"))
    assert "no C++ compiler" in str(fresh(PATH="", CXX=""))
    assert not list(tmp_path.glob("fxquant/*")), "something was left behind"


def test_the_reason_reaches_the_user(fresh, digits):
    fresh(CXX="/nonexistent/compiler")
    with pytest.raises(Unfit, match="/nonexistent/compiler"):
        NativeModel(digits[0])


def test_a_compiler_that_fails_is_a_reason(fresh, tmp_path):
    assert "could not compile" in str(fresh(CXX="false"))
    lazy = tmp_path / "lazy"
    lazy.write_text("#!/bin/sh\nexit 0\n")
    lazy.chmod(0o755)
    assert "could not be compiled" in str(fresh(CXX=str(lazy)))
    talking = tmp_path / "talking"
    talking.write_text("#!/bin/sh\necho 'plan.cpp:1: error: no such instruction' >&2\nexit 1\n")
    talking.chmod(0o755)
    assert "no such instruction" in str(fresh(CXX=str(talking)))
    assert not list(tmp_path.glob("fxquant/*")), "something was left behind"


def test_a_cache_that_cannot_be_written_is_a_reason(fresh, tmp_path):
    (tmp_path / "fxquant").write_text("a file where the folder would be")
    assert str(tmp_path / "fxquant") in str(fresh())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_is_read_only_is_a_reason(fresh, tmp_path):
    tmp_path.chmod(0o500)
    assert str(tmp_path / "fxquant") in str(fresh())
    tmp_path.chmod(0o700)


def test_a_broken_library_is_a_reason_or_made_anew(fresh, tmp_path):
    """As a machine that went off while writing leaves it."""
    writer = tmp_path / "writer"
    writer.write_text('#!/bin/sh\nfor last; do :; done\n: > "$last"\n')
    writer.chmod(0o755)
    found = fresh(CXX=str(writer))
    assert found is not None and "library" in found, found


ASK = "from fxquant.kernels.native import library; print(repr(library.missing()))"


@pytest.mark.long
def test_two_processes_compile_at_once(tmp_path):
    everything = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([sys.executable, "-c", ASK], env=everything, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate(timeout=300)[0].strip() for process in both] == [b"None", b"None"]
    assert len(list(tmp_path.glob("fxquant/*.so"))) == 1
    assert len(list(tmp_path.glob("fxquant/*"))) == 1, "something was left behind"


class Two(nn.Module):
    """Two inputs that are never combined before they are integers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.a(x).relu() * 2 + self.b(y).relu()).mean((2, 3)) * 1.5


def test_a_first_call_on_parts_of_a_tensor_says_nothing_of_later_ones():
    """Where an input began in its memory, and what shared it, was once taken for the model's own."""
    torch.manual_seed(0)
    images = torch.randn(6, 3, 8, 8)
    example = images[:1].clone(), images[1:2].clone()
    int8 = fxquant.convert(fxquant.calibrate(fxquant.prepare(Two().eval(), example), [example]), kernels="reference")
    calls = [(images[i : i + 1], images[j : j + 1]) for i, j in ((4, 5), (2, 2), (0, 1), (3, 0))]
    for first in calls:
        native = NativeModel(int8)
        for x, y in (first, *calls):
            assert torch.equal(native(x, y), int8(x, y))


def test_a_plan_keeps_nothing_of_its_first_inputs():
    """An input, or a copy of it, was once held for as long as the model was."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    x = torch.randn(2, 3, 16, 16)
    native = NativeModel(integers_of(model, x))
    native(x)
    (plan,) = native._plans.values()
    assert not any(isinstance(value, Tensor) and value.shape == x.shape for value in plan.values)
