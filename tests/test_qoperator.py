"""The QOperator form: every op beside its frozen model, networks beside their QDQ files, and what must stay as it is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from digits import DigitsNet
from onnx_files import ELEMENTS, assert_within_a_step, graph_of, kinds_of
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
from torch.nn import functional as F

import fxquant
from fxquant import Scheme, installed, processor
from fxquant.errors import InputError
from fxquant.export.to_onnx import OnnxFile, make_onnx
from fxquant.onnx.integer_moves import move_integers
from fxquant.onnx.qoperators import to_qoperators
from fxquant.runtimes.onnxruntime import onnxruntime_session
from fxquant.runtimes.openvino import openvino_session

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

SIGNED = Scheme(signed=True, symmetric=True)
ON_INTEGERS = {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"}


@pytest.mark.parametrize("name", mostly_long(COMPUTING, ("conv2d", "linear", "add", "cat", "silu", "layer_norm")))
def test_every_op_runs_in_onnxruntime_as_it_is_frozen(name):
    example, frozen = example_of(name), frozen_example(name)
    made = make_onnx(frozen, inputs_like(example, 3, 5), form="qoperator")
    inputs = inputs_like(example, rows_for(example, ELEMENTS), 6, gain=1.4)
    assert_within_a_step(made, inputs, run(frozen, inputs), name)
    assert {node.domain for node in graph_of(made).node} == {""}


OPERATORS = {
    "conv1d": {"QLinearConv": 1},
    "conv2d": {"QLinearConv": 1},
    "conv3d": {"QLinearConv": 1},
    "linear": {"MatMulInteger": 1},
    "matmul": {"QLinearMatMul": 1},
    "bmm": {"QLinearMatMul": 1},
    "conv_transpose2d": {},
    "add": {},
}


@pytest.mark.parametrize("name", mostly_long(OPERATORS, ("conv1d", "matmul", "add")))
def test_the_standards_operators_are_used_where_there_are_some(name):
    kinds = kinds_of(make_onnx(frozen_example(name), form="qoperator"))
    assert {kind: count for kind, count in kinds.items() if kind in ON_INTEGERS} == OPERATORS[name]
    assert not {"Conv", "Gemm", "MatMul"} & set(kinds)


class Convolutions(nn.Module):
    """Groups, dilation, stride, unequal padding, a depthwise convolution; operators with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, (2, 4), padding="same")
        self.grouped = nn.Conv2d(8, 12, 3, stride=(2, 1), dilation=(1, 2), groups=4, padding=(2, 0), bias=False)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, padding=1)
        self.plain, self.last = nn.Linear(12, 6, bias=False), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(F.relu6(self.first(x)), (1, 0, 2, 1))
        y = F.max_pool2d(self.depthwise(F.relu(self.grouped(y))), 3, 2, padding=1)
        y = self.plain(torch.cat([y, y.flip(3)], 3).flatten(2).transpose(1, 2))
        return self.last(torch.relu(y))


@pytest.mark.long
@pytest.mark.parametrize(("scheme", "clips"), [(Scheme(), 0), (SIGNED, 3)], ids=["unsigned", "signed"])
def test_attributes_padding_clamps_and_moves(scheme, clips, tmp_path):
    """Held against the exact integer reference, at other sizes than the example's."""
    prepared = prepared_of(Convolutions().eval(), torch.randn(4, 4, 12, 12), recipe_with(activation=scheme))
    made = make_onnx(prepared, form="qoperator")
    kinds = kinds_of(made)
    assert kinds["QLinearConv"] == 3 and kinds["QLinearMatMul"] == 1 and kinds["MatMulInteger"] == 1
    assert kinds["Clip"] == clips and not {"Conv", "Gemm", "MatMul", "Relu"} & set(kinds)
    reference = fxquant.convert(prepared, kernels="reference")
    for shape in ((4, 4, 12, 12), (1, 4, 12, 12), (2, 4, 15, 20)):
        x = torch.randn(shape)
        (actual,), expected = onnxruntime_session(made.content, threads=1)([x]), run(reference, (x,))
        step = made.model.output_scales()[0]
        assert step is not None and (actual - expected).abs().max() <= 1.01 * step
        assert ((actual - expected).abs() < 0.5 * step).float().mean() > 0.99
    report = fxquant.export_onnx(prepared, tmp_path / "m.onnx", form="qoperator", verify="nodes")
    names = {own.name for own in report.nodes}
    assert {"first:integers", "grouped:integers", "depthwise:integers", "plain:integers", "last:integers"} <= names
    assert all(own.lsb <= 1 and own.equal > 0.99 for own in report.nodes), report


def quantized_network(name: str) -> Any:
    return prepared_of(zoo.build(name), zoo.images(4))


