"""Random layers for the native kernels: shapes, strides, channels, and integers at the edges, numbered.

A ``Layer`` is drawn by its number; so are the ``Case``s of it, which put other weights, multipliers, zero points and bounds
into its integer form, and call it with images of another size. ``first_difference`` holds one against the reference, bit for
bit, with memory that is full of some byte before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from comparisons import assert_same_bits
from native_oracle import Function, integers_of, poisoned
from torch import Tensor, nn

from fxquant import Recipe, Scheme, Setting
from fxquant.kernels.native.model import NativeModel
from fxquant.nn.accumulating import IntegerWeighted

__all__ = ["KINDS", "Case", "Layer", "cases", "first_difference", "layer"]

SIZES = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 80, 96, 130)
"""Channels: at the edges of blocks of 16, of vectors of 64 and of tiles."""
RECIPES = {
    "unsigned": Recipe(quantize_outputs=True),
    "signed": Recipe(default=Setting(activation=Scheme(symmetric=True, signed=True)), quantize_outputs=True),
    "floats leave": Recipe(),
}
ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class Layer:
    """A layer, or a few, as an integer model.

    Attributes:
        integer: on the reference's kernels.
        words: what it is.
        channels: of the input.
        smallest: images' height and width, at least; None for rows.
    """

    integer: Any
    words: str
    channels: int
    smallest: tuple[int, int] | None


@dataclass(frozen=True)
class Case:
    """A call of a layer whose integers were drawn anew.

    Attributes:
        x: the input.
        words: what was drawn.
        full_of: what the memory holds before.
    """

    x: Tensor
    words: str
    full_of: int


def _window(random: Random, most: int) -> dict[str, Any]:
    """Attributes of a convolution's window."""
    kernel = [random.choice([k for k in (1, 1, 2, 3, 3, 5, 7) if k <= most]) for _ in range(2)]
    if random.random() < 0.6:
        kernel[1] = kernel[0]
    found: dict[str, Any] = {"kernel_size": tuple(kernel)}
    found["stride"] = random.choice([1, 1, 1, 2, 2, 3, (1, 2), (2, 1)])
    found["padding"] = tuple(random.randint(0, k - 1) if random.random() < 0.5 else k // 2 for k in kernel)
    found["dilation"] = random.choice([1, 1, 1, 2, (1, 3)])
    return found


def _reach(window: dict[str, Any]) -> tuple[int, int]:
    """The least height and width that a window with its dilation fits into without padding."""
    pairs = [(v, v) if isinstance(v, int) else v for v in (window["kernel_size"], window.get("dilation", 1))]
    return tuple((k - 1) * d + 1 for k, d in zip(*pairs, strict=True))  # type: ignore[return-value]


def _convolution(random: Random, kind: str) -> tuple[nn.Module, int, tuple[int, int], str]:
    groups, depth, channels = 1, random.choice(SIZES), random.choice(SIZES)
    window = _window(random, 7 if depth < 40 else 3)
    if kind == "depthwise":
        groups = channels = depth
        if random.random() < 0.5:  # its own kernel
            window |= {"kernel_size": (3, 3), "dilation": 1}
            window |= {"padding": random.choice([0, 1, 2]), "stride": random.choice([1, 2])}
    elif kind == "grouped":
        groups = random.choice([2, 3, 5])
        depth, channels = groups * random.choice([1, 2, 3, 5, 16, 20]), groups * random.choice([1, 3, 7, 16, 17, 33])
    elif kind == "pointwise":
        window = {"kernel_size": (1, 1), "stride": random.choice([1, 1, 2])}
        depth = random.choice([*SIZES, 200, 515])
    conv = nn.Conv2d(depth, channels, **window, groups=groups, bias=random.random() < 0.7)
    end = random.choice(list(ENDS))
    words = f"{conv}, {end}"
    adds = random.random() < 0.3
    if adds:
        model = Function(lambda m, x: F.relu(ENDS[end](m.conv(x)) + m.other(x)), conv=conv, other=_like(conv))
    else:
        model = Function(lambda m, x: ENDS[end](m.conv(x)), conv=conv)
    return model, depth, _reach(window), words + (" + another" if adds else "")


def _like(conv: nn.Conv2d) -> nn.Conv2d:
    """Another convolution whose result has the same shape."""
    window = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return nn.Conv2d(conv.in_channels, conv.out_channels, *window, groups=conv.groups)  # type: ignore[arg-type]


def _linear(random: Random) -> tuple[nn.Module, int, None, str]:
    depth, channels = random.choice([*SIZES, 300, 700]), random.choice([*SIZES, 515])
    linear = nn.Linear(depth, channels, bias=random.random() < 0.7)
    end = random.choice(list(ENDS))
    return Function(lambda m, x: ENDS[end](m.linear(x)), linear=linear), depth, None, f"{linear}, {end}"


def _pool(random: Random) -> tuple[nn.Module, int, tuple[int, int], str]:
    kernel = tuple(random.choice([1, 2, 3, 3, 5]) for _ in range(2))
    window: dict[str, Any] = {"kernel_size": kernel, "stride": random.choice([1, 2, 3, (1, 2)])}
    window["padding"] = tuple(random.randint(0, k // 2) for k in kernel)
    window["ceil_mode"] = random.random() < 0.3
    size = (random.randint(1, 4), random.randint(1, 4))
    pool: nn.Module = random.choice(
        [
            lambda: nn.MaxPool2d(**window, dilation=random.choice([1, 1, 2])),
            lambda: nn.AvgPool2d(**window, count_include_pad=random.random() < 0.5),
            lambda: nn.AdaptiveAvgPool2d(size),
        ]
    )()
    dilation = getattr(pool, "dilation", 1)
    reach = (1, 1) if isinstance(pool, nn.AdaptiveAvgPool2d) else _reach({**window, "dilation": dilation})
    model = Function(lambda m, x: m.pool(torch.sigmoid(x)), pool=pool)  # alone it would not be in bytes
    return model, random.choice(SIZES), reach, f"a sigmoid, {pool}"


def _pointwise(random: Random) -> tuple[nn.Module, int, tuple[int, int], str]:
    channels = random.choice(SIZES)
    functions: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "a sum": lambda m, x: m.a(x) + 0.7 * torch.sigmoid(x),
        "a sum, broadcast": lambda m, x: m.a(x) + x.mean((2, 3), keepdim=True),
        "a product": lambda m, x: m.a(x) * torch.sigmoid(x),
        "a product, broadcast": lambda m, x: m.a(x) * torch.sigmoid(x.mean((2, 3), keepdim=True)),
        "side by side": lambda m, x: torch.cat([F.max_pool2d(x, 1), torch.sigmoid(m.a(x)), x], 1),
        "tables": lambda m, x: F.gelu(torch.tanh(m.a(x))),
        "a batch norm": lambda m, x: m.norm(F.max_pool2d(x, 1)),
    }
    name = random.choice(list(functions))
    model = Function(
        functions[name], a=nn.Conv2d(channels, channels, 1, groups=channels), norm=nn.BatchNorm2d(channels)
    )
    return model, channels, (1, 1), f"{name} of {channels} channels"


KINDS: dict[str, Callable[[Random], tuple[nn.Module, int, tuple[int, int] | None, str]]] = {
    "dense": lambda random: _convolution(random, "dense"),
    "depthwise": lambda random: _convolution(random, "depthwise"),
    "pointwise": lambda random: _convolution(random, "pointwise"),
    "grouped": lambda random: _convolution(random, "grouped"),
    "linear": _linear,
    "pool": _pool,
    "pointwise ops": _pointwise,
}


def layer(number: int) -> Layer:
    """The layer of a number; its kind goes round with it."""
    random = Random(number)
    torch.manual_seed(number)
    kind = list(KINDS)[number % len(KINDS)]
    model, channels, smallest, words = KINDS[kind](random)
    recipe = random.choice([*RECIPES, "unsigned"])
    found = Layer(None, f"{number}: {words}, {recipe}", channels, smallest)
    return replace(found, integer=integers_of(model, _input(random, found), recipe=RECIPES[recipe]))


def _input(random: Random, of: Layer) -> Tensor:
    if of.smallest is None:
        lead = random.choice([(1,), (3,), (7,), (2, 5), (25,)])
        x = torch.randn(*lead, of.channels)
    else:
        sizes = [low + random.choice([0, 0, 1, 2, 5, 9, 14]) for low in of.smallest]
        x = torch.randn(random.choice([1, 1, 2, 3]), of.channels, *sizes)
    drawn = random.choice(["normal", "normal", "wide", "at the ends", "one number", "positive"])
    shapes: dict[str, Callable[[Tensor], Tensor]] = {
        "normal": lambda x: x,
        "wide": lambda x: 30 * x,
        "at the ends": lambda x: torch.where(x > 0, 100.0, -100.0),
        "one number": lambda x: torch.full_like(x, random.choice([-100.0, 0.0, 0.3, 100.0])),
        "positive": lambda x: x.abs() + 1,
    }
    return shapes[drawn](x)


def _weights(random: Random, like: Tensor) -> tuple[Tensor, str]:
    """Integers of 8 bits of some distribution."""
    kind = random.choice(["normal", "uniform", "at the ends", "outliers", "one sign", "zeros"])
    normal = torch.randn(like.shape)
    drawn = {
        "normal": 40 * normal,
        "uniform": 256 * torch.rand(like.shape) - 128,
        "at the ends": torch.where(normal < random.uniform(-2, 2), -128, 127),
        "outliers": torch.where(normal.abs() > 2, 127 * normal.sign(), 9 * normal),
        "one sign": random.choice([-1, 1]) * (60 * normal).abs(),
        "zeros": torch.where(normal > 1, 30 * normal, 0),
    }[kind]
    return drawn.round().clamp(-128, 127).to(like.dtype), kind


def _draw_integers(random: Random, part: IntegerWeighted) -> str:
    """Put other numbers into an integer form; what they are."""
    weight, words = _weights(random, part.weight)
    part.weight.copy_(weight)
    if part.bias is not None:
        part.bias.copy_(torch.randint(-(2 ** random.randint(1, 22)), 2 ** random.randint(1, 22), part.bias.shape))
    part.in_float32.fill_(False)  # the reference's sums, which other weights may take beyond 24 bits
    if part.output_dtype is None:
        return words
    zeros = random.choice([0, 0, 7, torch.randint(0, 31, part.multiplier.shape)])
    drawn = torch.randint(2**30, 2**31 - 1, part.multiplier.shape)
    part.multiplier.copy_((drawn >> zeros << zeros) | 2**30)
    size = weight.double().flatten(1).square().sum(1).mean().sqrt() * 70  # of a sum
    part.shift.copy_(-torch.log2(size / 60 + 1).round() + torch.randint(-2, 3, part.shift.shape))
    info = torch.iinfo(part.output_dtype)
    somewhere = random.randint(info.min, info.max)
    part.zero_point.fill_(random.choice([info.min, info.max, info.min + 128, somewhere]))
    if random.random() < 0.3:
        low, high = sorted(random.sample(range(info.min, info.max + 1), 2))
        part.low.fill_(low), part.high.fill_(high)
    return f"{words}, multipliers with {'some' if isinstance(zeros, Tensor) else zeros} zeros"


def cases(of: Layer, number: int, count: int) -> Iterator[Case]:
    """Some calls of a layer; each changes the integers in it, and holds until the next is asked for."""
    random = Random(-1 - number)
    for _ in range(count):
        parts = [part for part in of.integer.modules() if isinstance(part, IntegerWeighted)]
        words = [_draw_integers(random, part) for part in parts] if random.random() < 0.8 else ["as calibrated"]
        x = _input(random, of)
        yield Case(x, f"{'; '.join(words)}, of {list(x.shape)}", random.choice([0, 85, 255]))


def first_difference(of: Layer, case: Case) -> str | None:
    """What is wrong with a case on the set in use: None where the bits are the reference's.

    Raises:
        Refusal: there is no native form of it, as these kernels say.
    """
    with torch.no_grad():
        expected = of.integer(case.x)
    native = NativeModel(of.integer)
    with poisoned(case.full_of):
        found = native(case.x)
    try:
        assert_same_bits(found, expected)
    except AssertionError as error:
        return f"{native.program.library.name}: layer {of.words}: {case.words}: {error}"
    return None
