"""Recovery after training: the roundings that are found, and that they are what is saved, frozen, converted and exported."""

from __future__ import annotations

import copy
import itertools
import pickle

import digits
import pytest
import torch
import torch.nn.functional as F
from comparisons import decibels
from torch import Tensor, nn

import fxquant
from fxquant.algorithms import closed_form
from fxquant.algorithms.closed_form import Scales, rounded_rows
from fxquant.algorithms.columns import Matrices
from fxquant.algorithms.moments import Moments, moments_of
from fxquant.algorithms.order import late_weights, units
from fxquant.errors import CalibrationError, InputError, LevelError
from fxquant.nn.fake_quantize import WeightQuantize
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.tuning.placing import place_again

NO_FLOOR = torch.zeros(1, dtype=torch.float64)


def setting(weight: int = 4, activation: int = 8) -> fxquant.Setting:
    scheme = fxquant.Scheme.activation(activation, estimator="mse")
    return fxquant.Setting(weight=fxquant.Scheme.weight(weight), activation=scheme)


def ready(model: nn.Module, batches: list, *, weight: int = 4, activation: int = 8, **more):
    prepared = fxquant.prepare(model, batches[0], recipe=setting(weight, activation), **more)
    return fxquant.calibrate(prepared, batches, progress=False)


def recovered(model: nn.Module, batches: list, **more):
    return fxquant.recover(ready(model, batches, **more), batches, progress=False)


def quantizers(model: nn.Module) -> list[WeightQuantize]:
    return [part for part in model.modules() if isinstance(part, WeightQuantize)]


class Block(nn.Module):
    """Convolutions of every kind, norms with awkward γ, a shortcut, a functional call, one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn2 = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.weight, self.shift = nn.Parameter(torch.randn(5, 6, 3, 3) / 7), nn.Parameter(torch.randn(5) / 4)
        self.head = nn.Linear(5, 4, bias=False)
        with torch.no_grad():
            for norm in (self.bn, self.bn2):
                norm.weight.copy_(torch.tensor([1.2, -0.7, 0.0, 0.5, 0.9, -1.1, 0.3, 0.8]))
                norm.bias.uniform_(-0.5, 0.5)
                norm.running_mean.uniform_(-0.3, 0.3)
                norm.running_var.uniform_(0.2, 0.6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = F.relu(self.bn2(self.depthwise(x)))
        y = F.relu(self.grouped(y) + x)
        y = self.twice(F.relu(self.twice(y)))
        y = F.relu(F.conv2d(self.up(y), self.weight, self.shift))
        return self.head(y.mean((2, 3)))


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    model = Block().eval()
    smooth = F.avg_pool2d(torch.randn(48, 3, 18, 18), 3, 1) * 3
    return model, list(smooth.split(16))


def layer_error(real: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean square of what each row of ``real`` ``(R, K)`` misses of targets ``(R, P)``."""
    return (targets - real @ inputs).pow(2).mean(-1)


@pytest.mark.parametrize("bits, width", [(2, 9), (3, 6), (4, 4)])
def test_close_to_the_best_of_all_roundings(bits, width):
    """Of 24 rows at least half are the best on their scale; on average 10 % above it at most; none is above nearest."""
    ratios, scheme = [], fxquant.Scheme.weight(bits)
    every = torch.tensor(list(itertools.product(range(scheme.qmin, scheme.qmax + 1), repeat=width))).double()
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
        inputs = mix @ torch.randn(width, 500, generator=generator, dtype=torch.float64)
        rows = torch.randn(3, width, generator=generator, dtype=torch.float64)
        targets = rows @ (inputs + 0.2 * torch.randn(inputs.shape, generator=generator, dtype=torch.float64))
        second, crossed = (inputs @ inputs.T)[None] / 500, (targets @ inputs.T)[None] / 500
        goal = torch.linalg.solve(second, crossed, left=False)
        found = rounded_rows(goal, rows[None], second, crossed, Scales(1, 3, 3), scheme, floor=NO_FLOOR)
        error = layer_error(found.integers[0] * found.scale[:, None], inputs, targets)
        for row in range(3):
            real = every * found.scale[row]
            moment = ((real @ second[0] - 2 * crossed[0, row]) * real).sum(1).min() + targets[row].pow(2).mean()
            ratios.append(float(error[row] / moment))
            for weights in (rows[row], goal[0, row]):
                nearest = torch.clamp(torch.round(weights / found.scale[row]), scheme.qmin, scheme.qmax)
                on_grid = layer_error(nearest[None] * found.scale[row], inputs, targets[row][None])
                assert error[row] <= on_grid * (1 + 1e-9)
    ratio = torch.tensor(ratios, dtype=torch.float64)
    assert ratio.min() > 1 - 1e-9 and ratio.median() < 1 + 1e-9 and ratio.mean() < 1.1


