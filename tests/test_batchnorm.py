"""Batch norms: folded exactly for inference, trained behind quantized weights, folded into their scales when frozen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparisons import assert_close_to_scale, assert_ops_agree, assert_same_bits, assert_steps_apart
from torch import Tensor, nn

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.errors import CalibrationError
from fxquant.graph.text import graph_text
from fxquant.nn.modules import QuantWeighted

EPS = 1e-2


def randomized(bn: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics away from their defaults; gains of both signs, and one of zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        bn.running_mean.copy_(torch.randn(bn.running_mean.shape, generator=generator) * 0.4)
        bn.running_var.copy_(torch.rand(bn.running_var.shape, generator=generator) * 2 + 0.05)
        if bn.weight is not None:
            bn.weight.copy_(torch.randn(bn.weight.shape, generator=generator))
            bn.weight[0], bn.weight[1] = 0.0, -1.3
            bn.bias.copy_(torch.randn(bn.bias.shape, generator=generator))
    return bn


BEHIND = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), nn.BatchNorm1d(6, eps=EPS), (3, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1, dilation=2), nn.BatchNorm2d(6, eps=EPS), (3, 4, 9, 8)),
    "conv2d no bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, eps=EPS), (3, 4, 9, 8)),
    "conv2d depthwise": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8, eps=EPS), (3, 4, 9, 8)),
    "conv2d reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6, eps=EPS), (3, 4, 9, 8)),
    "not affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=EPS, affine=False), (3, 4, 9, 8)),
    "default eps": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), (3, 4, 9, 8)),
    "conv3d": (nn.Conv3d(2, 4, 2, groups=2, bias=False), nn.BatchNorm3d(4, eps=EPS), (3, 2, 4, 5, 6)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), nn.BatchNorm1d(6, eps=EPS), (3, 4, 9)),
    "conv_transpose2d": (
        nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2, padding=1, output_padding=1),
        nn.BatchNorm2d(4, eps=EPS),
        (3, 6, 5, 4),
    ),
    "conv_transpose3d": (nn.ConvTranspose3d(2, 3, 2, bias=False), nn.BatchNorm3d(3, eps=EPS), (2, 2, 3, 4, 3)),
    "linear": (nn.Linear(7, 5), nn.BatchNorm1d(5, eps=EPS), (9, 7)),
    "linear no bias": (nn.Linear(7, 5, bias=False), nn.BatchNorm1d(5, eps=EPS), (9, 7)),
}
BEFORE = {
    "conv1d": (nn.BatchNorm1d(4, eps=EPS), nn.Conv1d(4, 6, 3, stride=2, groups=2), (3, 4, 9)),
    "conv2d": (nn.BatchNorm2d(4, eps=EPS), nn.Conv2d(4, 6, (3, 2), dilation=2, bias=False), (3, 4, 9, 8)),
    "conv2d grouped": (nn.BatchNorm2d(4, eps=EPS), nn.Conv2d(4, 8, 3, groups=4), (3, 4, 9, 8)),
    "conv2d valid": (nn.BatchNorm2d(4, eps=EPS), nn.Conv2d(4, 8, 3, padding="valid"), (3, 4, 9, 8)),
    "conv3d": (nn.BatchNorm3d(2, eps=EPS), nn.Conv3d(2, 4, 2), (3, 2, 4, 5, 6)),
    "linear": (nn.BatchNorm1d(7, eps=EPS), nn.Linear(7, 5), (9, 7)),
}


def chain(first: nn.Module, second: nn.Module) -> nn.Sequential:
    model = copy.deepcopy(nn.Sequential(first, second))
    for part in model:
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            randomized(part)
    return model.eval()


def notes_of(module: Any) -> str:
    return "\n".join(note for node in module.graph.nodes for note in node.meta.get("notes", ()))


@pytest.mark.parametrize(
    ("first", "second", "shape"),
    [*BEHIND.values(), *BEFORE.values()],
    ids=[f"{k} then bn" for k in BEHIND] + [f"bn then {k}" for k in BEFORE],
)
def test_folding_is_exact(first, second, shape):
    model, x = chain(first, second), torch.randn(shape)
    prepared = fxquant.prepare(model, x)
    assert "BatchNorm" not in graph_text(prepared)
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        assert_close_to_scale(prepared(x), model(x), 2e-6)
    # In float64 nothing is rounded away, and the fold is exact to the last few bits.
    double = copy.deepcopy(model).double()
    prepared = fxquant.prepare(double, x.double())
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        assert_close_to_scale(prepared(x.double()), double(x.double()), 1e-14)


class Forked(nn.Module):
    """The convolution's output is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), randomized(nn.BatchNorm2d(4, eps=EPS))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class SharedConv(nn.Module):
    """One convolution, called twice, with a batch norm behind each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn1, self.bn2 = (randomized(nn.BatchNorm2d(3, eps=EPS), seed) for seed in (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv(self.bn1(self.conv(x))))


class SharedNorm(nn.Module):
    """One batch norm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), randomized(nn.BatchNorm2d(4, eps=EPS))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.b(F.relu(self.bn(self.a(x)))))


