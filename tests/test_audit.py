"""The audit of integer models: each defect planted once and named, sound models named as such."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from digits import DigitsNet, test_images
from op_cases import ROUNDED, recipe_with
from torch import Tensor, nn

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.kernels.audit import AuditFinding, LayerAudit
from fxquant.kernels.saturation import largest_sum
from fxquant.nn.accumulating import IntegerWeighted, weight_rows
from fxquant.nn.integer import Quantize

SEVEN_BITS = Scheme(bits=7, symmetric=True, signed=True, per_channel=True, narrow_range=True)
TWELVE_BITS = Scheme(bits=12)


def converted(
    model: nn.Module, *inputs: Tensor, recipe: Recipe | None = None, kernels: str = "auto", processor: str | None = None
) -> Any:
    prepared = fxquant.prepare(model.eval(), inputs, recipe=recipe, processor=processor)
    return fxquant.convert(fxquant.calibrate(prepared, [inputs], progress=False), kernels=kernels)


def findings(integer: nn.Module) -> tuple[AuditFinding, ...]:
    return fxquant.coverage(integer).audit.findings


def layers(integer: nn.Module) -> dict[str, LayerAudit]:
    return {layer.path: layer for layer in fxquant.coverage(integer).audit.layers}


def signal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def accumulated(part: IntegerWeighted, q: Tensor) -> Tensor:
    """What a layer adds up for the integers ``q``."""
    y = part.entry.function(q.double() - part.offset[0], part.weight.double(), None, **part.attributes)
    if part.bias is None:
        return y
    shape = [1] * y.ndim
    shape[part.channel_axis] = -1
    return y + part.bias.double().reshape(shape)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 3), (5,)),
    "conv": (nn.Conv2d(3, 4, 2), (3, 2, 2)),
    "grouped": (nn.Conv1d(4, 6, 1, groups=2), (4, 1)),
    "transposed": (nn.ConvTranspose1d(4, 3, 1), (4, 1)),
    "transposed, grouped": (nn.ConvTranspose1d(4, 6, 1, groups=2), (4, 1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_largest_accumulator_is_reached_and_never_passed(name):
    """Every layer is small enough to try all corners of its input."""
    layer, shape = LAYERS[name]
    torch.manual_seed(2)
    integer = converted(nn.Sequential(layer), signal(64, *shape), recipe=ROUNDED)
    part = integer.get_submodule("0")
    corners = torch.tensor(list(itertools.product((0, 255), repeat=min(12, signal(*shape).numel()))))
    corners = corners.reshape(-1, *shape)
    centred = int(accumulated(part, corners).abs().max())
    assert layers(integer)["0"].accumulator == max(centred, largest_sum(part))
    raw = part.entry.function(corners.double(), part.weight.double(), None, **part.attributes)
    assert int(raw.abs().max()) == largest_sum(part)


def test_padding_adds_zeros_which_a_clamped_input_does_not_hold():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Hardtanh(1.0, 2.0), nn.Conv2d(3, 4, 3, padding=1))
    integer = converted(model, signal(4, 2, 5, 5), recipe=ROUNDED)
    source, part = integer.get_submodule("0"), integer.get_submodule("2")
    zero = int(part.offset[0])
    low, high = int(source.low) - zero, int(source.high) - zero
    assert low > 0, "the clamp keeps what enters above zero, and the border is zero"
    centre = torch.full((1, 3, 5, 5), high + zero, dtype=torch.uint8)
    assert layers(integer)["2"].accumulator >= int(accumulated(part, centre).abs().max())
    rows = weight_rows(part).double()
    most, least = high * rows.clamp(min=0).sum(1) + part.bias, high * rows.clamp(max=0).sum(1) + part.bias
    assert layers(integer)["2"].accumulator == max(int(most.max()), -int(least.min()), largest_sum(part))


def test_sums_that_overflow_32_bits_are_named_and_run_by_the_reference():
    """70,000 products of 255 and 127 are 2.27e9."""
    torch.manual_seed(0)
    layer = nn.Linear(70_000, 2)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    x = torch.rand(4, 70_000)
    integer = converted(nn.Sequential(layer), x, recipe=ROUNDED, processor="vnni")
    (found,) = findings(integer)
    assert (found.path, found.kind) == ("0", "accumulator")
    assert "reference" in found.repair and "1.06 times" in found.what
    assert layers(integer)["0"].accumulator >= 255 * 127 * 70_000
    assert layers(integer)["0"].int32_share > 1
    assert "32 bits" in fxquant.coverage(integer).kernels["0"]
    top = torch.ones(1, 70_000)
    exact = converted(nn.Sequential(layer), x, recipe=ROUNDED, kernels="reference", processor="vnni")
    assert torch.equal(integer(top), exact(top)) and float(exact(top).max()) > 0
    fits = converted(nn.Sequential(nn.Linear(60_000, 2)), torch.rand(4, 60_000), recipe=ROUNDED)
    assert not findings(fits)


def test_wide_activations_overflow_sooner():
    model = nn.Sequential(nn.Linear(9_000, 2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    x = torch.rand(4, 9_000)
    for scheme, kinds in ((Scheme(bits=16), ["accumulator"]), (TWELVE_BITS, ["accumulator"]), (None, [])):
        recipe = Recipe(default=Setting(activation=scheme) if scheme else Setting(), quantize_outputs=True)
        assert [found.kind for found in findings(converted(model, x, recipe=recipe))] == kinds


def test_a_pair_that_saturates_is_told_from_one_that_does_not():
    def net(weights: list[float]) -> Any:
        layer = nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([weights]) / 127)
        return converted(nn.Sequential(layer), torch.rand(8, 4), recipe=ROUNDED, processor="vnni")

    over, under = net([127.0, 2.0, -100.0, -28.0]), net([127.0, 1.0, -100.0, -28.0])
    assert (layers(over)["0"].pair, layers(under)["0"].pair) == (129, 128)
    assert layers(over)["0"].pairs_saturate and not layers(under)["0"].pairs_saturate
    assert 255 * 129 > 2**15 - 1 >= 255 * 128
    assert fxquant.coverage(over).audit.saturating == ("0",)
    assert fxquant.coverage(under).audit.saturating == ()
    assert "on x86 without VNNI 1 of 1 layers saturate" in str(fxquant.coverage(over))
    assert "VNNI" not in str(fxquant.coverage(under))
    assert not findings(over), "where this machine adds in 32 bits, nothing is wrong"


def test_a_bias_that_does_not_fit_is_named_with_its_repair():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        layer.weight[1] *= 1e-9
        layer.bias[1] = 5.0
    integer = converted(nn.Sequential(layer), signal(2, 3, 4, 4), recipe=ROUNDED)
    (found,) = findings(integer)
    assert (found.path, found.kind) == ("0", "bias")
    assert found.what.startswith("the bias of 1 of its channels") and "raised" in found.repair
    left = int(integer.get_submodule("0").weight[1].abs().max())
    assert found.repair.endswith(f" {left}") and left < 127


def test_a_bias_beyond_32_bits_is_named_and_runs_by_the_reference():
    integer = converted(nn.Sequential(nn.Linear(3, 2)), signal(4, 3), recipe=ROUNDED)
    part = integer.get_submodule("0")
    part.bias = part.bias.to(torch.int64) + 2**33
    kinds = {found.kind for found in findings(integer)}
    assert kinds == {"bias", "accumulator"}
    assert fxquant.coverage(integer).kernels["0"].startswith("reference")
    assert torch.equal(integer(signal(1, 3)), integer(-signal(1, 3))), "every result is the bound"


class Joined(nn.Module):
    """What is tiny is held on the grid of what is not."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.tiny, self.large = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        with torch.no_grad():
            self.tiny.weight.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.tiny(x), self.large(x)], 1)


