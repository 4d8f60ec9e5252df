"""Estimators with a parameter, entropy calibration, and the choice among all of them by what layers lose."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import SchemeError
from fxquant.nn.fake_quantize import FakeQuantize
from fxquant.numerics.affine import dequantize, quantize, scale_and_zero_point
from fxquant.numerics.kl import least_divergence
from fxquant.numerics.ranges import ESTIMATOR
from fxquant.numerics.scheme import Scheme


def kept_by_tensorrt(counts: np.ndarray, levels: int) -> int:
    """NVIDIA's published loop, bin by bin: counts of |x| to the number of bins that are kept."""
    bins = counts.astype(np.float64).copy()
    bins[0] = bins[1]
    least, best = math.inf, len(bins)
    for i in range(max(128, levels), len(bins) + 1):
        groups = np.digitize(np.arange(i), np.linspace(0, i, levels + 1)) - 1
        q = np.zeros(i)
        for group in range(levels):
            inside = [k for k in np.flatnonzero(groups == group) if bins[k] != 0]
            for k in inside:
                q[k] = bins[inside].sum() / len(inside)
        p = bins[:i].copy()
        p[-1] += bins[i:].sum()
        p, q = p / p.sum(), q / q.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            divergence = np.where(p > 0, p * np.log(p / q), 0.0).sum()
        if divergence <= least:
            least, best = divergence, i
    return best


@pytest.mark.parametrize("seed, shape", [(0, 3.0), (1, 1.2), (2, 8.0)])
def test_entropy_calibration_is_tensorrts(seed, shape):
    rng = np.random.default_rng(seed)
    x = np.abs(rng.standard_t(shape, 20000))
    counts, _ = np.histogram(x, 300, (0, x.max()))
    for levels in (64, 128):
        assert least_divergence(torch.tensor(counts).double(), levels) == kept_by_tensorrt(counts, levels)