@pytest.mark.long
@pytest.mark.parametrize(("name", "convolutions"), [("resnet18", 20), ("mobilenet_v2", 52)])
def test_networks_give_the_integers_of_their_qdq_files(name, convolutions):
    prepared = quantized_network(name)
    qdq, made = make_onnx(prepared), make_onnx(prepared, form="qoperator")
    kinds = kinds_of(made)
    assert kinds["QLinearConv"] == convolutions and kinds["MatMulInteger"] == 1
    assert not {"Conv", "Gemm"} & set(kinds) and len(made.content) < len(qdq.content)
    for shape in ((1, 3, 64, 64), (3, 3, 96, 64)):
        x = torch.randn(shape)
        own, other = integers(made, x), integers(qdq, x)
        assert set(own) == set(other) and len(own) > convolutions
        total = sum(q.numel() for q in own.values())
        equal = sum(int((q == other[name]).sum()) for name, q in own.items())
        print(f"{name} at {shape}: {equal / total:.5%} equal")
        assert all((q.long() - other[name].long()).abs().max() <= 1 for name, q in own.items())
        assert equal / total > 0.999


def integers(made: OnnxFile, x: Tensor) -> dict[str, Tensor]:
    """Every rounded tensor in the file by its name, as ONNX Runtime computes it."""
    proto = onnx.load_from_string(made.content)
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    names = [name for node in proto.graph.node for name in node.output if name.endswith(":integers")]
    proto.graph.output.extend(known[name] for name in names)
    results = onnxruntime_session(proto.SerializeToString(), threads=1)([x])
    return dict(zip(names, results[-len(names) :], strict=True))


@pytest.mark.long
def test_weights_and_their_zero_points_are_int8_and_biases_int32():
    graph = graph_of(make_onnx(quantized_network("resnet18"), form="qoperator"))
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type != "QLinearConv":
            continue
        weight, scale, zero_point, bias = (constants[node.input[i]] for i in (3, 4, 5, 8))
        assert node.input[3] == f"{node.name}.weight" and weight.dtype == np.int8 and bias.dtype == np.int32
        assert scale.shape == zero_point.shape == bias.shape == weight.shape[:1]
        assert zero_point.dtype == np.int8 and not zero_point.any()
    floats = [value for value in constants.values() if value.dtype == np.float32]
    assert all(value.ndim < 2 for value in floats)


@pytest.mark.parametrize("bits", [2, 4, 16])
def test_weights_that_are_not_of_8_bits_stay_in_qdq(bits):
    example = example_of("conv2d")
    frozen = fxquant.freeze(calibrated(example, recipe_with(weight=WEIGHTS[bits])))
    made = make_onnx(frozen, inputs_like(example, 2, 1), form="qoperator")
    kinds = kinds_of(made)
    assert kinds["Conv"] == 1 and not ON_INTEGERS & set(kinds)
    inputs = inputs_like(example, 7, 2)
    assert_within_a_step(made, inputs, run(frozen, inputs))


@pytest.mark.long
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_tensors_of_other_widths(scheme):
    """Of less than 8 bits they are clamped integers of 8; of more they stay in QDQ."""
    prepared = prepared_of(DigitsNet().eval(), torch.rand(8, 1, 8, 8), recipe_with(activation=scheme))
    made, frozen = make_onnx(prepared, form="qoperator"), fxquant.freeze(prepared)
    kinds = kinds_of(made)
    assert (kinds["QLinearConv"] == 3 and not kinds["Conv"]) if scheme.bits <= 8 else not ON_INTEGERS & set(kinds)
    x = torch.rand(33, 1, 8, 8)
    (actual,), expected = onnxruntime_session(made.content, threads=1)([x]), run(frozen, (x,))
    assert (actual - expected).abs().max() <= 1.01 * (made.model.output_scales()[0] or 0)


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_targets_without_such_operators_refuse_the_form(target, tmp_path):
    prepared = fxquant.prepare(DigitsNet().eval(), torch.rand(4, 1, 8, 8), target=target)
    fxquant.calibrate(prepared, [torch.rand(4, 1, 8, 8)], progress=False)
    with pytest.raises(InputError, match=r"form='qoperator' is nothing for (OpenVINO|TensorRT)(.|\n)*what to do"):
        fxquant.export_onnx(prepared, tmp_path / "m.onnx", form="qoperator")
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("target", mostly_long(("onnxruntime", "xnnpack", "tflite"), ("onnxruntime",)))
def test_other_targets_take_it(target):
    x = torch.randn(8, 4, 12, 12)
    prepared = fxquant.prepare(Convolutions().eval(), x, target=target)
    fxquant.calibrate(prepared, [x], progress=False)
    made = make_onnx(prepared, form="qoperator")
    assert kinds_of(made)["QLinearConv"] == 3 and not kinds_of(made)["Conv"]
    (actual,), expected = onnxruntime_session(made.content, threads=1)([x]), run(fxquant.freeze(prepared), (x,))
    step = made.model.output_scales()[0] or 0.02 * float(expected.abs().max())
    assert (actual - expected).abs().max() <= 1.01 * step


