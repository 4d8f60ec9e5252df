"""errors_by_layer: its numbers against formulas in float64, planted faults, and that it leaves the model as it was."""

from __future__ import annotations

import copy
import json
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.analysis.measures import HistogramCount
from fxquant.errors import CalibrationError, InputError, LevelError
from fxquant.nn.fake_quantize import FakeQuantize

REL = 1e-3


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


def batches(count: int = 3, channels: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, channels, 6, 6, generator=generator) for _ in range(count)]


def prepared_small(
    data: list[Tensor], model: nn.Module | None = None, **options: object
) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = (model or Small()).eval()
    prepared = fxquant.prepare(model, data[0], **options)
    return model, fxquant.calibrate(prepared, data, progress=False)


def decibels(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(10 * np.log10(np.square(expected).sum() / np.square(actual - expected).sum()))


def on_grid(x: Tensor, quantizer: FakeQuantize) -> np.ndarray:
    """The grid's definition, in float64 numpy."""
    scale, zero = quantizer.scale.double().numpy(), quantizer.zero_point.numpy()
    scale = scale.reshape(-1, *[1] * (x.ndim - 1)) if scale.ndim else scale
    zero = zero.reshape(-1, *[1] * (x.ndim - 1)) if zero.ndim else zero
    q = np.clip(np.round(x.double().numpy() / scale) + zero, quantizer.scheme.qmin, quantizer.scheme.qmax)
    return (q - zero) * scale


def test_the_numbers_are_those_of_the_formulas():
    data = batches()
    model, prepared = prepared_small(data)
    found = fxquant.errors_by_layer(prepared, data, progress=False)
    x = torch.cat(data).double()
    double = copy.deepcopy(model).double()
    weight = model.conv.weight.detach()
    rounded = torch.from_numpy(on_grid(weight, prepared.conv.weight_quantizer))
    convolved = double.conv(x).detach()
    by_weight = F.conv2d(x, rounded, double.conv.bias, padding=1).detach()
    positive = convolved.relu()
    step = float(prepared.relu.output_quantizer.scale)

    conv, relu = found["conv"], found["relu"]
    assert conv.weight.sqnr == pytest.approx(decibels(rounded.numpy(), weight.double().numpy()), rel=REL)
    apart = (rounded - weight.double()).numpy() / prepared.conv.weight_quantizer.scale.double().numpy().reshape(
        -1, 1, 1, 1
    )
    assert conv.weight.lsb == pytest.approx(np.sqrt(np.square(apart).mean()), rel=REL) and conv.weight.lsb_max <= 0.5001
    assert conv.weight_alone.sqnr == pytest.approx(decibels(by_weight.numpy(), convolved.numpy()), rel=REL)
    assert conv.weight_alone.lsb_max == pytest.approx(float((by_weight - convolved).abs().max()) / step, rel=REL)
    assert conv.activation_alone is None and conv.alone == conv.weight_alone

    own = on_grid(positive.float(), prepared.relu.output_quantizer)
    assert relu.activation_alone.sqnr == pytest.approx(decibels(own, positive.numpy()), rel=REL)
    assert relu.weight is None and relu.bits == 8
    entering = torch.from_numpy(on_grid(x.float(), prepared.x_quantizer.output_quantizer))
    into = F.conv2d(entering, rounded, double.conv.bias, padding=1).relu().detach()
    together = on_grid(into.float(), prepared.relu.output_quantizer)
    assert relu.accumulated.sqnr == pytest.approx(decibels(together, positive.numpy()), abs=0.05)
    lsb = np.sqrt(np.square((together - positive.numpy()) / step).mean())
    assert relu.accumulated.lsb == pytest.approx(lsb, rel=0.01)
    assert relu.histogram.clipped == 0 and sum(relu.histogram.counts) == positive.numel()
    order = [layer.alone.sqnr for layer in found.layers]
    assert order == sorted(order) and not found.faults and not found.left_out


def test_a_layer_alone_has_both_roundings_and_float_inputs():
    data = batches()
    torch.manual_seed(0)
    model, prepared = prepared_small(data, nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)))
    found = fxquant.errors_by_layer(prepared, data, progress=False)["0"]
    double = copy.deepcopy(model).double()
    x = torch.cat(data).double()
    rounded = torch.from_numpy(on_grid(model[0].weight.detach(), prepared.get_submodule("0").weight_quantizer))
    both = on_grid(F.conv2d(x, rounded, double[0].bias).detach().float(), prepared.get_submodule("0").output_quantizer)
    assert found.alone.sqnr == pytest.approx(decibels(both, double[0](x).detach().numpy()), abs=0.02)
    assert found.alone.sqnr < min(found.weight_alone.sqnr, found.activation_alone.sqnr)


