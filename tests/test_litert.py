"""LiteRT files: run in its interpreter, by its reference kernels and by XNNPACK's, and held against the integer model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import mostly_long, run
from test_executorch import MODELS, images, integer_of
from torch import nn

from fxquant import installed
from fxquant.errors import ExportError, InputError, MissingPackageError
from fxquant.export import export_tflite
from fxquant.export.to_tflite import tflite_session

LONG = pytest.mark.long


def steps_of(model, found, expected):
    """The differences in steps of the output's grid."""
    return (found - expected).abs() / expected.unique().diff().min()


GROUPED = "transposed in groups"


@pytest.mark.parametrize("name", mostly_long([name for name in MODELS if name != GROUPED], ["residual"]))
def test_the_integers_whole_in_integer_kernels(name, tmp_path):
    """LiteRT's reference kernels round twice, as the target does, and give every integer; XNNPACK's, which it takes where
    it can, round once: a few values in a hundred are one step off."""
    integer = integer_of(MODELS[name](), target="tflite")
    x = images(2)
    report = export_tflite(integer, tmp_path / "m.tflite", x)
    assert "DEQUANTIZE" not in report.operators, report
    assert all(own.dtype == "int8" and own.scale for own in (*report.inputs, *report.outputs)), report
    assert report.size == (tmp_path / "m.tflite").stat().st_size and min(own.sqnr for own in report.agreement) > 40
    expected = run(integer, (x,))
    for reference in (False, True):
        (found,) = tflite_session((tmp_path / "m.tflite").read_bytes(), reference=reference)([x])
        apart = steps_of(integer, found, expected)
        differ = float((apart > 0.01).double().mean())
        assert float(apart.max()) < 1.01 and differ <= (0.0 if reference else 0.08), f"{name}, {reference=}: {differ}"


@LONG
def test_a_transposed_convolution_in_groups_computes_in_float_there(tmp_path):
    """LiteRT's converter takes it apart; the report says that floats are left, and the numbers are the integer model's."""
    integer = integer_of(MODELS[GROUPED](), target="tflite")
    report = export_tflite(integer, tmp_path / "m.tflite", images(2))
    assert any("tensors become floats" in note for note in report.notes), report
    x = images(2)
    (found,) = tflite_session((tmp_path / "m.tflite").read_bytes(), reference=True)([x])
    apart = steps_of(integer, found, run(integer, (x,)))
    assert float(apart.max()) < 1.01 and float((apart > 0.01).double().mean()) < 0.08


@LONG
def test_other_targets_keep_a_float_layer_that_agrees(tmp_path):
    """LiteRT has no kernel from integers to floats: the last layer computes in float, between weights of integers."""
    integer = integer_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), target="x86")
    report = export_tflite(integer, tmp_path / "m.tflite", images(2))
    assert "DEQUANTIZE" in report.operators and report.outputs[0].dtype == "float32"
    assert all(own.sqnr > 100 for own in report.agreement), report


class Several(nn.Module):
    """Two inputs, one of them as it is, and two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 6)

    def forward(self, x, gain):
        y = F.relu(self.a(x))
        return {"pooled": self.b(y.mean((2, 3))), "map": y * gain}


@LONG
def test_inputs_and_outputs_have_the_models_names_and_order(tmp_path):
    import fxquant

    torch.manual_seed(0)
    example = (images(2), torch.rand(2, 1, 1, 1))
    prepared = fxquant.prepare(Several().eval(), example, target="tflite")
    integer = fxquant.convert(fxquant.calibrate(prepared, [example], progress=False), kernels="reference")
    report = export_tflite(integer, tmp_path / "m.tflite", example)
    assert [own.name for own in report.inputs] == ["x", "gain"] and len(report.outputs) == 2
    found = tflite_session((tmp_path / "m.tflite").read_bytes())(list(example))
    with torch.no_grad():
        expected = integer(*example)
    for own, name in zip(found, ("pooled", "map"), strict=True):
        assert float(steps_of(integer, own, expected[name]).max()) < 1.01, name


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path):
    embedding = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)).eval()
    import fxquant

    rows = torch.randint(0, 7, (2, 5))
    integer = fxquant.quantize(embedding, [rows], target="tflite", progress=False)
    with pytest.raises(ExportError, match="no table of integers"):
        export_tflite(integer, tmp_path / "m.tflite", rows)
    with pytest.raises(InputError, match=r"\.tflite"):
        export_tflite(integer, tmp_path / "m.onnx", rows)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    integer = integer_of(MODELS["residual"](), target="tflite")
    monkeypatch.setattr(installed, "is_installed", lambda package: package != "litert_torch")
    with pytest.raises(MissingPackageError, match=r"pip install 'fxquant\[litert\]'"):
        export_tflite(integer, tmp_path / "m.tflite", images(2))
