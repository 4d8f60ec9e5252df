"""fxquant's own kernels of convolutions against the reference, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from native_oracle import ROUNDED, Function, integers_of, require_same, signal
from native_parts import SIGNED
from torch import Tensor, nn

from fxquant.kernels.native import library
from fxquant.kernels.native.weighted import Weighted

REASON = library.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels here: {REASON}")


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
