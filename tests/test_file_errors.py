"""The two comparisons on a QDQ file: against ONNX Runtime's own implementation, and against a computation by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_errors_by_layer import batches, decibels, on_grid, prepared_small

import fxquant
from fxquant.errors import InputError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("file")
    data = batches()
    _, prepared = prepared_small(data)
    fxquant.export_onnx(prepared, tmp_path / "int8.onnx")
    return tmp_path / "int8.onnx", prepared, data


@pytest.mark.long
def test_our_file_agrees_with_a_computation_by_hand(exported):
    path, prepared, data = exported
    found = fxquant.errors_by_layer(path, data, reference=prepared, progress=False)
    weights = {tensor.name: tensor.weight for tensor in found.weights}
    assert set(weights) == {"conv.weight", "conv.bias", "fc.weight", "fc.bias"}
    by_hand = on_grid(prepared.conv.weight.detach(), prepared.conv.weight_quantizer)
    assert weights["conv.weight"].sqnr == pytest.approx(
        decibels(by_hand, prepared.conv.weight.detach().numpy()), rel=1e-4
    )

    model = onnx.load(path)
    node = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.output[0] == "conv:integers")
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    scale, zero = (constants[name] for name in node.input[1:])
    model.graph.output.append(onnx.ValueInfoProto(name="conv:integers"))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    integers = [session.run(["conv:integers"], {"x": batch.numpy()})[0] for batch in data]
    actual = (np.concatenate(integers).astype(np.float64) - zero) * np.float64(scale)
    with torch.no_grad():
        expected = torch.nn.functional.conv2d(
            torch.cat(data).double(), prepared.conv.weight.double(), prepared.conv.bias.double(), padding=1
        )
    (conv,) = [tensor for tensor in found.activations if tensor.name == "conv:integers"]
    assert conv.accumulated.sqnr == pytest.approx(decibels(actual, expected.relu().numpy()), abs=0.02)
    layers = fxquant.errors_by_layer(prepared, data, progress=False)
    assert conv.accumulated.sqnr == pytest.approx(layers["relu"].accumulated.sqnr, abs=0.3)
    assert conv.by_rounding.sqnr == pytest.approx(layers["relu"].activation_alone.sqnr, abs=0.5)


def test_it_agrees_with_onnx_runtimes_own_comparison(tmp_path):
    debug = pytest.importorskip("onnxruntime.quantization.qdq_loss_debug")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self, inputs):
            self.inputs = iter(inputs)

        def get_next(self):
            batch = next(self.inputs, None)
            return None if batch is None else {"x": batch.numpy()}

    data = batches()
    model, _ = prepared_small(data)
    onnx.save(_float_file(model), tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "theirs.onnx",
        Reader(data),
        quant_format=QuantFormat.QDQ,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    found = fxquant.errors_by_layer(tmp_path / "theirs.onnx", data, reference=tmp_path / "float.onnx", progress=False)

    matched = debug.create_weight_matching(str(tmp_path / "float.onnx"), str(tmp_path / "theirs.onnx"))
    theirs = debug.compute_weight_error(matched)
    ours = {tensor.name.removesuffix("_quantized"): tensor.weight.sqnr for tensor in found.weights}
    assert len(theirs) >= 2 and set(theirs) <= set(ours)
    for name, value in theirs.items():  # they sum in float32, whose own noise tells from 100 dB on (biases of 32 bits)
        assert ours[name] == pytest.approx(float(value), abs=0.01 if value < 100 else 0.05)

    activations = {}
    for which in ("float", "theirs"):
        debug.modify_model_output_intermediate_tensors(
            str(tmp_path / f"{which}.onnx"), str(tmp_path / f"{which}_all.onnx")
        )
        activations[which] = debug.collect_activations(str(tmp_path / f"{which}_all.onnx"), Reader(data))
    theirs = debug.compute_activation_error(
        debug.create_activation_matching(activations["theirs"], activations["float"])
    )
    ours = {own.source: own for own in _sources(tmp_path / "theirs.onnx", found)}
    assert set(theirs) & set(ours)
    for name in set(theirs) & set(ours):
        for own, value in ((ours[name].by_rounding, "qdq_err"), (ours[name].accumulated, "xmodel_err")):
            given = float(theirs[name][value])  # some 300 where nothing differs: they add a tiny number to the noise
            assert own.sqnr == pytest.approx(given, abs=0.02) or (given > 200 and own.sqnr == float("inf"))


def _float_file(model):
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    held = {name: onnx.numpy_helper.from_array(t.detach().numpy(), name) for name, t in model.named_parameters()}
    nodes = [
        make("Conv", ["x", "conv.weight", "conv.bias"], ["convolved"], pads=[1, 1, 1, 1]),
        make("Relu", ["convolved"], ["positive"]),
        make("GlobalAveragePool", ["positive"], ["pooled"]),
        make("Flatten", ["pooled"], ["flat"]),
        make("Gemm", ["flat", "fc.weight", "fc.bias"], ["y"], transB=1),
    ]
    ends = [value("x", 1, ["n", 3, 6, 6])], [value("y", 1, ["n", 5])]
    graph = onnx.helper.make_graph(nodes, "small", *ends, list(held.values()))
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)


class _Named:
    def __init__(self, source, tensor):
        self.source, self.by_rounding, self.accumulated = source, tensor.by_rounding, tensor.accumulated


def _sources(path, found):
    of = {n.output[0]: n.input[0] for n in onnx.load(path).graph.node if n.op_type == "QuantizeLinear"}
    return [_Named(of[tensor.name], tensor) for tensor in found.activations]


@pytest.mark.long
def test_the_file_reads_as_text_and_json(exported):
    path, prepared, data = exported
    found = fxquant.errors_by_layer(path, data[0], reference=prepared, progress=False)
    assert "conv:integers" in str(found) and "accumulated [dB]" in str(found)
    assert len(json.loads(found.to_json())["activations"]) == len(found.activations)
    assert list(found.to_pandas()["tensor"]) == [row[0] for row in found.cells()]


@pytest.mark.long
def test_errors_say_what_to_do(exported, tmp_path):
    path, prepared, data = exported
    with pytest.raises(InputError, match=r"float\.onnx"):
        fxquant.errors_by_layer(path, data)
    with pytest.raises(InputError, match="no file"):
        fxquant.errors_by_layer(tmp_path / "none.onnx", data, reference=prepared)
    (tmp_path / "bad.onnx").write_bytes(b"no protobuf at all")
    with pytest.raises(InputError, match="cannot be read as ONNX"):
        fxquant.errors_by_layer(tmp_path / "bad.onnx", data, reference=prepared)
    other = fxquant.calibrate(fxquant.prepare(_Plain(), data[0]), data, progress=False)
    with pytest.raises(InputError, match="nothing in"):
        fxquant.errors_by_layer(path, data, reference=other)
    with pytest.raises(InputError, match="does not take"):
        fxquant.errors_by_layer(path, [torch.zeros(2, 5, 6, 6)], reference=prepared, progress=False)


class _Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.other = torch.nn.Conv2d(3, 2, 1)

    def forward(self, image):
        return self.other(image).sigmoid()


@pytest.mark.long
def test_four_bits_and_a_graph_with_several_inputs(tmp_path):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8)

        def forward(self, x, y):
            return (self.a(x) + self.b(y)).relu()

    torch.manual_seed(0)
    data = [(torch.randn(4, 6), torch.randn(4, 6)) for _ in range(3)]
    recipe = fxquant.Setting(weight=fxquant.Scheme.weight(4))
    prepared = fxquant.calibrate(fxquant.prepare(Two().eval(), data[0], recipe=recipe), data, progress=False)
    fxquant.export_onnx(prepared, tmp_path / "w4.onnx")
    found = fxquant.errors_by_layer(tmp_path / "w4.onnx", data, reference=prepared, progress=False)
    layers = fxquant.errors_by_layer(prepared, data, progress=False)
    for name in ("a", "b"):
        (own,) = [tensor.weight for tensor in found.weights if tensor.name.startswith(f"{name}.weight")]
        assert own.sqnr == pytest.approx(layers[name].weight.sqnr, abs=0.01)


class Keyed(torch.nn.Module):
    """Takes a dict of two tensors of one shape, which only their keys tell apart."""

    def __init__(self):
        super().__init__()
        self.left, self.right = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8)

    def forward(self, batch):
        return (self.left(batch["left"]) + self.right(batch["right"])).relu()


class Named(Keyed):
    """Takes the two by name."""

    def forward(self, left, right):
        return super().forward({"left": left, "right": right})


@pytest.mark.parametrize("kind", [Keyed, Named])
def test_inputs_are_found_by_their_keys_and_not_by_their_order(kind, tmp_path):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    data = [{name: torch.randn(4, 6, generator=generator) for name in ("left", "right")} for _ in range(2)]
    turned = [{name: batch[name] for name in ("right", "left")} for batch in data]
    example = (data[0],) if kind is Keyed else data[0]
    prepared = fxquant.calibrate(fxquant.prepare(kind().eval(), example), data, progress=False)
    path = tmp_path / "two.onnx"
    fxquant.export_onnx(prepared, path)
    found = fxquant.errors_by_layer(path, data, reference=prepared, progress=False)
    assert all(tensor.accumulated.sqnr > 30 for tensor in found.activations)
    assert fxquant.errors_by_layer(path, turned, reference=prepared, progress=False) == found
    inputs = [value.name for value in onnx.load(path).graph.input]
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4, 6]) for name in (*inputs, "out")]
    node = onnx.helper.make_node("Sub", inputs, ["out"])
    graph = onnx.helper.make_graph([node], "float", values[:2], values[2:])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "float.onnx")
    by_input = [dict(reversed(list(zip(inputs, batch.values(), strict=True)))) for batch in data]
    found = fxquant.errors_by_layer(path, by_input, reference=tmp_path / "float.onnx", progress=False)
    assert len(found.activations) == 2 and all(tensor.accumulated.sqnr > 30 for tensor in found.activations)
    with pytest.raises(InputError, match="is quantized itself"):
        fxquant.errors_by_layer(path, by_input, reference=path)
    others = [{"up": data[0]["left"], "down": data[0]["right"]}]
    with pytest.raises(InputError, match=f"keys up, down, and the file takes {', '.join(inputs)}"):
        fxquant.errors_by_layer(path, others, reference=tmp_path / "float.onnx")
