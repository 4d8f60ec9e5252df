"""ONNX files for targets: TensorRT's rules on real models and on planted violations, and what the runtimes make of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from op_cases import mostly_long
from test_targets import Mixed, prepared_for
from torch import nn

import fxquant
from fxquant import Recipe, installed, processor
from fxquant.errors import ExportError, InputError
from fxquant.export.to_onnx import make_onnx
from fxquant.runtimes.onnxruntime import onnxruntime_session
from fxquant.runtimes.openvino import openvino_session
from fxquant.runtimes.tensorrt_rules import FUSION_RULES, PARSER_RULES, tensorrt_violations
from fxquant.targets import TARGETS, get

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

RULES = {rule.__name__ for rule in (*PARSER_RULES, *FUSION_RULES)}


@pytest.fixture(scope="module")
def mixed() -> bytes:
    """The file of a small model with every kind of weighted op, for TensorRT."""
    torch.manual_seed(0)
    return make_onnx(prepared_for("tensorrt", Mixed().eval(), torch.randn(8, 3, 8, 8))).content


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "googlenet"])
def test_models_prepared_for_tensorrt_break_no_rule(name):
    prepared = prepared_for("tensorrt", zoo.build(name), zoo.images(2))
    made = make_onnx(prepared)
    assert tensorrt_violations(made.content) == [] and not made.notes
    graph = onnx.load_from_string(made.content).graph
    kinds = {t.data_type for t in graph.initializer if t.dims and len(t.dims) > 1}
    assert onnx.TensorProto.INT8 in kinds and onnx.TensorProto.INT32 not in kinds
    sums = [n for n in graph.node if n.op_type == "Add"]
    makers = {out: n.op_type for n in graph.node for out in n.output}
    for node in sums if name in ("resnet18", "mobilenet_v2") else ():
        assert sorted(makers[i] for i in node.input) == ["Conv", "DequantizeLinear"]
    (actual,), expected = (
        onnxruntime_session(made.content, threads=1)([zoo.images(3, seed=9)]),
        fxquant.freeze(prepared),
    )
    with torch.no_grad():
        wanted = expected(zoo.images(3, seed=9))
    if processor.adds_pairs_in_16_bits():
        return  # ONNX Runtime saturates, which TensorRT does not
    assert float((actual - wanted).square().sum()) < 10 ** (-2.5) * float(wanted.square().sum())  # 25 dB


@pytest.mark.long
def test_a_transformer_prepared_for_tensorrt_breaks_no_rule():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    made = make_onnx(prepared_for("tensorrt", layer, torch.randn(4, 5, 16)))
    assert tensorrt_violations(made.content) == []
    assert "LayerNormalization" in {n.op_type for n in onnx.load_from_string(made.content).graph.node}


@pytest.mark.long
def test_a_file_for_x86_breaks_rules_that_name_its_nodes():
    broken = tensorrt_violations(make_onnx(prepared_for("x86", zoo.build("resnet18"), zoo.images(2))).content)
    count = {rule: sum(v.rule == rule for v in broken) for rule in RULES}
    assert count["residuals_are_fused"] == 8 and count["integers_are_int8"] > 40 and count["zero_points_are_zero"] > 5
    bias = next(v for v in broken if "bias" in v.what)
    assert bias.operator == "DequantizeLinear" and bias.node == "conv1.bias" and bias.refused and bias.node in str(bias)
    assert not any(v.refused for v in broken if v.rule == "residuals_are_fused")


# Planted violations


def nodes(proto: Any, kind: str) -> list[Any]:
    return [n for n in proto.graph.node if n.op_type == kind]


def called(node: Any) -> str:
    """What a message calls a node: a rounding is known by its integers."""
    return node.name or (node.input[0] if node.op_type == "DequantizeLinear" else node.output[0])


def constant(proto: Any, node: Any, index: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Give ``node`` a changed copy of its constant input ``index``."""
    held = {t.name: t for t in proto.graph.initializer}
    made = {n.output[0]: n.attribute[0].t for n in proto.graph.node if n.op_type == "Constant"}
    name = node.input[index]
    value = change(onnx.numpy_helper.to_array(held.get(name) or made[name]))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), f"{name}_changed_{node.name}"))
    node.input[index] = f"{name}_changed_{node.name}"


