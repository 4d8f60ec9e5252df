"""Winograd's convolutions in whole numbers: the reference's bits with every instruction set, up to the bound that is proven
and no further, and taken where the rules say so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparisons import assert_same_bits
from native_oracle import ROUNDED, Function, integers_of, require_same, signal
from native_parts import SIGNED, weighted
from torch import Tensor, nn

from fxquant import Recipe, processor
from fxquant.kernels.native import library, sets, slices, winograd
from fxquant.kernels.native.model import NativeModel
from fxquant.kernels.native.weighted import Weighted
from fxquant.kernels.native.winograd_rules import DIRECT, RULES, taken

HERE = [row.name for row in sets.SETS if row.name in processor._sets_here()]
WAYS = {DIRECT: "direct", 2: "winograd 2 x 2", 4: "winograd 4 x 4"}
EDGE = 131586
"""The largest sum of weights of one sign with which bytes reach no sum of 2^25: 255 · 131586 = 2^25 - 2."""


@pytest.fixture(params=HERE)
def name(request, monkeypatch):
    monkeypatch.setenv(processor.VARIABLE, request.param)
    assert library.missing() is None
    return request.param


def ways(native: NativeModel, *inputs: Tensor) -> set[str]:
    return set(native.plan_of(*inputs).ways.values())


SHAPES: dict[str, tuple[int, int, Any, tuple[int, int, int]]] = {
    "one pixel": (4, 3, 1, (1, 1, 1)),
    "one line": (9, 17, (1, 0), (2, 1, 9)),
    "just a tile": (16, 16, 0, (1, 6, 6)),
    "odd sizes": (35, 33, 1, (3, 7, 9)),
    "no padding": (32, 65, 0, (2, 9, 8)),
    "padded by 2": (5, 70, 2, (2, 6, 3)),
    "padded by more than a tile": (6, 5, (5, 7), (1, 3, 2)),
    "more than 64 channels": (33, 82, 1, (1, 13, 10)),
    "many small images": (17, 24, 1, (9, 5, 4)),
}


@cache
def layer(shape: str, signed: bool) -> tuple[Any, Tensor]:
    depth, channels, padding, (n, h, w) = SHAPES[shape]
    x = signal(n, depth, h, w, offset=0.3)
    conv = nn.Conv2d(depth, channels, 3, padding=padding)
    return integers_of(conv, x, recipe=SIGNED if signed else ROUNDED), x


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_s_bits(name, shape, tile):
    for signed in (False, True):
        integer, x = layer(shape, signed)
        y = signal(1, x.shape[1], x.shape[2] + 3, x.shape[3] + 2, seed=4)
        with taken(tile):
            native = require_same(integer, (x,), (y,), values=3)
            assert ways(native, x) == ways(native, y) == {WAYS[tile]}
            assert native.program.library.name == name


BEHIND: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], Recipe | None]] = {
    "a sum": (lambda m, x: F.relu(m.conv(x) + m.other(x)), ROUNDED),
    "a table": (lambda m, x: F.hardswish(m.conv(x)), ROUNDED),
    "a concatenation": (lambda m, x: torch.cat([m.conv(x), F.max_pool2d(m.other(x), 3, 1, 1)], 1), ROUNDED),
    "a slice of channels": (lambda m, x: m.conv(m.other(x)[:, 1:]), ROUNDED),
    "nothing, in floats": (lambda m, x: m.conv(x), None),
    "nothing, in clamped floats": (lambda m, x: F.relu6(m.conv(x)), None),
}


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("behind", BEHIND)
def test_what_is_done_with_the_sums(name, behind, tile):
    forward, recipe = BEHIND[behind]
    inside = 19 if behind == "a slice of channels" else 20
    model = Function(
        forward, conv=nn.Conv2d(inside, 37, 3, padding=1), other=nn.Conv2d(20, {19: 20, 20: 37}[inside], 1)
    )
    x = signal(2, 20, 9, 11, offset=0.2)
    with taken(tile):
        native = require_same(integers_of(model, x, recipe=recipe), (x,), (signal(1, 20, 5, 3),))
        assert WAYS[tile] in ways(native, x)


RULES_OF_ROUNDING: dict[str, tuple[int, int, int, int]] = {
    "integers": (-2, 2, 2**30, -4),
    "float64": (-40, 112, 2**30 + 2**7 * 12345, -14),
}
"""Bounds of weights, multiplier and shift: sums half way between two integers, and sums of more than 24 bits."""


@pytest.mark.parametrize("rule", RULES_OF_ROUNDING)
def test_every_rule_of_rounding(name, rule):
    low, high, multiplier, shift = RULES_OF_ROUNDING[rule]
    torch.manual_seed(0)
    x = signal(2, 230, 6, 5).abs()
    integer = integers_of(nn.Conv2d(230, 18, 3, padding=1), x)
    (part,) = weighted(integer)
    part.weight.copy_(torch.randint(low, high + 1, part.weight.shape))
    part.multiplier.fill_(multiplier)
    part.shift.fill_(shift)
    with taken(4):
        native = require_same(integer, (x,), values=5)
        (own,) = (line.operation for line in native.program.lines if isinstance(line.operation, Weighted))
        assert own.rescaling.rule == rule and ways(native, x) == {WAYS[4]}


def at_the_edge(positive: int, negative: int) -> Any:
    """A layer of 128 channels whose first filters' weights sum to these, the second's to less than zero."""
    x = signal(1, 128, 6, 7).abs()
    integer = integers_of(nn.Conv2d(128, 5, 3, padding=1, bias=False), x, recipe=None)
    (part,) = weighted(integer)
    assert part.output_dtype is None and not int(part.offset[0])
    rows = part.weight.view(5, -1)
    rows[:3] = 0
    for row, sum_, sign in ((0, positive, 1), (1, negative, -1)):
        rows[row, : sum_ // 127] = 127 * sign
        rows[row, sum_ // 127] = sum_ % 127 * sign
    rows[2, ::9], rows[2, 4::9] = -128, 127
    return integer


def extremes() -> list[tuple[Tensor]]:
    """Bytes of 255 alone; and of 0 and 255, as signs, by lines and at random."""
    signs = torch.ones(3, 128, 6, 7)
    signs[1, :, ::2] = -1
    signs[2] = signal(128, 6, 7, seed=5).sign()
    return [(1e6 * signs[:1],), (1e6 * signs,)]


@pytest.mark.parametrize("tile", [2, 4])
def test_sums_at_the_edge_of_what_is_proven(name, tile):
    integer = at_the_edge(EDGE, EDGE)
    reached = integer(*extremes()[0]).double() / weighted(integer)[0].output_scale.double().reshape(1, -1, 1, 1)
    assert round(float(reached.max())) == -round(float(reached.min())) == 255 * EDGE == 2**25 - 2
    with taken(tile):
        native = require_same(integer, *extremes(), values=3)
        assert ways(native, *extremes()[0]) == {WAYS[tile]}


@pytest.mark.parametrize("sums", [(EDGE + 1, 5), (5, EDGE + 1)], ids=["positive", "negative"])
def test_one_beyond_is_computed_directly(name, sums, monkeypatch):
    integer = at_the_edge(*sums)
    with taken(4):
        native = require_same(integer, *extremes(), values=3)
        assert ways(native, *extremes()[0]) == {"direct"}
    with taken(2):
        assert ways(require_same(integer, *extremes(), values=3), *extremes()[0]) == {"winograd 2 x 2"}
    monkeypatch.setattr(winograd, "is_exact", lambda layer, tile: True)
    x = torch.full((1, 128, 6, 7), 1e6)
    with taken(4):
        assert not torch.equal(NativeModel(integer)(x), integer(x)), "the bound is one that matters"


def test_bits_of_tiles_of_two():
    """255 · 127 · 9 · 1841 < 2^29 <= 255 · 127 · 9 · 1842."""
    for depth, exact in ((1841, True), (1842, False)):
        integer = integers_of(nn.Conv2d(depth, 1, 3), signal(1, depth, 3, 3), recipe=None)
        weighted(integer)[0].weight.fill_(-127)
        x = torch.full((1, depth, 4, 3), 1e6)
        with taken(2):
            assert ways(require_same(integer, (x,), values=1), x) == {WAYS[2 if exact else DIRECT]}


def largest(transform: list[list[int]], low: int, high: int) -> tuple[int, int]:
    """The least and the greatest number of a transformed tile of numbers within bounds, by lines and in both directions."""
    rows = [*transform, *([a * b for a in p for b in q] for p, q in itertools.product(transform, transform))]
    least = min(sum(min(low * c, high * c) for c in row) for row in rows)
    return least, max(sum(max(low * c, high * c) for c in row) for row in rows)


def test_words_of_16_bits_hold_what_is_multiplied():
    """All that can come of bytes, and of weights of 8 bits, on the way and at its end; the matrices are the paper's."""
    pixels = {
        2: [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        4: [
            *([4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]),
            *([0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]),
        ],
    }
    found = {tile: largest(transform, 0, 255) for tile, transform in pixels.items()}
    weights = {tile: largest(transform, -128, 127) for tile, transform in winograd._TRANSFORMS.items()}
    assert found == {2: (-510, 1020), 4: (-12750, 17340)} and weights == {2: (-1152, 1147), 4: (-18432, 18432)}
    assert 9 * 0x38E38E39 % 2**32 == 1


@pytest.mark.parametrize("tile", [2, 4])
def test_threads_and_sizes_come_and_go(name, tile):
    """A plan's scratch memory is for a number of threads, which share the transformed pixels where there are few tiles."""
    before = torch.get_num_threads()
    x = signal(3, 40, 13, 9) if tile == 4 else signal(3, 40, 7, 8)
    integer = integers_of(nn.Conv2d(40, 70, 3, padding=1), x)
    expected = {size: integer(x[:size]) for size in (1, 3)}
    together = set[bool]()
    try:
        with taken(tile):
            native = NativeModel(integer)
            for count, size in itertools.product((1, 2, 3, 1), (1, 3)):
                torch.set_num_threads(count)
                assert_same_bits(native(x[:size]), expected[size], f"{count} threads")
                plan = native.plan_of(x[:size])
                assert plan.threads == count and set(plan.ways.values()) == {WAYS[tile]}
                kinds = [step.kind for step in plan.steps]
                if count == 2:
                    together.add(library.KINDS["winograd input"] in kinds)
                assert count > 1 or library.KINDS["winograd input"] not in kinds
    finally:
        torch.set_num_threads(before)
    assert together == {True, False}


def test_in_slices(name, monkeypatch):
    monkeypatch.setattr(slices, "_worth", lambda steps, slices: len(steps))
    x = signal(5, 8, 33, 30)
    integer = integers_of(nn.Sequential(nn.Conv2d(8, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 9, 3, padding=1)), x)
    with taken(4):
        native = require_same(integer, (x,), (x[:1],))
        assert native.plan_of(x).count > 2 * native.plan_of(x[:1]).count


def trained(depth: int, channels: int, size: int, kernel: int = 3, **options: Any) -> Any:
    """A layer with weights as those of trained networks, few of them near the largest."""
    conv = nn.Conv2d(depth, channels, kernel, **{"padding": kernel // 2} | options)
    nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(0))
    return integers_of(conv, signal(1, depth, size, size))


@pytest.mark.parametrize("own", HERE)
def test_where_it_is_taken(own, monkeypatch):
    """By rules that were measured, and nowhere else."""
    monkeypatch.setenv(processor.VARIABLE, own)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = signal(1, 64, 56, 56)
        found = ways(NativeModel(trained(64, 64, 56)), x)
        assert found == {"winograd 4 x 4" if RULES.get(own) else "direct"}
        assert (own in ("avx2", "avx512_vnni")) == bool(RULES.get(own))
        for options in ({"stride": 2}, {"dilation": 2}, {"groups": 2}, {"kernel": 5}, {"kernel": 1}):
            assert ways(NativeModel(trained(64, 64, 56, **options)), x) == {"direct"}, options
        few = signal(1, 64, 4, 4)
        assert ways(NativeModel(trained(64, 64, 4)), few) == {"direct"}
        torch.set_num_threads(64)
        assert ways(NativeModel(trained(64, 64, 56)), x) == {"direct"}, "more threads than there are tiles for"
    finally:
        torch.set_num_threads(before)
