"""The command line: its commands on small models, its exit codes, and its errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from op_cases import mostly_long
from PIL import Image

import fxquant
from fxquant import demo
from fxquant.behaviour import FloatOnly, Measuring
from fxquant.cli import main
from fxquant.errors import InputError
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


def refused(arguments, capsys) -> str:
    """What a command says that does not do what it was asked: in one message, without a traceback, with nothing printed."""
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert code in (1, 2) and captured.out == "" and "Traceback" not in captured.err
    return captured.err.strip().splitlines()[-1] if code == 2 else captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mean", "0.5,0.5"], "'0.5,0.5': write one number, or three, as 0.485,0.456,0.406"),
        (["--mean", "a,b,c"], "'a,b,c': write one number, or three"),
        (["--mean", "inf"], "write one number, or three"),
        (["--std", "0.2,0,0.2"], "write numbers above 0, as 0.229,0.224,0.225"),
        (["--std", "0"], "write numbers above 0"),
        (["--std", "nan"], "write one number, or three"),
        (["--images", "few"], "few is not 1 or more: write a whole number"),
        (["--weight-bits", "17"], "'17' is no number of bits: write one of 2 to 16"),
        (["--activation-bits", "x"], "'x' is no number of bits"),
        (["--target", "phone"], "invalid choice: 'phone'"),
    ],
)
def test_what_an_option_cannot_be_is_said_in_a_sentence(arguments, message, images, capsys):
    given = ["quantize", SPEC, "--data", str(images), *SIZE, "--out", "x.pt"]
    assert message in refused([*given, *arguments], capsys)
    assert not Path("x.pt").exists()


MODELS = """
import sys
from dataclasses import dataclass
from torch import nn

@dataclass
class Settings:
    width: "int" = 3

def raises():
    raise RuntimeError("no licence\\nfound")

def ends():
    sys.exit(3)

def reads():
    from beside import WIDTH
    return nn.Conv2d(3, WIDTH, 1)

class Net(nn.Conv2d):
    def __init__(self, width=4):
        super().__init__(3, width, 1)

class Talks(Net):
    def __init__(self):
        print("a print of the model's own")
        super().__init__()
