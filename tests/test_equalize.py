"""Equalization, SmoothQuant and bias correction: the float network stays, ranges and means become what the papers say."""

from __future__ import annotations

import copy
import warnings
from functools import cache

import digits
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.algorithms.bias_correction import clipped_normal, correct_biases
from fxquant.algorithms.equalization import equalize
from fxquant.algorithms.smooth_quant import smooth
from fxquant.errors import CalibrationError, InputError, LevelError

PER_TENSOR = fxquant.Setting(weight=fxquant.Scheme.weight(8, per_channel=False))


class Separable(nn.Module):
    """A layer, a depthwise one and a pointwise one, three times over; batch norms and ReLUs between."""

    def __init__(self, width: int = 16, act: type[nn.Module] = nn.ReLU, padding: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for stride in (1, 2, 2):
            layers += [nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), act()]
            layers += [
                nn.Conv2d(width, width, 3, stride, padding, groups=width, bias=False),
                nn.BatchNorm2d(width),
                act(),
            ]
            layers += [nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), act()]
            inputs = width
        self.features, self.head = nn.Sequential(*layers), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


@cache
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = Separable()
    digits.train(model, epochs=8, rate=0.05)
    return model.eval()


def unbalanced(model: nn.Module, spread: float = 8.0) -> nn.Module:
    """The same function with channels scaled against each other: by 2^u between a batch norm and the layer that reads it."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    parts = list(model.features)
    with torch.no_grad():
        for norm, layer in zip(parts[1::3], parts[3::3], strict=False):
            factor = torch.exp2((torch.rand(len(norm.weight), generator=generator) - 0.5) * spread)
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            layer.weight.div_(factor.reshape(-1, 1, 1, 1) if layer.groups > 1 else factor.reshape(1, -1, 1, 1))
    return model


def accuracy(model: nn.Module) -> float:
    """Over all 1797 images, in percent."""
    images, labels = digits.data()
    with torch.no_grad():
        return 100 * float((model.eval()(images).argmax(1) == labels).double().mean())


def batches() -> list[Tensor]:
    return list(digits.data()[0][:512].split(128))


@pytest.mark.long
def test_a_mobilenet_with_unbalanced_channels_is_useless_per_tensor_and_equalized_it_is_not():
    model = unbalanced(trained())
    assert accuracy(model) == pytest.approx(accuracy(trained()), abs=0.1)
    plain = fxquant.prepare(model, batches()[0], recipe=PER_TENSOR)
    equal = equalize(fxquant.prepare(model, batches()[0], recipe=PER_TENSOR))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the first, calibrate says that next to nothing is left
        fxquant.calibrate(plain, batches(), progress=False)
    before, after = fxquant.convert(plain), fxquant.convert(fxquant.calibrate(equal, batches(), progress=False))
    assert accuracy(before) < accuracy(model) - 20
    assert accuracy(after) > accuracy(model) - 0.3


def test_three_ranges_around_a_depthwise_layer_end_at_their_geometric_mean():
    torch.manual_seed(0)
    whole = unbalanced(Separable(8).eval(), 12.0)
    model, x = nn.Sequential(*list(whole.features)[:8]).eval(), torch.rand(4, 1, 12, 12)
    prepared = fxquant.prepare(model, x, recipe=PER_TENSOR)
    state = copy.deepcopy(model.state_dict())
    layers = [p for p in prepared.modules() if isinstance(p, nn.Conv2d)]

    def ranges() -> Tensor:
        weights = [layers[0].weight, layers[1].weight, layers[2].weight.transpose(0, 1)]
        return torch.stack([weight.detach().flatten(1).abs().amax(1).double() for weight in weights])

    with torch.no_grad(), fxquant.quantizers_off(prepared):
        wanted, y = ranges().log().mean(0).exp(), prepared(x)
        equalize(prepared, absorb=False)
        torch.testing.assert_close(prepared(x), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ranges(), wanted.expand(3, -1), rtol=1e-3, atol=0)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Chain(nn.Module):
    """Two layers of any kind with an op between them."""

    def __init__(self, first: nn.Module, between: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.second = first, between, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


PAIRS = {
    "triple exact": (nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 3, 6, 6)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2), nn.LeakyReLU(0.2), nn.Conv2d(8, 6, 3, groups=2), (2, 4, 9, 9)),
    "pooled": (nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 6, 1), (2, 3, 8, 8)),
    "transposed": (
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 3, 3, groups=3),
        (2, 4, 5, 5),
    ),
    "linear": (nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3), (4, 5)),
    "conv1d": (nn.Conv1d(2, 6, 3), nn.PReLU(6), nn.Conv1d(6, 3, 1), (2, 2, 9)),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_the_float_function_stays_and_both_ranges_are_equal(kind):
    torch.manual_seed(1)
    first, between, second, shape = PAIRS[kind]
    model, x = Chain(first, between, second).eval(), torch.randn(shape)
    prepared = fxquant.prepare(model, x)
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        y = prepared(x)
        equalize(prepared)
        torch.testing.assert_close(prepared(x), y, rtol=1e-4, atol=1e-5)
        ones = torch.eye(first.bias.numel())
        rows = prepared.first.weight.detach(), prepared.second.weight.detach()
    groups = getattr(second, "groups", 1)
    for channel in range(len(ones)):
        if kind == "transposed":
            group, inside = divmod(channel, 3)
            r1 = rows[0][2 * group : 2 * group + 2, inside].abs().max()
            r2 = rows[1][channel].abs().max()
        else:
            each = len(ones) // groups
            outputs = rows[1].shape[0] // groups
            group, inside = divmod(channel, each)
            r1 = rows[0][channel].abs().max()
            r2 = rows[1][group * outputs : (group + 1) * outputs, inside].abs().max()
        assert float(r1) == pytest.approx(float(r2), rel=1e-4)


class OwnForward(nn.Conv2d):
    """A convolution that calls torch's function with its parameters, which fxquant sees as a function then."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.long
