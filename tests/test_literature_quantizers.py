"""The literature's quantizers: each paper's own criterion, gradients, and integers or the reason why there are none."""

from __future__ import annotations

import math
from typing import Any

import digits
import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.errors import LevelError, RecipeError
from fxquant.quantizers import RULES
from fxquant.recipe import FIRST, INPUT, LAST

W = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 0.5, 6)[:, None]


def weight_of(rule: str, bits: int, **others: Any) -> Any:
    scheme = Scheme.weight(bits, quantizer=rule, **others)
    entry = RULES[rule]
    assert entry.weight is not None and entry.refusal(scheme, "weight") is None
    per_channel = scheme.per_channel
    return entry.weight(scheme, axis=0 if per_channel else None, channels=6 if per_channel else None).train()


def gradient_of(quantizer: Any, weight: Tensor, incoming: Tensor) -> Tensor:
    x = weight.clone().requires_grad_()
    quantizer(x).backward(incoming)
    assert x.grad is not None
    return x.grad


G = torch.randn(W.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("per_channel", [True, False])
def test_xnor_has_the_scale_with_the_least_error(per_channel):
    quantizer = weight_of("xnor", 2, per_channel=per_channel)
    y = quantizer(W)
    assert torch.equal(y.sign(), W.sign()) and all(len(row.abs().unique()) == 1 for row in y)
    for rows, found in zip(W if per_channel else [W], y if per_channel else [y], strict=True):
        alpha = float(found.abs().max())
        best = min(torch.linspace(0.2, 5, 2000), key=lambda a: float((rows - a * alpha * rows.sign()).square().sum()))
        assert float(best) == pytest.approx(1, abs=0.005) and alpha == pytest.approx(float(rows.abs().mean()), rel=1e-5)
    count = 40 if per_channel else 240
    alphas = (W.abs().mean(1, keepdim=True) if per_channel else W.abs().mean()).double()
    wanted = G.double() * (1 / count + alphas * (W.abs() <= 1))
    assert torch.allclose(gradient_of(quantizer, W, G).double(), wanted, rtol=1e-5, atol=1e-8)


def test_bnn_gives_signs_and_no_gradient_beyond_one():
    quantizer = weight_of("bnn", 2)
    x = W.clone()
    x[0, :3] = torch.tensor([0.0, 1.0, -1.0])
    assert torch.equal(quantizer(x), torch.where(x < 0, -1.0, 1.0))
    assert torch.equal(gradient_of(quantizer, x, G), torch.where(x.abs() <= 1, G, torch.zeros_like(G)))


@pytest.mark.parametrize("per_channel", [True, False])
def test_twn_has_its_threshold_and_the_scale_with_the_least_error(per_channel):
    quantizer = weight_of("twn", 2, per_channel=per_channel)
    y = quantizer(W)
    for rows, found in zip(W if per_channel else [W], y if per_channel else [y], strict=True):
        beyond = rows.abs() > 0.7 * rows.abs().mean()
        assert torch.equal(found != 0, beyond) and torch.equal(found.sign()[beyond], rows.sign()[beyond])
        alpha = float(found.abs().max())
        errors = [float((rows - a * found).square().sum()) for a in (0.99, 1.0, 1.01)]
        assert min(errors) == errors[1] and alpha == pytest.approx(float(rows.abs()[beyond].mean()), rel=1e-5)
    assert torch.equal(gradient_of(quantizer, W, G), G)


def test_ttq_learns_one_number_for_each_sign():
    quantizer = weight_of("ttq", 2, per_channel=False)
    y = quantizer(W)
    limit = 0.05 * float(W.abs().max())
    above, below = limit < W, -limit > W
    up, down = W[above].mean(), -W[below].mean()
    assert torch.allclose(y, up * above - down * below, rtol=1e-5)
    assert float((y.detach().max() + y.detach().min()).abs()) > 1e-3, "not symmetric"
    found = gradient_of(quantizer, W, G)
    assert float(quantizer.step.grad) == pytest.approx(float(G[above].sum()), rel=1e-4)
    assert float(quantizer.negative.grad) == pytest.approx(-float(G[below].sum()), rel=1e-4)
    slope = torch.where(above, up, torch.where(below, down, torch.ones(())))
    assert torch.allclose(found, G * slope, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_dorefa_weights_have_all_their_levels_and_the_formulas_gradient(bits):
    quantizer = weight_of("dorefa", bits, per_channel=False)
    many = torch.randn(4000, generator=torch.Generator().manual_seed(2))
    y = quantizer(many)
    levels = y.unique() * (2**bits - 1)
    assert torch.allclose(levels, torch.arange(1 - 2**bits, 2**bits, 2).float(), atol=1e-4) and float(y.max()) == 1
    x = W.double().clone().requires_grad_()
    t = torch.tanh(x)
    r = t / (2 * t.abs().max()) + 0.5
    straight = r + (torch.round(r * (2**bits - 1)) / (2**bits - 1) - r).detach()
    (2 * straight - 1).backward(G.double())
    assert torch.allclose(gradient_of(quantizer, W, G).double(), x.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["dorefa", "wrpn"])
def test_activations_of_the_unit_range(rule):
    tensor = RULES[rule].tensor
    assert tensor is not None
    quantizer = tensor(Scheme.activation(3, quantizer=rule)).train()
    x = torch.linspace(-0.5, 1.6, 43).requires_grad_()
    y = quantizer(x)
    assert torch.allclose(y, torch.round(x.detach().clamp(0, 1) * 7) / 7, atol=1e-6)
    y.sum().backward()
    inside = (x.detach() > -0.07) & (x.detach() < 1.07)  # to half a step beyond the ends
    assert torch.equal(x.grad, inside.float())


def test_wrpn_weights():
    quantizer = weight_of("wrpn", 4)
    assert torch.allclose(quantizer(W), torch.round(7 * W.clamp(-1, 1)) / 7, atol=1e-6)
    assert torch.equal(gradient_of(quantizer, W, G), torch.where(W.abs() <= 7.5 / 7, G, torch.zeros_like(G)))


def test_midrise_has_a_fifth_less_error_at_two_bits():
    """0.119 for normal numbers, where -2 … 1 has 0.149 and three levels 0.190 (the best step of each, by brute search)."""
    x = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(3))
    midrise = RULES["midrise"].weight(Scheme.weight(2, quantizer="midrise"), axis=0, channels=1)
    y = midrise(x)
    error = float((y - x).square().mean().detach())
    assert error == pytest.approx(0.119, abs=0.001)
    assert len(y.unique()) == 4 and torch.allclose(y.unique() / y.unique().max(), torch.tensor([-1, -1 / 3, 1 / 3, 1]))
    for low, wanted in ((-2, 0.149), (-1, 0.190)):
        errors = [((x / s).round().clamp(low, 1) * s - x).square().mean() for s in torch.linspace(0.8, 1.4, 31)]
        assert float(min(errors)) == pytest.approx(wanted, abs=0.002)


def test_gradients_of_midrise_are_differences_of_the_surrogate():
    quantizer = weight_of("midrise", 2)
    gradient = gradient_of(quantizer, W, G)
    for channel in range(6):
        s = 2 * float(quantizer.scale[channel])
        total = 0.0
        for w, g, found in zip(W[channel].tolist(), G[channel].tolist(), gradient[channel].tolist(), strict=True):
            v = w / s
            r = min(max(math.floor(v) + 0.5, -1.5), 1.5)
            inside = abs(v) <= 2

            def surrogate(step: float, w: float = w, r: float = r, v: float = v, inside: bool = inside) -> float:
                return step * (w / step + (r - v)) if inside else step * r

            h = 1e-6 * s
            total += g * (surrogate(s + h) - surrogate(s - h)) / (2 * h)
            assert found == pytest.approx(g if inside else 0.0, rel=1e-6)
        assert float(quantizer.step.grad[channel]) == pytest.approx(total / math.sqrt(40 * 1), rel=1e-3, abs=1e-4)


def test_stochastic_rounding_is_unbiased_and_off_in_eval():
    quantizer = weight_of("stochastic", 4)
    torch.manual_seed(0)
    draws = torch.stack([quantizer(W) for _ in range(2000)])
    step = quantizer.scale.reshape(-1, 1)
    spread = draws.std(0) / 2000**0.5
    off = (draws.mean(0) - W).abs()
    assert float((off <= 4 * spread + 1e-6).double().mean()) == 1.0 and float((draws.std(0) > 0).double().mean()) > 0.9
    assert float(((draws - W).abs() / step).max()) < 1.0 + 1e-4
    quantizer.eval()
    assert torch.equal(quantizer(W), quantizer(W))
    assert torch.allclose(quantizer(W), (W / step).round().clamp(-7, 7) * step, atol=1e-6)
    tensor = RULES["stochastic"].tensor(Scheme.activation(3, quantizer="stochastic")).train()
    tensor.set_range(torch.tensor(0.0), torch.tensor(7.0))
    x = torch.full((100_000,), 2.3)
    assert float(tensor(x).mean()) == pytest.approx(2.3, abs=4 * 0.46 / 100_000**0.5)
    assert tensor(torch.tensor([-3.0, 9.0]), 0.0, 5.0).tolist() == [0.0, 5.0]


RECIPES = {
    "xnor": Setting(weight=Scheme.weight(2, quantizer="xnor")),
    "bnn": Setting(weight=Scheme.weight(2, quantizer="bnn")),
    "twn": Setting(weight=Scheme.weight(2, quantizer="twn")),
    "dorefa": Setting(
        weight=Scheme.weight(4, quantizer="dorefa", per_channel=False),
        activation=Scheme.activation(4, quantizer="dorefa"),
    ),
    "wrpn": Setting(weight=Scheme.weight(6, quantizer="wrpn"), activation=Scheme.activation(4, quantizer="wrpn")),
    "midrise": Setting(weight=Scheme.weight(2, quantizer="midrise"), activation=Scheme.activation(4, quantizer="lsq")),
    "stochastic": Setting(
        weight=Scheme.weight(5, quantizer="stochastic"), activation=Scheme.activation(6, quantizer="stochastic")
    ),
    "ttq": Setting(weight=Scheme.weight(2, quantizer="ttq")),
}
ENDS = Setting(weight=Scheme.weight(8))


class Small(nn.Module):
    """Digits, with a batch norm behind each convolution, as binary and DoReFa weights need it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.nb = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.c, self.nc = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.head = nn.Linear(32 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.na(self.a(x)))
        x = torch.relu(self.nc(self.c(torch.relu(self.nb(self.b(x))))))
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


def trained(rule: str, epochs: int) -> Any:
    torch.manual_seed(0)
    ends = Setting(weight=Scheme.weight(8), activation=RECIPES[rule].activation)
    entering = Setting(activation=Scheme.activation(8, estimator="moving_average"))
    recipe = Recipe([(FIRST, ends), (LAST, ends), (INPUT, entering)], default=RECIPES[rule])
    prepared = fxquant.prepare(Small().train(), digits.data()[0][:8], qat=True, recipe=recipe)
    digits.train(prepared, epochs=epochs, rate=0.05)
    return prepared


def decibels(found: Tensor, wanted: Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum().clamp(min=1e-30)))


@pytest.mark.parametrize("rule", [pytest.param(r, marks=() if r == "xnor" else pytest.mark.long) for r in RECIPES])
def test_they_learn_and_what_is_trained_is_what_ships(rule, tmp_path):
    prepared = trained(rule, 3)
    fxquant.save(prepared, tmp_path / "model.pt")
    assert digits.accuracy(prepared) > 85
    loaded = fxquant.load(Small(), tmp_path / "model.pt")
    assert torch.equal(digits.logits(loaded), digits.logits(prepared))
    if RULES[rule].simulates:
        assert f"weight simulated by {rule}, no integers: its numbers" in str(fxquant.diff(Small(), prepared))
        for verb in (fxquant.freeze, fxquant.convert, lambda p: fxquant.export_onnx(p, tmp_path / "m.onnx")):
            with pytest.raises(LevelError, match=rf"'{rule}', which is simulated: its numbers"):
                verb(prepared)
        return
    frozen = fxquant.freeze(prepared)
    wanted, found = digits.logits(prepared), digits.logits(frozen)
    exact = digits.logits(fxquant.convert(frozen, kernels="reference"))
    assert decibels(found, wanted) >= 60 and decibels(exact, found) >= 60
    assert torch.equal(exact.argmax(1), wanted.argmax(1)) and torch.equal(found.argmax(1), wanted.argmax(1))
    assert rule in str(frozen.b.weight_quantizer)


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        (Setting(weight=Scheme.weight(8, quantizer="dorefa", per_channel=False)), "odd integers take one bit more"),
        (Setting(weight=Scheme.weight(4, quantizer="dorefa")), "it has one scale: set per_channel=False"),
        (Setting(activation=Scheme(bits=4, signed=True, quantizer="dorefa")), r"lie in \[0, 1\]"),
        (Setting(weight=Scheme.weight(4, quantizer="xnor")), "set bits=2"),
        (Setting(weight=Scheme.weight(3, quantizer="twn")), "set bits=2"),
        (Setting(weight=Scheme.weight(3, quantizer="ttq")), "set bits=2"),
        (Setting(weight=Scheme.weight(2, quantizer="midrise", narrow_range=False)), "set narrow_range=True"),
        (Setting(weight=Scheme.weight(8, quantizer="midrise")), "odd integers take one bit more"),
        (Setting(activation=Scheme.activation(4, quantizer="twn")), "a rule for weights only"),
    ],
    ids=str,
)
def test_schemes_that_a_rule_cannot_have_are_refused(setting, what):
    with pytest.raises(RecipeError, match=what):
        fxquant.prepare(Small(), digits.data()[0][:8], qat=True, recipe=setting)