"""


def test_what_a_models_own_file_raises_is_said_with_its_line(tmp_path, capsys):
    (tmp_path / "nets.py").write_text(MODELS)
    (tmp_path / "beside.py").write_text("WIDTH = 5\n")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    (tmp_path / "lacks.py").write_text("\nimport no_such_package\n")
    for spec, words in (
        ("nets.py:raises", f"raises() raises RuntimeError: no licence found ({tmp_path / 'nets.py'}:11)"),
        ("nets.py:ends", "ends() raises SystemExit: 3"),
        ("nets.py:Net(width='wide')", "Net(width='wide') raises TypeError"),
        ("nets.py:nothing", "has no function or class 'nothing'. It has Settings, raises, ends, reads, Net, Talks."),
        ("wrong.py:f", f"is not Python: invalid syntax ({tmp_path / 'wrong.py'}:1)"),
        ("lacks.py:f", f"No module named 'no_such_package' ({tmp_path / 'lacks.py'}:2)"),
    ):
        assert words in refused(["diff", f"{tmp_path}/{spec}"], capsys)
    assert "torchvision:resnet18(width=3) raises TypeError" in refused(
        ["diff", "torchvision:resnet18(width=3)"], capsys
    )
    assert build_model(f"{tmp_path}/nets.py:reads").out_channels == 5


def test_a_model_of_random_weights_is_the_same_in_every_command():
    before = torch.get_rng_state()
    first, second = (build_model(SPEC).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.equal(torch.get_rng_state(), before)


def test_files_that_are_no_weights_are_told_in_a_sentence(tmp_path, capsys):
    (tmp_path / "w.csv").write_text("x")
    torch.save(build_model(SPEC), tmp_path / "whole.pt")
    for path, words in (
        (tmp_path / "w.csv", "torch.save did not write it"),
        (tmp_path / "whole.pt", "objects of classes"),
    ):
        told = refused(["diff", SPEC, "--weights", str(path)], capsys)
        assert words in told and "model.state_dict()" in told and len(told.splitlines()) == 1
    assert "Is a directory" in refused(["diff", SPEC, "--weights", str(tmp_path)], capsys)
    for ending, words in ((".onnx", "fxquant errors MODEL --onnx"), (".pt", "fxquant info"), (".bin", "--weights")):
        (tmp_path / f"file{ending}").write_bytes(b"x")
        assert words in refused(["diff", str(tmp_path / f"file{ending}")], capsys)


def test_pictures_of_all_kinds(tmp_path, capsys):
    values = torch.arange(400, dtype=torch.int32).reshape(20, 20).numpy()
    Image.fromarray((values * 164).astype("uint16")).save(tmp_path / "sixteen.png")
    Image.fromarray((values * 164 / 257).round().astype("uint8")).save(tmp_path / "sixteen_as_eight.png")
    (tmp_path / "._sixteen.png").write_bytes(b"a resource fork, as macOS leaves them")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "half.png").write_bytes(b"")
    for channels in (1, 3):
        both = next(iter(ImageFolder(tmp_path, resize=20, crop=20, channels=channels, mean=[0] * 3, std=[1] * 3)))
        assert both.shape[0] == 2 and float((both[0] - both[1]).abs().max()) <= 1.01 / 255
        assert 0.4 < float(both[0].mean()) < 0.6
    Image.fromarray(values.astype("float32")).save(tmp_path / "numbers.tif")
    with pytest.raises(InputError, match=r"numbers\.tif' holds numbers of 32 bits"):
        next(iter(ImageFolder(tmp_path, resize=20, crop=20)))
    for options in ({"mean": (0.5,)}, {"std": (0.5, 0, 1)}, {"std": (0.5, float("nan"), 1)}):
        with pytest.raises(InputError, match=r"for each of 3 channels"):
            ImageFolder(tmp_path, **options)
    with pytest.raises(InputError, match="is a file: give the folder"):
        ImageFolder(tmp_path / "sixteen.png")


def broken_by_its_reader(*_, **__):
    raise SyntaxError("broken PNG file")


def test_whatever_a_pictures_reader_raises_names_the_picture(images, monkeypatch):
    monkeypatch.setattr(Image, "open", broken_by_its_reader)
    with pytest.raises(InputError, match=r"1\.png' cannot be read as an image: broken PNG file"):
        next(iter(ImageFolder(images)))


@pytest.mark.parametrize(
    "arguments",
    [
        ["diff", "NETS", "--shape", "8x8"],
        ["diff", "NETS", "--shape", "8x8", "--coverage", "--out", "d.txt"],
        ["bench", "NETS", "--shape", "1,3,8,8", "--runtimes", "torch", "--rounds", "1", "--no-memory"],
        ["ops"],
        ["doctor"],
    ],
)
def test_with_json_standard_output_is_one_json_value(arguments, tmp_path, capsys, monkeypatch):
    """The model's own file prints; a number that is not finite is no JSON."""
    (tmp_path / "nets.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    assert main([f"{tmp_path}/nets.py:Talks" if word == "NETS" else word for word in arguments] + ["--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out, parse_constant=pytest.fail) and "of the model's own" not in captured.out
    assert ("of the model's own" in captured.err) == ("NETS" in arguments)


def test_the_demo_gives_json(capsys, monkeypatch):
    monkeypatch.setattr("fxquant.demo.run", partial(demo.run, epochs=1, qat_epochs=1))
    assert main(["demo", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in rows] == ["float", "int8, PTQ", "int8, QAT"]
    assert all(0 <= row["accuracy"] <= 1 and row["bytes"] > 0 for row in rows)


def test_exit_codes_are_documented_where_they_are_looked_for(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for text in (capsys.readouterr().out, readme, str(sys.modules["fxquant.cli"].__doc__)):
        words = " ".join(text.split())
        assert (
            "0 it worked; 1 fxquant says what is wrong" in words
            and "130 interrupted" in words
            and "JSON value" in words
        )
