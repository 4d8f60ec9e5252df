"""The commands that look at a quantized model: what they print and write, and what they refuse."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_report_page import checked

import fxquant
from fxquant.analysis.evaluation import evaluate
from fxquant.analysis.file_info import info
from fxquant.cli import main
from fxquant.errors import CheckpointError, InputError
from fxquant.image_folder import ImageFolder
from fxquant.model_spec import build_model
from fxquant.page.compare import ComparedLayer, Comparison
from fxquant.reporting.tabled import plain

SPEC = f"{Path(__file__).parent / 'golden' / 'model.py'}:Sample"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(8):
        (folder / ("cats" if i % 2 else "dogs")).mkdir(exist_ok=True)
        picture = Image.linear_gradient("L").rotate(40 * i).resize((12, 10)).convert("RGB")
        picture.save(folder / ("cats" if i % 2 else "dogs") / f"{i}.png")
    return folder


@pytest.fixture
def given(images):
    return [SPEC, "--data", str(images), "--shape", "8x8", "--batch-size", "4"]


def printed(capsys, arguments):
    assert main(arguments) == 0
    return capsys.readouterr().out


def same_batches(images):
    return ImageFolder(images, limit=512, resize=9, crop=8, batch_size=4)


def test_errors(given, images, capsys):
    assert "accumulated [dB]" in printed(capsys, ["errors", *given])
    found = json.loads(printed(capsys, ["errors", *given, "--json"]))
    model, data = build_model(SPEC), same_batches(images)
    prepared = fxquant.calibrate(fxquant.prepare(model, torch.zeros(1, 3, 8, 8)), data, progress=False)
    expected = fxquant.errors_by_layer(prepared, data, batches=4, progress=False)
    assert [layer["path"] for layer in found["layers"]] == [layer.path for layer in expected.layers]
    assert found["layers"][0]["alone"]["sqnr"] == pytest.approx(expected.layers[0].alone.sqnr, abs=0.5)


def test_sensitivity(given, capsys):
    found = json.loads(printed(capsys, ["sensitivity", *given, "--bits", "8,3", "--json"]))
    assert found["bits"] == [8, 3] and len(found["layers"]) >= 3
    assert "3 bits [dB]" in printed(capsys, ["sensitivity", *given, "--bits", "3"])


def test_report(given, tmp_path, capsys, monkeypatch):
    out = tmp_path / "r.html"
    assert str(out) in printed(capsys, ["report", *given, "--out", str(out), "--seconds", "1"])
    checked(out.read_text(encoding="utf-8"))
    assert printed(capsys, ["report", *given, "--format", "markdown", "--no-sensitivity"]).startswith("# ")
    plain = json.loads(printed(capsys, ["report", *given, "--json", "--no-sensitivity"]))
    assert plain["sensitivity"] is None and plain["errors"]["layers"]
    monkeypatch.chdir(tmp_path)
    assert printed(capsys, ["report", *given, "--no-sensitivity"]) == "report.html\n" and Path("report.html").exists()


def test_two_models_beside_each_other(given, tmp_path, capsys):
    out, against = tmp_path / "two.html", "weight-bits=4,keep-float=fc"
    printed(capsys, ["report", *given, "--out", str(out), "--against", against, "--no-sensitivity"])
    text = out.read_text(encoding="utf-8")
    checked(text)
    assert "weight-bits 4" in text and "as the target has it" in text


def test_evaluate(given, images, tmp_path, capsys):
    found = json.loads(printed(capsys, ["evaluate", *given, "--json"]))
    assert found["rows"] == 8 and 0 <= found["same_top1"] <= 1
    saved = tmp_path / "int8.pt"
    assert main(["quantize", SPEC, "--data", str(images), "--shape", "8x8", "--out", str(saved)]) == 0
    capsys.readouterr()
    again = json.loads(printed(capsys, ["evaluate", *given, "--quantized", str(saved), "--json"]))
    assert again["same_top1"] == pytest.approx(found["same_top1"]) and again["sqnr"] == pytest.approx(
        found["sqnr"], abs=1
    )
    assert main(["evaluate", *given, "--quantized", "no.pt"]) == 1
    assert "no file" in capsys.readouterr().err


def test_evaluation_is_what_counting_by_hand_gives():
    exact = torch.tensor([[3.0, 1, 0], [0, 2, 1], [1, 0, 4], [5, 4, 0]])
    rounded = torch.tensor([[3.0, 1, 0], [0, 1, 2], [1, 0, 4], [4, 5, 0]])
    found = evaluate(
        lambda b: exact[b], lambda b: rounded[b], [[0, 1], [2, 3]], [0, 1, 2, 1], classes=3, progress=False
    )
    assert found.top1 == (0.75, 0.75) and found.top5 is None and found.same_top1 == 0.5 and found.rows == 4
    assert found.sqnr == pytest.approx(float(10 * torch.log10(exact.square().sum() / (rounded - exact).square().sum())))
    p, q = exact.softmax(1), rounded.softmax(1)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    other = evaluate(lambda b: exact[b], lambda b: rounded[b], [[0, 1]], [0, 1], classes=7, progress=False)
    assert other.top1 is None and "7 classes" in str(other)
    with pytest.raises(InputError, match="labels"):
        evaluate(lambda b: exact[b], lambda b: rounded[b], [[0, 1]], [0], progress=False)
    with pytest.raises(InputError, match="classifier"):
        evaluate(lambda b: torch.zeros(2), lambda b: rounded[b], [[0, 1]], None, progress=False)


def w4_model(images):
    model, data = build_model(SPEC), same_batches(images)
    recipe = fxquant.Setting(weight=fxquant.Scheme.weight(4))
    prepared = fxquant.prepare(model, torch.zeros(1, 3, 8, 8), recipe=recipe)
    return fxquant.convert(fxquant.calibrate(prepared, data, progress=False))


@pytest.mark.long
def test_info_of_an_exported_file(images, tmp_path):
    onnx = pytest.importorskip("onnx")
    int8 = w4_model(images)
    fxquant.export_onnx(int8, tmp_path / "int8.onnx", torch.zeros(1, 3, 8, 8), verify=False)

    found = info(tmp_path / "int8.onnx")
    held = {tensor.name: tensor for tensor in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    weights = [tensor for tensor in found.tensors if tensor.kind == "weight"]
    assert weights and all(tensor.name in held and tensor.bits == 4 for tensor in weights)
    assert all(list(tensor.shape) == list(held[tensor.name].dims) for tensor in weights)
    assert found.bytes == (tmp_path / "int8.onnx").stat().st_size and "opset" in found.facts
    assert re.match(r"(\d+) of \1 products", found.facts["coverage"])


def test_info_of_a_saved_model(images, tmp_path, capsys):
    int8 = w4_model(images)
    fxquant.save(int8, tmp_path / "int8.pt")
    text = printed(capsys, ["info", str(tmp_path / "int8.pt")])
    assert "Sample, integer" in text and "'bits': 4" in text
    plain = json.loads(printed(capsys, ["info", str(tmp_path / "int8.pt"), "--json"]))
    state = int8.state_dict()
    grids = {tensor["name"]: tensor for tensor in plain["tensors"] if tensor["kind"] == "activation"}
    for name, tensor in grids.items():
        assert tensor["scale"][0] == pytest.approx(float(state[f"{name}.scale"]))
        assert tensor["zero_point"] == int(state[f"{name}.zero_point"])
    assert grids

    with pytest.raises(InputError, match="no file"):
        info(tmp_path / "none.onnx")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(InputError, match="info reads"):
        info(tmp_path / "x.txt")
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not written by"):
        info(tmp_path / "other.pt")


@pytest.mark.long
def test_an_exported_file_is_measured_by_a_command(given, images, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "int8.onnx"
    assert main(["quantize", SPEC, "--data", str(images), "--shape", "8x8", "--out", str(out)]) == 0
    capsys.readouterr()
    found = json.loads(printed(capsys, ["errors", *given, "--onnx", str(out), "--json"]))
    assert {tensor["name"] for tensor in found["weights"]} >= {"fc.weight"} and found["activations"]


@pytest.mark.parametrize("command", ["diff", "quantize"])
def test_other_commands_print_json_too(command, given, images, tmp_path, capsys):
    arguments = [SPEC, "--shape", "1x3x8x8"] if command == "diff" else [*given, "--out", str(tmp_path / "x.pt")]
    assert "summary" in printed(capsys, [command, *arguments, "--json"]) or command == "diff"
    ops = json.loads(printed(capsys, ["ops", "--json"]))
    assert {"op", "ONNX"} <= set(ops[0])


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--out", "r.pdf"], 1, "names no form"),
        (["--out", "r.md", "--format", "html"], 1, "was asked for"),
        (["--out", "no/such/r.html"], 1, "no folder"),
        (["--against", "speed=9"], 2, "NAME=VALUE"),
        (["--bits", "1"], 2, "no list of bits"),
    ],
)
def test_what_a_report_cannot_be_is_told_at_once(arguments, code, words, given, capsys):
    if code == 2:
        with pytest.raises(SystemExit) as stopped:
            main(["report", *given, *arguments])
        assert stopped.value.code == 2
    else:
        assert main(["report", *given, *arguments]) == code
    assert words in capsys.readouterr().err


def test_an_interrupted_report_leaves_nothing(given, tmp_path, capsys, monkeypatch):
    out = tmp_path / "r.html"
    out.write_text("before")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fxquant.page.report.page_of", interrupted)
    assert main(["report", *given, "--out", str(out), "--no-sensitivity"]) == 130
    assert "interrupted" in capsys.readouterr().err and out.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "--against", "target=phone"], "'target=phone': write one of x86"),
        (["report", "--against", "processor=any,weight-bits=99"], "'99' is no number of bits"),
        (["report", "--against", "keep-float=no.such"], "'no.such' matches nothing"),
        (["report", "--json", "--format", "markdown"], "Leave one out"),
        (["sensitivity", "--bits", "8,x"], "'8,x' is no list of bits from 2 to 16: write some, as 8,4"),
        (["errors", "--onnx", "model.pt"], "--onnx model.pt: give a file that ends in .onnx"),
        (["errors", "--onnx", "no_such.onnx"], "--onnx: there is no file 'no_such.onnx'"),
        (["evaluate", "--quantized", "model.pt2"], "give a file that ends in .pt or .pth or .onnx"),
        (["evaluate", "--quantized", "no_such.pt"], "--quantized: there is no file 'no_such.pt'"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_is_measured(arguments, words, given, capsys, monkeypatch):
    def measured(*_, **__):
        pytest.fail("a model was calibrated")

    monkeypatch.setattr("fxquant.cli.subjects.calibrate", measured)
    try:
        code = main([arguments[0], *given, *arguments[1:]])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert code in (1, 2) and captured.out == "" and words in captured.err.strip().splitlines()[-1]


def test_a_folder_that_may_not_be_written_to_is_told_at_once(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path))
    monkeypatch.setattr("fxquant.cli.subjects.calibrate", lambda *_: pytest.fail("a model was calibrated"))
    assert main(["report", *given, "--out", str(tmp_path / "r.html")]) == 1
    assert "do not let you" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != ".")
    assert main(["report", *given]) == 1  # report.html, where no --out is given
    assert "do not let you" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "errors", "sensitivity", "evaluate", "quantize"])
def test_json_on_standard_output_is_all_that_is_there(command, given, tmp_path, capsys):
    out = {
        "report": ["--out", str(tmp_path / "r.html"), "--seconds", "1"],
        "quantize": ["--out", str(tmp_path / "q.pt")],
    }
    found = json.loads(printed(capsys, [command, *given, *out.get(command, []), "--json"]), parse_constant=pytest.fail)
    assert isinstance(found, dict)
    if command in out:
        assert Path(out[command][1]).stat().st_size > 0
    if command == "report":
        checked(Path(out[command][1]).read_text(encoding="utf-8"))


def test_a_file_of_another_model_is_no_crash(given, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 8, 8])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 192])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Flatten", ["x"], ["y"])], "other", [x], [y])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "other.onnx")
    assert main(["evaluate", *given, "--quantized", str(tmp_path / "other.onnx")]) == 1
    assert re.search(r"the quantized model gives \[4, 192\] .* it was not made of this model", capsys.readouterr().err)


def test_an_evaluation_as_records_holds_the_accuracy():
    logits = torch.eye(7)
    found = evaluate(lambda batch: logits, lambda batch: logits.roll(1, 0), [logits], list(range(7)), progress=False)
    (row,) = found.records()
    assert (row["top1_float"], row["top1_quantized"], row["top5_float"]) == (1.0, 0.0, 1.0)
    exact = evaluate(lambda batch: logits, lambda batch: logits, [logits], None, progress=False)
    assert "logits exact against float" in str(exact) and exact.records()[0]["top1_float"] is None


def test_an_interrupt_behind_everything_else_leaves_what_was_there(given, tmp_path, capsys, monkeypatch):
    """The file is the last thing that quantize makes: where it is interrupted there is no new one, as the message says."""
    order = []
    monkeypatch.setattr("fxquant.cli.models.diff", lambda *_, **__: order.append(list(tmp_path.iterdir())) or raised())

    def raised():
        raise KeyboardInterrupt

    assert main(["quantize", *given, "--out", str(tmp_path / "q.pt")]) == 130
    assert order == [[]] and list(tmp_path.iterdir()) == []


def test_a_table_without_rows_begins_with_what_there_is():
    logits = torch.eye(7)
    found = evaluate(lambda batch: logits, lambda batch: logits, [logits], None, progress=False)
    assert str(found).startswith("the float model's class in 100.00 %")


def test_a_gain_that_is_no_number_is_an_arrow():
    rows = [
        ComparedLayer("a", (None, None), accumulated, (8, 8)) for accumulated in ((math.inf, 30.0), (30.0, math.inf))
    ]
    found = Comparison(("1", "2"), {}, {}, tuple(rows), ("", ""))
    assert [row[-1] for row in found.cells()] == ["↓", "↑"] and "inf" not in found.html()
    assert [row["gain"] for row in json.loads(found.to_json() and json.dumps(plain(found.records())))] == [None, None]


def one_product(path, weight, scale, *, inputs=("x", "s"), options=None, more=(), constant=None):
    """A file x -> QuantizeLinear -> DequantizeLinear -> MatMul with ``weight`` (4, 2) behind a DequantizeLinear."""
    onnx = pytest.importorskip("onnx")
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [] if constant is None else [node("Constant", [], ["s"], value_float=constant)]
    nodes += [
        node("QuantizeLinear", list(inputs), ["q"], **(options or {})),
        node("DequantizeLinear", ["q", *inputs[1:]], ["d"]),
        node(
            "DequantizeLinear", ["w", "ws"], ["wd"], **({"block_size": 2, "axis": 0} if scale.ndim > 1 else {"axis": 1})
        ),
        node("MatMul", ["d", "wd"], ["y"]),
    ]
    kept = [weight, onnx.numpy_helper.from_array(scale, "ws"), *more]
    if constant is None:
        kept.append(onnx.numpy_helper.from_array(np.float32(0.25), "s"))
    x, y = value("x", onnx.TensorProto.FLOAT, [3, 4]), value("y", onnx.TensorProto.FLOAT, [3, 2])
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], kept)
    opset = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return info(path)


def test_info_of_files_as_other_quantizers_write_them(tmp_path):
    onnx = pytest.importorskip("onnx")
    path, types = tmp_path / "file.onnx", onnx.TensorProto
    integers = onnx.numpy_helper.from_array(np.arange(8, dtype=np.int8).reshape(4, 2), "w")
    scale = np.full(2, 0.5, np.float32)
    for given, bits in (
        ({}, 8),
        ({"inputs": ("x", "s", "")}, 8),  # a zero point that is left out by an empty name
        ({"constant": 0.25}, 8),  # a scale that a Constant holds as a number
        ({"options": {"output_dtype": types.INT16}}, 16),
    ):
        found = {tensor.name: tensor for tensor in one_product(path, integers, scale, **given).tensors}
        assert (found["q"].bits, found["q"].scale, found["q"].zero_point) == (bits, (0.25, 0.25), 0)
        assert (found["w"].bits, found["w"].scale) == (8, (0.5, 0.5))
    four = onnx.helper.make_tensor("w", types.INT4, [4, 2], [1, 2, 3, 4, 5, 6, 7, -8])
    assert {t.name: t.bits for t in one_product(path, four, scale).tensors} == {"w": 4, "q": 8}
    float8 = onnx.helper.make_tensor("w", types.FLOAT8E4M3FN, [4, 2], bytes(8), raw=True)
    for weight, own in ((float8, scale), (integers, np.ones((2, 2), np.float32))):
        found = one_product(path, weight, own)
        assert [tensor.name for tensor in found.tensors] == ["q"] and "not listed: w" in str(found)


def test_a_rounding_without_a_zero_point_is_measured(tmp_path):
    """Against float64: x / 0.25 rounded, the grid being 0 to 255."""
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    integers = onnx.numpy_helper.from_array(np.arange(8, dtype=np.int8).reshape(4, 2), "w")
    one_product(tmp_path / "int8.onnx", integers, np.full(2, 0.5, np.float32), inputs=("x", "s", ""))
    weight = onnx.numpy_helper.from_array(np.arange(8, dtype=np.float32).reshape(4, 2) * 0.5, "w")
    value = onnx.helper.make_tensor_value_info
    x, y = value("x", onnx.TensorProto.FLOAT, [3, 4]), value("y", onnx.TensorProto.FLOAT, [3, 2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    opset = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "float.onnx")
    data = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) * 9
    found = fxquant.errors_by_layer(tmp_path / "int8.onnx", data, reference=tmp_path / "float.onnx", progress=False)
    (rounded,) = found.activations
    exact = data.double()
    noise = ((exact / 0.25).round() * 0.25 - exact).square().sum()
    by_hand = 10 * math.log10(float(exact.square().sum() / noise))
    assert rounded.by_rounding.sqnr == pytest.approx(by_hand, abs=1e-3) and found.weights[0].weight.sqnr == math.inf


def test_a_file_that_only_looks_like_ours_is_refused(tmp_path):
    torch.save({"fxquant": 2, "state": {}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"was not written by fxquant\.save"):
        info(tmp_path / "x.pt")
