"""fxquant's own kernels on every grid, multiplier and bound, bit for bit the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_oracle import ROUNDED, Function, integers_of, require_same, signal
from native_parts import FORMS, SIGNED, mixed, of_kind, require_same_or_reason, weighted
from torch import Tensor, nn

from fxquant import Recipe, Scheme, Setting
from fxquant.errors import Refusal
from fxquant.kernels.native import library
from fxquant.kernels.native.model import NativeModel
from fxquant.kernels.native.weighted import Weighted
from fxquant.nn.accumulating import IntegerProduct, IntegerSum

REASON = library.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels here: {REASON}")


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


@pytest.mark.long
def test_scales_far_apart_are_right_or_refused():
    for shift in (-31, -24, -20, 5, 12, 25):
        for form, (build, shape) in FORMS.items():
            x = signal(*shape)
            integer = integers_of(build(), x)
            for part in weighted(integer):
                part.shift.fill_(shift)
            try:
                native = NativeModel(integer)
            except Refusal as reason:
                assert "too far apart" in str(reason) or "vanishes" in str(reason), reason
                continue
            assert torch.equal(native(x), integer(x)), form


@pytest.mark.parametrize("form", FORMS)
def test_dead_channels(form):
    """Channels whose scale vanished, and channels of a bias beside which no weight counts, beside live ones."""
    build, shape = FORMS[form]
    x = signal(*shape)
    integer = integers_of(build(), x)
    for part in weighted(integer):
        part.multiplier[::5] = 0
        part.weight[1::5] = part.weight[1::5].sign()
        part.bias[1::5] = torch.randint(2**28, 2**29, part.bias[1::5].shape) * (2 * torch.randint(2, (1,)) - 1)
        part.multiplier[1::5], part.shift[1::5] = 2**30, -27  # 2^-28: up to two steps, ties possible
    require_same(integer, (x,))


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