@pytest.mark.long
def test_openvino_runs_it_where_weights_have_one_scale():
    if not installed.is_installed("openvino"):
        pytest.skip("openvino is not installed")
    weight = Scheme(signed=True, symmetric=True, narrow_range=True)
    x = torch.randn(4, 4, 12, 12)
    prepared = prepared_of(Convolutions().eval(), x, recipe_with(weight=weight))
    made = make_onnx(prepared, form="qoperator")
    (actual,), expected = openvino_session(made.content, threads=1)([x]), run(fxquant.freeze(prepared), (x,))
    step = made.model.output_scales()[0]
    assert step is not None and ((actual - expected).abs() <= 1.01 * step).float().mean() > 0.99


# Graphs made by hand


def parse(body: str, arrays: dict[str, np.ndarray], inputs: str, outputs: str) -> Any:
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in arrays.items()]
    graph = onnx.parser.parse_graph(f"g ({inputs}) => ({outputs}) {{ {body} }}")
    graph.initializer.extend(constants)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def changed(proto: Any) -> Any:
    model = ir.from_proto(proto)
    move_integers(model)
    to_qoperators(model)
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    return made


def results(proto: Any, *inputs: np.ndarray) -> list[np.ndarray]:
    """Without ONNX Runtime's own rewriting, so that QDQ is computed as it is written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip((value.name for value in session.get_inputs()), inputs, strict=True)))


CONV = """
    q = QuantizeLinear(x, s, z)
    a = DequantizeLinear(q, s, z)
    w = DequantizeLinear<axis = 0>(weight, weight_scale)
    b = DequantizeLinear<axis = 0>(bias, bias_scale)
    y = Conv<group = 2, strides = [2, 1], dilations = [1, 2], pads = [1, 0, 2, 3]>(a, w, b)
"""
ROUND = """
    r = QuantizeLinear(y, t, u)
    out = DequantizeLinear(r, t, u)
"""


PART, SEED = (2, 4) if processor.adds_pairs_in_16_bits() else (1, 0)
"""Weights by hand are divided by it: two products stay within 16 bits where ONNX Runtime adds them there. The seed is one
for which no real bias, once it is rounded, decides a tie."""


def conv_arrays(**given: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(SEED)
    scales = rng.uniform(0.001, 0.02, 6).astype(np.float32)
    arrays = {
        "s": np.float32(0.05),
        "z": np.uint8(117),
        "t": np.float32(0.09),
        "u": np.uint8(130),
        "weight": (rng.integers(-127, 128, (6, 2, 3, 2)) // PART).astype(np.int8),
        "weight_scale": scales,
        "bias": rng.integers(-2000, 2000, 6).astype(np.int32),
        "bias_scale": scales * np.float32(0.05),
    }
    return {name: np.asarray(value) for name, value in (arrays | given).items()}


def image() -> np.ndarray:
    return np.random.default_rng(1).normal(0, 2.5, (3, 4, 9, 8)).astype(np.float32)


def types(proto: Any) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


SHAPES = "float[n, 4, h, w] x", "float[n, 6, i, j] out"
FLAT = CONV.replace("w = DequantizeLinear<axis = 0>", "w = DequantizeLinear")
ALONG_INPUTS = CONV.replace("w = DequantizeLinear<axis = 0>", "w = DequantizeLinear<axis = 1>")
REAL_BIAS = CONV.replace("b = DequantizeLinear<axis = 0>(bias, bias_scale)", "").replace("(a, w, b)", "(a, w, bias)")
BY_HAND: dict[str, tuple[str, dict[str, Any], str]] = {
    "all of it": (CONV + ROUND, {}, "QLinearConv"),
    "signed": (CONV + ROUND, {"z": np.int8(-3), "u": np.int8(11)}, "QLinearConv"),
    "unsigned weight": (CONV + ROUND, {"weight": np.full((6, 2, 3, 2), 7, np.uint8)}, "QLinearConv"),
    "signed with unsigned weight": (
        CONV + ROUND,
        {"weight": np.full((6, 2, 3, 2), 7, np.uint8), "z": np.int8(0), "u": np.int8(0)},
        "ConvInteger",
    ),
    "to another signedness": (CONV + ROUND, {"u": np.int8(2)}, "ConvInteger"),
    "one scale": (
        FLAT + ROUND,
        {"weight_scale": np.float32(0.0137), "bias_scale": np.full(6, 0.05 * 0.0137, np.float32)},
        "QLinearConv",
    ),
    "not rounded": (CONV + "out = Identity(y)", {}, "ConvInteger"),
    "read twice": (CONV + ROUND.replace("out =", "o =") + "out = Add(o, y)", {}, "ConvInteger"),
    "a bias of another scale": (CONV + ROUND, {"bias_scale": np.full(6, 0.01, np.float32)}, "Conv"),
    "a real bias": (REAL_BIAS + ROUND, {"bias": np.linspace(-1, 1, 6).astype(np.float32)}, "QLinearConv"),
    "scales along inputs": (ALONG_INPUTS + ROUND, {"weight_scale": np.array([0.01, 0.02], np.float32)}, "Conv"),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_a_convolution_by_hand(case):
    body, given, kind = BY_HAND[case]
    before = parse(body, conv_arrays(**given), *SHAPES)
    after = changed(before)
    assert types(after)[kind] == 1 and sum(types(after)[own] for own in (*ON_INTEGERS, "Conv")) == 1
    (expected,), (actual,) = results(before, image()), results(after, image())
    steps = np.abs(actual - expected) / (1e-4 if case == "not rounded" else 0.09)
    assert steps.max() <= 1.01 and (steps < 0.5).mean() > 0.999 and expected.std() > 0.5


def test_clamps_become_bounds_of_integers():
    body = CONV + "v = Clip(y, low, high)" + ROUND.replace("(y,", "(v,")
    before = parse(body, conv_arrays(low=np.float32(-1), high=np.float32(2)), *SHAPES)
    after = changed(before)
    (clip,) = [node for node in after.graph.node if node.op_type == "Clip"]
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in after.graph.initializer}
    assert [int(constants[name]) for name in clip.input[1:]] == [130 - 11, 130 + 22]
    assert constants[clip.input[1]].dtype == np.uint8
    (expected,), (actual,) = results(before, image()), results(after, image())
    assert np.abs(actual - expected).max() <= 0.0901


GEMM = """
    q = QuantizeLinear(x, s, z)
    a = DequantizeLinear(q, s, z)
    w = DequantizeLinear<axis = AXIS>(weight, weight_scale)
    b = DequantizeLinear<axis = 0>(bias, bias_scale)
    out = Gemm<OPTIONS>(a, w, b)
