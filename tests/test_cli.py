"""The command line: its commands on small models, its exit codes, and its errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import mostly_long
from PIL import Image

import fxquant
from fxquant.behaviour import FloatOnly, Measuring
from fxquant.cli import main
from fxquant.export.to_executorch import executorch_session
from fxquant.image_folder import ImageFolder
from fxquant.model_spec import build_model
from fxquant.ops.table import TABLE
from fxquant.runtimes.onnxruntime import onnxruntime_session

SPEC = f"{Path(__file__).parent / 'golden' / 'model.py'}:Sample"
SIZE = ["--resize", "8", "--crop", "8"]


@pytest.fixture
def images(tmp_path):
    for i in range(7):
        folder = tmp_path / "images" / ("cats" if i % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").rotate(40 * i).resize((12, 10)).convert("RGB").save(folder / f"{i}.png")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_diff_prints(capsys):
    assert main(["diff", SPEC, "--shape", "1,3,8,8"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^block\.bn1 +BatchNorm2d +folded into \.conv1$", printed, re.MULTILINE)
    assert "of MACs" in printed and "\033[" not in printed


def test_diff_writes_a_file(tmp_path, capsys):
    out = tmp_path / "diff.txt"
    arguments = [
        "diff",
        SPEC,
        "--shape",
        "1,3,8,8",
        "--qat",
        "--coverage",
        "--keep-float",
        "block.*",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    assert capsys.readouterr().out == ""
    text = out.read_text()
    assert "QuantBatchNorm2d" in text and "the recipe keeps it in float" in text and "Sample, prepared" in text


def test_diff_of_torchvision(capsys):
    assert main(["diff", "torchvision:squeezenet1_1", "--shape", "1,3,64,64"]) == 0
    assert "SqueezeNet: float → prepared, not calibrated" in capsys.readouterr().out


def test_quantize_writes_a_model_that_loads(tmp_path, images, capsys):
    out = tmp_path / "int8.pt"
    assert main(["quantize", SPEC, "--data", str(images), *SIZE, "--batch-size", "3", "--out", str(out), "--diff"]) == 0
    printed = capsys.readouterr().out
    assert "IntConv2d+ReLU" in printed and "calibrated on 7 images" in printed
    model = build_model(SPEC)
    integer = fxquant.load(model, out)
    batch = next(iter(ImageFolder(images, resize=8, crop=8)))
    prepared = fxquant.calibrate(
        fxquant.prepare(model, batch[:1]), ImageFolder(images, resize=8, crop=8, batch_size=3), progress=False
    )
    assert torch.equal(integer(batch), fxquant.convert(prepared)(batch))


@pytest.mark.parametrize("ending", mostly_long((".onnx", ".pt2", ".xml", ".pte"), (".onnx",)))
def test_the_ending_says_what_is_written(ending, tmp_path, images, capsys):
    out = tmp_path / f"int8{ending}"
    assert main(["quantize", SPEC, "--data", str(images), "--shape", "8x8", "--out", str(out)]) == 0
    assert f"int8{ending}" in capsys.readouterr().out
    (batch,) = ImageFolder(images, resize=9, crop=8)
    target = {".xml": "openvino", ".pte": "xnnpack"}.get(ending, "x86")
    prepared = fxquant.calibrate(fxquant.prepare(build_model(SPEC), batch[:1], target=target), [batch], progress=False)
    expected = fxquant.convert(prepared, kernels="reference")(batch)
    if ending == ".pt2":
        found = torch.export.load(out).module()(batch)
    elif ending == ".pte":
        (found,) = executorch_session(out.read_bytes())([batch])
    elif ending == ".onnx":
        (found,) = onnxruntime_session(out.read_bytes())([batch])
    else:
        import openvino

        assert sorted(path.name for path in tmp_path.glob("int8*")) == ["int8.bin", "int8.xml"]
        found = torch.from_numpy(openvino.Core().compile_model(str(out), "CPU")([batch.numpy()])[0])
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 0.05 * float(expected.abs().max())
    assert not list(tmp_path.glob(".fxquant*"))


def test_an_unknown_ending_is_told_before_any_work(tmp_path, capsys):
    assert main(["quantize", "nowhere.py:Net", "--data", "nowhere", "--out", str(tmp_path / "x.tfl")]) == 1
    assert "the ending '.tfl' names no format" in capsys.readouterr().err


FACTORIES = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width, *, depth=1):
        super().__init__(nn.Conv2d(3, width, 3), *(nn.Conv2d(width, width, 1) for _ in range(depth - 1)))
"""


def test_factories_take_arguments(tmp_path, capsys):
    path = tmp_path / "nets.py"
    path.write_text(FACTORIES)
    assert main(["diff", f"{path}:Net(4, depth=2)", "--shape", "12x10"]) == 0
    assert capsys.readouterr().out.count("QuantConv2d") == 2
    assert build_model(f"{path}:Net(width=5)")[0].out_channels == 5
    for spec, words in (
        (f"{path}:Net", "missing a required argument: 'width'"),
        (f"{path}:Net(4, wide=2)", "unexpected keyword argument 'wide'"),
        (f"{path}:Net(x)", "are not plain numbers"),
        (str(path), f"as {path}:factory"),
        ("torchvision:resnet18(3)", "takes arguments by name"),
    ):
        assert main(["diff", spec]) == 1
        assert words in capsys.readouterr().err
    assert build_model("torchvision:resnet18(num_classes=7)").fc.out_features == 7


