"""Rules whose numbers are no multiples of one scale: k-means codebooks and logarithmic activations, by their papers."""

from __future__ import annotations

import copy
import math
from typing import Any

import digits
import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.errors import LevelError, RecipeError
from fxquant.quantizers.kmeans import KMeansWeight
from fxquant.quantizers.log_entropy import LogEntropyTensor
from fxquant.recipe import FIRST, INPUT, LAST

W = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) ** 3


def kmeans(bits: int) -> KMeansWeight:
    return KMeansWeight(Scheme.weight(bits, per_channel=False, quantizer="kmeans")).train()


@pytest.mark.parametrize("bits", [2, 4])
def test_clusters_are_those_of_k_means(bits):
    """A fixed point of Lloyd's iteration from even centers, found by loops in float64; better than any even grid."""
    quantizer = kmeans(bits)
    y = quantizer(W).detach()
    centers = [float(W.min()) + (float(W.max()) - float(W.min())) * i / (2**bits - 1) for i in range(2**bits)]
    values = W.flatten().double().tolist()
    for _ in range(300):
        members: list[list[float]] = [[] for _ in centers]
        for w in values:
            members[min(range(len(centers)), key=lambda i: abs(w - centers[i]))].append(w)
        centers = [sum(m) / len(m) if m else c for m, c in zip(members, centers, strict=True)]
    expected = torch.tensor(centers)
    assert torch.allclose(quantizer.centers, expected, rtol=1e-5, atol=1e-6)
    nearest = expected[(W.flatten()[:, None] - expected).abs().argmin(1)].reshape(W.shape)
    assert torch.allclose(y, nearest, rtol=1e-5, atol=1e-6) and len(y.unique()) <= 2**bits
    even = min(
        float((W - (W / s).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * s).square().sum())
        for s in torch.linspace(0.05, 10, 400)
    )
    assert float((W - y).square().sum()) < even


def test_gradients_of_centroids_are_sums_over_their_clusters():
    quantizer, x = kmeans(3), W.clone().requires_grad_()
    incoming = torch.randn(W.shape, generator=torch.Generator().manual_seed(1))
    y = quantizer(x)
    y.backward(incoming)
    assert x.grad is None, "a weight stands for its cluster"
    for center, gradient in zip(quantizer.step.detach(), quantizer.step.grad, strict=True):
        expected = incoming.double()[y.detach() == center].sum()
        assert float(gradient) == pytest.approx(float(expected), rel=1e-5, abs=1e-5)


def test_clusters_stay_while_centroids_are_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.ReLU(), nn.Linear(16, 4))
    recipe = Setting(weight=Scheme.weight(3, per_channel=False, quantizer="kmeans"), activation=Scheme.activation(8))
    x = torch.randn(64, 12)
    prepared = fxquant.prepare(model.train(), x, qat=True, recipe=recipe)
    prepared(x)
    part = prepared.get_submodule("0")
    weight = part.weight.detach().clone()
    codes = (weight[..., None] - part.weight_quantizer.centers).abs().argmin(-1)
    optimizer = torch.optim.SGD(fxquant.parameter_groups(prepared), 0.05, momentum=0.9, weight_decay=0.1)
    assert any(p is part.weight_quantizer.step for p in optimizer.param_groups[-1]["params"])
    before = part.weight_quantizer.step.detach().clone()
    for _ in range(10):
        optimizer.zero_grad()
        (prepared(x) - x[:, :4]).square().mean().backward()
        optimizer.step()
    assert torch.equal(part.weight, weight) and bool((part.weight_quantizer.step != before).any())
    assert torch.equal(part.weight_quantizer(part.weight), part.weight_quantizer.step[codes])


def log_entropy(bits: int, x: Tensor) -> LogEntropyTensor:
    quantizer = LogEntropyTensor(Scheme.activation(bits, quantizer="log_entropy"))
    quantizer.observing = True
    for part in x.split(100):
        quantizer(part)
    quantizer.observing = False
    quantizer.update_scale()
    return quantizer.train()


X = torch.randn(500, generator=torch.Generator().manual_seed(2)).relu() ** 1.5


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_sixteenths_of_octaves_and_zero_lies_below(bits):
    quantizer = log_entropy(bits, X)
    x = torch.cat([X, X * 40, torch.tensor([0.0, -1.0, 1e-30])])
    y = quantizer(x)
    first, stride = int(quantizer.first), int(quantizer.stride)
    levels = [2 ** ((first + i * stride) / 16) for i in range(2**bits - 1)]
    for given, found in zip(x.tolist(), y.tolist(), strict=True):
        place = 16 * math.log2(given) if given > 0 else -math.inf
        if abs((place - first) / stride % 1 - 0.5) < 1e-3:
            continue  # float32 may round the logarithm to either side of an edge
        i = -1 if place < first - stride / 2 else min(round((place - first) / stride), 2**bits - 2)
        assert found == pytest.approx(0.0 if i < 0 else levels[i], rel=1e-6)
    assert stride % 2 == 0 and 2 <= stride <= 32


