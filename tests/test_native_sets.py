"""The native kernels with each instruction set that this processor has: the same bits as the reference, and as each other.

``FXQUANT_ISA=plain pytest tests/test_native*.py`` runs everything else with one of them.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparisons import assert_same_bits
from native_oracle import ROUNDED, Function, integers_of, require_same, signal
from torch import Tensor, nn

from fxquant import Recipe, Scheme, Setting, processor
from fxquant.kernels.native import compiler, library, sets
from fxquant.kernels.native.model import NativeModel
from fxquant.kernels.native.weighted import Weighted

HERE = [row.name for row in sets.SETS if row.name in processor._sets_here()]
SIGNED = Recipe(default=Setting(activation=Scheme(symmetric=True, signed=True)), quantize_outputs=True)


@pytest.fixture(params=HERE)
def name(request, monkeypatch):
    monkeypatch.setenv(processor.VARIABLE, request.param)
    assert library.missing() is None
    return request.param


def layers(*sizes: int, groups: int = 1) -> nn.Sequential:
    """Convolutions of 3 x 3, padded."""
    return nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1, groups=groups) for a, b in pairwise(sizes)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "few channels": (lambda: nn.Conv2d(3, 17, 7, stride=2, padding=3), (2, 3, 15, 18)),
    "an odd depth": (lambda: layers(5, 33, 7), (2, 5, 7, 9)),
    "many channels": (lambda: layers(64, 131), (1, 64, 5, 13)),
    "groups": (lambda: layers(15, 21, groups=3), (2, 15, 5, 6)),
    "many weights": (lambda: nn.Conv2d(600, 515, 1), (2, 600, 2, 3)),
    "depthwise of few": (lambda: nn.Conv2d(12, 12, 3, padding=1, groups=12), (2, 12, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(30, 30, 3, padding=1, groups=30), (2, 30, 9, 6)),
    "depthwise, strided": (lambda: nn.Conv2d(70, 70, 3, stride=2, padding=1, groups=70), (1, 70, 9, 7)),
    "depthwise, wide": (lambda: nn.Conv2d(65, 65, 5, padding=2, groups=65), (1, 65, 6, 7)),
    "a sum": (lambda: Function(lambda m, x: F.relu(m.a(x) + x), a=nn.Conv2d(24, 24, 1)), (2, 24, 5, 3)),
    "a table": (lambda: Function(lambda m, x: F.hardswish(m.a(x)), a=nn.Conv2d(24, 65, 1)), (2, 24, 5, 3)),
    "a table alone": (lambda: Function(lambda m, x: F.gelu(F.max_pool2d(x, 3, 1, 1))), (2, 67, 5, 3)),
    "a product": (lambda: Function(lambda m, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True))), (2, 35, 5, 3)),
    "averages": (lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d((3, 2))), (2, 35, 9, 8)),
    "a batch norm": (lambda: nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(19)), (2, 19, 6, 6)),
    "rows": (lambda: nn.Sequential(nn.Linear(50, 130), nn.ReLU(), nn.Linear(130, 9)), (7, 50)),
}


@pytest.mark.parametrize("model", MODELS)
def test_the_reference_s_bits(name, model):
    make, shape = MODELS[model]
    x = signal(*shape, offset=0.3)
    for recipe in (ROUNDED, SIGNED):
        native = require_same(integers_of(make(), x, recipe=recipe), (x,), (signal(1, *shape[1:], seed=5),), values=5)
        assert native.program.library.name == name


def test_the_largest_sums(name):
    """All weights and inputs at their bounds, of both signs: what saturates 16 bits, and needs more than 24."""
    for sign in (1.0, -1.0):
        conv = nn.Conv2d(700, 18, 1)
        conv.weight.data = torch.full_like(conv.weight, 0.02 * sign)
        x = signal(2, 700, 2, 3).abs() + 3
        integer = integers_of(conv, x, recipe=Recipe(quantize_outputs=True))
        require_same(integer, (x,), (torch.full_like(x, 100.0),), values=1)


@pytest.mark.parametrize("shape", [(37, 50, 3, 1), (36, 33, 3, 3), (3, 16, 7, 1), (130, 40, 1, 1)])
def test_pairs_of_the_largest_products(name, shape):
    """Few weights at their bounds, beside each other and of one sign, by the largest bytes: just what leaves 16 bits."""
    depth, channels, kernel, groups = shape
    conv = nn.Conv2d(depth, channels, kernel, padding=kernel // 2, groups=groups)
    weight = conv.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0)).clamp_(-0.3, 0.3)
    weight[:, 0, 0, 0] = 1.0  # the scale of every channel
    weight[::7, :2, 0, -1], weight[3::7, :2, -1, -1] = 1.0, -1.0
    x = signal(2, depth, 5, 8).abs() + 3
    native = require_same(integers_of(conv, x), (x,), (torch.cat([x, torch.full_like(x, 100.0), -x]),))
    (layer,) = (line.operation for line in native.program.lines if isinstance(line.operation, Weighted))
    assert (layer.halves is not None) == native.program.library.pairs_of_bytes, (
        "weights of bytes, and halves of those that could saturate"
    )
    if layer.halves is not None:
        assert 0 < len(layer.halves.weight) == int(layer.halves.first[-1])


def test_floats_at_the_border(name):
    """What is no number, what is infinite, and what lies half way between two integers."""
    x = signal(2, 5, 9, 21)
    integer = integers_of(nn.Conv2d(5, 3, 1), x)
    step = float(next(part.scale for part in integer.modules() if hasattr(part, "scheme")))
    half_way = (torch.arange(x.numel()).reshape(x.shape) % 300 - 20.5) * step
    odd = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40, 2.0**31, -(2.0**31)])
    require_same(integer, (x,), (half_way,), (odd.repeat(x.numel() // 8 + 1)[: x.numel()].reshape(x.shape),))


class Block(nn.Module):
    """A transformer's, and a softmax of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.qkv, self.out = nn.LayerNorm(66), nn.Linear(66, 198), nn.Linear(66, 66)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.before(x)).reshape(b, t, 3, 2, 33).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 66)
        return torch.softmax(x + self.out(mixed), -1)


