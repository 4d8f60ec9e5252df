"""Sums of two products in 16 bits: weights are chosen so that none saturates, as an emulation of ``vpmaddubsw`` says.

The emulation knows nothing of how scales were raised: it takes the integer model, the bytes that each layer reads, and adds
products by twos as kernels do: neighbouring taps of one channel, neighbouring channels at one tap, and the worst two of all.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant import Recipe, Scheme, Setting, processor
from fxquant.capture.calls import as_call
from fxquant.errors import InputError
from fxquant.export import onnx_file, runtimes
from fxquant.export.agreement import together
from fxquant.export.finding import finding
from fxquant.export.interleaved_timing import InterleavedTimes
from fxquant.export.to_onnx import make_onnx
from fxquant.export.tolerance import exact_outputs, least_sqnr
from fxquant.installed import is_installed
from fxquant.nn.accumulating import IntegerWeighted
from fxquant.nn.fake_quantize import WeightQuantize
from fxquant.numerics.pairs import LIMIT, channel_pairs, scale_factor, two_largest
from fxquant.runtimes import runtime
from fxquant.runtimes.onnxruntime import onnxruntime_session
from fxquant.runtimes.openvino import openvino_session
from fxquant.targets import PROCESSORS, TARGETS, X86, Target

WEIGHT = {"symmetric": True, "signed": True, "narrow_range": True}


class Functional(nn.Module):
    """Weights that are read by function calls; one of them twice, behind ranges that differ a lot."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6).abs())
        self.conv = nn.Parameter(torch.randn(6, 3, 3, 3).abs())

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, self.conv, padding=1, groups=2)).mean((2, 3))
        return F.linear(F.relu(F.linear(y, self.weight)) * 3, self.weight)


class Gpt(nn.Module):
    """``torch.addmm``, whose weight is ``(in, out)``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 7).abs()), nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, F.relu(x), self.weight)


def convs(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())])


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 16)), (64, 16)),
    "conv": (lambda: convs(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, (3, 1), stride=2)), (8, 3, 9, 9)),
    "grouped": (lambda: convs(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8)), (8, 4, 9, 9)),
    "one dimension": (lambda: convs(nn.Conv1d(4, 8, 5, padding=2), nn.Conv1d(8, 2, 1)), (8, 4, 9)),
    "three dimensions": (lambda: convs(nn.Conv3d(2, 4, 2), nn.Conv3d(4, 2, 1)), (4, 2, 4, 4, 4)),
    "transposed": (lambda: convs(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 2, 2, 2)), (8, 4, 5, 5)),
    "functional, shared": (Functional, (16, 6, 5, 5)),
    "addmm": (Gpt, (32, 12)),
    "no bias, wide inputs": (lambda: convs(nn.Conv2d(70, 3, 1, bias=False)), (4, 70, 3, 3)),
}


def one_sided(model: nn.Module) -> nn.Module:
    """Weights of one sign, as they saturate most."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.abs_()
    return model.eval()


def data(shape: tuple[int, ...], count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(shape, generator=generator) for _ in range(count)]


def made(model: nn.Module, batches: list[Tensor], **how: Any) -> Any:
    prepared = fxquant.calibrate(fxquant.prepare(model, batches[0], **how), batches, progress=False)
    return fxquant.convert(prepared, kernels="reference")


def read_bytes(integer: Any, batches: list[Tensor]) -> dict[str, tuple[IntegerWeighted, Tensor, int]]:
    """Each layer with the integers that it reads, as unsigned bytes."""
    found: dict[str, tuple[IntegerWeighted, Tensor, int]] = {}

    def keep(path: str) -> Any:
        def hook(part: Any, args: tuple[Any, ...]) -> None:
            shift = 128 if args[0].dtype == torch.int8 else 0
            held, before = args[0].to(torch.int32) + shift, found.get(path)
            found[path] = (part, held if before is None else torch.cat([before[1], held]), shift)

        return hook

    hooks = [
        part.register_forward_pre_hook(keep(path))
        for path, part in integer.named_modules()
        if isinstance(part, IntegerWeighted)
    ]
    for x in batches:
        integer(x)
    for hook in hooks:
        hook.remove()
    return found