class AlsoOutput(nn.Module):
    """What the batch norm reads is an output of the model too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), randomized(nn.BatchNorm2d(4, eps=EPS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.bn(y), y


def padded() -> nn.Module:
    return nn.Sequential(randomized(nn.BatchNorm2d(3, eps=EPS)), nn.Conv2d(3, 4, 3, padding=1))


def alone() -> nn.Module:
    return nn.Sequential(nn.ReLU(), randomized(nn.BatchNorm2d(3, eps=EPS)), nn.ReLU(), nn.Conv2d(3, 4, 1))


def transposed_behind() -> nn.Module:
    return nn.Sequential(randomized(nn.BatchNorm2d(3, eps=EPS)), nn.ConvTranspose2d(3, 4, 3))


REFUSED = {
    "padding": (padded, "_1 pads, and padding is not shifted by a batch norm"),
    "used twice": (Forked, "conv's output is also used by"),
    "also an output": (AlsoOutput, "conv"),
    "shared conv": (SharedConv, "its weights are used at several places"),
    "no weights": (alone, "has no weights"),
    "transposed behind": (transposed_behind, "is transposed and folds only what follows it"),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("qat", [False, True], ids=["ptq", "qat"])
def test_what_does_not_fold_says_why_and_stays_right(build, reason, qat):
    model, x = build().eval(), torch.randn(5, 3, 8, 8)
    prepared = fxquant.prepare(model, x, qat=qat)
    if not qat:
        assert reason in notes_of(prepared), notes_of(prepared)
        assert "not folded: " in notes_of(prepared)
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        assert_same_bits(prepared(x), model(x))
    fxquant.calibrate(prepared, [x], progress=False)
    frozen = fxquant.freeze(prepared)
    assert_ops_agree(frozen, fxquant.convert(frozen), (x,))


def test_a_shared_batch_norm_is_folded_once_for_each_call():
    model, x = SharedNorm().eval(), torch.randn(4, 3, 8, 8)
    prepared = fxquant.prepare(model, x)
    assert "BatchNorm" not in graph_text(prepared)
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        assert_close_to_scale(prepared(x), model(x), 2e-6)


def test_linear_behind_which_a_batch_norm_runs_over_another_axis_is_not_folded():
    """BatchNorm1d after a linear layer of three dimensions normalizes axis 1, which is not the features'."""
    model = nn.Sequential(nn.Linear(6, 5), randomized(nn.BatchNorm1d(5, eps=EPS))).eval()
    x = torch.randn(4, 5, 6)
    prepared = fxquant.prepare(model, x)
    assert "BatchNorm1d" in graph_text(prepared)
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        assert_same_bits(prepared(x), model(x))
    prepared = fxquant.prepare(model.train(), x, qat=True)
    fxquant.calibrate(prepared, [x], progress=False)
    frozen = fxquant.freeze(prepared)
    with torch.no_grad():
        assert_close_to_scale(frozen(x), prepared.eval()(x), 1e-5)


# Training: BN(conv(x, FQ(W))), then the fold into the scales.

TRAINED = {
    name: BEHIND[name]
    for name in (
        "conv1d",
        "conv2d",
        "conv2d no bias",
        "conv2d depthwise",
        "conv3d",
        "conv_transpose2d",
        "conv_transpose3d",
        "linear",
    )
}
WEIGHTS = {
    "8 bits": Scheme(symmetric=True, signed=True, per_channel=True, narrow_range=True),
    "4 bits": Scheme(bits=4, symmetric=True, signed=True, per_channel=True, narrow_range=True),
    "per tensor": Scheme(symmetric=True, signed=True, narrow_range=True),
}