def test_a_multiplier_that_vanishes_is_named():
    integer = converted(Joined(1e-13), signal(2, 3, 4, 4), recipe=ROUNDED)
    (found,) = findings(integer)
    assert (found.path, found.kind) == ("tiny", "scale")
    assert found.what.startswith("4 of its 4 multipliers vanish") and "reference" in found.repair
    assert not findings(converted(Joined(1e-3), signal(2, 3, 4, 4), recipe=ROUNDED))


@pytest.mark.parametrize(
    "scale, word", [(0.0, "not positive"), (1e-40, "too small"), (float("nan"), "not finite"), (-1.0, "not positive")]
)
@pytest.mark.parametrize("place", ["layer", "input"])
def test_a_degenerate_scale_is_named(scale, word, place):
    integer = converted(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), signal(2, 3, 4, 4))
    first = next(
        part for part in integer.modules() if isinstance(part, IntegerWeighted if place == "layer" else Quantize)
    )
    first.scale.fill_(scale)
    assert [(found.kind, word in found.what) for found in findings(integer)] == [("scale", True)]


def test_a_sum_that_loses_an_operand_is_named():
    class Adds(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    good, tiny = signal(4, 3), 1e-12 * signal(4, 3, seed=4)
    assert not findings(converted(Adds(), good, good))
    (found,) = findings(converted(Adds(), good, tiny))
    assert found.kind == "scale" and "vanish" in found.what


def test_channels_of_zeros_are_sound_and_counted():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        layer.weight[1:3] = 0.0
    integer = converted(nn.Sequential(layer, nn.ReLU(), nn.Conv2d(4, 2, 1)), signal(2, 3, 4, 4))
    assert not findings(integer)
    assert layers(integer)["0"].zero_channels == 2
    assert "2 output channels with weights all 0, which is sound" in str(fxquant.coverage(integer))


@pytest.mark.long
def test_a_clean_model_takes_one_line():
    images, _ = test_images()
    integer = converted(DigitsNet(), images[:64], recipe=recipe_with(None, SEVEN_BITS))
    found = fxquant.coverage(integer).audit
    assert found.layers and not found.findings and not found.saturating
    assert str(found).count("\n") == 0 and str(found).startswith("audit: sums use at most ")
    assert str(fxquant.coverage(integer)).endswith(str(found))


def test_models_before_conversion_have_no_audit():
    prepared = fxquant.prepare(DigitsNet().eval(), test_images()[0][:2])
    assert not fxquant.coverage(prepared).audit.layers
    assert "audit" not in str(fxquant.coverage(prepared))


def test_layers_of_an_island_are_found_by_their_whole_path():
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc(x)) if float(x.sum()) > 0 else self.fc(x)

    model = nn.Sequential(nn.Linear(3, 3), Looks())
    integer = converted(model, signal(4, 3).abs())
    assert {"0", "1.fc.linear"} == set(layers(integer)) == set(fxquant.coverage(integer).kernels)
