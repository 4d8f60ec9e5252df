"""What the tests of ONNX files have in common: reading one, and holding what ONNX Runtime makes of it against the model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from comparisons import tensors_of

from fxquant.export.to_onnx import OnnxFile
from fxquant.runtimes.onnxruntime import onnxruntime_session

ELEMENTS = 4_000
INEXACT = {"softmax": 0.8}
"""Ops that ONNX Runtime computes with an approximation of its own: the least share of equal integers; 0.999 elsewhere."""


def graph_of(made: OnnxFile) -> Any:
    onnx: Any = pytest.importorskip("onnx")
    return onnx.load_from_string(made.content).graph


def kinds_of(made: OnnxFile) -> Counter[str]:
    return Counter(node.op_type for node in graph_of(made).node)


def assert_within_a_step(made: OnnxFile, inputs: Any, expected: Any, name: str = "") -> None:
    """Outputs that are not rounded are held to a millionth of the largest."""
    scales, results = made.model.output_scales(), onnxruntime_session(made.content, threads=1)(inputs)
    for actual, wanted, scale in zip(results, tensors_of(expected), scales, strict=True):
        steps = torch.round((actual - wanted) / (scale or float(wanted.abs().max()) * 1e-6)).abs()
        share = float((steps == 0).float().mean())
        print(f"{name}: equal {share:.4%}, largest {steps.max():.0f} LSB")
        assert steps.max() <= 1 and share >= INEXACT.get(name, 0.999), f"{name}: {share:.4%}, {steps.max():.0f} LSB"


def qdq_file(
    path: Any, weight: torch.Tensor, scale: float, *, x_scale: float = 1 / 255, quantized_input: bool = True
) -> Any:
    """A file of the standard's operators alone, x -> Q -> DQ -> MatMul; ``weight`` (out, in) are integers at ``scale``."""
    onnx: Any = pytest.importorskip("onnx")
    node, held = onnx.helper.make_node, onnx.numpy_helper.from_array
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["x_quantized"]),
        node("DequantizeLinear", ["x_quantized", "xs", "xz"], ["xd"]),
        node("DequantizeLinear", ["w", "ws"], ["wd"]),
        node("MatMul", ["xd" if quantized_input else "x", "wd"], ["y"], name="product"),
    ]
    numbers = {"xs": torch.tensor(x_scale), "xz": torch.tensor(0, dtype=torch.uint8), "ws": torch.tensor(scale)}
    kept = [held(value.numpy(), name) for name, value in {**numbers, "w": weight.T.contiguous()}.items()]
    value = onnx.helper.make_tensor_value_info
    x, y = (
        value(name, onnx.TensorProto.FLOAT, ["batch", size])
        for name, size in zip("xy", weight.shape[::-1], strict=True)
    )
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], kept)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)
    return path
