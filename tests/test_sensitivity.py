"""sensitivity: its numbers against a model that was rounded by hand, its order, and that it leaves the model as it was."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from digits import data as digits_data
from digits import trained
from test_errors_by_layer import Small, batches, decibels, deep, on_grid, prepared_small

import fxquant
from fxquant.analysis.evaluation import evaluate
from fxquant.analysis.faults import Fault
from fxquant.analysis.measures import Noise
from fxquant.errors import CalibrationError, InputError
from fxquant.export.agreement import compare_output
from fxquant.nn.fake_quantize import WeightQuantize
from fxquant.numerics.scheme import QUANTIZERS, Scheme
from fxquant.quantizers import RULES, register


def test_the_numbers_are_those_of_a_model_rounded_by_hand():
    data = batches()
    model, prepared = prepared_small(data)
    found = fxquant.sensitivity(prepared, data, bits=(8, 3), progress=False)
    x, double = torch.cat(data).double(), copy.deepcopy(model).double()
    exact = double(x).detach()

    three = copy.deepcopy(prepared.relu.output_quantizer)
    span = 255 * float(three.scale)
    for bits in (8, 3):
        qmax = 2 ** (bits - 1) - 1
        weight = model.conv.weight.detach()
        quantizer = prepared.conv.weight_quantizer
        if bits == 8:
            rounded = torch.from_numpy(on_grid(weight, quantizer))
        else:
            scale = weight.double().abs().amax((1, 2, 3), keepdim=True) / qmax
            rounded = (weight.double() / scale).round().clamp(-qmax, qmax) * scale
        step = span / (2**bits - 1)
        y = F.conv2d(x, rounded, double.conv.bias, padding=1).relu()
        y = (y / step).round().clamp(0, 2**bits - 1) * step
        logits = double.fc(y.mean((2, 3))).detach()
        assert found["conv"].sqnr[bits] == pytest.approx(decibels(logits.numpy(), exact.numpy()), abs=0.05)
        p, q = exact.softmax(1), logits.softmax(1)
        kl = float((p * (p / q).log()).sum(1).mean())
        assert found["conv"].kl[bits] == pytest.approx(kl, rel=0.03)
    assert found["conv"].weights == model.conv.weight.numel()
    assert [layer.path for layer in found.layers] == sorted(
        (layer.path for layer in found.layers), key=lambda path: found[path].sqnr[3]
    )


def test_fewer_bits_lose_more_and_the_model_is_as_it_was():
    images = digits_data()[0]
    prepared = fxquant.calibrate(fxquant.prepare(trained(), images[:2]), [images[:256]], progress=False)
    before, quantizers = copy.deepcopy(prepared.state_dict()), [id(m) for m in prepared.modules()]
    found = fxquant.sensitivity(prepared, images[256:384], progress=False)
    assert {layer.path for layer in found.layers} >= {"stem", "grouped", "side", "fc", "x_quantizer"}
    for layer in found.layers:
        assert layer.sqnr[4] < layer.sqnr[8] and layer.kl[4] > layer.kl[8] >= -1e-9
    assert [id(m) for m in prepared.modules()] == quantizers
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
    assert json.loads(found.to_json())["layers"][0]["sqnr"]["4"] == found.layers[0].sqnr[4]
    assert "4 bits [dB]" in str(found) and len(found.to_pandas()) == len(found.layers)


def test_a_float_model_is_prepared_on_the_way():
    data = batches()
    torch.manual_seed(0)
    model = Small().eval()
    before = copy.deepcopy(model.state_dict())
    found = fxquant.sensitivity(model, data, progress=False)
    _, prepared = prepared_small(data)
    same = fxquant.sensitivity(prepared, data, progress=False)
    assert found.layers == same.layers
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_layer_with_an_outlier_is_the_most_sensitive():
    data = batches()
    model = deep()
    with torch.no_grad():
        model[4].weight[5] *= 200
        model[6].weight[:, 5] /= 200
    _, prepared = prepared_small(data, model)
    assert fxquant.sensitivity(prepared, data, progress=False).layers[0].path == "4"


def test_time_ends_it_and_errors_say_what_to_do():
    data = batches()
    model, prepared = prepared_small(data)
    found = fxquant.sensitivity(prepared, data, seconds=0.0, progress=False)
    assert not found.layers and "used up" in str(found)
    for bits in ((), (1,), (8.0,), 8):
        with pytest.raises(InputError, match="bits"):
            fxquant.sensitivity(prepared, data, bits=bits)
    with pytest.raises(InputError, match="no data"):
        fxquant.sensitivity(prepared, [])
    with pytest.raises(CalibrationError, match="before sensitivity"):
        fxquant.sensitivity(fxquant.prepare(model, data[0]), data)


class Selecting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(16, 64)

    def forward(self, x):
        y = self.fc(x)
        return y[y > 0.01]


def test_outputs_of_other_shapes_are_not_compared():
    torch.manual_seed(0)
    model, x = Selecting().eval(), torch.randn(256, 16)
    prepared = fxquant.calibrate(fxquant.prepare(model, x), [x], progress=False)
    found = fxquant.sensitivity(prepared, [x], bits=(3,), progress=False)
    assert "fc" in found.left_out and "other shapes" in found.left_out["fc"] and "other shapes" in str(found)
    page = fxquant.report(model, prepared, [x], bits=(3,), progress=False)
    assert any("other shapes" in note for note in page.notes) and not page.outputs


def with_weights(data: list[torch.Tensor], bits: int, quantizer: str) -> torch.nn.Module:
    recipe = fxquant.Setting(weight=Scheme.weight(bits, quantizer=quantizer))
    return prepared_small(data, recipe=recipe)[1]


@pytest.mark.parametrize("rule", ["wrpn", "midrise", "lsq"])
def test_other_bits_are_those_of_the_same_rule(rule):
    """fc's result stays float: all that is rounded is its weight, as the rule does that at four bits from the start."""
    data = batches()
    own = fxquant.sensitivity(with_weights(data, 4, rule), data, bits=(4,), progress=False)["fc"]
    other = fxquant.sensitivity(with_weights(data, 2, rule), data, bits=(4,), progress=False)["fc"]
    plain = fxquant.sensitivity(with_weights(data, 2, "observed"), data, bits=(4,), progress=False)["fc"]
    assert other.sqnr[4] == pytest.approx(own.sqnr[4], abs=0.01) and abs(plain.sqnr[4] - own.sqnr[4]) > 0.1


