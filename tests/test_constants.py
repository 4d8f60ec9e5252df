"""What depends on no input is computed once, at convert: stored as the integers that every call computed before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from comparisons import assert_same_bits
from op_cases import prepared_of
from torch import Tensor, nn
from torchvision.models import swin_transformer as swin

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.export.to_onnx import make_onnx
from fxquant.nn.integer import Quantize
from fxquant.runtimes.onnxruntime import onnxruntime_session
from fxquant.runtimes.openvino import openvino_session

PER_TENSOR = Setting(weight=Scheme(bits=8, symmetric=True, signed=True, per_channel=False, narrow_range=True))
RECIPES = {"per channel": Recipe(), "per tensor": Recipe([(nn.Linear, PER_TENSOR)])}


class Computed(nn.Module):
    """A bias that a network of its own makes of a buffer, as Swin v2 and LeViT have it."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("places", torch.randn(5, 3))
        self.register_buffer("order", torch.tensor([4, 0, 2, 1, 3]))
        self.bias_of = nn.Sequential(nn.Linear(3, 16), nn.ReLU(inplace=True), nn.Linear(16, 6, bias=False))
        self.body, self.head, self.use = nn.Linear(6, 6), nn.Linear(6, 4), use

    def bias(self) -> Tensor:
        bias = self.bias_of(self.places)
        return 3 * torch.sigmoid(bias.reshape(self.places.shape[0], -1)[self.order])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self.body(x), self.bias()))


class Given(Computed):
    """The same, with the bias as a parameter."""

    def __init__(self, source: Computed) -> None:
        super().__init__(source.use)
        self.load_state_dict(source.state_dict())
        self.held = nn.Parameter(source.bias().detach())

    def bias(self) -> Tensor:
        return self.held


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda x, bias: x + bias,
    "multiplied": lambda x, bias: x * bias,
    "joined": lambda x, bias: torch.cat([x, bias.expand(x.shape[0], -1, -1)], 1),
    "read twice": lambda x, bias: F.relu(x + bias) * bias,
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("use", USES)
def test_a_computed_constant_is_the_parameter_that_it_amounts_to(use, recipe):
    torch.manual_seed(3)
    computed, x = Computed(USES[use]).eval(), torch.randn(2, 5, 6)
    given = Given(computed).eval()
    models = []
    for model in (computed, given):
        prepared = fxquant.prepare(model, (x,), recipe=RECIPES[recipe])
        models.append(fxquant.convert(fxquant.calibrate(prepared, [x], progress=False)))
    folded, expected = models
    again = torch.randn(7, 5, 6)
    assert_same_bits(folded(again), expected(again))
    left = {path.split(".")[0] for path in folded.state_dict()}
    assert not left & {"bias_of", "places", "order"}, f"still there: {left}"
    (constant,) = (n for n in folded.graph.nodes if n.meta.get("integer_constant"))
    assert folded.get_buffer(constant.target).dtype == torch.uint8
    assert_same_bits(folded.get_buffer(constant.target), expected.get_buffer("held_integers"))
    assert constant.meta["grid"] == next(n for n in expected.graph.nodes if n.target == "held_integers").meta["grid"]


def test_the_diff_says_what_was_folded_into_what():
    prepared = prepared_of(Computed(USES["added"]).eval(), torch.randn(2, 5, 6))
    told = str(fxquant.diff(prepared, fxquant.convert(prepared)))
    for path in ("bias_of.0", "bias_of.1", "bias_of.2", "sigmoid", "mul_quantizer"):
        assert any(line.split()[0] == path and "folded into mul_integers" in line for line in told.splitlines() if line)
    assert "100 % of weights" in told and "float ops: 0" in told and "no-op" not in told


def test_a_folded_model_is_saved_and_loaded(tmp_path):
    x = torch.randn(2, 5, 6)
    integer = fxquant.convert(prepared_of(Computed(USES["added"]).eval(), x))
    fxquant.save(integer, tmp_path / "int8.pt")
    loaded = fxquant.load(Computed(USES["added"]).eval(), tmp_path / "int8.pt")
    assert_same_bits(loaded(x), integer(x))