def products(part: IntegerWeighted, held: Tensor, shift: int) -> Tensor:
    """Every product of every sum of a layer, ``(sums, channels, taps)``: by sums of one-hot inputs' weights.

    A layer of one tap is what remains when all weights but those of one input channel and tap are set to zero.
    """
    zero = int(part.offset[0]) + shift
    taps = part.weight.flatten(1).shape[1] if not part.entry.behaviour.out_axis else part.weight[:, 0].numel()
    attributes = {k: v for k, v in part.attributes.items() if k != "padding_mode"}
    out = []
    for tap in range(taps):
        weight = torch.zeros_like(part.weight, dtype=torch.float64)
        if part.entry.behaviour.out_axis:
            own = weight.transpose(0, 1).flatten(1)
            own[:, tap] = part.weight.transpose(0, 1).flatten(1)[:, tap].double()
            weight = own.unflatten(1, (weight.shape[0], *weight.shape[2:])).transpose(0, 1).contiguous()
        else:
            weight.view(weight.shape[0], -1)[:, tap] = part.weight.flatten(1)[:, tap].double()
        y = part.entry.function((held - zero).double(), weight, None, **attributes)
        y = y.movedim(-1 if part.entry.behaviour.channels_last else 1, -1)
        if part.entry.behaviour.out_axis == 0:  # what is padded shows the zero point
            y = y + zero * weight.flatten(1).sum(1)
        else:
            every = part.entry.function(torch.full_like(held, zero).double(), weight, None, **attributes)
            y = y + every.movedim(-1 if part.entry.behaviour.channels_last else 1, -1)
        out.append(y.flatten(0, -2))
    return torch.stack(out, -1)


def saturated(part: IntegerWeighted, held: Tensor, shift: int) -> dict[str, int]:
    """How many sums of two products leave 16 bits, by what meets what."""
    every = products(part, held, shift)
    size = part.weight[0, 0].numel()
    channels = every.unflatten(-1, (-1, size)).transpose(-1, -2).flatten(-2) if size > 1 else every
    if every.shape[-1] % 2:
        every, channels = F.pad(every, (0, 1)), F.pad(channels, (0, 1))
    best = every.clamp(min=0).topk(2).values, every.clamp(max=0).topk(2, largest=False).values
    pairs = {
        "taps": every.unflatten(-1, (-1, 2)).sum(-1),
        "channels": channels.unflatten(-1, (-1, 2)).sum(-1),
        "worst": torch.stack([own.sum(-1) for own in best]),
    }
    return {name: int(((sums > LIMIT) | (sums < -LIMIT - 1)).sum()) for name, sums in pairs.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_no_pair_saturates_on_what_calibration_saw(kind):
    make, shape = MODELS[kind]
    torch.manual_seed(0)
    model, batches = one_sided(make()), data(shape)
    for name, safe in (("any", True), ("avx2", True), ("vnni", False)):
        layers = read_bytes(made(model, batches, processor=name), batches)
        counts = {path: saturated(*layer) for path, layer in layers.items()}
        assert counts and any(sum(own.values()) for own in counts.values()) is not safe, (name, counts)


def quantizers(prepared: nn.Module) -> list[WeightQuantize]:
    return [part for part in prepared.modules() if isinstance(part, WeightQuantize)]


def widest(integer: nn.Module) -> list[int]:
    """The largest integer of each output channel of each layer."""
    layers = [part for part in integer.modules() if isinstance(part, IntegerWeighted)]
    return [int(row.abs().max()) for part in layers for row in part.weight.int()]


def test_channels_that_are_safe_keep_their_bits():
    """One channel reaches far under one large weight and nothing else; the next has two large ones."""
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0, -1.0, 0.0], [0.8, 0.5, 0.0, 0.0], [0.6, 0.6, 0.6, 0.6]]))
    x = torch.rand(64, 4, generator=torch.Generator().manual_seed(0))
    x[0] = 1.0
    assert widest(made(nn.Sequential(layer), [x])) == [127, 78, 64]
    x[:, 1:] *= 0.25  # what the second large weight meets is small
    assert widest(made(nn.Sequential(layer), [x])) == [127, 107, 97]
    assert widest(made(nn.Sequential(layer), [x], processor="vnni")) == [127, 127, 127]


