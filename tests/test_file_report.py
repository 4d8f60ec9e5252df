"""A report of a file: what its grids are, what they do to data, and what is lost against float; faults come first."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from onnx_files import qdq_file
from PIL import Image
from test_report_page import checked
from torch import nn

import fxquant
from fxquant.cli import main
from fxquant.errors import CheckpointError, InputError

pytest.importorskip("onnxruntime")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.head(torch.relu(self.b(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("files"), Net().eval()
    data = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    prepared = fxquant.calibrate(fxquant.prepare(model, data[0]), data, progress=False)
    int8 = fxquant.convert(prepared)
    fxquant.export_onnx(int8, folder / "int8.onnx", data[0])
    fxquant.save(int8, folder / "int8.pt")
    return folder, model, prepared, data


def test_of_a_file_alone_its_grids_and_sizes_are_told(exported):
    folder, _, prepared, _ = exported
    found = fxquant.report(folder / "int8.onnx")
    layer = found["b.weight"]
    assert (layer.bits, layer.shape, layer.bytes, layer.op, layer.path) == (8, (8, 8, 3, 3), 576, "Conv", "b")
    scale = prepared.get_submodule("b.weight_quantizer").scale
    ends = (float(scale.min()), float(scale.max()))
    assert layer.scale == pytest.approx(ends, rel=1.5 * 2**-23, abs=0) and layer.weight is None
    assert sum(layer.histogram.counts) == 576 and 0.4 < layer.histogram.used <= 1.0
    assert found["x_quantizer:integers"].kind == "activation" and found.batches == 0 and not found.faults
    assert not found.outputs and found.info.facts["coverage"].startswith("3 of 3")
    checked(found.html())
    assert {name for name, *_ in found.graph.nodes} and all(state != "float" for *_, state in found.graph.nodes)


def test_with_data_roundings_are_measured_and_with_the_model_what_is_lost(exported):
    folder, model, prepared, data = exported
    alone = fxquant.report(folder / "int8.onnx", None, data, progress=False)
    both = fxquant.report(folder / "int8.onnx", prepared, data, progress=False)
    by_hand = fxquant.errors_by_layer(folder / "int8.onnx", data, reference=prepared, progress=False)
    for tensor in by_hand.activations:
        assert both[tensor.name].by_rounding == tensor.by_rounding
        assert both[tensor.name].accumulated == tensor.accumulated
        assert alone[tensor.name].by_rounding is not None and alone[tensor.name].accumulated is None
    for tensor in by_hand.weights:
        if both[tensor.name].kind == "weight":
            assert both[tensor.name].weight == tensor.weight
    assert both.outputs[0].rows == 8 and both.outputs[0].sqnr > 25 and not alone.outputs
    with torch.no_grad():
        highest = float(torch.relu(model.a(torch.cat(data))).max())
    assert alone["a:integers"].histogram.grid_high == pytest.approx(highest, rel=0.02)
    for found in (alone, both):
        checked(found.html())
        json.loads(found.to_json(), parse_constant=pytest.fail)
        assert len(found.records()) == len(found.cells()) == len(found.layers)


def test_a_file_of_ours_and_its_model(exported, tmp_path):
    folder, model, prepared, data = exported
    found = fxquant.report(folder / "int8.pt")
    assert {layer.path for layer in found.layers if layer.kind == "weight"} == {"a", "b", "head"}
    beside = fxquant.report(folder / "int8.pt", model, data)
    with torch.no_grad():
        actual, expected = (torch.cat([m(x) for x in data]) for m in (fxquant.convert(prepared), model))
    sqnr = 10 * torch.log10(expected.double().square().sum() / (actual - expected).double().square().sum())
    assert beside.outputs[0].sqnr == pytest.approx(float(sqnr), abs=1e-3)
    checked(beside.html())
    with pytest.raises(InputError, match="give the float model"):
        fxquant.report(folder / "int8.pt", prepared, data)
    with pytest.raises(InputError, match="run by the model"):
        fxquant.report(folder / "int8.pt", None, data)
    int8 = fxquant.convert(prepared)
    fxquant.save(fxquant.compile(int8, data[0], runtime="torch"), tmp_path / "compiled.pt")
    compiled = fxquant.report(tmp_path / "compiled.pt", model, data)
    assert compiled.outputs == beside.outputs and compiled.records() == beside.records()
    torch.save(model.state_dict(), tmp_path / "floats.pt")
    with pytest.raises(CheckpointError, match="was not written by fxquant"):
        fxquant.report(tmp_path / "floats.pt")


@pytest.mark.long
def test_two_files_and_a_file_and_a_model_stand_beside_each_other(exported, tmp_path):
    folder, model, prepared, data = exported
    four = fxquant.Setting(weight=fxquant.Scheme.weight(4))
    other = fxquant.calibrate(fxquant.prepare(model, data[0], recipe=four), data, progress=False)
    fxquant.export_onnx(fxquant.convert(other), tmp_path / "w4.onnx", data[0])
    eight, low = fxquant.report(folder / "int8.onnx"), fxquant.report(tmp_path / "w4.onnx")
    compared = {layer.path: layer for layer in eight.compare(low).layers}
    assert compared["b"].weight_bits == (8, 4) and compared["b"].bytes == (576, 288) and compared["b"].gain == 0.0
    measured = fxquant.report(folder / "int8.onnx", prepared, data, progress=False)
    worse = fxquant.report(tmp_path / "w4.onnx", other, data, progress=False)
    gains = {layer.path: layer.gain for layer in measured.compare(worse).layers}
    assert gains["b"] < -15 and gains["head"] < -15
    whole = fxquant.report(model, prepared, data, bits=None, progress=False)
    beside = {layer.path: layer for layer in whole.compare(measured).layers}
    assert beside["relu"].accumulated[0] == pytest.approx(beside["relu"].accumulated[1], abs=0.5)
    assert beside["b"].weight[0] == pytest.approx(beside["b"].weight[1], abs=1e-4)
    for found in (eight.compare(low), measured.compare(worse), whole.compare(measured)):
        checked(found.html())
        assert str(found) and found.records() and json.loads(found.to_json())
    with pytest.raises(InputError, match="it was given a int"):
        eight.compare(3)


@pytest.mark.parametrize("fault", ["wide", "piled", "saturates", "float"])
def test_a_fault_planted_into_a_file_is_named_first(fault, tmp_path):
    """Files as another quantizer writes them: nothing but the standard's operators, and no model of ours behind them."""
    torch.manual_seed(0)
    weight = torch.randn(16, 8)
    scale = float(weight.abs().max()) / 127
    integers = (weight / scale).round().clamp(-127, 127)
    options = {}
    if fault == "wide":  # a scale 30 times as large as the weight needs
        integers, scale = (integers / 30).round(), scale * 30
    elif fault == "piled":
        integers = (integers * 6).clamp(-127, 127)
    elif fault == "saturates":
        options["x_scale"] = 0.002
    else:
        options["quantized_input"] = False
    path = qdq_file(tmp_path / "net.onnx", integers.to(torch.int8), scale, **options)
    data = [torch.rand(4, 8) for _ in range(2)]
    found = fxquant.report(path, None, data, progress=False)
    kind = {"wide": "weight scale", "piled": "weight saturates"}.get(fault, fault)
    assert found.faults[0].kind == kind, [str(own) for own in found.faults]
    assert found.faults[0].path == {"saturates": "x"}.get(fault, "w" if fault != "float" else "product")
    text = found.html()
    checked(text)
    assert f'<span class="kind">{kind}</span>' in text[text.index('<ol class="faults">') :].split("</li>")[0]
    healthy = qdq_file(tmp_path / "fine.onnx", (weight / float(weight.abs().max()) * 127).round().to(torch.int8), 0.01)
    assert not fxquant.report(healthy, None, data, progress=False).faults