def weight_of(proto: Any, kind: str) -> Any:
    makers = {out: n for n in proto.graph.node for out in n.output}
    return makers[nodes(proto, kind)[0].input[1]]


def shift_zero_point(proto: Any) -> Any:
    node = nodes(proto, "QuantizeLinear")[1]
    constant(proto, node, 2, lambda z: z + 3)
    return node


def unsigned_integers(proto: Any) -> Any:
    node = nodes(proto, "QuantizeLinear")[1]
    constant(proto, node, 2, lambda z: z.astype(np.uint8))
    return node


def default_type(proto: Any) -> Any:
    node = nodes(proto, "QuantizeLinear")[0]
    del node.input[2]
    return node


def negative_scale(proto: Any) -> Any:
    node = weight_of(proto, "Conv")
    constant(proto, node, 1, lambda s: -s)
    return node


def computed_scale(proto: Any) -> Any:
    node = nodes(proto, "QuantizeLinear")[1]
    proto.graph.node.insert(0, onnx.helper.make_node("Abs", [node.input[1]], ["computed"], name="abs"))
    node.input[1] = "computed"
    return node


def scale_a_channel(proto: Any) -> Any:
    node = nodes(proto, "QuantizeLinear")[0]
    constant(proto, node, 1, lambda s: np.repeat(s, 3))
    return node


def other_axis(proto: Any, kind: str, axis: int) -> Any:
    node = weight_of(proto, kind)
    kept = [a for a in node.attribute if a.name != "axis"]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute("axis", axis)])
    return node


def other_scale_behind(proto: Any) -> Any:
    quantize = nodes(proto, "QuantizeLinear")[2]
    node = next(n for n in proto.graph.node if n.input and n.input[0] == quantize.output[0])
    constant(proto, node, 1, lambda s: s * 2)
    return node


def integers_computed_on(proto: Any) -> Any:
    node = nodes(proto, "QuantizeLinear")[0]
    proto.graph.node.append(onnx.helper.make_node("MaxPool", [node.output[0]], ["on_integers"], name="pool"))
    return node


def operator_on_integers(proto: Any) -> Any:
    node = nodes(proto, "Conv")[0]
    node.op_type = "QLinearConv"
    return node


def other_domain(proto: Any) -> Any:
    node = nodes(proto, "Softmax")[0]
    node.domain = "com.microsoft"
    return node


def float_weight(proto: Any) -> Any:
    node, dequantize = nodes(proto, "Conv")[1], None
    makers = {out: n for n in proto.graph.node for out in n.output}
    dequantize = makers[node.input[1]]
    value = onnx.numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == dequantize.input[0]))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), "float_weight"))
    node.input[1] = "float_weight"
    return node


def float_input(proto: Any) -> Any:
    node = nodes(proto, "Conv")[0]
    node.input[0] = proto.graph.input[0].name
    return node


def rounded_between(proto: Any, kind: str) -> Any:
    """A pair in front of the first operand that comes from a convolution."""
    makers = {out: n for n in proto.graph.node for out in n.output}
    node, index = next(
        (n, i) for n in nodes(proto, kind) for i, name in enumerate(n.input) if makers[name].op_type == "Conv"
    )
    grid = list(nodes(proto, "QuantizeLinear")[0].input[1:])
    source = node.input[index]
    proto.graph.node.append(onnx.helper.make_node("QuantizeLinear", [source, *grid], ["q"], name="q"))
    proto.graph.node.append(onnx.helper.make_node("DequantizeLinear", ["q", *grid], ["dq"], name="dq"))
    for reader in proto.graph.node:
        if reader.name != "q":
            for i, name in enumerate(reader.input):
                reader.input[i] = "dq" if name == source else name
    return node


def old_opset(proto: Any) -> None:
    proto.opset_import[0].version = 11