@pytest.mark.parametrize(
    "weight",
    [
        Scheme(**WEIGHT, per_channel=True, estimator="mse"),
        Scheme(**WEIGHT, per_channel=True, estimator="percentile"),
        Scheme(**WEIGHT),
        Scheme(**{**WEIGHT, "narrow_range": False}, per_channel=True),
        Scheme(**WEIGHT, bits=7, per_channel=True),
    ],
    ids=["mse", "percentile", "one scale", "wide", "7 bits"],
)
def test_schemes_of_weights(weight):
    torch.manual_seed(0)
    model, batches = one_sided(MODELS["conv"][0]()), data((8, 3, 9, 9))
    recipe = Recipe(default=Setting(weight=weight))
    integer = made(model, batches, recipe=recipe)
    counts = [saturated(*layer) for layer in read_bytes(integer, batches).values()]
    assert counts and not any(sum(own.values()) for own in counts)
    free = made(model, batches, recipe=recipe, processor="vnni")
    lost = [sum(saturated(*layer).values()) for layer in read_bytes(free, batches).values()]
    assert any(lost) == (weight.bits == 8)


def test_a_clipped_weight_is_let_in_only_where_pairs_need_it():
    """A larger scale brings an outlier back into the grid; a factor of 1 where it is the only large weight."""
    weight = torch.tensor([[400.0, 0.4, 0.3, -1.0], [400.0, 127.0, 127.0, 0.0], [-140.0, -60.0, 0.0, 90.0]])
    reach, scale = torch.full((1, 4), 255.0), torch.ones(3)
    bounds: dict[str, Any] = {"out_axis": 0, "qmin": -127, "qmax": 127}
    factor = scale_factor(weight, scale, reach, clipped=True, **bounds)
    q = (weight / (scale * factor)[:, None]).round().clamp(-127, 127)
    assert bool((channel_pairs(q, reach, 0) <= LIMIT).all())
    assert float(factor[0]) == 1.0 and 527 * 255 / LIMIT < float(factor[1]) < 4.2 and 1.5 < float(factor[2]) < 1.6


def test_the_two_largest_are_those_of_topk():
    generator = torch.Generator().manual_seed(0)
    for rows, count in ((5, 1), (3, 2), (4, 127), (4, 128), (2, 131), (3, 4608), (2, 70_001)):
        x = torch.randn(rows, count, generator=generator)
        assert torch.equal(two_largest(x), x.topk(min(2, count), 1).values.clamp(min=0).sum(1))
        assert torch.equal(two_largest(-x.abs()), torch.zeros(rows))


