"""Data-free calibration: inputs whose activations have the statistics of the batch norms are nearly as good as data."""

from __future__ import annotations

import copy

import digits
import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.algorithms import synthesize
from fxquant.errors import CalibrationError, InputError


def distance(model: nn.Module, x: Tensor) -> float:
    """How far means and deviations at the worst batch norm are from those that it remembers, in deviations."""
    off: list[float] = []

    def look(part, args):
        y = args[0].double()
        mean, deviation = y.mean((0, 2, 3)), y.var((0, 2, 3)).sqrt()
        known = part.running_var.double().sqrt()
        off.append(
            float((((mean - part.running_mean) / known).square() + (deviation / known - 1).square()).mean().sqrt())
        )

    hooks = [p.register_forward_pre_hook(look) for p in model.modules() if isinstance(p, nn.BatchNorm2d)]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return max(off)


@pytest.fixture(scope="module")
def made():
    model = digits.trained()
    before = copy.deepcopy(model.state_dict())
    batches = synthesize(model, torch.zeros(64, 1, 8, 8), batches=2, steps=120, progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(part._forward_pre_hooks for part in model.modules())
    return model, batches


def test_statistics_are_those_of_the_batch_norms(made):
    model, batches = made
    torch.manual_seed(0)
    for x in batches:
        assert x.shape == (64, 1, 8, 8) and not x.requires_grad
        assert distance(model, x) < 0.15 < 0.5 < distance(model, torch.randn_like(x))


@pytest.mark.parametrize("weight, most", [(8, 1.0), (4, 3.0)])
def test_a_model_without_data_is_nearly_as_good_as_one_with(made, weight, most):
    """No image is used: calibrated, and below 8 bits recovered, on what was made."""
    model, batches = made
    recipe = fxquant.Setting(weight=fxquant.Scheme.weight(weight))
    prepared = fxquant.calibrate(fxquant.prepare(model, batches[0], recipe=recipe), batches, progress=False)
    if weight < 8:
        fxquant.recover(prepared, batches, progress=False)
    assert digits.accuracy(fxquant.convert(prepared)) > digits.accuracy(model) - most


def test_other_forms_of_inputs_and_the_same_seed():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, index: Tensor, scale: float = 1.0) -> Tensor:
            return self.norm(x)[index] * scale

    example = (torch.zeros(16, 3), torch.arange(4))
    one, other = (synthesize(Two().eval(), example, batches=1, steps=3, progress=False)[0] for _ in range(2))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], example[1])


def test_what_synthesize_needs():
    with pytest.raises(InputError, match="has none with statistics"):
        synthesize(nn.Sequential(nn.Linear(3, 3)), torch.zeros(2, 3), progress=False)
    with pytest.raises(InputError, match="real numbers"):
        synthesize(nn.Sequential(nn.BatchNorm1d(3)), torch.zeros(2, 3, dtype=torch.long), progress=False)


def test_calibrating_on_nothing_says_what_to_do():
    prepared = fxquant.prepare(digits.trained(), digits.data()[0][:4])
    with pytest.raises(CalibrationError, match="synthesize"):
        fxquant.calibrate(prepared, None)


class Writing(nn.Module):
    """Code that writes into what it is given, before and behind the batch norm, and into what its layers have read."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.relu, self.conv, self.norm = nn.ReLU(inplace=inplace), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.inplace = inplace

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if not self.inplace:
            return self.norm(self.conv(self.relu((x - 0.5) / 0.25)) * (mask + 1)) * 2
        x -= 0.5
        x /= 0.25
        mask += 1
        y = self.conv(self.relu(x))
        x.mul_(2)
        y *= mask
        y = self.norm(y)
        mask.zero_()
        return y.mul_(2)


def test_models_that_write_into_their_inputs():
    torch.manual_seed(0)
    writing, plain = Writing(inplace=True).eval(), Writing(inplace=False).eval()
    plain.load_state_dict(writing.state_dict())
    example = torch.zeros(16, 3, 5, 5), torch.randint(0, 2, (16, 1, 1, 1))
    before = [value.clone() for value in example]
    one, other = (synthesize(m, example, batches=1, steps=20, progress=False)[0] for m in (writing, plain))
    assert all(torch.equal(value, old) for value, old in zip(example, before, strict=True))
    torch.testing.assert_close(one[0], other[0], rtol=1e-3, atol=1e-3)  # twenty steps of Adam amplify rounding
    assert torch.equal(one[1], example[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_numbers(dtype):
    """Adam's division by 1e-8 would be one by zero in half precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval().to(dtype)
    (made,) = synthesize(model, torch.zeros(8, 3, 5, 5, dtype=dtype), batches=1, steps=10, progress=False)
    assert made.dtype == dtype and bool(torch.isfinite(made).all()) and float(made.float().std()) > 0.1


def test_what_has_no_gradient_or_no_numbers_is_said():
    class NoGradient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    x, model = torch.zeros(4, 3), nn.Sequential(nn.BatchNorm1d(3)).eval()
    with pytest.raises(InputError, match="with gradients"):
        synthesize(NoGradient().eval(), x, progress=False)
    with pytest.raises(InputError, match="at least 1"):
        synthesize(model, x, steps=0, progress=False)
    with torch.inference_mode():
        (made,) = synthesize(model, x, batches=1, steps=2, progress=False)
    assert not made.is_inference() and made.shape == x.shape
    model[0].running_var[1] = torch.nan
    with pytest.raises(InputError, match="1 of the model's 1 batch norms"):
        synthesize(model, x, progress=False)
    with pytest.raises(InputError, match="not what prepare made of it"):
        synthesize(fxquant.prepare(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval(), x), x, progress=False)
