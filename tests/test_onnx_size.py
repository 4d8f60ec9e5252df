"""What files hold beside their weights: names of the model's own, and nothing that the standard says already."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import zoo
from awkward import ReusedConv
from comparisons import assert_same_bits
from digits import DigitsNet
from onnx_files import graph_of
from op_cases import prepared_of, run
from torch import Tensor, nn

import fxquant
from fxquant.export.to_onnx import OnnxFile, make_onnx
from fxquant.onnx.default_attributes import drop_copies, drop_defaults, drop_zero_points
from fxquant.onnx.names import integers_name
from fxquant.runtimes.onnxruntime import onnxruntime_session

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def constants_of(graph: Any) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}


@pytest.fixture(scope="module")
def digits() -> OnnxFile:
    torch.manual_seed(0)
    return make_onnx(prepared_of(DigitsNet().eval(), torch.rand(8, 1, 8, 8)))


def test_operators_and_weights_have_the_models_names(digits):
    graph, state = graph_of(digits), DigitsNet().state_dict()
    constants = constants_of(graph)
    convolutions = {node.name: node for node in graph.node if node.op_type in ("Conv", "Gemm")}
    assert set(convolutions) == {"stem", "grouped", "side", "fc"}
    makers = {node.output[0]: node for node in graph.node}
    for name, node in convolutions.items():
        weight, bias = (makers[operand] for operand in node.input[1:])
        assert list(weight.input)[:2] == [f"{name}.weight", f"{name}.weight:scale"]
        assert bias.input[1] == f"{name}.bias:scale" and constants[bias.input[0]].dtype == np.int32
        assert constants[f"{name}.weight"].shape == tuple(state[f"{name}.weight"].shape)
    assert {node.name for node in graph.node if node.op_type == "Add"} == {"add"}
    rounded = [node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert "stem:integers" in rounded and "x_quantizer:integers" in rounded
    others = [name for node in graph.node if node.op_type != "QuantizeLinear" for name in node.output]
    assert all(name.isdigit() or name == "output" for name in others)
    named = [node.name for node in graph.node if node.name]
    assert len(set(named)) == len(named)


class Clashing(nn.Module):
    """Its modules have the names that the exporter and this package give to their own, and one input is a number's."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"weight": nn.Linear(6, 6), "parameter_weight": nn.Linear(6, 6)})
        self.scale = nn.ModuleDict({"integers": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.model["parameter_weight"](torch.relu(self.model["weight"](x)))
        return {"0": self.scale["integers"](y), "model": y}


def test_names_that_clash_stay_apart():
    x = torch.randn(5, 6)
    prepared = prepared_of(Clashing().eval(), x)
    made = make_onnx(prepared, x)
    graph = graph_of(made)
    produced = [name for node in graph.node for name in node.output] + [t.name for t in graph.initializer]
    produced += [value.name for value in graph.input]
    assert len(set(produced)) == len(produced)
    shapes = {name: value.shape for name, value in constants_of(graph).items()}
    assert sum(shape == (6, 6) for shape in shapes.values()) == 3
    actual, expected = onnxruntime_session(made.content, threads=1)([x]), run(fxquant.freeze(prepared), (x,))
    for own, other in zip(actual, expected.values(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_a_module_that_runs_twice_has_its_integers_numbered():
    graph = graph_of(make_onnx(prepared_of(ReusedConv().eval(), torch.randn(2, 3, 9, 9))))
    rounded = [node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(set(rounded)) == len(rounded)
    taken: set[str] = set()
    assert [integers_name("a.rounding", taken) for _ in range(3)] == ["a:integers", "a:integers_1", "a:integers_2"]


@pytest.mark.long
def test_no_constant_is_stored_twice_and_no_shape_or_default_at_all():
    graph = graph_of(make_onnx(prepared_of(zoo.build("resnet18"), zoo.images(2))))
    stored = [(t.data_type, tuple(t.dims), t.raw_data) for t in graph.initializer]
    assert len(set(stored)) == len(stored) and not graph.value_info
    for node in graph.node:
        known = onnx.defs.get_schema(node.op_type, 18).attributes
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for name, value in given.items():
            default = known[name].default_value
            assert not default.type or onnx.helper.get_attribute_value(default) != value, f"{node.name}: {name}"
            assert name not in ("dilations", "strides") or set(value) != {1}
            assert name != "pads" or any(value)
    assert any(a.name == "strides" for node in graph.node for a in node.attribute)


def test_products_keep_the_zero_points_without_which_they_run_in_float(digits):
    graph = graph_of(digits)
    makers = {node.output[0]: node for node in graph.node}
    count = {node.name: len(makers[node.input[1]].input) for node in graph.node if node.op_type in ("Conv", "Gemm")}
    assert count == {"stem": 2, "grouped": 2, "side": 2, "fc": 3}


CONVOLUTIONS = {
    "defaults": {"group": 1, "strides": [1, 1], "dilations": [1, 1], "pads": [0, 0, 0, 0], "auto_pad": "NOTSET"},
    "own": {"group": 2, "strides": [2, 1], "dilations": [1, 2], "pads": [0, 1, 0, 0], "auto_pad": "VALID"},
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_attributes_are_dropped_at_their_defaults_only(kind):
    given = CONVOLUTIONS[kind]
    kept = {} if kind == "defaults" else given
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], **given)
    softmax = onnx.helper.make_node("Softmax", ["y"], ["z"], axis=-1 if kind == "defaults" else 1)
    assert attributes_after(drop_defaults, [node, softmax]) == [kept, {} if kind == "defaults" else {"axis": 1}]


def attributes_after(change: Any, nodes: list[Any]) -> list[dict[str, Any]]:
    values = [onnx.helper.make_tensor_value_info(name, 1, ["n", 4, "h", "w"]) for name in "xz"]
    weight = onnx.numpy_helper.from_array(np.ones((4, 2, 1, 1), dtype=np.float32), "w")
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]))
    change(model)
    return [
        {name: [*v.value] if isinstance(v.value, (tuple, list)) else v.value for name, v in node.attributes.items()}
        for node in model.graph
    ]


@pytest.mark.parametrize(("zero", "readers", "kept"), [(0, "Conv", 2), (1, "Conv", 3), (0, "Conv Relu", 3)])
def test_zero_points_go_where_they_are_zero_and_convolutions_alone_read(zero, readers, kept):
    make = onnx.helper.make_node
    nodes = [make("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0)]
    nodes += [make(kind, ["x", "w"] if kind == "Conv" else ["w"], [f"y{i}"]) for i, kind in enumerate(readers.split())]
    held = {
        "q": np.ones((2, 3, 1, 1), dtype=np.int8),
        "s": np.ones(2, dtype=np.float32),
        "z": np.full(2, zero, dtype=np.int8),
    }
    values = [onnx.helper.make_tensor_value_info(name, 1, None) for name in ("x", "y0")]
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in held.items()]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]))
    drop_zero_points(model)
    assert len(model.graph[0].inputs) == kept