def test_training_is_safe_for_any_input():
    """No calibration bounds what a trained network reads: pairs of any bytes fit, at every step and after conversion."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))
    prepared = fxquant.prepare(one_sided(model), torch.rand(4, 3, 5, 5), qat=True).train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    for x in data((4, 3, 5, 5)):
        prepared(x).square().mean().backward()
        optimizer.step()
    assert all(bool((own.reach == 255).all()) for own in quantizers(prepared))
    fxquant.calibrate(prepared, data((4, 3, 5, 5)), progress=False)
    integer = fxquant.convert(prepared.eval(), kernels="reference")
    for part in integer.modules():
        if isinstance(part, IntegerWeighted):
            rows = part.weight.flatten(1).int()
            ends = rows.topk(2, 1).values.sum(1), -rows.topk(2, 1, largest=False).values.sum(1)
            assert int(torch.maximum(*ends).max()) <= 128


def test_a_weight_that_two_ops_read_keeps_the_larger_bound():
    torch.manual_seed(0)
    prepared = fxquant.prepare(Functional().eval(), torch.rand(16, 6, 5, 5))
    fxquant.calibrate(prepared, data((16, 6, 5, 5)), progress=False)
    conv, shared = (own for own in dict.fromkeys(quantizers(prepared)))
    assert conv.reach.shape == (2, 3) and shared.reach.shape == (1, 6)
    seen = shared.reach.clone()
    fxquant.calibrate(prepared, [torch.zeros(2, 6, 5, 5)], progress=False)
    assert bool((shared.reach >= seen).all()), "an earlier calibration is not forgotten"


def test_wide_activations_and_other_runtimes_need_nothing():
    """Integers of 16 bits are not multiplied in bytes, and XNNPACK, TFLite and TensorRT add products in 32 bits."""
    batches = data((64, 16))
    model = one_sided(MODELS["linear"][0]())
    sixteen = Recipe(default=Setting(activation=Scheme(bits=16)))
    assert set(widest(made(model, batches, recipe=sixteen))) == {127}
    for target in ("xnnpack", "tflite", "tensorrt"):
        assert max(widest(made(model, batches, target=target))) == 127
        assert not any(hasattr(own, "reach") for own in quantizers(fxquant.prepare(model, batches[0], target=target)))
    with_four = made(model, batches, recipe=Recipe(default=Setting(activation=Scheme(bits=4))))
    assert set(widest(with_four)) == {127}, "2 · 15 · 127 fits"


def test_bounds_survive_copies_and_files(tmp_path):
    torch.manual_seed(0)
    model, batches = one_sided(MODELS["grouped"][0]()), data((8, 4, 9, 9))
    prepared = fxquant.calibrate(fxquant.prepare(model, batches[0], processor="avx2"), batches, progress=False)
    expected = fxquant.convert(prepared)(batches[0])
    fxquant.save(prepared, tmp_path / "p.pt")
    loaded = fxquant.load(model, tmp_path / "p.pt")
    again = fxquant.prepare(model, batches[0], processor="avx2")
    again.load_state_dict(prepared.state_dict())
    for twin in (copy.deepcopy(prepared), loaded, again):
        assert torch.equal(fxquant.convert(twin)(batches[0]), expected)
        assert all(torch.equal(a.reach, b.reach) for a, b in zip(quantizers(twin), quantizers(prepared), strict=True))
    fxquant.save(fxquant.convert(prepared), tmp_path / "i.pt")
    settings = fxquant.load(model, tmp_path / "i.pt").settings
    assert settings["target"].processor == loaded.settings["target"].processor == "avx2"
    free = fxquant.calibrate(fxquant.prepare(model, batches[0], processor="vnni"), batches, progress=False)
    fxquant.save(free, tmp_path / "v.pt")
    assert not any(hasattr(own, "reach") for own in quantizers(fxquant.load(model, tmp_path / "v.pt")))
    content = torch.load(tmp_path / "v.pt", weights_only=True)
    del content["processor"]  # a file from before processors were told apart
    torch.save(content, tmp_path / "old.pt")
    old = fxquant.load(model, tmp_path / "old.pt")
    assert torch.equal(fxquant.convert(old)(batches[0]), fxquant.convert(free)(batches[0]))


def test_where_it_runs_can_be_said_everywhere(capsys):
    model, batches = one_sided(MODELS["linear"][0]()), data((64, 16))
    assert {name: target.processor for name, target in TARGETS.items()} == dict.fromkeys(TARGETS, "any")
    free = fxquant.quantize(model, batches, processor="vnni", progress=False)
    assert set(widest(free)) == {127} and free.settings["target"].processor == "vnni"
    mine = dataclasses.replace(X86, name="mine", processor="arm_dotprod")
    assert set(widest(made(model, batches, target=mine))) == {127}
    assert max(widest(made(model, batches, target=Target(name="t", title="T")))) < 127
    with pytest.raises(InputError, match=r"(?s)Did you mean 'avx2'\?.*vnni"):
        fxquant.prepare(model, batches[0], processor="avx")
    from fxquant.cli import main

    assert main(["diff", "torchvision:squeezenet1_0", "--shape", "1,3,64,64", "--processor", "vnni"]) == 0
    with pytest.raises(SystemExit):
        main(["diff", "torchvision:squeezenet1_0", "--processor", "sse"])
    assert "vnni" in capsys.readouterr().err


def test_processors_without_products_of_unsigned_bytes_get_weights_without_the_lowest_integer():
    wide = Recipe(default=Setting(weight=Scheme(**{**WEIGHT, "narrow_range": False}, per_channel=True)))
    model = nn.Sequential(nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(-model[0].weight.abs())
    for name, own in PROCESSORS.items():
        (quantizer,) = quantizers(fxquant.prepare(model, torch.rand(2, 4), recipe=wide, processor=name))
        assert quantizer.scheme.narrow_range == own.narrow_weights == (name in ("any", "arm"))
    assert 2 * 128 * 127 <= LIMIT < 2 * 128 * 128, "a pair of signed bytes, without -128 and with it"


def test_reports_say_what_was_done_and_what_the_other_choice_gives():
    model, batches = one_sided(MODELS["linear"][0]()), data((64, 16))
    done, free = (str(fxquant.coverage(made(model, batches, processor=name))) for name in ("any", "vnni"))
    assert "64 of 64 output channels, in 2 of 2 layers, have weights of less than 8 bits" in done
    assert "processor='vnni' keeps all 8" in done and "saturate" not in done
    assert "on x86 without VNNI 2 of 2 layers saturate in ONNX Runtime and OpenVINO" in free
    assert "prepare(processor='any')" in free


def noisy(amount: float) -> Any:
    """What opens a session whose results are off by noise of ``amount`` of their size."""

    def opened(*args: Any, **options: Any) -> Any:
        session = onnxruntime_session(args[0], 1)

        def run(tensors: Any) -> list[Tensor]:
            return [
                y * (1 + amount * (1 - 2 * (torch.arange(y.numel()).reshape(y.shape) % 2))) for y in session(tensors)
            ]

        return run

    return opened


def open_by(monkeypatch: Any, name: str, **how: Any) -> None:
    """Let a runtime's models be opened otherwise."""
    monkeypatch.setitem(runtime.RUNTIMES, name, dataclasses.replace(runtime.RUNTIMES[name], **{"open": None, **how}))