def test_it_leaves_the_model_as_it_was():
    data = batches()
    _, prepared = prepared_small(data)
    prepared.train()
    before, state = copy.deepcopy(prepared.state_dict()), torch.get_rng_state()
    fxquant.errors_by_layer(prepared, data, progress=False)
    assert prepared.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
    assert not any(part._forward_hooks for part in prepared.modules())
    assert all(q.enabled and not q.observing for q in prepared.modules() if isinstance(q, FakeQuantize))


def test_integer_and_frozen_models_are_measured_against_the_prepared_one():
    data = batches()
    _, prepared = prepared_small(data)
    prepared_errors = fxquant.errors_by_layer(prepared, data, progress=False)
    for made in (fxquant.convert(prepared), fxquant.freeze(prepared)):
        found = fxquant.errors_by_layer(made, data, reference=prepared, progress=False)
        assert found.level in ("integer", "frozen")
        for path in ("x_quantizer", "relu"):
            assert found[path].accumulated.sqnr == pytest.approx(prepared_errors[path].accumulated.sqnr, abs=0.3)
    with pytest.raises(InputError, match="reference=prepared"):
        fxquant.errors_by_layer(made, data)
    other = prepared_small(data, nn.Sequential(nn.Conv2d(3, 2, 1)))[1]
    with pytest.raises(InputError, match="was not made of this reference"):
        fxquant.errors_by_layer(made, data, reference=other)


def test_errors_say_what_to_do():
    data = batches()
    model, prepared = prepared_small(data)
    with pytest.raises(LevelError, match=r"fxquant\.prepare"):
        fxquant.errors_by_layer(model, data)
    with pytest.raises(InputError, match="no data"):
        fxquant.errors_by_layer(prepared, [])
    with pytest.raises(InputError, match="NaN"):
        fxquant.errors_by_layer(prepared, [torch.full((1, 3, 6, 6), math.nan)], progress=False)
    with pytest.raises(CalibrationError, match="before errors_by_layer"):
        fxquant.errors_by_layer(fxquant.prepare(model, data[0]), data)


def test_it_reads_as_text_json_html_markdown_and_pandas():
    data = batches()
    _, prepared = prepared_small(data)
    found = fxquant.errors_by_layer(prepared, data[0], progress=False)
    assert "accumulated [dB]" in str(found) and "relu" in str(found)
    plain = json.loads(found.to_json())
    assert {layer["path"] for layer in plain["layers"]} == {layer.path for layer in found.layers}
    assert "<table>" in found._repr_html_() and found.markdown().count("\n| ") >= len(found.layers)
    frame = found.to_pandas()
    assert list(frame["layer"]) == [layer.path for layer in found.layers]
    assert frame.loc[frame["layer"] == "relu", "accumulated_sqnr"].item() == found["relu"].accumulated.sqnr


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.fc(self.fc(x) * mask)


def test_masks_are_counted_and_not_measured():
    torch.manual_seed(0)
    inputs = (torch.randn(4, 16), torch.rand(4, 16) > 0.5)
    prepared = fxquant.calibrate(fxquant.prepare(Masked().eval()), [inputs], progress=False)
    found = fxquant.errors_by_layer(prepared, [inputs], progress=False)
    (mask,) = [layer for layer in found.layers if layer.not_measured]
    assert "mask" in mask.path and mask.alone is None and "1 result is a mask" in str(found)
    assert found["fc_1"].alone.values == 64


# --- planted faults -------------------------------------------------------------------------------------------------------


def deep(channels: int = 24) -> nn.Sequential:
    torch.manual_seed(3)
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)).eval()


def first_fault(prepared: nn.Module, data: list[Tensor]) -> fxquant.analysis.faults.Fault:
    found = fxquant.errors_by_layer(prepared, data, progress=False)
    assert found.faults
    return found.faults[0]


