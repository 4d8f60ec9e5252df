"""What must not be rounded is not: positions, masks, denominators; the rest is, as ever."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparisons import decibels
from torch import Tensor, nn

import fxquant
from fxquant import Op, Recipe, Setting
from fxquant.kernels.agreement import agreement
from fxquant.nn.fake_quantize import FakeQuantize


def quantized(model: nn.Module, inputs: tuple[Any, ...], recipe: Recipe | None = None) -> tuple[Any, Any]:
    """Prepared and integer, calibrated on the example; the graphs are held against the model."""
    prepared = fxquant.prepare(model, inputs, recipe=recipe, verify=True)
    fxquant.calibrate(prepared, [inputs], progress=False)
    return prepared, fxquant.convert(prepared)


def accuracy(model: nn.Module, inputs: tuple[Any, ...], recipe: Recipe | None = None) -> float:
    with torch.no_grad():
        return decibels(model(*inputs), quantized(model, inputs, recipe)[1](*inputs))


def left_in_float(prepared: Any) -> dict[str, str]:
    """The reasons of the ops that the pass left in float, by node."""
    return {n.name: n.meta["reason"] for n in prepared.graph.nodes if "setting" in n.meta and "reason" in n.meta}


# Positions


class Positions(nn.Module):
    """Embeds positions by ``embed`` and adds them to what a layer made."""

    def __init__(self, embed: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.data, self.place, self.out = embed, nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        return self.out(torch.relu(self.data(x) + self.place(self.embed(x, t))))


def frequencies(count: int = 8) -> Tensor:
    return torch.exp(-math.log(10000.0) * torch.arange(count, dtype=torch.float32) / count)


def sinusoid(x: Tensor, t: Tensor | None) -> Tensor:
    phase = torch.arange(x.size(1))[:, None].float() * frequencies()
    return torch.cat([phase.sin(), phase.cos()], -1)[None]


def timestep(x: Tensor, t: Tensor | None) -> Tensor:
    assert t is not None
    phase = t[:, None].float() * frequencies()[None]
    return torch.cat([torch.cos(phase), torch.sin(phase)], -1)[:, None]


def interleaved(x: Tensor, t: Tensor | None) -> Tensor:
    phase = torch.outer(torch.arange(x.size(1), dtype=torch.float32), 1.0 / (10000.0 ** (torch.arange(0, 16, 2) / 16)))
    return torch.stack((phase.sin(), phase.cos()), -1).flatten(-2)[None]


def multiplied(x: Tensor, t: Tensor | None) -> Tensor:
    """As HF's rotary embeddings compute phases: a product of matrices."""
    positions = torch.arange(x.size(1))[None, None, :].float()
    phase = (frequencies()[None, :, None] @ positions).transpose(1, 2)
    return torch.cat([phase.cos(), phase.sin()], -1) * 0.9


FLOAT_TIMES = torch.linspace(0.0, 990.0, 4)
POSITIONS = {
    "sinusoid": (sinusoid, ()),
    "timestep": (timestep, (torch.tensor([3, 870, 412, 55]),)),
    "timestep given as floats": (timestep, (FLOAT_TIMES,)),
    "interleaved": (interleaved, ()),
    "product of matrices": (multiplied, ()),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_are_rounded_where_a_layer_reads_them_and_not_before(name):
    embed, more = POSITIONS[name]
    model, x = Positions(embed).eval(), torch.randn(4, 200, 8)
    with torch.no_grad():
        table = embed(x, *more) if more else embed(x, None)
        by_hand = Positions(lambda x, t: t).eval()  # the embeddings come from outside, exact
        assert accuracy(model, (x, *more)) > accuracy(by_hand, (x, table)) - 1.0


class Rotary(nn.Module):
    """Attention with rotary positions, written by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("inv_freq", 1.0 / (10000.0 ** (torch.arange(0, 16, 2).float() / 16)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        phase = torch.arange(x.size(1), dtype=self.inv_freq.dtype)[:, None] * self.inv_freq
        cos, sin = torch.cat([phase, phase], -1).cos(), torch.cat([phase, phase], -1).sin()
        q, k = (y * cos + torch.cat([-y[..., 8:], y[..., :8]], -1) * sin for y in (q, k))
        return self.out(F.scaled_dot_product_attention(q * 2, k * 2, v))


def test_rotary_positions():
    x = torch.randn(2, 256, 16)
    prepared, integer = quantized(Rotary().eval(), (x,))
    assert decibels(Rotary().eval()(x), integer(x)) > 30.0
    reasons = left_in_float(prepared)
    assert any("made of integers (a position, a mask or a count)" in reason for reason in reasons.values())
    assert not any(n.target == "qkv" for n in prepared.graph.nodes if "reason" in n.meta)


# Masks


class Attention(nn.Module):
    """Self-attention whose scores ``mask`` masks, from the scores and ``allowed`` (bool, true where to look)."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask, self.qkv, self.out = mask, nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("causal", torch.ones(32, 32).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, allowed = q * 3, k * 3, self.causal[: x.size(1), : x.size(1)]
        if self.mask is None:
            return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed))
        return self.out(self.mask(q @ k.transpose(1, 2) / 4, allowed).softmax(-1) @ v)


