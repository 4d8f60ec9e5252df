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