def only_onnxruntime(monkeypatch: Any) -> None:
    monkeypatch.setattr(runtime, "is_installed", lambda name: name != "openvino")

    def turns(runs: Any, **_: Any) -> Any:
        return {name: InterleavedTimes((0.001 if name == "onnxruntime" else 0.002,) * 3) for name in runs}

    monkeypatch.setattr(runtimes, "time_interleaved", turns)


@pytest.mark.parametrize(("amount", "taken"), [(0.003, True), (0.05, False), (float("nan"), False)])
def test_auto_takes_only_what_agrees_with_the_exact_integers(monkeypatch, amount, taken):
    """Noise of 0.3 % of the signal is 50 dB, of 5 % 26 dB: the fastest of all, and wrong."""
    pytest.importorskip("onnxscript")
    only_onnxruntime(monkeypatch)
    open_by(monkeypatch, "onnxruntime", session=noisy(amount))
    model, batches = MODELS["linear"][0]().eval(), data((64, 16))
    compiled = fxquant.compile(made(model, batches), batches[0])
    (own,) = (timing for timing in compiled.report if timing.runtime == "onnxruntime")
    assert (compiled.runtime == "onnxruntime") == taken == (own.milliseconds is not None)
    assert own.agreement is not None and (own.agreement >= 40) == taken
    assert taken or ("left out" in own.reason and f"{own.agreement:.1f} dB" in own.reason)
    assert all(timing.agreement is not None for timing in compiled.report if timing.milliseconds is not None)


