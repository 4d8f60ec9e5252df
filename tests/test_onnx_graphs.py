"""What the graphs in our files are spared, because a runtime stumbles over it: held in OpenVINO, and in the graph itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from comparisons import tensors_of
from onnx_files import graph_of
from op_cases import mostly_long, run
from torch import Tensor, nn

import fxquant
from fxquant import installed
from fxquant.export import program
from fxquant.export.to_onnx import OnnxFile, make_onnx
from fxquant.runtimes.onnxruntime import onnxruntime_session
from fxquant.runtimes.openvino import openvino_session

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class Shuffle(nn.Module):
    """A convolution with a bias, and channels shuffled at any image size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        n, c, h, w = y.shape
        return self.last(y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w))


class Patches(nn.Module):
    """Patches behind a class token, of which there is one an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token, self.head = nn.Conv2d(3, 16, 8, stride=8), nn.Parameter(torch.randn(1, 1, 16)), None
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        return self.last(torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1))


class Rolled(nn.Module):
    """What shifted windows do when nothing was padded: a roll, and a crop to the full size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.roll(self.first(x), (2, 2), (1, 2))
        return self.last(y[:, : x.shape[1], : x.shape[2], :].contiguous())


def made_from(model: nn.Module, shape: tuple[int, ...], target: str = "x86") -> OnnxFile:
    torch.manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.Conv2d) and part.bias is not None:
            part.bias.data.normal_(0, 1)
    prepared = fxquant.prepare(model.eval(), (torch.randn(shape) + 0.5,), target=target)
    batches = [torch.randn(4, *shape[1:]) + 0.5 for _ in range(3)]
    return make_onnx(fxquant.calibrate(prepared, batches, progress=False))


def sessions_of(made: OnnxFile) -> dict[str, Any]:
    found = {"onnxruntime": onnxruntime_session(made.content, threads=1)}
    if installed.is_installed("openvino"):
        found["openvino"] = openvino_session(made.content, threads=1)
    return found


def assert_agrees(made: OnnxFile, shapes: list[tuple[int, ...]]) -> None:
    """At most one value in a hundred further from the frozen model's than rounding takes it."""
    for runtime, session in sessions_of(made).items():
        for shape in shapes:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(len(runtime))) + 0.5
            (actual,), (expected,) = session([x]), tensors_of(run(made.model.reference, (x,)))
            far = (actual - expected).abs() > 0.02 * expected.abs().max()
            assert far.double().mean() < 0.01, f"{runtime} {shape}: {far.double().mean():.2%} are off"


def reads_of_the_first_axis(graph: Any) -> list[Any]:
    starts = [{a.name: a.i for a in node.attribute} for node in graph.node if node.op_type == "Shape"]
    return [start for start in starts if start.get("start", 0) == 0]


def test_a_reshape_copies_the_batch_size_at_free_image_sizes():
    made = made_from(Shuffle(), (1, 3, 32, 32))
    graph = graph_of(made)
    assert not made.notes and not reads_of_the_first_axis(graph)
    constants = {t.name: onnx.numpy_helper.to_array(t).tolist() for t in graph.initializer}
    joined = {node.output[0]: node for node in graph.node if node.op_type == "Concat"}
    targets = [joined[node.input[1]] for node in graph.node if node.op_type == "Reshape" and node.input[1] in joined]
    assert len(targets) >= 2 and all(constants[target.input[0]] == [0] for target in targets)
    assert_agrees(made, [(1, 3, 32, 32), (3, 3, 32, 32), (2, 3, 48, 64)])


@pytest.mark.long
def test_rows_are_counted_where_a_convolution_is_in_the_file():
    made = made_from(Patches(), (1, 3, 32, 32))
    graph = graph_of(made)
    assert not reads_of_the_first_axis(graph) and "Size" in {node.op_type for node in graph.node}
    assert_agrees(made, [(1, 3, 32, 32), (5, 3, 32, 32), (2, 3, 48, 64)])


