"""Quantization-aware training: an ordinary module that learns, whose ranges follow, and that converts to what it was."""

from __future__ import annotations

import copy
from typing import Any

import digits
import pytest
import torch
from comparisons import assert_same_bits, assert_same_top1
from torch import Tensor, nn

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize

FOUR_BITS = Setting(
    weight=Scheme(bits=4, symmetric=True, signed=True, per_channel=True, narrow_range=True),
    activation=Scheme(bits=4),
)


def example() -> Tensor:
    return digits.data()[0][:8]


def activation_quantizers(module: nn.Module) -> dict[str, FakeQuantize]:
    return {n: m for n, m in module.named_modules() if type(m) is FakeQuantize}


def test_training_from_scratch_learns_and_converts():
    torch.manual_seed(0)
    prepared = fxquant.prepare(digits.DigitsNet().train(), example(), qat=True)
    losses = digits.train(prepared, epochs=4, rate=0.05)
    assert losses[-1] < 0.3 * losses[0]
    integer = fxquant.convert(prepared)
    assert digits.accuracy(prepared) > 93
    assert abs(digits.accuracy(integer) - digits.accuracy(prepared)) <= 1.0
    assert_same_top1(digits.logits(integer), digits.logits(fxquant.freeze(prepared)), 0.995)
    assert_same_top1(digits.logits(fxquant.freeze(prepared)), digits.logits(prepared), 0.99)


def test_training_mends_what_four_bits_break():
    recipe, batches = Recipe(default=FOUR_BITS), list(digits.training_batches(0))
    ptq = fxquant.prepare(digits.trained(), example(), recipe=recipe)
    before = digits.accuracy(fxquant.convert(fxquant.calibrate(ptq, batches, progress=False)))
    prepared = fxquant.prepare(digits.trained().train(), example(), qat=True, recipe=recipe)
    digits.train(prepared, epochs=3, rate=0.02)
    fxquant.reestimate_batchnorm(prepared, batches)
    after = digits.accuracy(fxquant.convert(prepared))
    assert after >= before and after >= digits.accuracy(digits.trained()) - 2.0


def test_default_ranges_do_not_cost_accuracy():
    """Eight bits cost nothing in post-training quantization here, so that training with them must not either."""
    prepared = fxquant.prepare(digits.trained().train(), example(), qat=True)
    digits.train(prepared, epochs=3, rate=0.02)
    assert digits.accuracy(fxquant.convert(prepared)) >= digits.accuracy(digits.trained()) - 1.0


def test_frozen_statistics_train_too():
    prepared = fxquant.prepare(digits.trained().train(), example(), qat=True, batch_norm="frozen")
    with torch.no_grad():
        prepared.get_parameter("fc.weight").zero_()  # so that there is something to learn
    losses = digits.train(prepared, epochs=2, rate=0.01)
    assert losses[-1] < losses[0]
    integer = fxquant.convert(prepared)
    assert abs(digits.accuracy(integer) - digits.accuracy(prepared)) <= 1.0


def test_a_training_run_is_the_same_twice():
    def once() -> dict[str, Tensor]:
        torch.manual_seed(3)
        prepared = fxquant.prepare(digits.trained().train(), example(), qat=True)
        digits.train(prepared, epochs=1, rate=0.02)
        return prepared.state_dict()

    a, b = once(), once()
    assert all(torch.equal(a[k], b[k]) for k in a)


def linear(qat: bool = True) -> Any:
    torch.manual_seed(0)
    return fxquant.prepare(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).train(), torch.randn(4, 8), qat=qat
    )


def test_ranges_follow_a_growing_activation():
    prepared = linear()
    x = torch.randn(32, 8)
    prepared(x)
    before = {n: float(q.scale) for n, q in activation_quantizers(prepared).items()}
    for _ in range(20):
        prepared(x * 10)
    for n, q in activation_quantizers(prepared).items():
        assert 7 * before[n] < float(q.scale) < 14 * before[n], n


def test_ranges_follow_a_shrinking_activation():
    prepared = linear()
    x = torch.randn(32, 8)
    prepared(x * 10)
    before = {n: float(q.scale) for n, q in activation_quantizers(prepared).items()}
    for _ in range(40):
        prepared(x)
    assert all(float(q.scale) < 0.3 * before[n] for n, q in activation_quantizers(prepared).items())