def test_bits_that_a_rule_cannot_have_are_told():
    data = batches()
    prepared = with_weights(data, 2, "twn")
    found = fxquant.sensitivity(prepared, data, bits=(8, 2), progress=False)
    assert set(found["conv"].sqnr) == set(found["conv"].kl) == {2} and set(found["mean"].sqnr) == {8, 2}
    reason = "the quantizer rule 'twn' of its weight has no 8 bits: its numbers are -1, 0 and 1"
    assert {path for path, why in found.left_out.items() if why.startswith(reason)} == {
        "conv at 8 bits",
        "fc at 8 bits",
    }
    assert f"not measured: conv at 8 bits, fc at 8 bits: {reason}" in str(found)
    row = next(row for row in found.records() if row["layer"] == "conv")
    assert row["sqnr_8"] is None and row["sqnr_2"] == found["conv"].sqnr[2] and json.loads(found.to_json())
    assert "Infinity" not in found.to_json() and "conv at 8 bits" in found.markdown() and found._repr_html_()
    model = Small().eval()
    page = fxquant.report(model, prepared, data, bits=(8, 4), progress=False)
    assert "conv at 4 bits" in page.html() and "conv" not in {layer.path for layer in page.sensitivity.layers}


class OnlyFew(WeightQuantize):
    """A user's rule that says only when it is made which bits it has."""

    def __init__(self, scheme: Scheme, **options: object) -> None:
        if scheme.bits > 4:
            raise ValueError("at most 4 bits")
        super().__init__(scheme, **options)


class Unregistered(WeightQuantize):
    """A quantizer of a user's own that is put into a model by hand."""