def test_a_function_of_its_own_parameters_is_treated_as_a_module():
    model, x = unbalanced(trained()), torch.randn(4, 1, 8, 8)
    twin = copy.deepcopy(model)
    for part in twin.modules():
        if isinstance(part, nn.Conv2d):
            part.__class__ = OwnForward
    found = []
    for each in (model, twin):
        prepared = fxquant.prepare(each, x, recipe=PER_TENSOR)
        before = dict(prepared.named_parameters())
        equalize(prepared)
        changed = {name for name, value in prepared.named_parameters() if not torch.equal(value, before[name])}
        fxquant.calibrate(prepared, [x], progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the first layer, which reads the data, nothing is known
            correct_biases(prepared)
        parameters = dict(prepared.named_parameters())
        found.append((parameters, changed, prepared(x)))
    assert found[0][1] == found[1][1] and len(found[0][1]) > 8
    assert all(torch.equal(value, found[1][0][name]) for name, value in found[0][0].items())
    assert torch.equal(found[0][2], found[1][2])


def test_a_function_whose_parameters_others_read_is_left_alone():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.first = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.relu(F.conv2d(F.relu(self.first(x)), self.weight)), self.weight)

    model, x = Twice().eval(), torch.randn(2, 4, 5, 5)
    with pytest.warns(UserWarning, match="no pair of layers"):
        prepared = equalize(fxquant.prepare(model, x))
    assert torch.equal(prepared.weight, model.weight) and torch.equal(prepared.first.weight, model.first.weight)


def test_what_is_not_homogeneous_is_refused_with_the_reason():
    x = torch.randn(2, 3, 6, 6)
    model = Chain(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1)).eval()
    with pytest.warns(UserWarning, match="clamps at 6; ReLU would be"):
        prepared = equalize(fxquant.prepare(model, x))
    assert torch.equal(prepared.first.weight, model.first.weight)
    with pytest.warns(UserWarning, match="not positively homogeneous"):
        equalize(fxquant.prepare(Chain(nn.Conv2d(3, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1)).eval(), x))


def test_two_readers_and_shared_weights_are_left_alone():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.b(self.b(F.relu(self.a(x)))) + x

    model, x = Residual().eval(), torch.randn(2, 3, 4, 4)
    with pytest.warns(UserWarning, match="no pair"):
        prepared = equalize(fxquant.prepare(model, x))
    assert all(torch.equal(getattr(prepared, n).weight, getattr(model, n).weight) for n in ("stem", "a", "b"))