class TwoUnits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.c, self.shortcut, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.b(F.relu(self.a(x))) + x)
        x = F.relu(self.shortcut(x) + self.c(x))
        return self.head(x.mean((2, 3)))


def test_weights_come_late_and_residual_units_are_blocks():
    graph = fxquant.prepare(TwoUnits().eval(), torch.randn(2, 4, 5, 5))
    order = [node.name for node in late_weights(graph)]
    assert sorted(order) == sorted(node.name for node in graph.graph.nodes)
    names = [[node.name for node in block if "quantizer" not in node.name] for block in units(graph)]
    assert [block for block in names if block] == [
        ["stem", "relu"],
        ["a", "relu_1", "b", "add", "relu_2"],
        ["shortcut", "c", "add_1", "relu_3"],
        ["mean"],
        ["head"],
    ]


KINDS = {
    "conv1d": (nn.Conv1d(6, 4, 3, stride=2, padding=2, dilation=2, groups=2), (5, 6, 11)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), padding="same", padding_mode="reflect"), (4, 3, 5, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, stride=(2, 1), padding=1, groups=4), (4, 4, 6, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2, padding=1, padding_mode="circular"), (3, 2, 3, 4, 3)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, padding=1), (3, 4, 5)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2), (3, 4, 4, 3)),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 2, stride=(2, 1, 2)), (2, 2, 2, 3, 2)),
    "linear": (nn.Linear(7, 5), (3, 4, 7)),
}


