"""ONNX files: every op with an integer form in ONNX Runtime, what the files hold, calls and structures, and bad input."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from awkward import Constant, ReusedConv, Structured, TiedWeights
from comparisons import assert_same_bits, tensors_of
from digits import DigitsNet
from onnx_files import ELEMENTS, assert_within_a_step, graph_of
from op_cases import (
    COMPUTING,
    SCHEMES,
    WEIGHTS,
    calibrated,
    example_of,
    frozen_example,
    inputs_like,
    mostly_long,
    prepared_of,
    recipe_with,
    rows_for,
    run,
)
from torch import Tensor, nn

import fxquant
from fxquant import FxquantError, Op, Recipe, Scheme, installed
from fxquant.capture.islands import islands_of, map_graphs, specializations_of
from fxquant.errors import CalibrationError, ExportError, InputError, LevelError, MissingPackageError
from fxquant.export.to_onnx import make_onnx
from fxquant.nn.qdq import Rounding
from fxquant.onnx import files
from fxquant.passes.to_qdq import to_qdq
from fxquant.runtimes.onnxruntime import onnxruntime_session
from fxquant.runtimes.openvino import openvino_session

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def qdq_of(frozen: Any) -> Any:
    return map_graphs(fxquant.convert(frozen), to_qdq).eval()


@pytest.mark.parametrize("name", COMPUTING)
def test_the_qdq_form_is_the_frozen_model_bit_for_bit(name):
    example, frozen = example_of(name), frozen_example(name)
    for rows, gain in ((2, 1.0), (5, 1.7)):
        inputs = inputs_like(example, rows, 51, gain)
        assert_same_bits(run(qdq_of(frozen), inputs), run(frozen, inputs), name)


QUICK = (
    "conv2d",
    "linear",
    "conv_transpose2d",
    "add",
    "mul",
    "cat",
    "matmul",
    "layer_norm",
    "max_pool2d",
    "sigmoid",
    "mean",
)


@pytest.mark.parametrize("name", mostly_long(COMPUTING, QUICK))
def test_every_op_runs_in_onnxruntime_as_it_is_frozen(name):
    example, frozen = example_of(name), frozen_example(name)
    made = make_onnx(frozen, inputs_like(example, 3, 5))
    inputs = inputs_like(example, rows_for(example, ELEMENTS), 6, gain=1.4)
    assert_within_a_step(made, inputs, run(frozen, inputs), name)


@pytest.mark.long
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_tensors_of_other_widths(scheme):
    frozen = fxquant.freeze(prepared_of(DigitsNet().eval(), torch.rand(8, 1, 8, 8), recipe_with(activation=scheme)))
    made = make_onnx(frozen)
    assert made.opset == (21 if scheme.bits > 8 else 19)
    x = torch.rand(33, 1, 8, 8)
    (actual,), expected = onnxruntime_session(made.content, threads=1)([x]), run(frozen, (x,))
    assert (actual - expected).abs().max() <= 1.01 * made.model.output_scales()[0]
    kinds = {t.data_type for t in graph_of(made).initializer}
    assert (onnx.TensorProto.UINT16 if scheme.bits > 8 and not scheme.signed else onnx.TensorProto.INT8) in kinds


@pytest.mark.parametrize("bits", WEIGHTS)
@pytest.mark.parametrize("name", mostly_long(("conv2d", "conv_transpose2d", "linear", "conv1d"), ("conv2d",)))
def test_weights_of_other_widths(name, bits):
    example = example_of(name)
    frozen = fxquant.freeze(calibrated(example, recipe_with(weight=WEIGHTS[bits])))
    made = make_onnx(frozen, inputs_like(example, 2, 1))
    kind = {2: "INT4", 4: "INT4", 6: "INT8", 16: "INT16"}[bits]
    assert made.opset == (19 if bits == 6 else 21)
    weights = [t for t in graph_of(made).initializer if len(t.dims) > 1]
    assert [t.data_type for t in weights] == [getattr(onnx.TensorProto, kind)]
    inputs = inputs_like(example, 7, 2)
    (actual,), expected = onnxruntime_session(made.content, threads=1)(inputs), run(frozen, inputs)
    assert (actual - expected).abs().max() <= 1.01 * made.model.output_scales()[0]


AXES = {"conv2d": 0, "conv_transpose2d": 1, "conv_transpose1d": 1, "linear": 0}


@pytest.mark.parametrize("name", AXES)
def test_weights_are_integers_behind_one_dequantize_along_their_axis(name):
    graph = onnx.load_from_string(make_onnx(frozen_example(name)).content).graph
    constants = {t.name: t for t in graph.initializer}
    stored = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants]
    (weight,) = [n for n in stored if len(constants[n.input[0]].dims) > 1]
    bias = [n for n in stored if n is not weight]
    assert constants[weight.input[0]].data_type == onnx.TensorProto.INT8
    assert next((a.i for a in weight.attribute if a.name == "axis"), 1) == AXES[name]
    assert [constants[n.input[0]].data_type for n in bias] == [onnx.TensorProto.INT32]
    assert not [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]
    assert {node.domain for node in graph.node} == {""}


def small_classifiers() -> list[str]:
    return ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"]


@pytest.mark.long
@pytest.mark.parametrize("name", small_classifiers())
def test_torchvision_models_in_both_runtimes_at_other_sizes_from_one_file(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(0.5, 1.5)
    prepared = prepared_of(model, torch.randn(4, 3, 64, 64))
    made, frozen = make_onnx(prepared, torch.randn(1, 3, 64, 64)), fxquant.freeze(prepared)
    sessions = [onnxruntime_session(made.content, threads=1)]
    if installed.is_installed("openvino"):
        sessions.append(openvino_session(made.content, threads=1))
    for shape in ((1, 3, 64, 64), (3, 3, 64, 64), (2, 3, 96, 64)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
        expected = run(frozen, (x,))
        for session in sessions:
            (actual,) = session([x])
            noise, signal = float((actual - expected).square().sum()), float(expected.square().sum())
            assert noise < 10 ** (-2.5) * signal, f"{name} at {shape}"  # 25 dB
    size = sum(p.numel() for p in model.parameters()) * 4
    assert len(made.content) < (0.27 if name in ("resnet18", "squeezenet1_1") else 0.28) * size


@pytest.mark.long
def test_convolutions_sums_pools_and_products_become_integer_kernels(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    prepared = prepared_of(torchvision.models.resnet18(weights=None).eval(), torch.randn(2, 3, 64, 64))
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    ort.InferenceSession(make_onnx(prepared).content, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 20 and kinds.count("QLinearAdd") == 8 and kinds.count("QGemm") == 1
    assert not {"Conv", "Add", "Gemm", "MaxPool", "Relu"} & set(kinds)


@pytest.mark.parametrize("level", ["prepared", "frozen", "integer"])
def test_every_level_exports_the_same_numbers(level, tmp_path):
    prepared = prepared_of(DigitsNet().eval(), torch.rand(64, 1, 8, 8))
    model = {"prepared": lambda m: m, "frozen": fxquant.freeze, "integer": fxquant.convert}[level](prepared)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = fxquant.export_onnx(model, tmp_path / "digits.onnx", torch.rand(1, 1, 8, 8), verify="nodes")
    assert report.inputs == {"x": ["batch", 1, "x_2", "x_3"]} and report.outputs == {"output": ["batch", 10]}
    assert [own.rows for own in report.agreement] == [1, 2]
    assert all(own.difference < 1e-5 and own.top1 == 1 for own in report.agreement)
    assert len(report.nodes) >= 9 and all(own.lsb <= 1 for own in report.nodes)
    assert "digits.onnx" in str(report) and "SQNR" in str(report) and "stem:integers: 0 LSB" in str(report)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert os.listdir(tmp_path) == ["digits.onnx"]
    assert onnx.load(tmp_path / "digits.onnx").producer_name == "fxquant"


def test_batch_norms_trained_behind_weights_are_folded():
    torch.manual_seed(3)
    prepared = fxquant.prepare(DigitsNet(), torch.rand(4, 1, 8, 8), qat=True)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    for _ in range(3):
        prepared(torch.rand(16, 1, 8, 8)).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        prepared.bn1.weight[::2] *= -1
    made = make_onnx(prepared)
    x = torch.rand(9, 1, 8, 8)
    (actual,) = onnxruntime_session(made.content, threads=1)([x])
    torch.testing.assert_close(actual, run(fxquant.freeze(prepared), (x,)), rtol=1e-5, atol=1e-5)
    assert all(part.training for part in prepared.modules())
    assert "BatchNormalization" not in {n.op_type for n in graph_of(made).node}


class Passing(nn.Module):
    """Returns an input as it is, a tensor twice, and a number's worth of tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        return {"x": x, "y": y, "again": y, "size": torch.tensor(3)}


