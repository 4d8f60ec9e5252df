"""fxquant's own kernels in graphs: pools, norms, rows and unusual shapes, bit for bit the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparisons import assert_same_bits
from native_coverage import covered
from native_oracle import ROUNDED, Function, integers_of, require_same, signal
from native_parts import SIGNED, conv, linear_parts, of_kind, require_same_or_reason
from torch import Tensor, nn

from fxquant import Recipe
from fxquant.errors import Refusal
from fxquant.kernels.native import library
from fxquant.kernels.native.model import NativeModel
from fxquant.nn.integer import IntegerEvaluate, IntegerLinearMap

REASON = library.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels here: {REASON}")


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
    except Refusal as reason:
        assert str(reason).count(" ") > 3, reason
        covered(f"shape: {name}", integer, {str(reason)})
        return
    assert_same_bits(found, integer(x))
    covered(f"shape: {name}", integer, set())