def layer_of(prepared):
    """The one weighted op of a prepared model: module, matrices and what stands before it."""
    (node,) = (
        n for n in prepared.graph.nodes if n.op == "call_module" and hasattr(prepared.get_submodule(n.target), "weight")
    )
    part = prepared.get_submodule(node.target)
    return (
        part,
        Matrices(call_of(node, part), behaviour_of(node), part.weight),
        prepared.get_submodule(node.args[0].target),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_op_is_a_product_of_its_matrices(kind):
    layer, shape = KINDS[kind]
    prepared = fxquant.prepare(nn.Sequential(layer).eval(), torch.randn(shape))
    _, matrices, _ = layer_of(prepared)
    for seed in range(3):
        x, weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)), torch.randn_like(layer.weight)
        with torch.no_grad():
            twin = copy.deepcopy(layer)
            twin.weight.copy_(weight)
            twin.bias.zero_()
            wanted = matrices.per_position(twin(x))
        found = matrices.rows(weight) @ matrices.columns(x, torch.arange(wanted.shape[-1]))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(matrices.weight(matrices.rows(weight)), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_each_group_is_rounded_as_a_linear_layer_by_hand(kind, monkeypatch):
    """H, C, the ridge and the bias from all positions in float64, for one group at a time where scales are its own.

    A search among integers is no continuous function: where two roundings lose the same to within float32's noise, another
    order of a sum takes the other one. So the moments are held against float64 ones with float32's tolerance, and the
    integers and scales against the search on the very moments that were used.
    """
    layer, shape = KINDS[kind]
    used: list[Moments] = []

    def noted(*args, **kwargs):
        used.append(moments_of(*args, **kwargs))
        return used[-1]

    monkeypatch.setattr(closed_form, "moments_of", noted)
    x = torch.randn((16, *shape[1:]), generator=torch.Generator().manual_seed(7)) + 0.4
    prepared = recovered(nn.Sequential(layer).eval(), [x])
    (moments,) = used
    part, matrices, entering = layer_of(prepared)
    with torch.no_grad():
        columns = matrices.columns(
            entering(x), torch.arange(10**4)[: matrices.per_position(layer(x)).shape[-1]]
        ).double()
        targets = matrices.per_position(layer(x)).double()
    columns, targets = (t.movedim(0, -2).flatten(-2) for t in (columns, targets))
    weights, means = matrices.rows(layer.weight.detach()).double(), columns.mean(-1)
    x_hat, t = columns - means[..., None], targets - targets.mean(-1, keepdim=True)
    by_hand = Moments(
        x_hat @ x_hat.mT / x_hat.shape[-1],
        t @ x_hat.mT / x_hat.shape[-1],
        means,
        targets.mean(-1),
        columns.shape[-1],
        len(x),
    )
    for name in ("inputs", "crossed", "input_mean", "target_mean"):  # float32's sums of numbers up to 5
        torch.testing.assert_close(getattr(moments, name), getattr(by_hand, name), atol=2e-6, rtol=2e-6)
    assert (moments.count, moments.images) == (by_hand.count, by_hand.images)
    few = moments.count < 40 * weights.shape[-1]
    share = closed_form.chosen_ridge(weights, moments) if few else 0.1
    ridge = share * moments.inputs.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    ridge = ridge * torch.eye(weights.shape[-1]).double()
    goal = torch.linalg.solve(moments.inputs + ridge, moments.crossed + weights @ ridge, left=False)
    delta = closed_form.chosen_damping(goal, moments, part.weight_quantizer.scheme) if few else 0.0
    delta = delta * moments.inputs.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    inputs = moments.inputs + delta * torch.eye(weights.shape[-1]).double()
    crossed = goal @ inputs if few else moments.crossed
    groups, rows = weights.shape[:2]
    own = part.weight_quantizer
    together = [range(groups)] if matrices.shares_scales else [range(g, g + 1) for g in range(groups)]
    for some in together:
        at, scales = list(some), Scales(len(some), rows, rows)
        each = (tensor[at] for tensor in (goal, weights, inputs, crossed))
        wanted = rounded_rows(*each, scales, own.scheme, floor=NO_FLOOR)
        scale = own.scale.flatten() if matrices.shares_scales else own.scale.reshape(groups, rows)[at].flatten()
        torch.testing.assert_close(scale.double(), wanted.scale, atol=0, rtol=1e-6)  # kept as float32
        found = matrices.rows(own.integers.double())[at]
        assert (found != wanted.integers).double().mean() <= 0.02  # ties between two orders of a float64 sum
    real = matrices.rows(own(part.weight).detach()).double()
    bias = targets.mean(-1) - (real * means[:, None]).sum(-1)
    torch.testing.assert_close(own.bias_for(part.bias).double(), bias.flatten(), atol=1e-4, rtol=1e-4)


def test_the_parts_of_the_moments_make_up_the_whole(monkeypatch):
    used: list[Moments] = []
    monkeypatch.setattr(closed_form, "moments_of", lambda *a: used.append(moments_of(*a)) or used[-1])
    recovered(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False)).eval(), [torch.randn(8, 4, 6, 6) + 0.4 for _ in range(3)])
    (whole,) = used
    fit, rest = whole.halves
    assert fit.count + rest.count == whole.count and rest.count == whole.count // 4
    for name in ("inputs", "crossed", "input_mean", "target_mean"):
        joined = (fit.count * getattr(fit, name) + rest.count * getattr(rest, name)) / whole.count
        torch.testing.assert_close(joined, getattr(whole, name), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("images", [8, 16, 64])
def test_few_images_do_no_harm_to_others(images):
    """A layer with more columns than positions: least squares gave what calibrates it, and harmed everything else."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, 2), nn.ReLU6(), nn.Conv2d(64, 64, 3, 2), nn.Flatten(), nn.Linear(576, 10))
    model.eval()

    def some(count: int, seed: int) -> torch.Tensor:
        coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        return nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")

    batches = list(some(images, 1).split(8))
    nearest, chosen = ready(model, batches, weight=8, activation=8), ready(model, batches, weight=8, activation=8)
    fxquant.recover(chosen, batches, progress=False)
    others = some(256, 2)
    with torch.no_grad():
        before, after = (decibels(model(others), prepared(others)) for prepared in (nearest, chosen))
    assert after > before - 0.1


@pytest.mark.parametrize("weight, activation", [(4, 8), (2, 8), (4, 4), (8, 8)])
def test_closer_to_float_than_nearest_rounding(block, weight, activation):
    model, batches = block
    with torch.no_grad():
        true = torch.cat([model(x) for x in batches])
        before = ready(model, batches, weight=weight, activation=activation)
        nearest = torch.cat([before(x) for x in batches])
        after = fxquant.recover(before, batches, progress=False)
        found = torch.cat([after(x) for x in batches])
    assert decibels(true, found) > decibels(true, nearest) + (0 if weight == 8 else 3)


@pytest.mark.long
@pytest.mark.parametrize("weight, activation, processor", [(4, 8, "vnni"), (2, 8, "any"), (4, 4, "any"), (8, 8, "any")])
def test_frozen_and_integer_models_are_the_recovered_one(block, weight, activation, processor):
    model, batches = block
    prepared = recovered(model, batches, weight=weight, activation=activation, processor=processor)
    assert all(own.integers is not None for own in quantizers(prepared))
    x = torch.cat(batches)
    with torch.no_grad():
        y, frozen = prepared(x), fxquant.freeze(prepared)
        assert decibels(y, frozen(x)) >= 60
        assert decibels(y, fxquant.convert(prepared, kernels="reference")(x)) >= 60
        assert decibels(y, fxquant.convert(frozen)(x)) >= 60
    shipped = fxquant.convert(prepared).get_submodule("grouped").weight
    assert torch.equal(shipped, prepared.get_submodule("grouped").weight_quantizer.integers)


@pytest.mark.long
def test_roundings_survive_what_a_model_goes_through(block, tmp_path):
    model, batches = block
    prepared = recovered(model, batches)
    x = batches[0]
    y = prepared(x)
    fresh = fxquant.prepare(model, x, recipe=setting())
    fresh.load_state_dict(prepared.state_dict())
    again = {
        "state dict": fresh,
        "deepcopy": copy.deepcopy(prepared),
        "pickle": pickle.loads(pickle.dumps(prepared)),
    }
    for level, made in (
        ("prepared", prepared),
        ("frozen", fxquant.freeze(prepared)),
        ("integer", fxquant.convert(prepared)),
    ):
        fxquant.save(made, tmp_path / "model.pt")
        loaded = fxquant.load(Block(), tmp_path / "model.pt")
        assert torch.equal(loaded(x), made(x)), level
        again[level] = loaded if level == "prepared" else prepared
    for name, twin in again.items():
        assert torch.equal(twin(x), y), name
        assert torch.equal(fxquant.convert(twin)(x), fxquant.convert(prepared)(x)), name
    before = [own.integers.clone() for own in quantizers(prepared)]
    fxquant.calibrate(prepared, [batches[1]], progress=False)
    assert all(torch.equal(own.integers, old) for own, old in zip(quantizers(prepared), before, strict=True))
    prepared.load_state_dict(ready(model, batches).state_dict())
    assert all(own.integers is None for own in quantizers(prepared)), "a state without pinned roundings has none"


def test_roundings_survive_another_placement(block):
    model, batches = block
    prepared = recovered(model, batches)
    again = place_again(prepared, fxquant.Recipe({"depthwise": None}, default=setting()))
    kept = [part for part in again.modules() if isinstance(part, WeightQuantize)]
    assert len(kept) == len(quantizers(prepared)) - 1 and all(own.integers is not None for own in kept)
    assert torch.equal(
        again.stem.weight_quantizer(again.stem.weight), prepared.stem.weight_quantizer(prepared.stem.weight)
    )


def test_the_float_network_stays(block):
    model, batches = block
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared = ready(model, batches)
    with fxquant.quantizers_off(prepared), torch.no_grad():
        y = prepared(batches[0])
    prepared.train()
    assert fxquant.recover(prepared, batches, progress=False) is prepared
    with fxquant.quantizers_off(prepared), torch.no_grad():
        assert torch.equal(prepared(batches[0]), y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for own in quantizers(prepared):
        own.unpin()
    plain = ready(model, batches)
    assert torch.equal(
        plain.stem.weight_quantizer(plain.stem.weight), prepared.stem.weight_quantizer(prepared.stem.weight)
    )


@pytest.mark.long
def test_memory_and_batches_change_nothing(block):
    model, batches = block
    on_disk = fxquant.recover(ready(model, batches), batches, memory=0.0, progress=False)
    assert torch.equal(on_disk(batches[0]), recovered(model, batches)(batches[0]))


class Shared(nn.Module):
    """One weight with two biases, and one without any."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.biases = nn.ParameterList([torch.randn(6), torch.randn(6)])

    def forward(self, x: Tensor) -> Tensor:
        for bias in self.biases:
            x = F.relu(F.linear(x, self.weight, bias))
        return F.linear(x, self.weight)


def test_calls_of_one_weight_keep_their_own_biases():
    torch.manual_seed(0)
    batches = list(torch.randn(64, 6).split(32))
    prepared = recovered(Shared().eval(), batches, weight=3)
    (own,) = quantizers(prepared)
    assert own.integers is not None and own.bias_for(torch.ones(6)).equal(torch.ones(6))
    with torch.no_grad():
        assert decibels(prepared(batches[0]), fxquant.convert(prepared, kernels="reference")(batches[0])) >= 60


class Branches(nn.Module):
    """A branch that depends on data, with layers before, in and behind it; takes a dict's entries by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 6, 3), Inner(), nn.Linear(6, 4)

    def forward(self, image: Tensor, gain: Tensor) -> dict[str, Tensor]:
        return {"y": self.last(self.second(F.relu(self.first(image)) * gain).mean((2, 3)))}


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


def test_graphs_inside_islands_are_recovered_too():
    torch.manual_seed(0)
    batches = [{"image": torch.randn(8, 3, 8, 8), "gain": torch.rand(1) + 1} for _ in range(3)]
    prepared = recovered(Branches().eval(), batches, weight=3)
    assert len(quantizers(prepared)) == 3 and all(own.integers is not None for own in quantizers(prepared))


def test_what_cannot_be_recovered_is_told(block):
    model, batches = block
    own = type("Mine", (WeightQuantize,), {})
    prepared = ready(model, batches)
    prepared.grouped.weight_quantizer.__class__ = own
    with pytest.warns(UserWarning, match="1 parts of the model are rounded as before: grouped: .* a Mine"):
        fxquant.recover(prepared, batches, progress=False)


def test_errors_leave_the_model_as_it_was(block):
    model, batches = block
    with pytest.raises(CalibrationError, match=r"no range yet.*\n.*calibrate"):
        fxquant.recover(fxquant.prepare(model, batches[0]), batches, progress=False)
    prepared = ready(model, batches)
    y = prepared(batches[0])
    with pytest.raises(InputError, match=r"method='adam'.*closed_form"):
        fxquant.recover(prepared, batches, method="adam")
    with pytest.raises(CalibrationError, match="empty loader"):
        fxquant.recover(prepared, [], progress=False)
    with pytest.raises(CalibrationError, match="batch 2 holds NaN"):
        fxquant.recover(prepared, [batches[0], batches[1] * torch.nan], progress=False)
    assert torch.equal(prepared(batches[0]), y) and all(own.integers is None for own in quantizers(prepared))
    for wrong in (model, fxquant.convert(prepared)):
        with pytest.raises(LevelError, match="recover takes a model at level prepared"):
            fxquant.recover(wrong, batches, progress=False)
    with pytest.raises(LevelError, match="qat=True"):
        fxquant.recover(fxquant.prepare(model, batches[0], qat=True), batches, progress=False)


def test_pin_checks_what_it_is_given(block):
    model, batches = block
    own = ready(model, batches).stem.weight_quantizer
    integers = torch.zeros(8, 3, 3, 3)
    for wrong in (integers + 8, integers + 0.5):
        with pytest.raises(InputError, match="outside of -7…7"):
            own.pin(wrong, torch.ones(8))
    for scale in (torch.ones(3), torch.zeros(8), torch.full((8,), torch.nan)):
        with pytest.raises(InputError, match="positive scale"):
            own.pin(integers, scale)


def of_digits(weight: int, activation: int, **more):
    """The digits' network prepared and calibrated, with its calibration batches."""
    batches = list(digits.training_batches(0))[:8]
    prepared = fxquant.prepare(digits.trained(), batches[0][0], recipe=setting(weight, activation), **more)
    return fxquant.calibrate(prepared, batches, progress=False), batches


@pytest.mark.long
@pytest.mark.parametrize("weight, activation, least", [(4, 8, 0.5), (3, 8, 1.0), (4, 4, 3.0)])
def test_a_trained_network_keeps_its_accuracy(weight, activation, least):
    prepared, batches = of_digits(weight, activation)
    recovered = fxquant.convert(fxquant.recover(prepared, batches, progress=False))
    assert digits.accuracy(recovered) >= digits.accuracy(digits.trained()) - least


@pytest.mark.long
def test_the_file_of_a_recovered_model_gives_the_same_classes(tmp_path):
    session = pytest.importorskip("onnxruntime").InferenceSession
    prepared, batches = of_digits(4, 8, target="onnxruntime")
    integer = fxquant.convert(fxquant.recover(prepared, batches, progress=False))
    images = digits.test_images()[0]
    fxquant.export_onnx(integer, tmp_path / "model.onnx", images[:2])
    file = session(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = file.run(None, {file.get_inputs()[0].name: images.numpy()})
    wanted = integer(images).detach()
    assert (torch.from_numpy(found).argmax(1) == wanted.argmax(1)).double().mean() >= 0.998