@pytest.mark.long
def test_outputs_that_are_inputs_or_constants_or_twice_the_same(tmp_path):
    x = torch.randn(3, 6)
    prepared = prepared_of(Passing().eval(), x)
    report = fxquant.export_onnx(prepared, tmp_path / "p.onnx", x)
    assert len(report.outputs) == 4 and not set(report.outputs) & set(report.inputs)
    compiled = fxquant.compile(prepared, x, runtime="onnxruntime")
    actual, expected = compiled(x), fxquant.freeze(prepared)(x)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_constants_keep_their_scales_through_a_file_of_ours(tmp_path):
    model, x = Constant().eval(), torch.randn(2, 5, 6)
    prepared = prepared_of(model, x)
    integer = fxquant.convert(prepared)
    fxquant.save(integer, tmp_path / "int8.pt")
    loaded = fxquant.load(Constant().eval(), tmp_path / "int8.pt")
    expected = run(fxquant.freeze(prepared), (x,))
    for form in (integer, loaded):
        (actual,) = onnxruntime_session(make_onnx(form, x).content, threads=1)([x])
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_weight_used_twice_is_stored_once():
    for model, x in ((ReusedConv(), torch.randn(2, 3, 9, 9)), (TiedWeights(), torch.randn(4, 5))):
        made = make_onnx(prepared_of(model.eval(), x))
        constants = graph_of(made).initializer
        stored = [t.raw_data for t in constants if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
        assert len(stored) == len(set(stored)), type(model).__name__


STRUCTURES = {
    "dataclass": ["scores", "features_0", "features_1"],
    "dict": ["scores", "features_0", "features_1"],
    "tuple": ["output_0", "output_1"],
}


@pytest.mark.long
@pytest.mark.parametrize("kind", STRUCTURES)
@pytest.mark.parametrize("runtime", mostly_long(("onnxruntime", "openvino", "torch"), ("onnxruntime",)))
def test_calls_and_results_have_the_models_own_structure(kind, runtime, tmp_path):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    example = {"x": torch.randn(5, 6), "extra": {"shift": torch.randn(5, 4)}, "double": True}
    prepared = prepared_of(Structured(kind).eval(), example)
    report = fxquant.export_onnx(prepared, tmp_path / "s.onnx", example)
    assert list(report.inputs) == ["x", "extra_shift"] and list(report.outputs) == STRUCTURES[kind]
    compiled = fxquant.compile(prepared, example, runtime=runtime, threads=1)
    x, shift = torch.randn(3, 6), torch.randn(3, 4)
    expected = fxquant.freeze(prepared)(x, {"shift": shift}, double=True)
    actual = compiled(x, extra={"shift": shift}, double=True)
    assert type(actual) is type(expected) and f"for {runtime}" in repr(compiled)
    if kind == "tuple":
        assert actual[2] is None
    if kind == "dataclass":
        actual, expected = vars(actual), vars(expected)
    for own, other in zip(tensors_of(actual), tensors_of(expected), strict=True):
        assert type(own) is Tensor and (own - other).abs().max() <= 0.04
    with pytest.raises(FxquantError, match=r"double|differs"):
        compiled(x, {"shift": shift}, double=False)


@pytest.mark.long
def test_auto_takes_the_fastest_and_says_what_it_measured():
    prepared = prepared_of(DigitsNet().eval(), torch.rand(4, 1, 8, 8))
    compiled = fxquant.compile(prepared, torch.rand(1, 1, 8, 8))
    times = [own.milliseconds for own in compiled.report if own.milliseconds is not None]
    assert compiled.report[0].runtime == compiled.runtime and times == sorted(times) and len(times) >= 2
    assert "fastest of" in repr(compiled) and " ms" in repr(compiled)
    assert compiled(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_auto_without_other_runtimes_is_one_of_ours(monkeypatch):
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    compiled = fxquant.compile(prepared_of(DigitsNet().eval(), torch.rand(4, 1, 8, 8)), runtime="auto")
    assert compiled.runtime in ("torch", "native") and "pip install 'fxquant[openvino]'" in repr(compiled)


@pytest.mark.long
def test_openvino_is_not_given_tensors_that_it_computes_wrongly():
    pytest.importorskip("openvino")
    recipe = recipe_with(activation=Scheme(bits=16))
    prepared = prepared_of(DigitsNet().eval(), torch.rand(4, 1, 8, 8), recipe)
    with pytest.raises(ExportError, match="OpenVINO"):
        fxquant.compile(prepared, runtime="openvino")
    compiled = fxquant.compile(prepared, runtime="auto")
    assert compiled.runtime != "openvino" and "OpenVINO computes" in repr(compiled)


class Stateful(nn.Module):
    """Its first part asks a question about data; what the answer is used for can be written to a file, or cannot."""

    def __init__(self, exportable: bool) -> None:
        super().__init__()
        self.stem, self.asks, self.fc = nn.Conv2d(3, 4, 3), Asks(exportable), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.asks(F.relu(self.stem(x))).mean((2, 3)))


class Asks(nn.Module):
    def __init__(self, exportable: bool) -> None:
        super().__init__()
        self.exportable, self.conv = exportable, nn.Conv2d(4, 4, 3)

    def forward(self, y: Tensor) -> Tensor:
        if not self.exportable and float(y.mean()) > 1e3:
            return self.conv(y) * 2.0
        return self.conv(y).cumsum(1) if self.exportable else self.conv(y)


@pytest.mark.long
def test_float_parts_and_islands_export_as_they_run(tmp_path):
    x = torch.randn(2, 3, 12, 12)
    prepared = prepared_of(Stateful(exportable=True).eval(), x)
    report = fxquant.export_onnx(prepared, tmp_path / "a.onnx", x)
    assert "CumSum" in report.operators and all(own.difference < 1e-5 for own in report.agreement)
    leaf = fxquant.prepare(Stateful(exportable=True).eval(), x, leaves=["asks"])
    report = fxquant.export_onnx(fxquant.calibrate(leaf, [x], progress=False), tmp_path / "b.onnx", x)
    assert all(own.difference < 1e-5 for own in report.agreement)


def test_an_island_that_asks_about_data_is_named(tmp_path):
    x = torch.randn(2, 3, 12, 12)
    prepared = prepared_of(Stateful(exportable=False).eval(), x)
    assert [island.path for island in islands_of(prepared)] == ["asks"]
    with pytest.raises(ExportError, match=r"where: asks, which runs its own code because"):
        fxquant.export_onnx(prepared, tmp_path / "a.onnx", x)
    assert not os.listdir(tmp_path)


@pytest.mark.long
def test_merged_clamps_survive_where_the_grid_does_not_do_them():
    """On a signed grid, 0 and 6 are inside: the file clamps; on an affine one, saturation does it and no node is spent."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3), nn.ReLU()).eval()
    x = torch.randn(8, 3, 12, 12) * 6
    for scheme, clamps in ((Scheme(), 0), (Scheme(signed=True, symmetric=True), 2)):
        prepared = prepared_of(model, x, recipe_with(activation=scheme))
        made = make_onnx(prepared)
        kinds = [node.op_type for node in graph_of(made).node]
        assert kinds.count("Relu") + kinds.count("Clip") + kinds.count("Max") + kinds.count("Min") == clamps
        roundings = [m for m in made.model.flat.modules() if isinstance(m, Rounding)]
        assert sum(m.lower is not None or m.upper is not None for m in roundings) == clamps
        (actual,) = onnxruntime_session(made.content, threads=1)([x])
        assert (actual - run(fxquant.freeze(prepared), (x,))).abs().max() <= 1.01 * made.model.output_scales()[0]


def test_nothing_in_a_file_tells_where_it_was_made():
    content = make_onnx(prepared_of(DigitsNet().eval(), torch.rand(4, 1, 8, 8))).content
    for word in (b".py", b"site-packages", str(Path.home()).encode(), b"pkg.torch"):
        assert word not in content


@pytest.mark.long
def test_static_and_batch_only_files():
    prepared = prepared_of(DigitsNet().eval(), torch.rand(4, 1, 8, 8))
    for dynamic, shape in (("none", [4, 1, 8, 8]), ("batch", ["batch", 1, 8, 8])):
        graph = onnx.load_from_string(make_onnx(prepared, torch.rand(4, 1, 8, 8), dynamic=dynamic).content).graph
        dims = graph.input[0].type.tensor_type.shape.dim
        assert [d.dim_param or d.dim_value for d in dims] == shape


class HalvesLargeImages(nn.Module):
    """Its way depends on the size; as an island its weights would not be quantized, so that it is captured for one way."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > self.limit:
            x = F.max_pool2d(x, 2)
        return F.relu(F.conv2d(x, self.weight))


@pytest.mark.long
def test_sizes_stay_fixed_where_the_file_would_be_wrong_for_others(tmp_path):
    for side, limit, seen in ((16, 24, "24 is False; now it is True"), (16, 1000, "1000 is False (")):
        prepared = prepared_of(HalvesLargeImages(limit).eval(), torch.rand(1, 3, side, side))
        report = fxquant.export_onnx(prepared, tmp_path / "m.onnx")
        assert report.inputs["x"] == ["batch", 3, side, side]
        assert f"x.shape[-1] > {seen}" in report.notes[0]
        assert len(report.agreement) == 2 and all(own.equal == 1.0 for own in report.agreement)
    asked = fxquant.export_onnx(prepared, tmp_path / "m.onnx", dynamic="sizes")
    assert asked.inputs["x"] == ["batch", 3, "x_2", "x_3"] and "test_onnx.py" in asked.notes[0]


class AsksWhatIsSo(nn.Module):
    """Its question has one answer for every size of at least two."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight)
        return x + F.relu(x) if x.shape[1] > 1 else x


def test_an_answer_that_always_holds_leaves_sizes_free(tmp_path):
    prepared = prepared_of(AsksWhatIsSo().eval(), torch.rand(2, 5, 8))
    assert specializations_of(prepared)
    report = fxquant.export_onnx(prepared, tmp_path / "m.onnx")
    assert report.inputs["x"] == ["batch", "x_1", 8] and not report.notes


ARGUMENTS = {
    "suffix": ({"path": "model.pt"}, InputError, "does not end in .onnx"),
    "folder": ({"path": "nowhere/model.onnx"}, InputError, "there is no folder"),
    "order": (
        {"path": torch.rand(1, 1, 8, 8), "example_inputs": "model.onnx"},
        InputError,
        "a Tensor was given where the",
    ),
    "form": ({"form": "qlinear"}, InputError, "form='qlinear' is not known. Choose"),
    "dynamic": ({"dynamic": "all"}, InputError, "dynamic='all'"),
    "verify": ({"verify": "often"}, InputError, "verify='often'"),
    "opset": ({"opset": 13}, InputError, "too old: this model needs 18"),
    "example": ({"example_inputs": (torch.rand(1, 1, 8, 8), 3)}, InputError, "does not fit the model's forward"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_bad_arguments_are_refused_and_leave_the_file_alone(arguments, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(b"before")
    prepared = prepared_of(DigitsNet().eval(), torch.rand(4, 1, 8, 8))
    with pytest.raises(error, match=message):
        fxquant.export_onnx(prepared, **{"path": "model.onnx", **arguments})
    assert Path("model.onnx").read_bytes() == b"before" and os.listdir() == ["model.onnx"]


def test_a_write_that_fails_leaves_the_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"before")
    prepared = prepared_of(DigitsNet().eval(), torch.rand(4, 1, 8, 8))

    def fails(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "replace", fails)
    with pytest.raises(ExportError, match="no space"):
        fxquant.export_onnx(prepared, path, verify=False)
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.long
def test_models_that_are_not_ready_are_refused(tmp_path):
    path, x = tmp_path / "m.onnx", torch.rand(4, 1, 8, 8)
    with pytest.raises(CalibrationError, match="no range yet"):
        fxquant.export_onnx(fxquant.prepare(DigitsNet().eval(), x), path)
    for verb in (lambda m: fxquant.export_onnx(m, path), fxquant.compile):
        with pytest.raises(LevelError, match="was given a DigitsNet"):
            verb(DigitsNet())
    without = fxquant.calibrate(fxquant.prepare(DigitsNet().eval()), [x], progress=False)
    with pytest.raises(InputError, match="example_inputs are missing"):
        fxquant.export_onnx(without, path)
    assert fxquant.export_onnx(without, path, x).agreement
    with pytest.raises(InputError, match="runtime='tensorrt'"):
        fxquant.compile(without, x, runtime="tensorrt")
    with pytest.raises(InputError, match="threads=0"):
        fxquant.compile(without, x, threads=0)
    with pytest.raises(InputError, match=r"the runtime refuses inputs of shapes \[2, 5, 8, 8\]"):
        fxquant.compile(without, x, runtime="onnxruntime")(torch.rand(2, 5, 8, 8))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime", "openvino"])
def test_missing_packages_are_named_with_the_extra_that_brings_them(package, tmp_path, monkeypatch):
    prepared = prepared_of(DigitsNet().eval(), torch.rand(4, 1, 8, 8))
    real = installed.importlib.util.find_spec
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None if name == package else real(name))
    extra = "openvino" if package == "openvino" else "onnx"
    with pytest.raises(MissingPackageError, match=rf"{package}, which is not installed(.|\n)*fxquant\[{extra}\]"):
        if package == "openvino":
            fxquant.compile(prepared, runtime="openvino")
        fxquant.export_onnx(prepared, tmp_path / "m.onnx")
    assert not os.listdir(tmp_path)


def test_an_op_without_an_onnx_form_is_told():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 2, ceil_mode=True, divisor_override=4)).eval()
    prepared = prepared_of(model, torch.randn(2, 3, 12, 12), recipe_with())
    with pytest.raises(ExportError, match="divisor_override and ceil_mode"):
        make_onnx(prepared)
    kept = fxquant.prepare(model, torch.randn(2, 3, 12, 12), recipe=Recipe([(Op("avg_pool2d"), None)]))
    fxquant.calibrate(kept, [torch.randn(2, 3, 12, 12)], progress=False)


def test_half_precision_models_keep_their_dtype():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(4 * 36, 5)).eval().half()
    x = torch.randn(2, 3, 8, 8).half()
    prepared = prepared_of(model, x)
    made = make_onnx(prepared, x)
    (actual,) = onnxruntime_session(made.content, threads=1)([x])
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual, run(fxquant.convert(prepared), (x,)), rtol=1e-2, atol=1e-2)