def test_entropy_calibration_cuts_a_tail_and_nothing_else():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(200_000), torch.full((3,), 40.0)])
    scheme = Scheme(symmetric=True, signed=True, narrow_range=True)
    for batches in ([x], list(x.split(30_000)), list(x.flip(0).split(7_777))):
        state = ESTIMATOR["kl"].initial_state(None)
        for batch in batches:
            ESTIMATOR["kl"].update(state, batch, axis=None)
        low, high = (float(bound) for bound in ESTIMATOR["kl"].range(state, scheme))
        assert 3.0 < high < 6.0 and low >= -high
    flat = torch.linspace(-1, 1, 100_001)
    state = ESTIMATOR["kl"].initial_state(None)
    ESTIMATOR["kl"].update(state, flat, axis=None)
    assert [round(float(b), 2) for b in ESTIMATOR["kl"].range(state, scheme)] == [-1.0, 1.0]


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
def test_a_norm_finds_the_least_error_of_that_norm(p):
    """Against a search over the very same factors on the values themselves, in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40_000, generator=generator).pow(3)
    scheme = Scheme(bits=4, symmetric=True, signed=True, narrow_range=True)
    state = ESTIMATOR[f"lp:{p:g}"].initial_state(None)
    ESTIMATOR[f"lp:{p:g}"].update(state, x, axis=None)

    def error(low: Tensor, high: Tensor) -> float:
        scale, zero = scale_and_zero_point(low, high, scheme)
        q = quantize(x.double(), scale.double(), zero, scheme.qmin, scheme.qmax)
        return float((dequantize(q, scale.double(), zero) - x.double()).abs().pow(p).mean())

    low, high = state["low"], state["high"]
    best = min(error(low * f, high * f) for f in torch.logspace(0, -2, 128))
    assert error(*ESTIMATOR[f"lp:{p:g}"].range(state, scheme)) <= best * 1.01


def test_a_percentile_is_numpys():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    state = ESTIMATOR["percentile:97.5"].initial_state(None)
    ESTIMATOR["percentile:97.5"].update(state, x, axis=None)
    low, high = ESTIMATOR["percentile:97.5"].range(state, Scheme())
    wanted = np.percentile(x.numpy(), [2.5, 97.5])
    width = 2.0 ** int(state["exponent"])
    assert abs(float(low) - wanted[0]) <= width and abs(float(high) - wanted[1]) <= width


@pytest.mark.parametrize(
    "name", ["percentile:40", "percentile:abc", "lp:0", "lp", "lp:", "minmax:3", "percentile:101", "lp:nan"]
)
def test_names_that_cannot_be(name):
    with pytest.raises(SchemeError, match="estimator="):
        Scheme(estimator=name)


def test_kl_is_refused_for_channels():
    with pytest.raises(SchemeError, match="per_channel"):
        Scheme.weight(estimator="kl")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=4)
        self.up, self.head = nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.second(x) + x[:, :, 1:-1, 1:-1])
        return self.head(F.relu(self.up(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def spiky():
    """A network whose tensors and weights have outliers, so that estimators differ."""
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        for weight in (model.first.weight, model.second.weight, model.up.weight):
            weight.copy_(weight.sign() * weight.abs().pow(3) * 60)
    return model, list((torch.randn(32, 3, 9, 9).pow(3)).split(16))


def prepared_with(spiky, estimator: str, bits: int = 4):
    model, batches = spiky
    schemes = {
        "weight": Scheme.weight(bits, estimator=estimator),
        "activation": Scheme.activation(bits, estimator=estimator),
    }
    prepared = fxquant.prepare(model, batches[0], recipe=fxquant.Setting(**schemes), processor="vnni")
    return fxquant.calibrate(prepared, batches, progress=False)


def test_auto_takes_the_range_with_which_its_readers_lose_least(spiky):
    """The losses from the definition, layer by layer, with plain torch on the last batch."""
    model, batches = spiky
    prepared, x = prepared_with(spiky, "auto"), batches[-1]
    with torch.no_grad():
        relu = F.relu(model.first(x))
        inner = F.relu(model.second(relu) + relu[:, :, 1:-1, 1:-1])
        reads = {"first": x, "second": relu, "up": inner, "head": F.relu(model.up(inner)).mean((2, 3))}
        differ = 0
        for name, read in reads.items():
            layer, own = getattr(model, name), prepared.get_submodule(name).weight_quantizer
            axis = 1 if name == "up" else 0
            losses = {}
            for estimator in ("minmax", "mse", "lp:2", "lp:4"):
                state = ESTIMATOR[estimator].initial_state(layer.weight.shape[axis])
                ESTIMATOR[estimator].update(state, layer.weight, axis=axis)
                grid = scale_and_zero_point(*ESTIMATOR[estimator].range(state, own.scheme), own.scheme)
                q = quantize(layer.weight, *grid, own.scheme.qmin, own.scheme.qmax, axis=axis)
                twin = copy.deepcopy(layer)
                twin.weight.copy_(dequantize(q, *grid, axis=axis))
                error = (twin(read) - layer(read)).double().square()
                error = error.movedim(-1 if name == "head" else 1, 0).flatten(1).sum(1)
                losses[estimator] = error.reshape(-1, layer.weight.shape[axis]).sum(0), grid[0]
            table = torch.stack([loss for loss, _ in losses.values()])
            scales = torch.stack([scale for _, scale in losses.values()])
            best = table.argmin(0)
            torch.testing.assert_close(own.scale, scales.gather(0, best[None])[0])
            differ += int((best > 1).sum())
        assert differ  # not only the two that everybody has


@pytest.mark.parametrize("bits", [4, 8])
def test_auto_is_never_worse_than_minmax_or_mse(spiky, bits):
    """The input of the second layer, which a slice reads too: the loss of the tensor itself and of the layer."""
    model, batches = spiky
    with torch.no_grad():
        relu = F.relu(model.first(batches[-1]))
        zero = torch.zeros_like(model.second.bias)
        losses = {}
        for name in ("auto", "minmax", "mse"):
            own: FakeQuantize = prepared_with(spiky, name, bits).get_submodule("relu").output_quantizer
            error = relu - own(relu)
            through, whole = (F.conv2d(t, model.second.weight, zero, groups=4) for t in (error, relu))
            losses[name] = float(
                error.square().sum() / relu.square().sum() + through.square().sum() / whole.square().sum()
            )
    assert losses["auto"] <= min(losses["minmax"], losses["mse"]) * (1 + 1e-5)


def test_the_choice_is_saved(spiky, tmp_path):
    model, batches = spiky
    prepared = prepared_with(spiky, "auto")
    with torch.no_grad():
        before = prepared(batches[0])
        fxquant.save(prepared, tmp_path / "auto.pt")
        assert torch.equal(fxquant.load(model, tmp_path / "auto.pt")(batches[0]), before)
        assert torch.equal(copy.deepcopy(prepared)(batches[0]), before)
    for own in (part for part in prepared.modules() if isinstance(part, FakeQuantize)):
        choice = own.range_state()["auto"].clone()
        own.reset()
        assert torch.equal(own.range_state()["auto"], choice)
    named = fxquant.Setting(activation=Scheme(estimator="percentile:99.5"))
    other = fxquant.calibrate(fxquant.prepare(model, batches[0], recipe=named), batches, progress=False)
    fxquant.save(other, tmp_path / "percentile.pt")
    with torch.no_grad():
        assert torch.equal(fxquant.load(model, tmp_path / "percentile.pt")(batches[0]), other(batches[0]))