"""


@pytest.mark.parametrize(
    ("options", "axis", "kind"),
    [
        ("transB = 1", 0, "MatMulInteger"),
        ("transB = 0", 1, "MatMulInteger"),
        ("transB = 1", 1, "Gemm"),
        ("transB = 1, alpha = 0.5", 0, "Gemm"),
    ],
)
def test_a_product_by_hand(options, axis, kind):
    rng = np.random.default_rng(2)
    scales = rng.uniform(0.001, 0.02, 5).astype(np.float32)
    arrays = {
        "s": np.asarray(np.float32(0.05)),
        "z": np.asarray(np.uint8(100)),
        "weight": (rng.integers(-127, 128, (5, 5)) // PART).astype(np.int8),
        "weight_scale": scales,
        "bias": rng.integers(-2000, 2000, 5).astype(np.int32),
        "bias_scale": scales * np.float32(0.05),
    }
    body = GEMM.replace("OPTIONS", options).replace("AXIS", str(axis))
    before = parse(body, arrays, "float[n, 5] x", "float[n, 5] out")
    after, x = changed(before), rng.normal(0, 3, (7, 5)).astype(np.float32)
    assert types(after)[kind] == 1
    np.testing.assert_allclose(results(after, x)[0], results(before, x)[0], rtol=1e-5, atol=1e-5)


PAD = """
    q = QuantizeLinear(x, s, z)
    a = DequantizeLinear(q, s, z)
    p = Pad(a, sides, value)
    r = QuantizeLinear(p, s, z)
    out = DequantizeLinear(r, s, z)
"""


@pytest.mark.parametrize(("value", "stays"), [(0.0, False), (0.5, False), (0.3, True), (1e9, True)])
def test_padding_is_with_a_number_of_the_grid(value, stays):
    arrays = {"s": np.float32(0.25), "z": np.uint8(9), "value": np.float32(value), "sides": np.array([0, 1, 0, 2])}
    before = parse(PAD, {k: np.asarray(v) for k, v in arrays.items()}, "float[n, 3] x", "float[n, 6] out")
    after, x = changed(before), np.random.default_rng(0).normal(0, 3, (2, 3)).astype(np.float32)
    assert types(after)["QuantizeLinear"] == (2 if stays else 1)
    np.testing.assert_array_equal(results(after, x)[0], results(before, x)[0])