PLANTED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "zero point": ("zero_points_are_zero", shift_zero_point),
    "uint8": ("integers_are_int8", unsigned_integers),
    "no type": ("integers_are_int8", default_type),
    "negative scale": ("scales_are_constant_and_positive", negative_scale),
    "computed scale": ("scales_are_constant_and_positive", computed_scale),
    "scale a channel": ("tensors_have_one_scale", scale_a_channel),
    "conv axis": ("weights_have_their_axis", lambda p: other_axis(p, "Conv", 1)),
    "transposed axis": ("weights_have_their_axis", lambda p: other_axis(p, "ConvTranspose", 0)),
    "linear axis": ("weights_have_their_axis", lambda p: other_axis(p, "Gemm", 1)),
    "other scale": ("pairs_are_whole", other_scale_behind),
    "integers read": ("pairs_are_whole", integers_computed_on),
    "QLinearConv": ("no_integer_operators", operator_on_integers),
    "domain": ("no_integer_operators", other_domain),
    "float weight": ("weighted_ops_are_quantized_whole", float_weight),
    "float input": ("weighted_ops_are_quantized_whole", float_input),
    "rounded before silu": ("activations_are_fused", lambda p: rounded_between(p, "Sigmoid")),
    "rounded before add": ("residuals_are_fused", lambda p: rounded_between(p, "Add")),
    "opset": ("opset_has_axes", old_opset),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_violation_is_found_and_named(plant, mixed):
    proto = onnx.load_from_string(mixed)
    assert tensorrt_violations(mixed) == []
    rule, change = PLANTED[plant]
    node = change(proto)
    broken = tensorrt_violations(proto.SerializeToString())
    named = [v for v in broken if v.rule == rule and v.node == ("" if node is None else called(node))]
    assert named, [str(v) for v in broken]
    assert named[0].refused == (rule in {r.__name__ for r in PARSER_RULES}) and named[0].what


def test_every_rule_has_a_planted_violation():
    assert {rule for rule, _ in PLANTED.values()} == RULES


# At export


@pytest.mark.long
def test_a_file_that_tensorrt_refuses_is_not_written(tmp_path):
    own = dataclasses.replace(get("onnxruntime"), name="own", title="Mine", file_rules="tensorrt")
    prepared = prepared_for(own, Mixed().eval(), torch.randn(4, 3, 8, 8))
    with pytest.raises(ExportError, match=r"Mine would refuse the file:\n    \w+: [\w.:]+ \(\w+\)") as refused:
        fxquant.export_onnx(prepared, tmp_path / "m.onnx")
    assert "what to do" in str(refused.value) and not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="'tensort', which are not known"):
        make_onnx(
            prepared_for(dataclasses.replace(own, file_rules="tensort"), nn.Linear(3, 2).eval(), torch.randn(4, 3))
        )


@pytest.mark.long
def test_what_would_only_run_slower_is_a_note(tmp_path):
    recipe, x = Recipe([("fc", None)]), torch.randn(4, 3, 8, 8)
    report = fxquant.export_onnx(prepared_for("tensorrt", Mixed().eval(), x, recipe=recipe), tmp_path / "m.onnx")
    assert any("run this in float: weighted_ops_are_quantized_whole" in note for note in report.notes)
    assert all(own.difference < 1e-4 for own in report.agreement)


@pytest.mark.parametrize("target", mostly_long(TARGETS, ("x86", "openvino")))
def test_files_for_every_target_agree_in_both_runtimes(target):
    if processor.adds_pairs_in_16_bits() and not get(target).adds_pairs:
        pytest.skip("needs VNNI: without it these runtimes saturate, and files for this target do not expect that")
    prepared = prepared_for(target, Mixed().eval(), torch.randn(16, 3, 8, 8))
    made, frozen, x = make_onnx(prepared), fxquant.freeze(prepared), torch.randn(5, 3, 8, 8)
    sessions = {"onnxruntime": onnxruntime_session(made.content, threads=1)}
    if installed.is_installed("openvino"):
        sessions["openvino"] = openvino_session(made.content, threads=1)
    with torch.no_grad():
        expected = frozen(x)
    for runtime, session in sessions.items():
        for actual, wanted, scale in zip(session([x]), expected, made.model.output_scales(), strict=True):
            largest, step = float((actual - wanted).abs().max()), scale or 0.01 * float(wanted.abs().max())
            print(f"{target} in {runtime}: {largest / step:.2f} steps")
            assert largest <= 1.01 * step, f"{runtime}: {largest / step:.2f} steps of the output's grid"