def test_every_set_rounds_floats_alike(monkeypatch):
    """What computes in float32 inside, with finer steps than the reference shares with any float arithmetic."""
    fine = Recipe(quantize_outputs=True)
    shapes = [(2, 37, 66), (1, 130, 66)]
    integer = integers_of(Block(), signal(*shapes[0], gain=2.0), recipe=fine)
    found: dict[str, list[Any]] = {}
    for own in HERE:
        monkeypatch.setenv(processor.VARIABLE, own)
        native = NativeModel(integer)
        found[own] = [native(signal(*shape, gain=gain, seed=7)) for shape in shapes for gain in (0.5, 2.0, 30.0)]
    for own, results in found.items():
        for result, plain in zip(results, found["plain"], strict=True):
            assert len(result.unique()) > 2
            assert_same_bits(result, plain, own)


FUSED = r"""
#include <cstdio>
#include <cstdlib>
#include "isa_plain.h"
int main() {
    uint64_t state = 1, different = 0, inexact = 0;
    const auto next = [&] {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<uint32_t>(state >> 32);
    };
    const auto real = [&](uint32_t around) {
        const uint32_t bits = (next() & 0x807FFFFF) | ((around + next() % 60 - 30) << 23);
        float x;
        return std::memcpy(&x, &bits, 4), next() % 4 ? x : std::ldexp(static_cast<float>(next() % 32), -3);
    };
    for (int i = 0; i < 2000000; i++) {
        const float a = real(127), b = real(127), c = real(127);
        const float own = fxquant::fused(a, b, c), right = std::fma(a, b, c);
        different += own != right, inexact += a * b + c != right;
    }
    const float tiny = fxquant::fused(0x1.8p-80f, 0x1p-69f, 0x1p-149f), exact = std::fma(0x1.8p-80f, 0x1p-69f, 0x1p-149f);
    std::printf("%llu %d %d", (unsigned long long)different, inexact > 1000, tiny == exact);
}
"""


def test_fused_without_the_instruction(tmp_path):
    """A product and a sum rounded once, made of float64, against the C library's own."""
    source, made = tmp_path / "fused.cpp", tmp_path / "fused"
    source.write_text(FUSED)
    options = ["-O2", "-std=c++17", "-ffp-contract=off", f"-I{compiler.SOURCE}"]
    subprocess.run(["c++", *options, str(source), "-o", str(made)], check=True, timeout=60)
    printed = subprocess.run([str(made)], capture_output=True, text=True, check=True, timeout=60)
    assert printed.stdout == "0 1 1"


def test_the_best_set_that_is_asked_for_and_has_a_header_is_taken(monkeypatch):
    everything = tuple(processor._X86)
    monkeypatch.setattr(processor, "is_arm", lambda: False)
    monkeypatch.setattr(processor, "_sets_here", lambda: everything)
    for asked in everything:
        monkeypatch.setenv(processor.VARIABLE, asked)
        assert sets.chosen_set().name == asked
    monkeypatch.setattr(processor, "is_arm", lambda: True)
    monkeypatch.setattr(processor, "_sets_here", lambda: tuple(processor._ARM))
    monkeypatch.delenv(processor.VARIABLE)
    assert sets.chosen_set().name == "neon_i8mm"
    for asked, taken in {"neon_dotprod": "neon_dotprod", "neon": "plain"}.items():
        monkeypatch.setenv(processor.VARIABLE, asked)
        assert sets.chosen_set().name == taken


def test_a_model_keeps_the_set_it_was_made_for(monkeypatch):
    x = signal(1, 5, 4, 4)
    integer = integers_of(nn.Conv2d(5, 20, 3), x)
    monkeypatch.setenv(processor.VARIABLE, "plain")
    native = NativeModel(integer)
    monkeypatch.delenv(processor.VARIABLE)
    assert_same_bits(native(x), integer(x), "another set was chosen meanwhile")
    assert native.program.library.name == "plain"


def test_intrinsics_stay_in_the_headers_of_sets():
    for path in compiler.SOURCE.iterdir():
        if not path.name.startswith("isa_"):
            text = path.read_text()
            assert not any(word in text for word in ("_mm", "__m", "immintrin", "arm_neon", "vdotq")), path.name
    assert {row.header for row in sets.SETS} <= {path.name for path in compiler.SOURCE.iterdir()}