def test_agreement_of_outputs_that_are_not_finite_or_no_numbers():
    mask = torch.tensor([[1.0, float("-inf"), 3.0, float("nan")]])
    assert together([mask.clone()], [mask]) == math.inf
    assert 40 < together([mask * 1.005], [mask]) < 60
    assert together([mask.nan_to_num(neginf=-1e30)], [mask]) == -math.inf
    assert together([torch.full((1, 4), float("nan"))], [mask]) == -math.inf
    classes = torch.arange(200)
    assert together([classes], [classes]) == math.inf == together([classes.where(classes != 7, 1)], [classes])
    assert together([classes % 100], [classes]) == -math.inf == together([classes[:5]], [classes])
    assert together([], []) == math.inf and together([], [mask]) == -math.inf


def test_auto_says_why_it_takes_what_is_below_40_decibels(monkeypatch):
    """Noise of 3 % of the signal, 30 dB, in a network where one more rounding of each tensor leaves less."""
    pytest.importorskip("onnxscript")
    only_onnxruntime(monkeypatch)
    open_by(monkeypatch, "onnxruntime", session=noisy(0.03))
    monkeypatch.setattr(runtimes, "least_sqnr", lambda *_: 25.0)
    model, batches = MODELS["linear"][0]().eval(), data((64, 16))
    compiled = fxquant.compile(made(model, batches), batches[0])
    own = next(timing for timing in compiled.report if timing.runtime == "onnxruntime")
    assert compiled.runtime == "onnxruntime" and own.agreement is not None and own.agreement < 40
    assert "within one more rounding" in own.reason and own.reason in str(own)
    assert all(not timing.reason for timing in compiled.report if timing.agreement == math.inf)


def test_where_nothing_agrees_the_exact_reference_runs(monkeypatch):
    only_onnxruntime(monkeypatch)
    monkeypatch.setattr(runtime, "is_installed", lambda name: False)
    model, batches = MODELS["linear"][0]().eval(), data((64, 16))
    integer = made(model, batches)
    open_by(monkeypatch, "torch", open=lambda *_: lambda x: torch.zeros(x.shape[0], 16))
    open_by(monkeypatch, "native", open=lambda *_: lambda x: torch.zeros(x.shape[0], 15))
    compiled = fxquant.compile(integer, batches[0])
    assert compiled.runtime == "torch" and torch.equal(compiled(batches[1]), integer(batches[1]))
    reasons = {timing.runtime: timing.reason for timing in compiled.report}
    assert "left out" in reasons["native"] and "-inf" in reasons["native"]


def test_what_one_more_rounding_leaves_is_the_tolerance_of_a_deep_network():
    """A shallow network has to agree to 40 dB; one of many layers to about what int8 keeps of float in it."""
    torch.manual_seed(0)
    for depth, low, high in ((1, 40.0, 40.0), (8, 20.0, 39.0)):
        layers = [part for _ in range(depth) for part in (nn.Linear(16, 16, bias=False), nn.ReLU())]
        model, batches = nn.Sequential(*layers, nn.Linear(16, 4)).eval(), data((64, 16))
        with torch.no_grad():
            for part in model.modules():
                if isinstance(part, nn.Linear):
                    part.weight.mul_(6**0.5)  # so that signals neither grow nor fade
        integer = made(model, batches)
        call = as_call(integer, batches[0])
        exact = exact_outputs(integer, call)
        least = least_sqnr(integer, call, exact)
        assert low <= least <= high
        assert torch.equal(integer(batches[0]), exact[0]), "what disturbed it has gone"


def test_a_low_agreement_becomes_words(monkeypatch):
    model, batches = one_sided(MODELS["linear"][0]()), data((64, 16))
    free, limited = (made(model, batches, processor=name) for name in ("vnni", "any"))
    monkeypatch.setattr(processor, "adds_pairs_in_16_bits", lambda: True)
    assert finding("R", 40.0, free, 40.0) is None
    said = str(finding("R", 27.5, free, 40.0))
    assert "27.5 dB" in said and "0, 2" in said and "prepare(..., processor='any')" in said and "7 bits" in said
    assert "beyond those of calibration" in str(finding("R", 27.5, limited, 40.0))
    assert "within one more rounding" in str(finding("R", 27.5, limited, 25.0))
    assert "outside of its integer kernels (softmax)" in str(finding("R", 27.5, free, 40.0, outside="softmax"))
    assert "own roundings" in (said := str(finding("R", 27.5, free, 40.0, outside=""))) and "16 bits" not in said
    monkeypatch.setattr(processor, "adds_pairs_in_16_bits", lambda: False)
    assert "do not explain it (this processor adds products in 32 bits)" in str(finding("R", 27.5, free, 40.0))


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