class WritesABuffer(nn.Module):
    """The bias decays from call to call, under the name that it is read by, or another."""

    def __init__(self, *, directly: bool) -> None:
        super().__init__()
        self.register_buffer("state", torch.rand(6) + 1)
        self.head, self.directly = nn.Linear(6, 4), directly

    def forward(self, x: Tensor) -> Tensor:
        self.state.mul_(0.5)
        return self.head(x + (self.state if self.directly else torch.sigmoid(self.state)))


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spread, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + torch.rand_like(self.spread) * self.spread)


class FollowsTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.row, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + torch.sigmoid(self.row.reshape(1, -1).repeat(x.shape[0], 1)))


@pytest.mark.parametrize("build", [lambda: WritesABuffer(directly=False), lambda: WritesABuffer(directly=True), Draws])
def test_what_changes_from_call_to_call_is_no_constant(build):
    model, x = build().eval(), torch.randn(3, 6)
    prepared = fxquant.prepare(model, (x,))
    integer = fxquant.convert(fxquant.calibrate(prepared, [x], progress=False))
    assert sum(isinstance(part, Quantize) for part in integer.modules()) == 2  # the input, and what changes
    first, second = integer(x), integer(x)
    assert (first - second).abs().max() > 0.01 * first.abs().max()


def test_convert_does_not_touch_the_state_of_random_numbers_nor_the_model():
    model, x = Draws().eval(), torch.randn(3, 6)
    prepared = fxquant.calibrate(fxquant.prepare(model, (x,)), [x], progress=False)
    before = torch.get_rng_state()
    fxquant.convert(prepared)
    assert_same_bits(torch.get_rng_state(), before)
    computed = prepared_of(Computed(USES["added"]).eval(), torch.randn(2, 5, 6))
    state = {name: value.clone() for name, value in computed.state_dict().items()}
    fxquant.convert(computed)
    assert_same_bits(dict(computed.state_dict()), state)


def test_what_follows_the_batch_is_no_constant():
    model, x = FollowsTheBatch().eval(), torch.randn(3, 6)
    prepared = fxquant.calibrate(fxquant.prepare(model, (x,)), [x], progress=False)
    integer, frozen = fxquant.convert(prepared), fxquant.freeze(prepared)
    for rows in (1, 3, 8):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(integer(x), frozen(x), rtol=0, atol=1e-5)


def swin_block() -> nn.Module:
    """A block of torchvision's Swin v2, whose bias and scale are computed from parameters."""
    torch.manual_seed(5)
    return swin.SwinTransformerBlockV2(8, num_heads=2, window_size=[4, 4], shift_size=[0, 0]).eval()


@pytest.mark.long
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("build", [lambda: Computed(USES["multiplied"]).eval(), swin_block], ids=["bias", "swin"])
def test_files_hold_integers_where_openvino_refuses_a_quantizer(runtime, build):
    """OpenVINO 2026.4 refuses a product with a constant that the file quantizes (Swin v2's logit scale)."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip(runtime)
    shape = (8, 8, 8) if build is swin_block else (5, 6)
    made = make_onnx(prepared_of(build(), torch.randn(2, *shape)))
    graph = onnx.load_from_string(made.content).graph
    assert not [t.name for t in graph.initializer if "bias_of" in t.name or "cpb_mlp" in t.name]
    session = {"onnxruntime": onnxruntime_session, "openvino": openvino_session}[runtime](made.content, threads=1)
    for rows in (1, 3):
        x = torch.randn(rows, *shape)
        (actual,), (expected,) = session([x]), made.model.reference_outputs([x])
        signal, noise = expected.double().square().sum(), (actual - expected).double().square().sum()
        assert signal > 30 * noise, f"{10 * torch.log10(signal / noise):.1f} dB"
