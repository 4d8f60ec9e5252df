"""AdaRound and block reconstruction: near the best of all roundings, by one step only, pinned, and better than what was."""

from __future__ import annotations

import copy
import itertools

import digits
import pytest
import torch
from comparisons import decibels
from torch import Tensor, nn

import fxquant
from fxquant.algorithms import reconstruct
from fxquant.algorithms.columns import Matrices
from fxquant.errors import CalibrationError, InputError
from fxquant.nn.fake_quantize import WeightQuantize
from fxquant.ops.calls import behaviour_of, call_of


def setting(weight: int, activation: int = 8) -> fxquant.Setting:
    return fxquant.Setting(
        weight=fxquant.Scheme.weight(weight, estimator="mse"),
        activation=fxquant.Scheme.activation(activation, estimator="mse"),
    )


def ready(model: nn.Module, batches: list, weight: int, activation: int = 8):
    prepared = fxquant.prepare(model, batches[0], recipe=setting(weight, activation))
    return fxquant.calibrate(prepared, batches, progress=False)


KINDS = {
    "linear": (nn.Linear(12, 3), (200, 12)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (40, 4, 4, 4)),
    "grouped": (nn.Conv2d(4, 6, (2, 3), groups=2), (40, 4, 4, 5)),
    "transposed": (nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2), (40, 4, 3, 3)),
    "conv1d": (nn.Conv1d(2, 3, 5), (60, 2, 9)),
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "transposed" else pytest.mark.long) for k in KINDS])
def test_close_to_the_best_of_all_roundings_up_or_down(kind):
    """Every way of rounding each row of at most 12 weights up or down, on the scale that is given: a quarter above the
    least error at most, on average over rows, and nearer to it than rounding to nearest."""
    layer, shape = KINDS[kind]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator)
    x = x + x.mean(1, keepdim=True) * 2 + 0.5  # neighbours go together, which rounding to nearest does not see
    model = nn.Sequential(copy.deepcopy(layer)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    prepared = ready(model, [x], 3)
    fxquant.recover(prepared, [x], method="adaround", steps=1000, progress=False)
    (node,) = (
        n for n in prepared.graph.nodes if n.op == "call_module" and hasattr(prepared.get_submodule(n.target), "weight")
    )
    part, entering = prepared.get_submodule(node.target), prepared.get_submodule(node.args[0].target)
    matrices, own = Matrices(call_of(node, part), behaviour_of(node), part.weight), part.weight_quantizer
    with torch.no_grad():
        targets = matrices.per_position(model(x)).double()
        positions = targets.shape[-1]
        targets = targets.movedim(0, -2).flatten(-2)
        columns = matrices.columns(entering(x), torch.arange(positions)).double()
    columns = columns.movedim(0, -2).flatten(-2)
    bias = own.bias_for(part.bias).detach().double().reshape(targets.shape[:2])
    axis = [-1 if i == own.axis else 1 for i in range(layer.weight.ndim)]
    scales = matrices.rows((own.scale.reshape(axis) * torch.ones_like(part.weight)).detach()).double()
    real = matrices.rows(part.weight.detach()).double() / scales
    chosen = matrices.rows(own.integers).double()
    assert ((chosen - real).abs() < 1).logical_or(real.abs() > own.scheme.qmax).all()
    ways = torch.tensor(list(itertools.product((0.0, 1.0), repeat=real.shape[-1]))).double()
    found, nearest = [], []
    for group, row in itertools.product(range(real.shape[0]), range(real.shape[1])):
        every = (real[group, row].floor() + ways).clamp(own.scheme.qmin, own.scheme.qmax) * scales[group, row]
        other = real[group, row].round().clamp(own.scheme.qmin, own.scheme.qmax) * scales[group, row]

        def error(weights: Tensor, at: tuple[int, int] = (group, row)) -> Tensor:
            return (targets[at] - weights @ columns[at[0]] - bias[at]).square().mean(-1)

        least = error(every).min()
        found.append(float(error(chosen[group, row] * scales[group, row]) / least))
        nearest.append(float(error(other) / least))
    assert min(found) > 1 - 1e-6
    assert sum(found) / len(found) < 1.25
    assert sum(found) < sum(nearest) or max(nearest) < 1 + 1e-6  # which is the best itself, in one of the five


def test_the_clamp_behind_a_layer_counts():
    """A row whose outputs are all negative before a ReLU cannot lose anything: the error that is left is the other row's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-50.0, 0.0]))
    x = torch.randn(256, 8)
    prepared = ready(model, [x], 3)
    before = prepared.get_submodule("0").weight_quantizer(model[0].weight).detach()
    fxquant.recover(prepared, [x], method="adaround", steps=300, progress=False)
    own: WeightQuantize = prepared.get_submodule("0").weight_quantizer
    after = own(model[0].weight).detach()

    def lost(weight: Tensor) -> float:
        relu = nn.functional.relu
        with torch.no_grad():
            given = relu(nn.functional.linear(prepared.get_submodule("input_1_quantizer")(x), weight, model[0].bias))
            return float((relu(model[0](x)) - given).square().mean())

    assert lost(after) <= lost(before)


@pytest.fixture(scope="module")
def network():
    model = digits.trained()
    return model, list(digits.data()[0][:512].split(128))


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(digits.test_images()[0])


@pytest.mark.long
@pytest.mark.parametrize("weight, activation", [(4, 8), (3, 4)])
def test_adaround_is_closer_to_float_than_nearest(network, weight, activation):
    model, batches = network
    prepared = ready(model, batches, weight, activation)
    before = decibels(output(model), output(prepared))
    fxquant.recover(prepared, batches, method="adaround", steps=300, progress=False)
    assert decibels(output(model), output(prepared)) > before + 2


def test_what_adaround_takes(network):
    model, batches = network
    with pytest.raises(InputError, match="steps=0"):
        fxquant.recover(ready(model, batches, 4), batches, method="adaround", steps=0)
    with pytest.raises(InputError, match="'closed_form' was asked for"):
        fxquant.recover(ready(model, batches, 4), batches, steps=10)


def units_errors(model: nn.Module, prepared: nn.Module) -> tuple[float, float]:
    """The errors of the block of two convolutions and of the last layer, each reading what is really before it."""
    x = torch.cat(list(digits.data()[0][:512].split(128)))
    with torch.no_grad():
        return decibels(model(x), prepared(x)), decibels(output(model), output(prepared))


@pytest.mark.long
@pytest.mark.parametrize("first", ["nearest", "closed form"])
def test_block_reconstruction_is_better_than_what_it_starts_from(network, first):
    model, batches = network
    prepared = ready(model, batches, 2, 8)
    if first == "closed form":
        fxquant.recover(prepared, batches, progress=False)
    before, parameters = units_errors(model, prepared), {n: p.clone() for n, p in prepared.named_parameters()}
    reconstruct(prepared, batches, steps=400, progress=False)
    after = units_errors(model, prepared)
    assert after[0] >= before[0] + (3 if first == "nearest" else 0)
    assert all(torch.equal(parameters[name], value) for name, value in prepared.named_parameters())


def test_what_is_reconstructed_is_pinned_saved_and_shipped(network, tmp_path):
    model, batches = network
    prepared = fxquant.recover(ready(model, batches, 3, 6), batches, progress=False)
    reconstruct(prepared, batches, steps=4, progress=False)
    own = [part for part in prepared.modules() if isinstance(part, WeightQuantize)]
    assert not any(value.requires_grad for part in own for value in part._buffers.values())
    assert not any(part._forward_hooks for part in prepared.modules())
    y = output(prepared)
    fxquant.save(prepared, tmp_path / "blocks.pt")
    assert torch.equal(output(fxquant.load(model, tmp_path / "blocks.pt")), y)
    assert torch.equal(output(copy.deepcopy(prepared)), y)
    other = fxquant.load(model, tmp_path / "blocks.pt")
    other.load_state_dict(prepared.state_dict())
    assert torch.equal(output(other), y) and torch.equal(output(fxquant.freeze(prepared)), y)
    assert decibels(output(fxquant.freeze(prepared)), output(fxquant.convert(prepared))) > 60
    fxquant.calibrate(prepared, batches, progress=False)
    assert all(torch.equal(a.integers, b.integers) for a, b in zip(own, quantizers_of(other), strict=True) if a.pinned)


def quantizers_of(model: nn.Module) -> list[WeightQuantize]:
    return [part for part in model.modules() if isinstance(part, WeightQuantize)]


class Kinds(nn.Module):
    """A residual unit of grouped, depthwise and transposed layers, and one weight that two calls read."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.depthwise = nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.down, self.up = nn.Conv2d(8, 4, 2, stride=2), nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)
        self.twice, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        relu = nn.functional.relu
        x = relu(self.up(relu(self.down(relu(self.depthwise(relu(self.grouped(x))))))) + x)
        return self.head(self.twice(relu(self.twice(x))).mean((2, 3)))


@pytest.mark.long
def test_units_of_every_kind_of_layer():
    torch.manual_seed(0)
    model, batches = Kinds().eval(), list(torch.randn(48, 4, 6, 6).split(16))
    prepared = ready(model, batches, 3, 8)
    x = torch.cat(batches)
    with torch.no_grad():
        before = decibels(model(x), prepared(x))
        with pytest.warns(UserWarning, match="twice_1: other calls read the same weight"):
            reconstruct(prepared, batches, steps=150, progress=False)
        assert decibels(model(x), prepared(x)) > before
    for name in ("grouped", "depthwise", "down", "up"):
        own = prepared.get_submodule(name).weight_quantizer
        assert own.integers is not None and own.integers.abs().max() <= own.scheme.qmax, name
    assert prepared.get_submodule("twice_1").weight_quantizer.integers is None


def test_a_failed_run_leaves_the_model_as_it_was(network):
    model, batches = network
    prepared = ready(model, batches, 3, 6)
    y = output(prepared)
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        reconstruct(prepared, [batches[0], torch.full_like(batches[1], torch.nan)], steps=2, progress=False)
    with pytest.raises(CalibrationError, match="reconstruct was given an empty loader"):
        reconstruct(prepared, [], progress=False)
    with pytest.raises(InputError, match="keep=1"):
        reconstruct(prepared, batches, keep=1.0, progress=False)
    assert torch.equal(output(prepared), y)