def test_quantizers_of_a_users_own_are_measured_at_bits_that_they_have():
    data = batches()
    kept = dict(RULES), dict(QUANTIZERS)
    try:
        register("few", weight=OnlyFew, estimator="minmax")
        found = fxquant.sensitivity(with_weights(data, 4, "few"), data, bits=(8, 4, 3), progress=False)
    finally:
        for registry, before in zip((RULES, QUANTIZERS), kept, strict=True):
            registry.clear()
            registry.update(before)
    assert set(found["conv"].sqnr) == {4, 3} and "ValueError: at most 4 bits" in found.left_out["conv at 8 bits"]
    _, prepared = prepared_small(data)
    own = prepared.conv.weight_quantizer
    prepared.conv.weight_quantizer = Unregistered(own.scheme, axis=own.axis, channels=own.channels)
    found = fxquant.sensitivity(prepared, data, bits=(8, 4), progress=False)
    assert set(found["conv"].sqnr) == {8} and "no registered rule" in found.left_out["conv at 4 bits"]
    assert isinstance(prepared.conv.weight_quantizer, Unregistered)


class Masked(torch.nn.Module):
    """Scores of which some are excluded, as -inf."""

    def __init__(self, collapses: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.collapses = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4), collapses

    def forward(self, x, excluded):
        y = self.first(x)
        y = self.last((y + 1000.0) - 1000.0 if self.collapses else y)
        return y.masked_fill(excluded, float("-inf"))


def test_masked_scores_are_no_signal_and_no_noise():
    torch.manual_seed(0)
    model, x = Masked().eval(), (torch.randn(32, 8), torch.rand(32, 4) > 0.6)
    prepared = fxquant.calibrate(fxquant.prepare(model, x), [x], progress=False)
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        exact = prepared(*x).double()
    with torch.no_grad():
        integer = fxquant.convert(prepared)(*x).double()
    kept = exact.isfinite()
    assert 0.4 < float(kept.double().mean()) < 0.9 and torch.equal(kept, integer.isfinite())
    expected = decibels(integer[kept].numpy(), exact[kept].numpy())
    page = fxquant.report(model, prepared, [x], bits=(8, 4), progress=False)
    assert page.outputs[0].sqnr == pytest.approx(expected, abs=0.01)
    assert 0 <= page.outputs[0].difference < 0.1 and "nan" not in page.markdown()
    for layer in page.sensitivity.layers:
        assert all(10 < layer.sqnr[bits] < 100 and 0 <= layer.kl[bits] < 0.1 for bits in (8, 4))
        assert layer.sqnr[8] > layer.sqnr[4]
    found = evaluate(lambda batch: exact, lambda batch: integer, [x], None, progress=False)
    keep = [(p, q) for p, q in zip(exact, integer, strict=True) if bool(p.isfinite().any())]
    by_hand = sum(float((p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0)))[p.isfinite()].sum()) for p, q in keep)
    assert found.sqnr == pytest.approx(expected, abs=0.01) and found.kl == pytest.approx(by_hand / 32, rel=1e-6)


def test_masked_scores_do_not_hide_that_the_others_collapse():
    torch.manual_seed(0)
    model, x = Masked(collapses=True).eval(), (torch.randn(16, 8), torch.rand(16, 4) > 0.6)
    with pytest.warns(UserWarning, match=r"rounding to 8 bits leaves -?\d+\.\d dB of an output"):
        fxquant.calibrate(fxquant.prepare(model, x), [x], progress=False)


def test_another_infinity_is_noise_without_end():
    exact, lost = torch.tensor([[1.0, -torch.inf, 2.0]]), torch.tensor([[1.0, -5.0, 2.0]])
    noise = Noise()
    noise.add(lost, exact)
    assert noise.error().sqnr == -math.inf
    assert compare_output("", lost, exact, None).sqnr == -math.inf
    noise = Noise()
    noise.add(torch.tensor([[1.5, -torch.inf, 2.0]]), exact)
    assert noise.error().sqnr == pytest.approx(10 * math.log10(5 / 0.25), rel=1e-6)


def test_what_was_not_measured_is_in_every_form_of_a_report():
    data = batches()
    model, prepared = prepared_small(data)
    page = fxquant.report(model, prepared, data, seconds=1e-9, progress=False)
    for shown in (page.markdown(), page.html()):
        assert "seconds were used up" in shown
    faults = tuple(Fault(f"layer{i}", "float", "stays", "keep", 1.0) for i in range(20))
    assert "and 8 more" in replace(page, faults=faults).markdown()