def trained(
    first: nn.Module, second: nn.Module, shape: tuple[int, ...], weight: Scheme, tail: list[nn.Module]
) -> tuple[Any, Tensor]:
    """A QAT model after a few steps of SGD, in eval mode, and an input."""
    model = nn.Sequential(*chain(first, second), *tail).train()
    x = torch.randn(24, *shape[1:])
    recipe = Recipe(default=Setting(weight=weight), quantize_outputs=True)
    prepared = fxquant.prepare(model, x, qat=True, recipe=recipe)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        prepared(x + 0.1 * torch.randn_like(x)).square().mean().backward()
        optimizer.step()
    return prepared.eval(), x


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("tail", [[], [nn.ReLU()]], ids=["", "relu"])
@pytest.mark.parametrize("name", TRAINED)
def test_freezing_folds_into_the_scales_exactly(name, tail, weight):
    prepared, x = trained(*TRAINED[name], weight, tail)
    frozen = fxquant.freeze(prepared)
    grouped = name == "conv_transpose2d"
    assert ("BatchNorm" in graph_text(frozen)) == grouped, (
        "a grouped transposed convolution shares scales across groups"
    )
    with torch.no_grad():
        assert_steps_apart(frozen(x), prepared(x), last_scale(frozen), 1.001 if not grouped else 2.001)
    if not grouped:
        assert_only_the_bias_is_rounded(prepared, frozen, x)
    assert_trained_integers_kept(prepared, frozen)
    assert_ops_agree(frozen, fxquant.convert(frozen), (x,))


def last_rounding(module: Any) -> Any:
    """The module that rounds the model's output."""
    parts = [module.get_submodule(n.target) for n in module.graph.nodes if n.op == "call_module"]
    return [p for p in parts if getattr(p, "output_quantizer", None) is not None][-1]


def last_scale(module: Any) -> Tensor:
    return last_rounding(module).output_quantizer.scale


def assert_only_the_bias_is_rounded(prepared: Any, frozen: Any, x: Tensor) -> None:
    """In float64 and with the output quantizer set aside, half a step of s_x·s_w is all that freezing may change."""

    def open_ended(module: Any) -> Any:
        module = copy.deepcopy(module)
        last_rounding(module).applies = False
        return module.double().eval()

    with torch.no_grad():
        expected, got = open_ended(prepared)(x.double()), open_ended(frozen)(x.double())
    conv = next(p for p in frozen.modules() if isinstance(p, QuantWeighted))
    x_scale = frozen.get_submodule("input_1_quantizer").output_quantizer.scale
    step = x_scale * conv.weight_quantizer.scale.max()
    assert (got - expected).abs().max() <= 0.5 * step + 1e-6 * expected.abs().max()


def assert_trained_integers_kept(prepared: Any, frozen: Any) -> None:
    """Every weight is the integer that was trained, or its negative where γ is negative."""
    before = next(p for p in prepared.modules() if isinstance(p, QuantWeighted))
    after = next(p for p in frozen.modules() if isinstance(p, QuantWeighted))

    def integers(part: Any) -> Tensor:
        q = part.weight_quantizer
        scale = (
            q.scale if q.axis is None else q.scale.reshape([-1 if i == q.axis else 1 for i in range(part.weight.ndim)])
        )
        return torch.round(part.weight.detach() / scale)

    a, b = integers(before), integers(after)
    axis = after.weight_quantizer.axis
    if axis is not None:  # channel 0 was given γ = 0: its weights vanish beside its bias
        assert (a.select(axis, 0).abs() >= b.select(axis, 0).abs()).all()
        a, b = (q.narrow(axis, 1, q.shape[axis] - 1) for q in (a, b))
    assert torch.equal(a.abs(), b.abs()) and a.abs().max() > 1
    if axis is not None:
        signs = (a * b).transpose(0, axis).flatten(1)
        assert all(bool((row >= 0).all() or (row <= 0).all()) for row in signs), "one sign for each channel"


@pytest.mark.parametrize("qat", [False, True], ids=["ptq", "qat"])
@pytest.mark.parametrize("gain", [0.0, 1e-12, 1e-9, -1e-7])
def test_a_channel_that_lives_by_its_bias(gain, qat):
    """Its bias does not fit on a grid as fine as its weights': the weights have to give way, not the result."""
    model = nn.Sequential(nn.Conv2d(64, 4, 7), nn.BatchNorm2d(4, eps=EPS)).eval()
    with torch.no_grad():
        model[0].weight.abs_()
        model[1].weight[2], model[1].bias[2] = gain, 1.5
    x = torch.rand(2, 64, 9, 9) * 4
    recipe = Recipe(quantize_outputs=True)
    prepared = fxquant.calibrate(fxquant.prepare(model, x, qat=qat, recipe=recipe), [x], progress=False)
    frozen = fxquant.freeze(prepared)
    assert_only_the_bias_is_rounded(prepared.eval(), frozen, x)
    assert_ops_agree(frozen, fxquant.convert(frozen), (x,))
    with torch.no_grad():
        assert abs(float(frozen(x)[:, 2].mean()) - 1.5) < last_scale(frozen)


