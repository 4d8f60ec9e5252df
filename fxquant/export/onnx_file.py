"""An ONNX file with the model that it was made from: what is in it, and how it agrees with the model in ONNX Runtime."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fxquant.export.agreement import (
    GOOD_SQNR,
    NodeAgreement,
    OutputAgreement,
    compare_nodes,
    compare_output,
    other_batch,
    together,
)
from fxquant.export.finding import finding
from fxquant.export.qdq_model import QdqModel
from fxquant.installed import require
from fxquant.onnx.files import Pair
from fxquant.onnx.names import integers_name
from fxquant.runtimes.onnxruntime import onnxruntime_session
from fxquant.runtimes.runtime import run_session

__all__ = ["ExportReport", "OnnxFile", "described", "hold_against_model"]


@dataclass(frozen=True)
class OnnxFile:
    """A file with the model that it was made from.

    Attributes:
        content: its bytes; without the larger tensors where these lie in a file of their own.
        model: what it was made from, with the signature that its tensors have.
        opset: the version of the operator set.
        notes: what could not be had.
        pair: where it lies on disk with those tensors beside it; None where ``content`` is all.
    """

    content: bytes
    model: QdqModel
    opset: int
    notes: tuple[str, ...]
    pair: Pair | None = None

    @property
    def source(self) -> bytes | Pair:
        """What runtimes and checkers read."""
        return self.content if self.pair is None else self.pair

    @property
    def size(self) -> int:
        """Bytes, those of the tensors beside it too."""
        return len(self.content) + (0 if self.pair is None else os.path.getsize(self.pair.data))


@dataclass
class ExportReport:
    """What was written, and how it agrees with the model.

    Attributes:
        path: the file.
        data: the file beside it that holds its tensors; None where it holds them itself.
        size: bytes, of both.
        opset: the version of the operator set.
        inputs, outputs: shapes by name; sizes that are free are names.
        operators: how many nodes of each kind.
        agreement: one entry per output and run; empty without ``verify``.
        nodes: one entry a rounded tensor, with ``verify="nodes"``.
        notes: what could not be had.
    """

    path: str
    size: int
    opset: int
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    operators: dict[str, int]
    agreement: list[OutputAgreement] = field(default_factory=list)
    nodes: list[NodeAgreement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: str | None = None

    def __str__(self) -> str:
        def shapes(named: dict[str, list[int | str]]) -> str:
            return ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in named.items())

        beside = "" if self.data is None else f" and {os.path.basename(self.data)}"
        lines = [
            f"{self.path}{beside}: {self.size / 1e6:.2f} MB, opset {self.opset}, {sum(self.operators.values())} nodes",
            f"  inputs   {shapes(self.inputs)}",
            f"  outputs  {shapes(self.outputs)}",
            *(f"  {own}" for own in (*self.agreement, *self.nodes)),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def described(made: OnnxFile, path: str) -> ExportReport:
    """What is in ``made``, which is to be written to ``path``."""
    onnx: Any = require("onnx", "export to ONNX", "onnx")
    graph = onnx.load_from_string(made.content).graph
    return ExportReport(
        path=path,
        size=made.size,
        opset=made.opset,
        inputs={value.name: _shape(value) for value in graph.input},
        outputs={value.name: _shape(value) for value in graph.output},
        operators=dict(Counter(node.op_type for node in graph.node)),
        notes=list(made.notes),
        data=None if made.pair is None else f"{path}.data",
    )


def _shape(value: Any) -> list[int | str]:
    sizes = value.type.tensor_type.shape.dim
    return [size.dim_value if size.HasField("dim_value") else size.dim_param or "?" for size in sizes]


def hold_against_model(made: OnnxFile, report: ExportReport, *, every_node: bool) -> None:
    """Run ``made`` in ONNX Runtime on the example, and on one row more where the batch is free; write into ``report``.

    Args:
        every_node: compare each rounded tensor inside too.
    """
    qdq = made.model
    free = [bool(shape) and isinstance(shape[0], str) for shape in report.inputs.values()]
    more = other_batch(qdq.inputs, lambda i: i < len(free) and free[i])
    batches = [qdq.inputs, *([] if more is None else [more])]
    expected, scales = [qdq.reference_outputs(tensors) for tensors in batches], qdq.output_scales()
    session = onnxruntime_session(made.source)
    low = math.inf
    for tensors, wanted in zip(batches, expected, strict=True):
        actual = run_session(session, tensors)
        for name, own, other, scale in zip(qdq.signature.output_names, actual, wanted, scales, strict=True):
            report.agreement.append(compare_output(name, own, other, scale))
        low = min(low, together(actual, wanted))
    if low < GOOD_SQNR:
        report.notes.append(str(finding("ONNX Runtime", low, qdq.integer, qdq.least_sqnr())))
    if every_node:
        report.nodes = _compare_every_node(made)


def _compare_every_node(made: OnnxFile) -> list[NodeAgreement]:
    onnx: Any = require("onnx", "export to ONNX", "onnx")
    taken: set[str] = set()
    expected = {integers_name(path, taken): q for path, q in made.model.integers(made.model.inputs)}
    proto = onnx.load_from_string(made.content)
    made_integers = [name for node in proto.graph.node for name in node.output]
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    outputs = {value.name for value in proto.graph.output}
    asked = [name for name in made_integers if name in expected and name in known and name not in outputs]
    proto.graph.output.extend(known[name] for name in asked)
    source: Any = proto.SerializeToString()
    if made.pair is not None:  # tensors are looked for beside the graph
        source = f"{made.pair.path}.nodes"
        onnx.save(proto, source)
    session = onnxruntime_session(source)
    results = run_session(session, made.model.inputs)[-len(asked) :] if asked else []
    return compare_nodes(dict(zip(asked, results, strict=True)), expected)