def test_eval_mode_moves_nothing():
    prepared = linear()
    x = torch.randn(32, 8)
    prepared(x)
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    prepared.eval()
    with torch.no_grad():
        first = prepared(x * 100)
        assert_same_bits(prepared(x * 100), first)
    assert all(torch.equal(before[k], v) for k, v in prepared.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(prepared(x * 100), first)


def test_eval_before_any_training_does_not_round():
    prepared = linear()
    x = torch.randn(32, 8)
    with torch.no_grad():
        rounded = prepared.eval()(x)
        with fxquant.quantizers_off(prepared):
            exact = prepared(x)
    assert not torch.equal(rounded, exact), "weights are rounded at once: their range is known"
    assert all(not q.ready for q in activation_quantizers(prepared).values())


def test_weights_are_rounded_anew_after_every_step():
    prepared = linear()
    quantizer = prepared.get_submodule("0").weight_quantizer
    assert isinstance(quantizer, WeightQuantize)
    prepared(torch.randn(4, 8))
    before = quantizer.scale.clone()
    with torch.no_grad():
        prepared.get_submodule("0").weight.mul_(3.0)
    prepared(torch.randn(4, 8))
    assert torch.allclose(quantizer.scale, 3 * before)
    prepared.load_state_dict({k: v * 2 if k == "0.weight" else v for k, v in prepared.state_dict().items()})
    prepared(torch.randn(4, 8))
    assert torch.allclose(quantizer.scale, 6 * before)


def test_weights_changed_through_data_are_rounded_anew():
    prepared = linear()
    layer = prepared.get_submodule("0")
    prepared(torch.randn(4, 8))
    before = layer.weight_quantizer.scale.clone()
    layer.weight.data.mul_(3.0)
    prepared(torch.randn(4, 8))
    assert torch.allclose(layer.weight_quantizer.scale, 3 * before)


def test_gradients_reach_every_parameter():
    prepared = fxquant.prepare(digits.trained().train(), example(), qat=True)
    nn.functional.cross_entropy(prepared(digits.data()[0][:64]), digits.data()[1][:64]).backward()
    for name, parameter in prepared.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, (
            name
        )


def test_parameter_groups_by_name_still_match():
    model = digits.trained().train()
    prepared = fxquant.prepare(model, example(), qat=True)

    def groups(module: nn.Module) -> list[list[str]]:
        named = [n for n, _ in module.named_parameters()]
        return [[n for n in named if "bn" in n], [n for n in named if "bn" not in n]]

    assert groups(prepared) == groups(model)
    optimizer = torch.optim.SGD(
        [{"params": [p for n, p in model.named_parameters() if n in g]} for g in groups(model)], lr=0.1, momentum=0.9
    )
    nn.functional.cross_entropy(model(example()), digits.data()[1][:8]).backward()
    optimizer.step()
    given = dict(prepared.named_parameters())
    other = torch.optim.SGD([{"params": [given[n] for n in g]} for g in groups(prepared)], lr=0.1, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    for p, state in other.state.items():
        assert state["momentum_buffer"].shape == p.shape


def test_an_optimizers_state_goes_over_to_the_prepared_model():
    """By position, as torch does it: parameters have to come in the float model's order."""
    model = digits.trained().train()
    prepared = fxquant.prepare(model, example(), qat=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    nn.functional.cross_entropy(model(example()), digits.data()[1][:8]).backward()
    optimizer.step()
    other = torch.optim.SGD(prepared.parameters(), lr=0.1, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    own = {n: other.state[p]["momentum_buffer"] for n, p in prepared.named_parameters()}
    assert all(torch.equal(own[n], optimizer.state[p]["momentum_buffer"]) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(dtype):
    prepared = fxquant.prepare(digits.trained().train(), example(), qat=True)
    images, labels = digits.data()[0][:64], digits.data()[1][:64]
    with torch.autocast("cpu", dtype=dtype):
        loss = nn.functional.cross_entropy(prepared(images), labels)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in prepared.parameters())
    assert all(q.scale.dtype == torch.float32 and q.ready for q in activation_quantizers(prepared).values())
    assert digits.accuracy(fxquant.convert(prepared)) > 85


def test_training_goes_on_from_a_checkpoint(tmp_path):
    def some_steps(module: nn.Module) -> None:
        torch.manual_seed(1)
        digits.train(module, epochs=1, rate=0.01)

    prepared = fxquant.prepare(digits.trained().train(), example(), qat=True)
    some_steps(prepared)
    fxquant.save(prepared, tmp_path / "qat.pt")
    other = fxquant.load(digits.DigitsNet().train(), tmp_path / "qat.pt")
    third = copy.deepcopy(prepared)
    for module in (prepared, other, third):
        some_steps(module)
    for module in (other, third):
        assert all(torch.equal(v, module.state_dict()[k]) for k, v in prepared.state_dict().items())


def test_calibration_before_training_gives_a_start():
    prepared = fxquant.prepare(digits.trained().train(), example(), qat=True)
    fxquant.calibrate(prepared, list(digits.training_batches(0))[:4], progress=False)
    assert prepared.training and all(q.ready for q in activation_quantizers(prepared).values())
    assert digits.accuracy(prepared) > 90
