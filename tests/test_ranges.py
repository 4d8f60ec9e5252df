"""Range estimators: the same samples give the same range, however they are cut, ordered or laid out."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.errors import SchemeError
from fxquant.numerics.affine import dequantize, quantize, scale_and_zero_point
from fxquant.numerics.ranges import ESTIMATOR, MeanSquareError, MovingAverage, Percentile, RangeEstimator
from fxquant.numerics.scheme import ESTIMATORS, Scheme

AFFINE = Scheme()
SYMMETRIC = Scheme(symmetric=True, signed=True, narrow_range=True)
CHANNELS = Scheme(symmetric=True, signed=True, narrow_range=True, per_channel=True)
HISTOGRAMS = ("percentile", "percentile:99", "mse", "lp:3", "kl", "auto")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Waiting for a second thread costs more than it computes where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def observe(estimator: RangeEstimator, *batches: Tensor, **clamp: float) -> dict[str, Tensor]:
    state = estimator.initial_state(None)
    identities = {name: id(value) for name, value in state.items()}
    for batch in batches:
        estimator.update(state, batch, axis=None, **clamp)
    assert identities == {name: id(value) for name, value in state.items()}
    return state


def samples(n: int = 60, growth: float = 1.0) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(n, 3, 7, 5) * growth ** torch.arange(n)[:, None, None, None] + 0.3


def cut(x: Tensor, seed: int) -> list[Tensor]:
    rng = random.Random(seed)
    sizes = []
    while sum(sizes) < len(x):
        sizes.append(min(rng.randrange(1, 20), len(x) - sum(sizes)))
    return list(x.split(sizes))


def test_every_name_has_an_estimator():
    assert set(ESTIMATORS) <= set(ESTIMATOR)
    for estimator in ESTIMATOR.values():
        for channels, shape in ((None, ()), (4, (4,))):
            state = estimator.initial_state(channels)
            assert state["low"].shape == state["high"].shape == shape and state["low"].dtype == torch.float32
            assert torch.all(state["low"] == torch.inf) and torch.all(state["high"] == -torch.inf)


@pytest.mark.parametrize("name", ["minmax", *HISTOGRAMS])
@pytest.mark.parametrize("growth", [1.0, 1.4])
@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC], ids=str)
def test_batches_do_not_matter(name, growth, scheme):
    estimator, x = ESTIMATOR[name], samples(growth=growth)
    whole = observe(estimator, x)
    shuffled = x[torch.randperm(len(x))]
    for batches in ([*x.split(1)], cut(x, 1), cut(x, 2), cut(shuffled, 3)):
        state = observe(estimator, *batches)
        for key, value in whole.items():
            assert torch.equal(state[key], value), key
        assert [v.item() for v in estimator.range(state, scheme)] == [v.item() for v in estimator.range(whole, scheme)]


@pytest.mark.parametrize("growth", [1.0, 1.1])
def test_batches_do_not_matter_to_the_moving_average(growth):
    estimator, x = ESTIMATOR["moving_average"], samples(growth=growth)
    whole = observe(estimator, x)
    for batches in ([*x.split(1)], cut(x, 1), cut(x, 2)):
        state = observe(estimator, *batches)
        step = (whole["high"] - whole["low"]) / 255
        assert (state["low"] - whole["low"]).abs() < 1e-3 * step
        assert (state["high"] - whole["high"]).abs() < 1e-3 * step


def test_moving_average_is_the_recurrence():
    x = samples().double()
    low, high = x[0].min(), x[0].max()
    for sample in x[1:]:
        low = torch.minimum(sample.min(), 0.95 * low + 0.05 * sample.min())
        high = torch.maximum(sample.max(), 0.95 * high + 0.05 * sample.max())
    state = observe(MovingAverage(rate=0.05), *cut(x.float(), 5))
    step = (high - low) / 255
    assert abs(state["low"] - low) < 1e-3 * step and abs(state["high"] - high) < 1e-3 * step


def test_moving_average_grows_at_once_and_shrinks_slowly():
    estimator = ESTIMATOR["moving_average"]
    state = observe(estimator, torch.ones(320, 4), torch.full((1, 4), 10.0))
    assert state["high"] == 10.0
    state = observe(estimator, torch.full((1, 4), 10.0), *[torch.ones(140, 4)])
    assert abs(float(state["high"]) - (1 + 9 * 0.995**140)) < 1e-5


@pytest.mark.parametrize("name", HISTOGRAMS)
@pytest.mark.parametrize("exponents", [range(-6, 7), range(6, -7, -1)], ids=["growing", "shrinking"])
def test_counts_after_growth_are_those_of_the_final_grid(name, exponents):
    torch.manual_seed(0)
    parts = [torch.randn(50, 9) * 10.0**e for e in exponents]
    state = observe(ESTIMATOR[name], *parts)
    x = torch.cat(parts).double()
    width = 2.0 ** int(state["exponent"])
    half = state["counts"].numel() // 2
    expected = torch.bincount(torch.floor(x / width).long().flatten() + half, minlength=2 * half)
    assert torch.equal(state["counts"], expected)
    assert half * width / 2 <= x.abs().max() <= half * width


@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99, 75.0, 100.0])
@pytest.mark.parametrize("kind", ["normal", "one-sided", "skewed", "few"])
def test_percentile_within_one_bin_of_numpy(percentile, kind):
    torch.manual_seed(0)
    x = torch.randn(50 if kind == "few" else 40_000)
    x = {"one-sided": x.relu(), "skewed": x.exp() - 5}.get(kind, x)
    estimator = Percentile(percentile=percentile)
    state = observe(estimator, *cut(x.reshape(-1, 10), 0))
    low, high = (v.item() for v in estimator.range(state, AFFINE))
    width = 2.0 ** int(state["exponent"])
    values = x.double().numpy()
    tail = round((100 - percentile) / 100, 9)
    assert abs(high - np.quantile(values, 1 - tail, method="inverted_cdf")) <= width
    assert abs(low + np.quantile(-values, 1 - tail, method="inverted_cdf")) <= width
    assert (x > high).double().mean() <= tail and (x < low).double().mean() <= tail


def raw_error(x: Tensor, low: Tensor, high: Tensor, scheme: Scheme, norm: float) -> float:
    scale, zero_point = scale_and_zero_point(low, high, scheme)
    y = dequantize(quantize(x, scale, zero_point, scheme.qmin, scheme.qmax), scale, zero_point)
    return float((x - y).double().abs().pow(norm).mean())


@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "laplace", "one-sided", "outlier", "uniform"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_against_brute_force(norm, bits, kind, symmetric):
    """At most 2 % above the best of 40 × 40 ranges on the raw numbers, and not above minmax."""
    torch.manual_seed(0)
    x = torch.randn(20_000)
    if kind == "laplace":
        x = torch.distributions.Laplace(0.0, 1.0).sample((20_000,))
    elif kind == "uniform":
        x = torch.rand(20_000) * 3 - 1
    elif kind == "one-sided":
        x = x.relu()
    elif kind == "outlier":
        x = torch.cat([x, torch.tensor([30.0])])
    scheme = Scheme(bits=bits, symmetric=symmetric, signed=symmetric)
    estimator = MeanSquareError(norm=norm)
    state = observe(estimator, *x.reshape(-1, 1).split(5000))
    found = raw_error(x, *estimator.range(state, scheme), scheme, norm)
    shrink = torch.linspace(0.05, 1.0, 40)
    lows, highs = x.min().clamp(max=0) * shrink, x.max().clamp(min=0) * shrink
    pairs = [(a, b) for a, b in zip(lows, highs, strict=True)] if symmetric else [(a, b) for a in lows for b in highs]
    best_pair = min(pairs, key=lambda pair: raw_error(x[::5], *pair, scheme, norm))
    best = raw_error(x, *best_pair, scheme, norm)
    assert found <= 1.02 * best
    assert found <= 1.001 * raw_error(x, x.min(), x.max(), scheme, norm)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(name, dtype):
    estimator, x = ESTIMATOR[name], samples().to(dtype)
    state, expected = observe(estimator, x), observe(estimator, x.float())
    for key in state:
        assert state[key].dtype == expected[key].dtype and torch.equal(state[key], expected[key]), key


@pytest.mark.parametrize("name", ESTIMATORS)
def test_layouts_and_pieces(name, monkeypatch):
    estimator, x = ESTIMATOR[name], samples()
    expected = observe(estimator, x)
    monkeypatch.setattr("fxquant.numerics.memory._ELEMENTS_PER_THREAD", 64)
    gaps = torch.zeros(*x.shape, 2)
    gaps[..., 1] = x
    for same in (x, x.contiguous(memory_format=torch.channels_last), gaps[..., 1]):
        state = observe(estimator, same)
        for key in state:
            assert torch.equal(state[key], expected[key]), key


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("clamp", [{"lower": 0.0}, {"lower": 0.0, "upper": 1.0}, {"upper": 0.5}])
def test_merged_clamp(name, clamp):
    estimator, x = ESTIMATOR[name], samples()
    clamped = x.clamp(clamp.get("lower"), clamp.get("upper"))
    state, expected = observe(estimator, x, **clamp), observe(estimator, clamped)
    for key in state:
        assert torch.equal(state[key], expected[key]), key


@pytest.mark.parametrize("name", [*(name for name in ESTIMATORS if name != "kl"), "percentile:99", "lp:3"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels(name, axis):
    torch.manual_seed(0)
    w = torch.randn(6, 6, 40, 6) * torch.tensor([1e-3, 1.0, 0.0, 5.0, 0.3, 30.0])
    w = w.movedim(-1, axis)
    estimator = ESTIMATOR[name]
    state = estimator.initial_state(6)
    estimator.update(state, w, axis=axis)
    low, high = estimator.range(state, CHANNELS)
    rows = w.movedim(axis, 0).reshape(6, -1)
    assert torch.equal(state["low"], rows.amin(1)) and torch.equal(state["high"], rows.amax(1))
    assert torch.all(low >= rows.amin(1)) and torch.all(high <= rows.amax(1))
    if name in HISTOGRAMS:
        assert state["counts"].sum(1).tolist() == [rows.shape[1]] * 6
        again = {key: value.clone() for key, value in state.items()}
        estimator.update(again, w, axis=axis)
        assert all(torch.equal(again[key], state[key]) for key in state)
    else:
        assert torch.equal(low, rows.amin(1)) and torch.equal(high, rows.amax(1))


@pytest.mark.parametrize("bits", [4, 8])
def test_mse_of_channels_against_brute_force(bits):
    torch.manual_seed(0)
    w = torch.randn(5, 3000) * torch.tensor([[1e-3], [1.0], [4.0], [0.2], [1.0]])
    w[4, 0] = 20.0
    scheme = Scheme(bits=bits, symmetric=True, signed=True, narrow_range=True, per_channel=True)
    estimator = ESTIMATOR["mse"]
    state = estimator.initial_state(5)
    estimator.update(state, w, axis=0)
    low, high = estimator.range(state, scheme)
    for row, a, b in zip(w, low, high, strict=True):
        limits = row.abs().max() * torch.linspace(0.02, 1.0, 99)
        best = min(raw_error(row, -limit, limit, scheme, 2.4) for limit in limits)
        assert raw_error(row, a, b, scheme, 2.4) <= 1.05 * best
        assert raw_error(row, a, b, scheme, 2.4) <= 1.001 * raw_error(row, row.min(), row.max(), scheme, 2.4)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 1])
def test_bad_numbers_are_not_hidden(name, bad, position):
    x = torch.ones(3, 4)
    x[1, 1] = bad
    batches = [torch.ones(3, 4), torch.ones(3, 4)]
    batches[position] = x
    state = observe(ESTIMATOR[name], *batches)
    assert not (torch.isfinite(state["low"]) & torch.isfinite(state["high"]))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_empty_scalar_and_constant(name):
    estimator = ESTIMATOR[name]
    state = observe(estimator, torch.empty(0, 3))
    assert state["low"] == torch.inf
    state = observe(estimator, torch.empty(0, 3), torch.tensor(2.5))
    assert state["low"] == state["high"] == 2.5
    for value in (0.0, 3.0, -3.0, 1e-44):
        state = observe(estimator, torch.full((4, 4), value))
        scale, zero_point = scale_and_zero_point(*estimator.range(state, AFFINE), AFFINE)
        y = dequantize(quantize(torch.tensor(value), scale, zero_point, 0, 255), scale, zero_point)
        assert abs(y - value) <= scale / 2


@pytest.mark.parametrize(
    "build", [lambda: MovingAverage(rate=0.0), lambda: Percentile(percentile=50.0), lambda: MeanSquareError(norm=0.0)]
)
def test_settings_that_cannot_be(build):
    with pytest.raises(SchemeError):
        build()