def test_high_biases_move_to_the_next_layer():
    """β = 5, γ = 1/2: after a ReLU the channel never is near zero; 3.5 of it can be the next layer's bias."""
    torch.manual_seed(0)
    model = Chain(
        nn.Conv2d(3, 4, 1, bias=False), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.Conv2d(4, 5, 3)
    ).eval()
    with torch.no_grad():
        model.between[0].weight.fill_(0.5)
        model.between[0].bias.copy_(torch.tensor([5.0, 0.0, -3.0, 4.0]))
        x = torch.randn(64, 3, 8, 8)
        raw = model.first(x)
        model.between[0].running_mean.copy_(raw.mean((0, 2, 3)))
        model.between[0].running_var.copy_(raw.var((0, 2, 3)))
        plain, moved = (fxquant.prepare(model, x) for _ in range(2))
        equalize(plain, absorb=False)
        equalize(moved)
        with fxquant.quantizers_off(plain), fxquant.quantizers_off(moved):
            differ = (moved(x) - plain(x)).abs() > 1e-4 * plain(x).abs().max()
            assert differ.double().mean() < 0.01  # beyond three deviations, one in 740 on either side
        scale = moved.first.weight.flatten(1).norm(dim=1) / (model.first.weight.flatten(1).norm(dim=1))
        own = (
            scale * (raw.var((0, 2, 3)) + 1e-5).sqrt()
        )  # β and γ of the equalized layer over those of the batch norm, times 2
        taken = plain.first.bias - moved.first.bias
        torch.testing.assert_close(taken, 2 * own * torch.tensor([3.5, 0.0, 0.0, 2.5]), rtol=1e-3, atol=1e-4)


def test_a_padded_reader_keeps_high_biases_where_they_are():
    torch.manual_seed(0)
    model = Chain(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.Conv2d(4, 5, 3, padding=1)).eval()
    with torch.no_grad():
        model.between[0].bias.fill_(9.0)
        x = torch.randn(2, 3, 8, 8)
        plain, moved = (fxquant.prepare(model, x) for _ in range(2))
        equalize(plain, absorb=False)
        equalize(moved)
    assert torch.equal(plain.first.bias, moved.first.bias)


def test_equalize_comes_before_calibration_and_not_in_training():
    prepared = fxquant.prepare(trained(), batches()[0])
    fxquant.calibrate(prepared, batches(), progress=False)
    with pytest.raises(InputError, match="between fxquant"):
        equalize(prepared)
    with pytest.raises(LevelError, match="qat=True"):
        equalize(fxquant.prepare(trained(), batches()[0], qat=True))


class Encoder(nn.Module):
    """A pre-norm block: both norms are read by linear layers alone."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down, self.width = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), width

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        scores = torch.softmax(self.q(y) @ self.k(y).transpose(-1, -2) / self.width**0.5, -1)
        x = x + self.out(scores @ self.v(y))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@pytest.fixture
def outliers():
    torch.manual_seed(0)
    model = Encoder().eval()
    with torch.no_grad():
        for norm in (model.norm1, model.norm2):
            norm.weight[::8] *= 60.0
        for layer in (model.q, model.k, model.v, model.up):
            layer.weight[:, ::8] /= 30.0
    return model, [torch.randn(8, 10, 24) for _ in range(3)]


def test_smoothing_keeps_the_float_function_and_follows_the_formula(outliers):
    model, data = outliers
    prepared = fxquant.prepare(model, data[0])
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        before = prepared(data[0])
        smooth(prepared, data, alpha=0.6, progress=False)
        torch.testing.assert_close(prepared(data[0]), before, rtol=1e-4, atol=1e-4)
        top = torch.stack([model.norm1(x).abs().amax((0, 1)) for x in data]).amax(0)
    weights = torch.stack([layer.weight.abs().amax(0) for layer in (model.q, model.k, model.v)]).amax(0)
    factor = top**0.6 / weights**0.4
    torch.testing.assert_close(prepared.norm1.weight, model.norm1.weight / factor, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(prepared.norm1.bias, model.norm1.bias / factor, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(prepared.k.weight, model.k.weight * factor, rtol=1e-4, atol=1e-6)


def test_smoothing_helps_where_a_few_channels_are_large(outliers):
    model, data = outliers
    with torch.no_grad():
        true = model(data[0])
        losses = []
        for smoothed in (False, True):
            prepared = fxquant.prepare(model, data[0], recipe=PER_TENSOR)
            if smoothed:
                smooth(prepared, data, progress=False)
            fxquant.calibrate(prepared, data, progress=False)
            losses.append(float((prepared(data[0]) - true).square().mean()))
    assert losses[1] < losses[0] / 2


def test_smoothing_says_what_it_cannot_do(outliers):
    model, data = outliers
    with pytest.warns(UserWarning, match="nothing was smoothed"):
        smooth(fxquant.prepare(nn.Sequential(nn.Linear(24, 4)).eval(), data[0]), data, progress=False)
    with pytest.raises(InputError, match="alpha"):
        smooth(fxquant.prepare(model, data[0]), data, alpha=1.5)
    with pytest.raises(CalibrationError, match="empty"):
        smooth(fxquant.prepare(model, data[0]), [], progress=False)


@pytest.mark.parametrize("low, high", [(0.0, None), (0.0, 6.0), (-1.0, 1.0), (None, None), (None, 0.5)])
def test_moments_of_clipped_normals(low, high):
    """Against the integral over a fine grid, in float64."""
    mean = torch.tensor([-2.0, 0.0, 0.7, 5.0, 40.0, 1.0]).double()
    deviation = torch.tensor([1.0, 1.0, 0.3, 2.0, 1.0, 0.0]).double()
    found = clipped_normal(mean, deviation, low, high)
    grid = torch.linspace(-12, 12, 200_001).double()
    weight = torch.exp(-0.5 * grid**2)
    weight /= weight.sum()
    for i in range(len(mean)):
        x = (
            (mean[i] + deviation[i] * grid).clamp(low, high)
            if (low, high) != (None, None)
            else mean[i] + deviation[i] * grid
        )
        wanted = (x * weight).sum(), ((x - (x * weight).sum()).square() * weight).sum().sqrt()
        assert float(found[0][i]) == pytest.approx(float(wanted[0]), abs=1e-4)
        assert float(found[1][i]) == pytest.approx(float(wanted[1]), abs=1e-3)


def gaussian_net() -> tuple[nn.Module, list[Tensor]]:
    """Layers whose inputs are what their batch norms say: statistics taken on the data, many channels mixed."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(8, 32, 1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, groups=4), nn.BatchNorm2d(32), nn.ReLU6()),
        nn.Conv2d(32, 6, 1),
    )
    data = [torch.randn(32, 8, 8, 8) for _ in range(4)]
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 1.5)
            norm.momentum = None
        model.train()
        for _ in range(2):
            for x in data:
                model(x)
    return model.eval(), data