def test_frozen_statistics_stay_and_gains_train():
    model, x = chain(*BEHIND["conv2d"][:2]), torch.randn(8, 4, 9, 8)
    prepared = fxquant.prepare(model.train(), x, qat=True, batch_norm="frozen")
    bn = prepared.get_submodule("1")
    before = {k: v.clone() for k, v in bn.state_dict().items()}
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
    after = bn.state_dict()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(before[name], after[name]), f"{name} moved"
    assert not torch.equal(before["weight"], after["weight"]) and not torch.equal(before["bias"], after["bias"])
    with torch.no_grad():
        training = prepared.train()(x)
        for quantizer in prepared.modules():
            if hasattr(quantizer, "tracking"):
                quantizer.tracking = False
        assert_same_bits(prepared.train()(x), prepared.eval()(x), "train mode computes what eval mode does")
    assert training.shape == (8, 6, 7, 6) or training.ndim == 4


def test_freeze_batchnorm_can_be_undone():
    model, x = chain(*BEHIND["conv2d"][:2]), torch.randn(8, 4, 9, 8)
    prepared = fxquant.prepare(model.train(), x, qat=True)
    bn = prepared.get_submodule("1")

    def moves() -> bool:
        mean = bn.running_mean.clone()
        prepared.train()(x)
        return not torch.equal(mean, bn.running_mean)

    assert moves()
    assert fxquant.freeze_batchnorm(prepared) is prepared
    assert not moves() and "statistics frozen" in repr(bn)
    fxquant.freeze_batchnorm(prepared, frozen=False)
    assert moves() and "statistics frozen" not in repr(bn)


def test_statistics_are_taken_anew_as_the_mean_over_batches():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=0.3)).train()
    batches = [torch.randn(6, 2, 7, 7) * (i + 1) for i in range(5)]
    prepared = fxquant.prepare(model, batches[0], qat=True)
    for x in batches:
        prepared(x)
    scales = {k: v.clone() for k, v in prepared.state_dict().items() if "running" not in k and "tracked" not in k}
    fxquant.reestimate_batchnorm(prepared, [(x, None) for x in batches], batches=3)
    prepared.eval()
    conv, quantized = prepared.get_submodule("0"), prepared.get_submodule("input_1_quantizer")
    with torch.no_grad():
        seen = [conv(quantized(x)) for x in batches[:3]]
    mean = torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0)
    variance = torch.stack([y.var((0, 2, 3), unbiased=True) for y in seen]).mean(0)
    bn = prepared.get_submodule("1")
    assert_close_to_scale(bn.running_mean, mean, 1e-6)
    assert_close_to_scale(bn.running_var, variance, 1e-6)
    assert bn.momentum == 0.3
    for name, value in scales.items():
        assert torch.equal(prepared.state_dict()[name], value), f"{name} moved"


def test_reestimating_on_nothing_changes_nothing():
    model = chain(*BEHIND["conv2d"][:2]).train()
    prepared = fxquant.prepare(model, torch.randn(3, 4, 9, 8), qat=True)
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    modes = [m.training for m in prepared.modules()]
    with pytest.raises(CalibrationError, match="empty loader; the statistics are as they were"):
        fxquant.reestimate_batchnorm(prepared, [])
    assert all(torch.equal(before[k], v) for k, v in prepared.state_dict().items())
    assert modes == [m.training for m in prepared.modules()]


def test_a_failing_batch_leaves_modes_and_statistics_as_they_were():
    model = chain(*BEHIND["conv2d"][:2]).train()
    x = torch.randn(3, 4, 9, 8)
    prepared = fxquant.prepare(model, x, qat=True)
    prepared(x)
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    modes = [m.training for m in prepared.modules()]
    with pytest.raises(RuntimeError):
        fxquant.reestimate_batchnorm(prepared, [x, torch.randn(3, 5, 9, 8)])
    assert modes == [m.training for m in prepared.modules()]
    assert all(torch.equal(before[k], v) for k, v in prepared.state_dict().items())