@pytest.mark.parametrize("factor, kind", [(8.0, "scale"), (1 / 8, "saturates")])
def test_a_wrong_scale_is_named(factor, kind):
    data = batches()
    _, prepared = prepared_small(data, deep())
    assert not fxquant.errors_by_layer(prepared, data, progress=False).faults
    quantizer = prepared.get_submodule("5").output_quantizer
    quantizer.set_grid(quantizer.scale * factor, quantizer.zero_point)
    fault = first_fault(prepared, data)
    assert (fault.path, fault.kind) == ("5", kind) and fault.cost > 10
    assert ("8 times" in fault.what or "8.01 times" in fault.what) or kind == "saturates"
    assert ("beyond the grid" in fault.what) == (kind == "saturates")


@pytest.mark.parametrize("factor, kind", [(8.0, "weight scale"), (1 / 8, "weight saturates")])
def test_a_wrong_scale_of_a_weight_is_named(factor, kind):
    data = batches()
    _, prepared = prepared_small(data, deep(), processor="vnni")
    part = prepared.get_submodule("4")
    quantizer = part.weight_quantizer
    scale = quantizer.scale * factor
    integers = (part.weight / scale.reshape(-1, 1, 1, 1)).round().clamp(-127, 127)
    quantizer.pin(integers, scale)
    fault = first_fault(prepared, data)
    assert (fault.path, fault.kind) == ("4", kind)


def test_outlier_channels_are_named():
    data = batches()
    model = deep()
    with torch.no_grad():
        model[2].weight[7] *= 60
    _, prepared = prepared_small(data, model)
    fault = first_fault(prepared, data)
    assert (fault.path, fault.kind) == ("3", "outliers") and "channel 7:" in fault.what


def test_outlier_channels_of_a_weight_with_one_scale_are_named():
    data = batches()
    model = deep()
    with torch.no_grad():
        model[2].weight[7] *= 60
    recipe = fxquant.Setting(weight=fxquant.Scheme.weight(per_channel=False))
    _, prepared = prepared_small(data, model, recipe=recipe)
    found = fxquant.errors_by_layer(prepared, data, progress=False)
    assert "weight outliers" in {fault.kind for fault in found["2"].faults}


def test_too_few_bits_are_named_once():
    data = batches()
    few = fxquant.Setting(weight=fxquant.Scheme.weight(3), activation=fxquant.Scheme.activation(3))
    _, prepared = prepared_small(data, deep(), recipe=few)
    found = fxquant.errors_by_layer(prepared, data, progress=False)
    (fault,) = [fault for fault in found.faults if fault.kind == "bits"]
    own = [layer for layer in found.layers if not layer.faults]
    assert fault.path == own[0].path and "3 bits leave" in fault.what
    assert f"{sum(layer.alone.sqnr < 20 for layer in own) - 1} more ops" in fault.what


class Sorting(nn.Module):
    """Its own code takes a way that the data chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(24, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if float(x.mean()) > -1e9 else x


def test_an_island_is_named():
    data = batches()
    model = deep()
    model[4] = Sorting().eval()
    _, prepared = prepared_small(data, model)
    fault = first_fault(prepared, data)
    assert (fault.path, fault.kind) == ("4", "island") and "test_errors_by_layer.py" in fault.what


def test_a_shared_grid_is_not_called_wrong():
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([8 * self.conv(x), self.conv(x).sigmoid()], 1).relu()

    data = batches()
    _, prepared = prepared_small(data, Joined())
    kinds = {fault.path: fault.kind for fault in fxquant.errors_by_layer(prepared, data, progress=False).faults}
    assert kinds.get("sigmoid") == "shared"


class Choosing(nn.Module):
    """Its own code calls its part twice where that gives many different values, which rounded it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(16, 16), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        return self.part(y) if len(y.unique()) > 256 else y


def test_what_runs_otherwise_when_quantized_is_left_out_with_the_reason():
    torch.manual_seed(0)
    model, x = Choosing().eval(), torch.randn(128, 16)
    prepared = fxquant.prepare(model, x, recipe=fxquant.Recipe(quantize_outputs=True))
    with pytest.warns(UserWarning, match="dB of an output"):
        fxquant.calibrate(prepared, [x], progress=False)
    found = fxquant.errors_by_layer(prepared, [x], progress=False)
    assert found.left_out and all(path.startswith("part") for path in found.left_out)
    assert set(found.left_out.values()) == {"the model's own code calls it otherwise when it is quantized"}
    assert "not measured: part" in str(found)


class WritesInPlace(nn.Module):
    """An island that writes into what it was given, and into what its own layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            return x
        x.mul_(3.0)
        y = self.fc(x)
        y[y < 0] = 0
        return y


class ChoosesBySign(nn.Module):
    """An island that runs one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.positive(x) if float(x.detach().mean()) > 0 else self.negative(x)