def zeros_masked(scores: Tensor, allowed: Tensor) -> Tensor:
    return scores + torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_fill -inf": lambda scores, allowed: scores.masked_fill(~allowed, float("-inf")),
    "masked_fill -1e4": lambda scores, allowed: scores.masked_fill(allowed == 0, -1e4),
    "masked_fill finfo.min": lambda scores, allowed: scores.masked_fill(~allowed, torch.finfo(torch.float32).min),
    "where": lambda scores, allowed: torch.where(allowed, scores, torch.tensor(-1e9)),
    "sum with -inf": zeros_masked,
    "one minus": lambda scores, allowed: scores + (1.0 - allowed.float()) * -1e9,
    "times and minus": lambda scores, allowed: scores * allowed.float() - 1e4 * (1 - allowed.float()),
    "buffer of zeros and ones": lambda scores, allowed: scores + torch.log(allowed.float()),
    "in place": lambda scores, allowed: scores.masked_fill_(~allowed, -1e9),
    "scaled afterwards": lambda scores, allowed: scores.masked_fill(~allowed, -1e9) * 0.9,
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_as_good_as_in_fused_attention(name):
    x = torch.randn(8, 12, 16, generator=torch.Generator().manual_seed(0))
    fused = accuracy(Attention(None).eval(), (x,))
    assert accuracy(Attention(MASKS[name]).eval(), (x,)) > fused - 3.0
    prepared = quantized(Attention(MASKS[name]).eval(), (x,))[0]
    scales = [float(part.scale.max()) for part in prepared.modules() if isinstance(part, FakeQuantize)]
    assert max(scales) < 1.0, "a masked value has set a scale"


class CutMask(Attention):
    """The mask is computed from as much of a buffer as the input is long, as in the first GPT."""

    def __init__(self, value: float) -> None:
        super().__init__(None)
        self.value = value
        self.register_buffer("ones", torch.ones(32, 32).tril())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        seen = self.ones[: x.size(1), : x.size(1)]
        return self.out(((q * 3) @ (k * 3).transpose(1, 2) / 4 * seen - self.value * (1 - seen)).softmax(-1) @ v)


@pytest.mark.parametrize("value", [1e4, 1e10])
def test_a_mask_made_of_a_part_of_a_buffer(value):
    x = torch.randn(8, 12, 16, generator=torch.Generator().manual_seed(0))
    assert accuracy(CutMask(value).eval(), (x,)) > accuracy(Attention(None).eval(), (x,)) - 3.0


class Expected(nn.Module):
    """Where each map is largest on average, and how large it is: positions computed of arange, which grow with the image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.head(self.conv(x).relu()) * 3
        shares = maps.flatten(2).softmax(-1).view(maps.shape)
        where = (shares.sum(2) * torch.arange(x.shape[3])).sum(-1)
        return torch.stack([where, shares.amax((2, 3))], -1)


def test_positions_follow_the_size_of_an_image():
    """What was computed of integers was rounded again one op later, on the grid of the example's size."""
    data = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model = Expected().eval()
    prepared, integer = quantized(model, (data,))
    wide = torch.randn(4, 3, 6, 24, generator=torch.Generator().manual_seed(1))
    for x in (data, wide):
        with torch.no_grad():
            wanted, found = model(x), integer(x)
        assert decibels(wanted[..., 0], found[..., 0]) > 30.0
        assert decibels(wanted[..., 1], found[..., 1]) > 25.0
    assert {"sum_1", "sum_2"} <= set(left_in_float(prepared))