@pytest.mark.parametrize("bits", [2, 3])
def test_no_grid_has_more_weighted_entropy(bits):
    """All starts and strides, by loops over the numbers."""
    quantizer = log_entropy(bits, X)
    places = [math.floor(16 * math.log2(v)) for v in X.tolist() if v > 2**-24]
    counts = {p: places.count(p) for p in set(places)}
    total = sum(counts.values())

    def entropy(first: int, stride: int) -> float:
        shares = [0] * (2**bits - 1)
        for place, count in counts.items():
            i = min((place - first + stride // 2) // stride, 2**bits - 2)
            if i >= 0:
                shares[i] += count
        parts = [(2 ** ((first + i * stride) / 16), n / total) for i, n in enumerate(shares)]
        return -sum(v * p * math.log(p) for v, p in parts if p)

    starts = range(min(places) - 32 * (2**bits - 2), max(places) + 2)
    best = max(entropy(first, stride) for first in starts for stride in range(2, 33, 2))
    assert entropy(int(quantizer.first), int(quantizer.stride)) == pytest.approx(best, rel=1e-9)


def test_gradients_pass_from_the_first_region_to_the_last_level_and_within_clamps():
    quantizer = log_entropy(3, X)
    low = 2 ** ((float(quantizer.first) - float(quantizer.stride) / 2) / 16)
    high = 2 ** ((float(quantizer.first) + 6 * float(quantizer.stride)) / 16)
    x = torch.tensor([-1.0, low * 0.99, low * 1.01, (low + high) / 2, high * 0.99, high * 1.01]).requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 0]
    x.grad = None
    bound = (low + high) / 2 * 0.9
    y = quantizer(x, 0.0, bound)
    y.sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 0, 0, 0]
    assert len(y[3:].unique()) == 1 and torch.equal(y[3], quantizer(torch.tensor([bound]))[0])


ENTERING = Setting(activation=Scheme.activation(8, estimator="moving_average"))
RECIPES: dict[str, tuple[Setting, str]] = {
    "kmeans": (
        Setting(weight=Scheme.weight(3, per_channel=False, quantizer="kmeans"), activation=Scheme.activation(8)),
        "weight simulated by kmeans, no integers: its numbers are no multiples",
    ),
    "log_entropy": (
        Setting(weight=Scheme.weight(8), activation=Scheme.activation(4, quantizer="log_entropy")),
        "tensor simulated by log_entropy, no integers: its levels are powers of two",
    ),
}


@pytest.mark.parametrize("rule", RECIPES)
def test_they_learn_are_saved_and_say_that_they_are_simulated(rule, tmp_path):
    torch.manual_seed(0)
    setting, note = RECIPES[rule]
    images = digits.data()[0][:256]
    ends = Setting(weight=Scheme.weight(8), activation=setting.activation)
    recipe = Recipe([(FIRST, ends), (LAST, ends), (INPUT, ENTERING)], default=setting)
    model = digits.trained().train()
    prepared = fxquant.prepare(model, images[:2], qat=True, recipe=recipe)
    if rule == "log_entropy":
        fxquant.calibrate(prepared, [images], progress=False)
    before = digits.accuracy(fxquant.reestimate_batchnorm(copy.deepcopy(prepared).train(), [images]))
    digits.train(prepared, epochs=1, rate=0.01)
    after = digits.accuracy(prepared)
    assert after >= before - 1.0 and after > 90
    assert note in str(fxquant.diff(model, prepared))
    with pytest.raises(LevelError, match=f"quantized by '{rule}', which is simulated"):
        fxquant.convert(prepared)
    fxquant.save(prepared, tmp_path / "model.pt")
    loaded = fxquant.load(digits.DigitsNet(), tmp_path / "model.pt").eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), prepared.eval()(images))


def prepared_for(setting: Setting) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).train()
    recipe = Recipe([(INPUT, ENTERING)], default=setting)
    return fxquant.prepare(model, torch.randn(8, 6), qat=True, recipe=recipe)


def test_schedules_search_a_logarithmic_grid_anew_and_leave_codebooks():
    prepared = prepared_for(RECIPES["log_entropy"][0])
    fxquant.calibrate(prepared, [torch.randn(64, 6)], progress=False)
    (tensor,) = {q for q in prepared.modules() if isinstance(q, LogEntropyTensor)}
    own = int(tensor.first), int(tensor.stride)
    schedule = fxquant.Schedule(prepared, bits={0: 8, 1: 4})
    assert (int(tensor.first), int(tensor.stride)) != own
    schedule.step()
    assert (int(tensor.first), int(tensor.stride)) == own
    with pytest.raises(RecipeError, match="codebook has as many numbers as it was made with"):
        fxquant.Schedule(prepared_for(RECIPES["kmeans"][0]), bits={0: 8, 1: 3})


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        (Setting(weight=Scheme.weight(3, quantizer="kmeans")), "set per_channel=False"),
        (Setting(weight=Scheme.weight(9, per_channel=False, quantizer="kmeans")), "set bits to 8 or fewer"),
        (Setting(activation=Scheme.activation(4, signed=True, quantizer="log_entropy")), "set signed=False"),
    ],
    ids=["per channel", "bits", "signed"],
)
def test_schemes_that_they_cannot_have_are_refused(setting, what):
    with pytest.raises(RecipeError, match=what):
        prepared_for(setting)