def test_an_interrupted_command_leaves_nothing(tmp_path, images, capsys, monkeypatch):
    out = tmp_path / "int8.pt"
    out.write_bytes(b"before")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fxquant.cli.models.save", interrupted)
    assert main(["quantize", SPEC, "--data", str(images), "--shape", "8x8", "--out", str(out)]) == 130
    assert "interrupted" in capsys.readouterr().err and out.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "int8.pt"]


def test_weights_are_loaded(tmp_path, capsys):
    model = build_model(SPEC)
    torch.nn.init.ones_(model.fc.weight)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert torch.equal(build_model(SPEC, weights=str(tmp_path / "w.pt")).fc.weight, model.fc.weight)
    torch.save({"fc.weight": torch.ones(3)}, tmp_path / "bad.pt")
    assert main(["diff", SPEC, "--weights", str(tmp_path / "bad.pt")]) == 1
    assert "do not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diff", "resnet18"], "names no model"),
        (["diff", "torchvision:resnet81"], "Did you mean resnet18"),
        (["diff", "nowhere.py:Net"], "there is no file 'nowhere.py'"),
        (["diff", SPEC.replace(":Sample", ":Simple")], "Did you mean Sample"),
        (["diff", SPEC.replace(":Sample", ":example")], "not an nn.Module"),
        (["diff", SPEC, "--shape", "1,1,8,8"], "does not run on example_inputs"),
        (["diff", SPEC, "--shape", "1,3,8,8", "--keep-float", "blok.*"], "matches nothing"),
        (["diff", SPEC, "--weights", "nowhere.pt"], "there is no file 'nowhere.pt'"),
        (["diff", SPEC, "--out", "no/such/folder/d.txt"], "there is no folder 'no/such/folder'"),
        (["quantize", SPEC, "--data", "nowhere", "--out", "x.pt"], "there is no folder 'nowhere'"),
        (["quantize", SPEC, "--data", str(Path(__file__).parent / "golden"), "--out", "x.pt"], "holds no image"),
    ],
)
def test_errors_are_one_message_and_exit_code_1(arguments, message, capsys):
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("fxquant: ")
    assert "Traceback" not in captured.err and captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [[], ["dif"], ["diff"], ["quantize", SPEC], ["diff", SPEC, "--shape", "1,x"], ["diff", SPEC, "--width", "0"]],
)
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: fxquant" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["diff", "--help"], ["quantize", "--help"], ["bench", "--help"]])
def test_help_has_examples(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "examples:\n  fxquant " in capsys.readouterr().out


def test_an_unreadable_image_is_named(images, tmp_path, capsys):
    (images / "broken.png").write_bytes(b"no png")
    assert main(["quantize", SPEC, "--data", str(images), *SIZE, "--out", str(tmp_path / "x.pt")]) == 1
    assert "broken.png" in capsys.readouterr().err
    assert not (tmp_path / "x.pt").exists()


def test_image_folder_spreads_its_choice(images):
    folder = ImageFolder(images, limit=3, resize=8, crop=8, batch_size=2)
    assert len(folder.paths) == 3 and len(folder) == 2
    assert {path.parent.name for path in folder.paths} == {"cats", "dogs"}
    assert [batch.shape for batch in folder] == [(2, 3, 8, 8), (1, 3, 8, 8)]


def test_image_folder_in_grey(images):
    (batch,) = ImageFolder(images, resize=8, crop=6, channels=1, mean=(0.5, 0.1, 0.1), std=(0.25, 1, 1))
    assert batch.shape == (7, 1, 6, 6)
    assert -2 <= float(batch.min()) < float(batch.max()) <= 2


def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "fxquant", "diff", SPEC, "--shape", "2,3,8,8"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "folded into .conv1" in done.stdout and "\033[" not in done.stdout


def test_the_demo_runs(capsys):
    pytest.importorskip("sklearn")
    from fxquant import demo

    threads = torch.get_num_threads()
    demo.run(epochs=2, qat_epochs=1)
    printed = capsys.readouterr().out
    accuracy = dict(re.findall(r"^(float|int8, PTQ|int8, QAT) +([\d.]+) %", printed, re.MULTILINE))
    assert set(accuracy) == {"float", "int8, PTQ", "int8, QAT"}
    assert all(float(percent) > 90 for percent in accuracy.values()), printed
    assert torch.get_num_threads() == threads


def test_the_demo_says_what_it_misses(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["demo"]) == 1
    assert "pip install 'fxquant[demo]'" in capsys.readouterr().err


def test_ops_lists_every_op_of_the_table(capsys):
    assert main(["ops"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]}
    hidden = {name for name, entry in TABLE.items() if isinstance(entry.behaviour, (FloatOnly, Measuring))}
    assert listed == set(TABLE) - hidden