class GivenMask(Attention):
    """The mask is an input of the model, added as it is."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.transpose(1, 2) + mask[:, None].squeeze(1)).softmax(-1) @ v)


@pytest.mark.parametrize("value", [-1e4, torch.finfo(torch.float32).min, float("-inf")])
def test_a_mask_given_as_an_input(value):
    x = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4, 12, 12).masked_fill(torch.ones(12, 12).triu(1).bool(), value)
    assert accuracy(GivenMask(None).eval(), (x, mask)) > 30.0


class Biased(Attention):
    """A learned bias of the scores is no mask: its sum stays in integers."""

    def __init__(self) -> None:
        super().__init__(None)
        self.bias = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.transpose(1, 2) + self.bias).softmax(-1) @ v)


def test_a_learned_bias_is_no_mask():
    prepared, _ = quantized(Biased().eval(), (torch.randn(4, 12, 16),))
    assert left_in_float(prepared) == {}


# Denominators


class Between(nn.Module):
    """``normalize`` between two layers, on rows of very different sizes."""

    def __init__(self, normalize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.normalize, self.last = nn.Linear(16, 16, bias=False), normalize, nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.normalize(self.first(x)))


def softmax_by_hand(y: Tensor) -> Tensor:
    powers = torch.exp(y - y.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True)


def layer_norm_by_hand(y: Tensor) -> Tensor:
    centred = y - y.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5) * 1.1 + 0.1


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: F.relu(y) / (F.relu(y).sum(-1, keepdim=True) + 1e-5),
    "layer norm by hand": layer_norm_by_hand,
    "euclidean": lambda y: y / (y.pow(2).sum(-1, keepdim=True) + 1e-12).sqrt(),
    "softmax by hand": softmax_by_hand,
    "clamped below": lambda y: y / y.abs().mean(-1, keepdim=True).clamp(min=1e-6),
    "swish by hand": lambda y: y / (1 + torch.exp(-y)),
}


@pytest.mark.parametrize("name", NORMS)
def test_denominators_are_not_rounded(name):
    model, rows = Between(NORMS[name]).eval(), torch.logspace(0, -1.5, 16)[:, None]
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) * rows
    prepared, integer = quantized(model, (x,))
    with torch.no_grad():
        frozen, want = fxquant.freeze(prepared), model(x)
        for found in (prepared(x), frozen(x), integer(x), fxquant.convert(frozen, kernels="reference")(x)):
            assert bool(found.isfinite().all())
            assert decibels(want, found) > 20.0


@pytest.mark.parametrize("name", NORMS)
def test_training_through_denominators_stays_finite(name):
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    x[:16] *= 1e-4
    model = fxquant.prepare(Between(NORMS[name]), x, qat=True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        assert bool(loss.isfinite()) and all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_recipe_that_names_an_op_is_followed():
    recipe = Recipe([(Op("div"), Setting())])
    x = torch.randn(4, 16)
    prepared, _ = quantized(Between(lambda y: y / (y.abs() + 2.0)).eval(), (x,), recipe)
    assert left_in_float(prepared) == {}


def test_kernels_agree_where_a_recipe_divides_by_zero():
    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.over, self.under = nn.Linear(8, 16), nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.over(x) / (torch.relu(self.under(x)) + 1e-3)

    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    prepared, integer = quantized(Divides().eval(), (x,), Recipe([(Op("div"), Setting())]))
    reference = fxquant.convert(prepared, kernels="reference")
    assert bool(reference(x).isfinite().all())
    assert max(found.worst for found in agreement(integer, x)) <= 1.0
    assert torch.equal(integer(x), reference(x))


def test_a_constant_denominator_is_read_as_it_is():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("spread", torch.logspace(-4, 0, 16))
            self.layer = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x / self.spread)

    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 0, 16)
    with pytest.warns(
        UserWarning, match="Most is lost at div"
    ):  # the input's 8 bits have no room for its small channels
        prepared, integer = quantized(Scaled().eval(), (x,))
    assert left_in_float(prepared) == {}
    assert bool(integer(x).isfinite().all())


def test_convolutional_networks_have_nothing_left_in_float():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    prepared = fxquant.prepare(model.eval(), torch.randn(2, 3, 16, 16))
    assert left_in_float(prepared) == {}


# Whole transformers, as benchmarks/transformers_int8.py measures them


def benchmark() -> Any:
    path = Path(__file__).parents[1] / "benchmarks"
    sys.path.insert(0, str(path))
    try:
        return importlib.import_module("transformers_int8")
    finally:
        sys.path.remove(str(path))


SLOW = ("llama", "gpt2", "bert", "t5", "whisper", "unet")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    ["nanogpt", "attention", "time embedding", *(pytest.param(n, marks=pytest.mark.long) for n in SLOW)],
)
def test_transformers_are_within_three_decibels_of_the_best_recipe(name):
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers" if name == "unet" else "transformers")
    found = benchmark().row(name, 64)
    assert found["int8 (dB)"] > max(20.0, found["by hand (dB)"] - 3.0)