def test_copies_are_those_of_the_same_type_shape_and_numbers():
    """In whatever order they lie in memory: the exporter's folded constants may be views."""
    square = np.arange(6, dtype=np.float32).reshape(2, 3)
    arrays = {"a": square, "b": np.asfortranarray(square), "c": square.reshape(3, 2), "d": square.astype(np.int32)}
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 18})
    for name, array in arrays.items():
        graph.register_initializer(ir.Value(name=name, const_value=ir.Tensor(array, name=name)))
    nodes = [ir.Node("", "Identity", [graph.initializers[name]]) for name in arrays]
    graph.extend(nodes)
    drop_copies(ir.Model(graph, ir_version=10))
    assert list(graph.initializers) == ["a", "c", "d"]
    assert [node.inputs[0].name for node in nodes] == ["a", "a", "c", "d"]


@pytest.mark.long
def test_what_was_dropped_changes_no_bit(monkeypatch):
    """The same file with everything in it: attributes, zero points and the exporter's names."""
    from fxquant.export import program

    prepared = prepared_of(zoo.build("mobilenet_v3_small"), zoo.images(2))
    lean = make_onnx(prepared)
    for name in ("drop_defaults", "drop_zero_points", "name_tensors"):
        monkeypatch.setattr(program, name, lambda *_: None)
    full = make_onnx(prepared)
    assert len(lean.content) < len(full.content) - 20_000
    x = zoo.images(3, seed=5)
    for own, other in zip(*(onnxruntime_session(made.content, threads=1)([x]) for made in (lean, full)), strict=True):
        assert_same_bits(own, other, "mobilenet_v3_small")
