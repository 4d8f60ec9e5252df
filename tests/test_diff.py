"""The diff: golden texts, colour and width, notes, and what it refuses."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import InputError
from fxquant.graph.leveled import LeveledModule
from fxquant.reporting.diff import Diff, diff
from fxquant.reporting.paths import elide, near
from fxquant.reporting.terminal import paint, visible_length

GOLDEN = Path(__file__).parent / "golden"


def _golden_module():
    loaded = importlib.util.spec_from_file_location("golden_model", GOLDEN / "model.py")
    assert loaded is not None and loaded.loader is not None
    module = sys.modules["golden_model"] = importlib.util.module_from_spec(loaded)  # pickle finds the class by name
    loaded.loader.exec_module(module)
    return module


golden = _golden_module()


@pytest.fixture
def model() -> nn.Module:
    return golden.Sample().eval()


def _prepared(model: nn.Module) -> LeveledModule:
    return fxquant.prepare(model, golden.example(), recipe=fxquant.Recipe([("fc", None)]))


def _calibrated(model: nn.Module) -> LeveledModule:
    return fxquant.calibrate(_prepared(model), [golden.example()], progress=False)


@pytest.fixture
def calibrated(model: nn.Module) -> Diff:
    return diff(model, _calibrated(model))


def _row(found: Diff, path: str):
    (row,) = [row for row in found.rows if row.path == path and row.before]
    return row


def _compare(name: str, text: str) -> None:
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("FXQUANT_REGENERATE"):
        path.write_text(text + "\n", encoding="utf-8")
    assert text + "\n" == path.read_text(encoding="utf-8")


def test_golden_prepared(model):
    _compare("prepared", diff(model, _prepared(model)).text(width=110))


def test_golden_calibrated(model):
    _compare("calibrated", diff(model, _calibrated(model)).text(width=110))


def test_golden_calibrated_for_a_file(model):
    _compare("calibrated_unwrapped", diff(model, _calibrated(model)).text())


def test_golden_narrow(model):
    _compare("narrow", diff(model, _calibrated(model)).text(width=80))


def test_golden_integer(model):
    _compare("integer", diff(model, fxquant.convert(_calibrated(model))).text(width=110))


def test_golden_prepared_to_integer(model):
    prepared = _calibrated(model)
    _compare("prepared_to_integer", diff(prepared, fxquant.convert(prepared)).text(width=110))


def test_golden_qat_without_shapes(model):
    _compare("qat", diff(model, fxquant.prepare(model.train(), qat=True)).text(width=110))


def test_golden_frozen_qat(model):
    prepared = fxquant.prepare(model, golden.example(), qat=True)
    fxquant.calibrate(prepared, [golden.example()], progress=False)
    _compare("frozen_qat", diff(model, fxquant.freeze(prepared)).text(width=110))


def test_no_line_is_wider_than_asked_for(model):
    for prepared in (_prepared(model), _calibrated(model)):
        for width in (110, 120, 140):
            assert max(map(len, diff(model, prepared).text(width=width).split("\n"))) <= width


def test_rows_are_data(calibrated):
    folded = _row(calibrated, "block.bn1")
    assert (folded.state, folded.how, folded.into) == ("gone", "folded", "block.conv1")
    conv = _row(calibrated, "block.conv1")
    assert (conv.before, conv.after, conv.rounded_by) == ("Conv2d", "QuantConv2d", "block.relu")
    assert conv.weight.per_channel and conv.output is None
    relu = _row(calibrated, "block.relu")
    assert relu.zero_point == 0 and relu.range[0] == 0
    assert relu.range[1] == pytest.approx(255 * relu.scale)
    assert _row(calibrated, "cat").shares == "block.relu_1"
    assert _row(calibrated, "cumsum").source.endswith("model.py:41")


def test_the_range_is_that_of_the_grid(model):
    prepared = _calibrated(model)
    quantizer = prepared.get_submodule("stem").output_quantizer
    row = _row(diff(model, prepared), "stem")
    low, high = ((q - int(quantizer.zero_point)) * float(quantizer.scale) for q in (0, 255))
    assert row.range == pytest.approx((low, high))
    assert (row.scale, row.zero_point) == (float(quantizer.scale), int(quantizer.zero_point))


def test_integer_rows_have_the_grids_of_the_prepared_ones(model):
    prepared = _calibrated(model)
    before, after = diff(model, prepared), diff(model, fxquant.convert(prepared))
    last_links = {"block.conv1": "block.relu", "block.add": "block.relu_1"}
    for path in ("x", "stem", "block.conv1", "block.conv2", "block.add", "norm", "sigmoid", "cat"):
        old, new = _row(before, last_links.get(path, path)), _row(after, path)
        assert new.scale == pytest.approx(old.scale), path
        assert (new.zero_point, new.output) == (old.zero_point, old.output), path


def test_numbers_appear_with_calibration(model):
    assert _row(diff(model, _prepared(model)), "stem").scale is None
    assert not diff(model, _prepared(model)).calibrated
    assert diff(model, _calibrated(model)).calibrated


def test_a_range_known_in_advance_is_shown_before_calibration():
    prepared = fxquant.prepare(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sigmoid(), nn.Conv2d(2, 2, 1)))
    row = _row(diff(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sigmoid(), nn.Conv2d(2, 2, 1)), prepared), "1")
    assert row.range[0] == 0 and row.range[1] == pytest.approx(1, abs=0.01)


def test_summary_without_shapes_asks_for_example_inputs(model):
    found = diff(model, fxquant.prepare(model))
    assert found.macs is None
    assert "give prepare example_inputs for MACs" in found.summary()


def test_the_model_is_not_touched(model):
    names = [name for name, _ in model.named_modules()]
    training = [part.training for part in model.modules()]
    diff(model, _prepared(model))
    assert [name for name, _ in model.named_modules()] == names
    assert [part.training for part in model.modules()] == training


def test_a_model_that_was_not_the_origin_is_refused(model):
    with pytest.raises(InputError, match="was not made from the first"):
        diff(nn.Sequential(nn.Linear(3, 4)), _prepared(model))


def test_a_plain_model_as_second_is_refused(model):
    with pytest.raises(InputError, match="fxquant did not make"):
        diff(model, model)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _at_a_terminal(monkeypatch) -> None:
    """Called in the test itself: pytest sets stdout anew after the fixtures."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "130")
    monkeypatch.setattr(sys, "stdout", _Terminal())