class SelectsRows(nn.Module):
    """An island whose layer is given as many rows as there are positive ones: none of some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[x[:, 0] > 0]).sum(0, keepdim=True)


def around(island: nn.Module) -> tuple[nn.Module, list[Tensor], nn.Module]:
    """A model around ``island``, whose first layer changes nothing; one positive batch and one negative; and it prepared."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(a=nn.Linear(8, 8), island=island, b=nn.Linear(8, 4))).eval()
    with torch.no_grad():
        model.a.weight.copy_(torch.eye(8))
        model.a.bias.zero_()
    data = [torch.rand(4, 8) + 1, -torch.rand(4, 8) - 1]
    return model, data, fxquant.calibrate(fxquant.prepare(model, data[0]), data, progress=False)


def test_what_an_island_writes_in_place_is_no_error_of_the_layer_before_it():
    _, data, prepared = around(WritesInPlace())
    for made in (prepared, fxquant.convert(prepared)):
        reference = None if made is prepared else prepared
        found = fxquant.errors_by_layer(made, data, reference=reference, progress=False)
        for path in ("a", "island.fc.linear"):  # 8 bits leave some 40 dB; held against what was written, some 5
            assert found[path].accumulated.sqnr > 30
        assert not found.left_out


def test_layers_that_only_some_batches_reach_are_measured_on_those():
    _, data, prepared = around(ChoosesBySign())  # the example is positive: the other layer stays in float
    both = fxquant.errors_by_layer(prepared, data, progress=False)
    inside = {layer.path for layer in both.layers if layer.path.startswith("island.positive.")}
    assert len(inside) == 2 and not both.left_out
    assert all(both[path].accumulated.values == 32 for path in inside)
    found = fxquant.errors_by_layer(prepared, data[1:], progress=False)
    assert found.left_out == dict.fromkeys(inside, "no batch reaches it")
    assert {layer.path for layer in found.layers} == {layer.path for layer in both.layers} - inside
    tried = fxquant.sensitivity(prepared, data[1:], bits=(4,), progress=False)
    assert tried.left_out == found.left_out and all(math.isfinite(layer.sqnr[4]) for layer in tried.layers)


def test_empty_results_are_no_error_and_are_told_where_there_are_no_others():
    model, data, prepared = around(SelectsRows())
    both = fxquant.errors_by_layer(prepared, data, progress=False)
    assert both["island.fc"].alone.values == 32 and not both.left_out
    empty = fxquant.errors_by_layer(prepared, data[1:], progress=False)
    assert empty["island.fc"].alone is None
    assert empty.left_out == {"island.fc": "its results are empty in these batches"}
    assert "empty" in fxquant.report(model, prepared, data[1:], bits=None, progress=False).html()


def test_histograms_count_beyond_what_float32_counts():
    scheme = fxquant.Scheme.activation(8)
    count = HistogramCount(torch.tensor(0.1), torch.tensor(0), scheme, None)
    count.add(torch.zeros(1).expand(2**24 + 77))
    assert sum(count.histogram().counts) == 2**24 + 77


def test_how_far_values_lie_beyond_the_grid_is_that_of_all_batches():
    calm, wild = torch.linspace(-1, 1, 64).reshape(8, 8), torch.linspace(-5, 5, 64).reshape(8, 8)
    torch.manual_seed(0)
    prepared = fxquant.calibrate(fxquant.prepare(nn.Linear(8, 8).eval(), calm), [calm], progress=False)
    found = fxquant.errors_by_layer(prepared, [calm, wild], progress=False)["input_1_quantizer"]
    assert found.histogram.reach == pytest.approx(5, rel=0.02)  # the grid's end lies within a step of 1
    saturates = next(fault for fault in found.faults if fault.kind == "saturates")
    far = float(saturates.what.partition("up to ")[2].split()[0])
    assert far == pytest.approx(5, rel=0.02)
    positive = fxquant.calibrate(fxquant.prepare(nn.Linear(8, 8).eval(), calm.abs()), [calm.abs()], progress=False)
    found = fxquant.errors_by_layer(positive, [calm.abs(), -calm.abs()], progress=False)["input_1_quantizer"]
    assert any("where it ends at 0" in fault.what for fault in found.faults if fault.kind == "saturates")