def ready(model: nn.Module, data: list[Tensor], weight: int = 3, activation: int = 8):
    scheme = fxquant.Setting(weight=fxquant.Scheme.weight(weight), activation=fxquant.Scheme.activation(activation))
    return fxquant.calibrate(fxquant.prepare(model, data[0], recipe=scheme), data, progress=False)


def test_empirical_correction_gives_every_channel_its_float_mean():
    model, data = gaussian_net()
    prepared = ready(model, data)
    nearest = [
        part.weight_quantizer(part.weight).detach() for part in prepared.modules() if isinstance(part, nn.Conv2d)
    ]
    fxquant.recover(prepared, data, method="bias_correction", progress=False)
    layers = [part for part in prepared.modules() if isinstance(part, nn.Conv2d)]
    for part, before in zip(layers, nearest, strict=True):
        assert torch.equal(part.weight_quantizer(part.weight), before) and part.weight_quantizer.integers is not None
    with torch.no_grad():
        x = torch.cat(data)
        wanted = model(x).mean((0, 2, 3))
        assert (prepared(x).mean((0, 2, 3)) - wanted).abs().max() < 1e-3 * wanted.abs().max() + 2e-3


def test_analytic_and_empirical_correction_agree():
    model, data = gaussian_net()
    plain, analytic, empirical = (ready(model, data, 5, 12) for _ in range(3))
    fxquant.recover(empirical, data, method="bias_correction", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the first layer, which reads the data, nothing is known
        correct_biases(analytic)
    for name in ("3", "6"):
        biases = [
            m.get_submodule(name).weight_quantizer.bias_for(m.get_submodule(name).bias)
            for m in (plain, analytic, empirical)
        ]
        moved, wanted = (biases[1] - biases[0]).detach(), (biases[2] - biases[0]).detach()
        assert float((moved - wanted).norm() / wanted.norm()) < 0.35
        assert float(F.cosine_similarity(moved, wanted, dim=0)) > 0.93


def test_what_analytic_correction_needs():
    model, data = gaussian_net()
    with pytest.raises(CalibrationError, match="needs ranges"):
        correct_biases(fxquant.prepare(model, data[0]))
    no_norm = nn.Sequential(nn.Conv2d(8, 4, 1)).eval()
    with pytest.raises(CalibrationError, match="there are none"):
        correct_biases(ready(no_norm, data))
    with pytest.warns(UserWarning, match="1 layers"):
        correct_biases(ready(model, data))


def test_a_loaded_model_has_forgotten_its_batch_norms(tmp_path):
    model, data = gaussian_net()
    fxquant.save(ready(model, data), tmp_path / "m.pt")
    with pytest.raises(CalibrationError, match="forgotten"):
        correct_biases(fxquant.load(model, tmp_path / "m.pt"))