def test_a_terminal_gets_colour(monkeypatch, calibrated):
    _at_a_terminal(monkeypatch)
    assert "\033[" in str(calibrated)


def test_no_color_is_respected(monkeypatch, calibrated):
    _at_a_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033[" not in str(calibrated)


def test_an_empty_no_color_counts_as_unset(monkeypatch, calibrated):
    _at_a_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "")
    assert "\033[" in str(calibrated)


def test_a_dumb_terminal_gets_no_colour(monkeypatch, calibrated):
    _at_a_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    assert "\033[" not in str(calibrated)


def test_a_pipe_gets_no_colour_and_no_wrapping(monkeypatch, calibrated):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert str(calibrated) == calibrated.text()


def test_color_can_be_forced_and_forbidden(monkeypatch, model):
    _at_a_terminal(monkeypatch)
    prepared = _prepared(model)
    assert "\033[" not in str(diff(model, prepared, color=False))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert "\033[" in str(diff(model, prepared, color=True))


def test_colour_changes_nothing_but_colour(calibrated):
    import re

    plain = re.sub("\033\\[[0-9]*m", "", calibrated.text(color=True, width=110))
    assert [line.rstrip() for line in plain.split("\n")] == calibrated.text(width=110).split("\n")


def test_deep_copies_print_the_same_diff(model):
    import copy
    import pickle

    prepared = _calibrated(model)
    text = diff(model, prepared).text()
    assert diff(model, copy.deepcopy(prepared)).text() == text
    assert diff(model, pickle.loads(pickle.dumps(prepared))).text() == text


@pytest.mark.parametrize(
    ("path", "width", "shown"),
    [
        ("layer1.0.conv1", 14, "layer1.0.conv1"),
        ("features.block3.layer24.conv2", 24, "features…layer24.conv2"),
        ("features.block3.layer24.conv2", 18, "…layer24.conv2"),
        ("a_very_long_single_name", 10, "…ngle_name"),
    ],
)
def test_elide(path, width, shown):
    assert elide(path, width) == shown
    assert len(shown) <= width