@pytest.mark.parametrize("signed", [False, True])
def test_products_of_two_tensors(signed, monkeypatch):
    """Unsigned operands are exact in every runtime and on every processor; where signed ones are not, it is said."""
    pytest.importorskip("onnxscript")
    a, b = (torch.rand(4, 8, 32), torch.rand(4, 32, 8))
    recipe = Recipe(default=Setting(activation=Scheme(signed=signed, symmetric=signed)), quantize_outputs=True)
    prepared = fxquant.prepare(Product(), (a, b), recipe=recipe, target="onnxruntime")
    integer = fxquant.convert(fxquant.calibrate(prepared, [(a, b)], progress=False))
    exact = exact_outputs(integer, as_call(integer, (a, b)))
    names = ["onnxruntime", *(["openvino"] if is_installed("openvino") and not signed else [])]
    for name in names:
        assert together([fxquant.compile(integer, (a, b), runtime=name)(a, b)], exact) > 60.0
    monkeypatch.setattr(processor, "adds_pairs_in_16_bits", lambda: True)
    assert ("unsigned activations" in str(finding("R", 14.5, integer, 40.0))) == signed


def test_exports_and_benchmarks_tell_a_low_agreement(monkeypatch, tmp_path):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(onnx_file, "onnxruntime_session", noisy(0.05))
    open_by(monkeypatch, "onnxruntime", session=noisy(0.05))
    least = 20 if processor.adds_pairs_in_16_bits() else 25  # where the runtime saturates by itself, that comes on top
    monkeypatch.setattr(processor, "adds_pairs_in_16_bits", lambda: True)
    model, batches = one_sided(MODELS["linear"][0]()), data((64, 16))
    free = made(model, batches, processor="vnni")
    report = fxquant.export_onnx(free, tmp_path / "f.onnx", batches[0])
    (note,) = report.notes
    told = re.match(r"ONNX Runtime agrees with the integer model to ([\d.]+) dB", note)
    assert told and least < float(told[1]) < 27 and "prepare(..., processor='any')" in str(report)
    found = fxquant.bench(free, batches[0], runtimes=["torch", "onnxruntime"], rounds=1, memory=False, progress=False)
    exact, noise = (float(row.agreement or 0) for row in found.rows)
    assert exact == math.inf and least < noise < 27
    assert any("prepare(..., processor='any')" in note for note in found.notes) and "agrees dB" in str(found)


@pytest.mark.long
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "xnnpack", "tflite", "tensorrt"])
def test_weights_of_two_to_eight_bits_run_everywhere(target, bits):
    pytest.importorskip("onnxscript")
    weight = Scheme(**WEIGHT, bits=bits, per_channel=target != "tflite")
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)).eval()
    batches = [x - 0.3 for x in data((8, 3, 5, 5))]
    integer = made(model, batches, target=target, recipe=Recipe(default=Setting(weight=weight)))
    assert max(widest(integer)) <= weight.qmax
    file = make_onnx(integer, batches[0])
    sessions = [onnxruntime_session] + [openvino_session] * (target == "openvino" and is_installed("openvino"))
    exact = exact_outputs(integer, as_call(integer, batches[0]))
    foreign = bits == 8 and not fxquant.targets.get(target).adds_pairs and processor.adds_pairs_in_16_bits()
    for opened in [] if foreign else sessions:
        assert together(opened(file.source, 1)([batches[0]]), exact) > 40.0, opened.__name__
    if target == "xnnpack":
        assert together([fxquant.export.export_program(integer, batches[0]).module()(batches[0])], exact) == math.inf
    if foreign:
        pytest.skip(f"a file for {target}, whose kernels never add pairs in 16 bits: ONNX Runtime's do without VNNI")