def test_a_model_without_convolutions_reads_its_batch_size():
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.last = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))

    made = made_from(Token(), (2, 7, 6))
    assert reads_of_the_first_axis(graph_of(made))
    assert_agrees(made, [(1, 7, 6), (4, 9, 6)])


def test_what_lies_on_a_grid_is_not_rounded_to_it_again():
    made = made_from(Rolled(), (2, 8, 8, 6))
    graph = graph_of(made)
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        before = makers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if before is not None and before.op_type == "DequantizeLinear":
            assert list(before.input[1:]) != list(node.input[1:]), f"{node.output[0]} rounds again"
    assert_agrees(made, [(2, 8, 8, 6), (1, 8, 8, 6)])


def test_another_grid_is_rounded_to(tmp_path):
    """A tensor that two quantizers read keeps both roundings."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) + x)

    torch.manual_seed(0)
    prepared = fxquant.prepare(Twice().eval(), (torch.randn(2, 6),))
    fxquant.calibrate(prepared, [torch.randn(16, 6)], progress=False)
    report = fxquant.export_onnx(prepared, tmp_path / "m.onnx", torch.randn(3, 6), verify="nodes")
    assert report.operators["QuantizeLinear"] == len(report.nodes) == 3 and all(node.lsb <= 1 for node in report.nodes)


@contextmanager
def pairwise_rules_counted() -> Iterator[list[str]]:
    from onnxscript import rewriter

    seen: list[str] = []
    original = rewriter.RewritePass

    class Counting(original):  # type: ignore[misc, valid-type]
        def __init__(self, rules: Any) -> None:
            seen.extend(str(rule.name) for rule in rules)
            super().__init__(rules)

    rewriter.RewritePass = Counting
    try:
        yield seen
    finally:
        rewriter.RewritePass = original


@pytest.mark.long
def test_the_exporters_pairwise_rule_is_left_out_and_put_back():
    from onnxscript import rewriter

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x[:, :4]) - self.last(x[:, 4:])

    before = rewriter._DEFAULT_REWRITE_RULES
    with pairwise_rules_counted() as seen:
        made = made_from(Halves(), (2, 8))
    assert seen and "SlicesSplit" not in seen and "MaterializeReshapeShape" in seen
    assert rewriter._DEFAULT_REWRITE_RULES is before and "SlicesSplit" in {rule.name for rule in before}
    assert_agrees(made, [(2, 8), (5, 8)])


class Heads(nn.Module):
    """Scores of three heads, each times a number of its own, or each row or all times one."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 12), nn.Linear(8, 4)
        self.factor = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        n, rows, _ = x.shape
        y = self.first(x).reshape(n, rows, 3, 4).transpose(1, 2)
        return self.last((y @ y.transpose(-2, -1) * self.factor).softmax(-1))


SPREAD = {(3, 1, 1): [3, 8, 1], (8, 1): [8, 8], (8,): [8], (1, 1, 1): [1, 1, 1], (3, 8, 1): [3, 8, 1]}
"""What is stored for factors of each shape."""


@pytest.mark.long
@pytest.mark.parametrize("shape", mostly_long(SPREAD, ((3, 1, 1),)))
def test_one_factor_a_head_is_written_as_one_a_row(shape, monkeypatch):
    x = torch.randn(2, 8, 12)
    prepared = fxquant.calibrate(fxquant.prepare(Heads(*shape).eval(), (x,)), [x], progress=False)
    made = make_onnx(prepared, x, dynamic="batch")
    (stored,) = (t for t in graph_of(made).initializer if "factor" in t.name)
    assert list(stored.dims) == SPREAD[shape] and stored.data_type == onnx.TensorProto.UINT8
    monkeypatch.setattr(program, "spread_over_rows", lambda model: None)
    as_given = make_onnx(prepared, x, dynamic="batch")
    for rows in (1, 5):
        x = torch.randn(rows, 8, 12)
        (actual,), (expected,) = (onnxruntime_session(own.content, threads=1)([x]) for own in (made, as_given))
        assert torch.equal(actual, expected)