def test_near():
    assert near("layer1.0.conv2", "layer1.0.bn2") == ".conv2"
    assert near("layer1.1.conv2", "layer1.0.bn2") == "layer1.1.conv2"
    assert near("conv1", "bn1") == "conv1"


def test_paint_and_visible_length():
    assert paint("x", None) == "x"
    assert paint("", "green") == ""
    assert visible_length(paint("conv", "green")) == 4


def test_a_shared_conv_is_told_apart():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(torch.relu(self.conv(x)))

    model = Twice()
    found = diff(model, fxquant.prepare(model, torch.randn(1, 4, 6, 6)))
    convs = [row.path for row in found.rows if row.before == "Conv2d"]
    assert len(convs) == len(set(convs)) == 2
    assert found.weights.total == 4 * 4 * 9
    assert found.macs.total == 2 * 4 * 4 * 9 * 36


class _Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(self.conv(x)))


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = _Part(), _Part()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.near(x)
        return self.far(-y if y.sum().item() > 1e9 else y)


class _WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), _Head()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.head(x * 1.5 if x.shape[1] % 4 == 0 else x)


IMAGES = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)


@pytest.mark.parametrize("qat", [False, True])
def test_a_tree_is_shown_graph_by_graph(qat):
    model = _WithHead().eval()
    prepared = fxquant.prepare(model, IMAGES, qat=qat)
    found = diff(model, prepared)
    graphs = [part.path for part in found.parts if part not in found.islands]
    assert graphs == ["", "head.near", "head.far"] and [island.path for island in found.islands] == ["head"]
    assert _row(found, "head.near.conv").after == "QuantConv2d"
    assert _row(found, "head.far.bn").how == (None if qat else "folded")
    lines = found.text().split("\n")
    near = lines.index("graph head.near")
    assert (
        lines.index("graph the top module")
        < next(i for i, s in enumerate(lines) if s.startswith("island head: "))
        < near
    )
    assert sum("% 4 == 0 is True" in line for line in lines) == 1
    assert "require" not in found.text()


def test_a_tree_is_compared_at_every_level():
    model = _WithHead().eval()
    prepared = fxquant.calibrate(fxquant.prepare(model, IMAGES), [IMAGES], progress=False)
    integer = fxquant.convert(prepared)
    assert diff(prepared, integer).levels == ("prepared", "integer")
    for found in (diff(model, integer), diff(prepared, integer)):
        assert _row(found, "head.near.conv").after == "IntConv2d+ReLU"
        assert max(map(len, found.text(width=110).split("\n"))) <= 110
    assert "\033[" in diff(model, integer).text(color=True)


def test_leaves_are_left_when_the_first_model_is_captured_again():
    model = _WithHead().eval()
    found = diff(model, fxquant.prepare(model, IMAGES, leaves=[_Head]))
    (island,) = found.islands
    assert island.is_named and "it was named as a leaf" in found.text()
    assert len(found.parts) == 2


@pytest.mark.long
def test_googlenet_in_training_has_graphs_and_an_island_at_the_top():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.googlenet(weights=None, init_weights=False)
    found = diff(model, fxquant.prepare(model, torch.randn(2, 3, 64, 64), qat=True))
    assert found.islands[0].path == "" and found.name == "GoogLeNet"
    text = found.text(width=120)
    assert "island the top module: " in text and "graph inception3a" in text
    assert _row(found, "inception3a.branch1.conv").after == "QuantConv2d"
    assert max(map(len, text.split("\n"))) <= 120


@pytest.mark.long
def test_a_detector_is_shown_graph_by_graph():
    detection = pytest.importorskip("torchvision").models.detection
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    found = diff(model, fxquant.prepare(model, ([torch.rand(3, 64, 64)],)))
    assert [island.path for island in found.islands] == [""]
    assert {part.path for part in found.parts[1:]} == {"backbone", "head"}
    assert found.macs.fraction > 0.9


def test_a_tree_of_another_model_is_refused():
    with pytest.raises(InputError, match="was not made from the first"):
        diff(golden.Sample().eval(), fxquant.prepare(_WithHead().eval(), IMAGES))