class OwnForward(nn.Module):
    """A layer of ``kind`` whose forward calls torch's function with the layer's parameters, as TensorFlow's padding does."""

    def __init__(
        self, kind: type[nn.Module], function: Any, *args: Any, extra: tuple[Any, ...] = (), **kwargs: Any
    ) -> None:
        super().__init__()
        held: Any = kind(*args, **kwargs)
        self.weight, self.bias, self.function, self.extra = held.weight, held.bias, function, extra

    def forward(self, x: Tensor) -> Tensor:
        return self.function(F.pad(x, (0, 1, 0, 1)) if x.ndim == 4 else x, self.weight, self.bias, *self.extra)


class NamedBias(OwnForward):
    """Its bias is given by name, or not at all."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1) if self.bias is None else F.conv2d(x, self.weight, bias=self.bias)


class ReadTwice(nn.Module):
    """Two convolutions of one weight, and a batch norm behind the second."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bn = nn.Parameter(torch.randn(4, 4, 3, 3)), randomized(nn.BatchNorm2d(4, eps=EPS))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(F.relu(F.conv2d(x, self.weight, padding=1)), self.weight, padding=1))


class OfALayer(nn.Module):
    """A convolution with the weight of a layer that is called too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, bias=False), randomized(nn.BatchNorm2d(4, eps=EPS))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(self.conv(x), self.conv.weight, padding=1))


def behind(layer: nn.Module, channels: int, norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(layer, randomized(norm(channels, eps=EPS)), nn.ReLU6())


FUNCTIONS = {
    "no bias": lambda: behind(OwnForward(nn.Conv2d, F.conv2d, 4, 6, 3, bias=False, extra=(2,)), 6),
    "bias": lambda: behind(OwnForward(nn.Conv2d, F.conv2d, 4, 6, 3), 6),
    "depthwise": lambda: behind(OwnForward(nn.Conv2d, F.conv2d, 4, 8, 3, groups=4, bias=False, extra=(1, 0, 1, 4)), 8),
    "transposed, grouped": lambda: behind(
        OwnForward(nn.ConvTranspose2d, F.conv_transpose2d, 4, 6, 3, groups=2, extra=(2, 1, 0, 2)), 6
    ),
    "no bias by name": lambda: behind(NamedBias(nn.Conv2d, None, 4, 6, 3, bias=False), 6),
    "bias by name": lambda: behind(NamedBias(nn.Conv2d, None, 4, 6, 3), 6),
    "before it": lambda: nn.Sequential(randomized(nn.BatchNorm2d(4, eps=EPS)), NamedBias(nn.Conv2d, None, 4, 6, 3)),
    "linear": lambda: nn.Sequential(
        nn.Flatten(), OwnForward(nn.Linear, F.linear, 4 * 64, 5, bias=False), randomized(nn.BatchNorm1d(5, eps=EPS))
    ),
}


@pytest.mark.parametrize("build", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_folds_into_a_function_of_parameters_that_nothing_else_reads(build):
    model, x = build().eval(), torch.randn(5, 4, 8, 8)
    prepared = fxquant.prepare(model, x)
    assert "BatchNorm" not in graph_text(prepared)
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        assert_close_to_scale(prepared(x), model(x), 2e-6)
    assert set(dict(model.named_parameters())) >= {name for name, _ in prepared.named_parameters() if "weight" in name}
    fxquant.calibrate(prepared, [x], progress=False)
    assert_ops_agree(frozen := fxquant.freeze(prepared), fxquant.convert(frozen), (x,))


@pytest.mark.parametrize("build", [ReadTwice, OfALayer])
def test_does_not_fold_into_parameters_that_something_else_reads(build):
    model, x = build().eval(), torch.randn(5, 4, 8, 8)
    prepared = fxquant.prepare(model, x)
    assert "its weights are used at several places" in notes_of(prepared)
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        assert_same_bits(prepared(x), model(x))


def test_a_model_whose_functions_took_batch_norms_is_saved_and_loaded(tmp_path):
    model, x = FUNCTIONS["no bias"]().eval(), torch.randn(5, 4, 8, 8)
    int8 = fxquant.quantize(model, [x], progress=False)
    fxquant.save(int8, tmp_path / "int8.pt")
    assert_same_bits(fxquant.load(FUNCTIONS["no bias"](), tmp_path / "int8.pt")(x), int8(x))