def test_what_a_file_cannot_tell_is_said(exported, tmp_path):
    folder, model, prepared, data = exported
    with pytest.raises(InputError, match="needs data"):
        fxquant.report(folder / "int8.onnx", prepared)
    with pytest.raises(InputError, match="there is no file"):
        fxquant.report(tmp_path / "none.onnx")
    with pytest.raises(InputError, match="does not take"):
        fxquant.report(folder / "int8.onnx", None, torch.randn(2, 4, 16, 16), progress=False)
    other = fxquant.calibrate(fxquant.prepare(nn.Sequential(nn.Linear(4, 4)), data[0][..., :4]), [data[0][..., :4]])
    with pytest.raises(InputError, match="no weight and no rounded tensor has a name of it"):
        fxquant.report(folder / "int8.onnx", other, data, progress=False)
    with pytest.raises(InputError, match="needs its prepared one and data"):
        fxquant.report(model)


@pytest.fixture(scope="module")
def spec(exported):
    """The same model, and images, for the command line."""
    folder, model, *_ = exported
    body = Path(__file__).read_text(encoding="utf-8").split("class Net", 1)[1].split("@pytest", 1)[0]
    (folder / "nets.py").write_text(f"import torch\nfrom torch import nn\n\n\nclass Net{body}", encoding="utf-8")
    torch.save(model.state_dict(), folder / "net.pth")
    (folder / "photos").mkdir()
    for number in range(6):
        pixels = torch.randint(0, 256, (20, 20, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "photos" / f"{number}.png")
    return f"{folder / 'nets.py'}:Net", folder


@pytest.mark.long
def test_the_command_takes_files(spec, capsys, monkeypatch):
    name, folder = spec
    monkeypatch.chdir(folder)
    images = ["--data", "photos", "--shape", "16x16", "--batch-size", "2"]
    model = [name, "--weights", "net.pth", *images]
    assert main(["quantize", *model, "--out", "q.onnx"]) == 0
    assert main(["quantize", *model, "--out", "q4.onnx", "--weight-bits", "4"]) == 0
    of_model = ["--model", name, "--weights", "net.pth", *images]
    runs = {
        "alone": ["q.onnx"],
        "data": ["q.onnx", *images],
        "float": ["q.onnx", *of_model],
        "saved": ["int8.pt"],
        "saved and float": ["int8.pt", *of_model],
        "two": ["q.onnx", "--against", "q4.onnx", *of_model],
        "beside": [*model, "--against", "q.onnx", "--no-sensitivity"],
    }
    for shown, arguments in runs.items():
        capsys.readouterr()
        assert main(["report", *arguments, "--out", f"{shown}.html"]) == 0, shown
        assert capsys.readouterr().out == f"{shown}.html\n"
        checked((folder / f"{shown}.html").read_text(encoding="utf-8"))
        assert main(["report", *arguments, "--json"]) == 0
        assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert main(["report", "q.onnx", *of_model, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert all(own["accumulated"] for own in plain["layers"] if own["name"] == "b:integers") and plain["outputs"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["none.onnx"], "there is no file 'none.onnx'"),
        (["int8.onnx", "--model", "SPEC"], "needs images: --data"),
        (["SPEC"], "--data FOLDER"),
        (["SPEC", "--data", "photos", "--model", "SPEC"], "is a model itself"),
        (["int8.onnx", "--against", "weight-bits=4"], "is a file"),
        (["int8.onnx", "--against", "none.onnx"], "--against: there is no file"),
        (["int8.pt", "--data", "photos", "--model", "int8.onnx"], "with its model"),
    ],
)
def test_what_the_command_cannot_do_with_a_file_is_told(arguments, words, spec, capsys, monkeypatch):
    name, folder = spec
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    assert main(["report", *(name if word == "SPEC" else word for word in arguments), "--out", "new.html"]) == 1
    captured = capsys.readouterr()
    assert re.search(re.escape(words), captured.err) and captured.out == ""
    assert sorted(folder.iterdir()) == before
