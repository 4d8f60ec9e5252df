"""OpenVINO's code for the shapes of a call, and the graphs for which it ends the process or refuses to make it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparisons import assert_same_bits
from onnx_files import graph_of, kinds_of
from op_cases import prepared_of
from torch import Tensor, nn

import fxquant
from fxquant import installed
from fxquant.errors import ExportError, InputError
from fxquant.export.to_onnx import OnnxFile, make_onnx
from fxquant.onnx.concat_inputs import round_before_joining
from fxquant.onnx.fixed_sizes import takes_fixed_sizes
from fxquant.runtimes import openvino as sessions
from fxquant.runtimes.onnxruntime import onnxruntime_session
from fxquant.runtimes.openvino import openvino_session

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
needs_openvino = pytest.mark.skipif(not installed.is_installed("openvino"), reason="no openvino")


class Small(nn.Module):
    """Takes images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return self.last((y + self.second(y)).mean((2, 3)))


class Dense(nn.Module):
    """Joined channels behind a batch norm, as in densenet; ``between`` stands in front of it."""

    def __init__(self, between: nn.Module | None = None, behind: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(12, 5, 1)
        self.between, self.norm, self.behind = between or nn.Identity(), nn.BatchNorm2d(12), behind or nn.ReLU()
        nn.init.normal_(self.norm.weight, 1, 0.3)
        nn.init.normal_(self.norm.bias, 0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(self.behind(self.norm(self.between(torch.cat([y, self.second(y)], 1)))))


class Times(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.7


class Positions(nn.Module):
    """Embeddings of tokens and of as many positions, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.last = nn.Embedding(30, 8), nn.Embedding(16, 8), nn.Linear(8, 4)
        self.register_buffer("numbers", torch.arange(16)[None])

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.words(ids) + self.places(self.numbers[:, : ids.shape[1]]))


@pytest.fixture
def compilations(monkeypatch) -> list[bool]:
    """For each compilation, whether it was for free sizes."""
    made: list[bool] = []
    original = sessions._InOpenVINO._compiled

    def counted(self: Any, model: Any) -> Any:
        made.append(bool(model.is_dynamic()))
        return original(self, model)

    monkeypatch.setattr(sessions._InOpenVINO, "_compiled", counted)
    return made


@pytest.fixture(scope="module")
def small() -> Any:
    torch.manual_seed(0)
    return prepared_of(Small().eval(), torch.randn(4, 3, 17, 17))


def made_from(model: nn.Module, x: Tensor, target: str = "x86") -> OnnxFile:
    torch.manual_seed(1)
    prepared = fxquant.prepare(model.eval(), (x,), target=target)
    return make_onnx(fxquant.calibrate(prepared, [x], progress=False))


def read(content: bytes) -> Any:
    import onnx_ir

    return onnx_ir.from_proto(onnx.load_from_string(content))


def joined_late(content: bytes) -> bytes:
    import onnx_ir

    model = read(content)
    assert round_before_joining(model) and not round_before_joining(model)
    changed: bytes = onnx_ir.to_proto(model).SerializeToString()
    onnx.checker.check_model(changed, full_check=True)
    return changed


SHAPES = [(1, 3, 17, 17), (4, 3, 17, 17), (1, 3, 32, 24), (2, 3, 9, 40), (3, 3, 21, 21), (7, 3, 8, 8)]


@pytest.mark.long
@needs_openvino
def test_the_first_shapes_get_code_of_their_own_and_the_others_share_one(small, compilations, monkeypatch):
    compiled = fxquant.compile(small, torch.randn(1, 3, 17, 17), runtime="openvino", threads=1)
    assert compilations == [False]
    inputs = [torch.randn(shape) for shape in (*SHAPES, *SHAPES)]
    results = [compiled(x) for x in inputs]
    assert compilations == [False] * sessions._SHAPES + [True] and len(SHAPES) > sessions._SHAPES
    monkeypatch.setattr(sessions, "_SHAPES", 0)
    free = openvino_session(make_onnx(small).content, threads=1)
    frozen = fxquant.freeze(small)
    with torch.no_grad():
        for x, y in zip(inputs, results, strict=True):
            assert_same_bits(y, free([x])[0])
            expected = frozen(x)
            assert y.shape == expected.shape and (y - expected).abs().max() < 0.02 * expected.abs().max()


@needs_openvino
def test_shapes_that_do_not_fit_are_refused_and_spoil_nothing(small, compilations):
    compiled = fxquant.compile(small, torch.randn(1, 3, 17, 17), runtime="openvino", threads=1)
    with pytest.raises(InputError, match=r"refuses inputs of shapes \[2, 3, 1, 1\]"):  # too small for the first layer
        compiled(torch.randn(2, 3, 1, 1))
    assert compilations == [False]
    wrong = [torch.randn(1, 4, 17, 17), torch.randn(3, 17, 17)]
    for x in (*wrong, *wrong):
        with pytest.raises(InputError, match=rf"the runtime refuses inputs of shapes \[{x.shape[0]}, "):
            compiled(x)
    assert compilations == [False, True]
    assert compiled(torch.randn(2, 3, 17, 17)).shape == (2, 5) and compilations == [False, True, False]
    assert compiled(torch.randn(0, 3, 17, 17)).shape == (0, 5) and len(compilations) == 3


@needs_openvino
def test_a_file_of_fixed_sizes_is_compiled_once(small, compilations):
    made = make_onnx(small, torch.randn(2, 3, 17, 17), dynamic="none")
    session = openvino_session(made.content, threads=1)
    assert not compilations and session([torch.randn(2, 3, 17, 17)])[0].shape == (2, 5)
    with pytest.raises(RuntimeError):
        session([torch.randn(3, 3, 17, 17)])
    assert compilations == [False]


@needs_openvino
def test_where_fixed_sizes_are_refused_the_free_ones_run(small, monkeypatch):
    tried, original = [], sessions._InOpenVINO._compiled

    def refusing(self: Any, model: Any) -> Any:
        tried.append(bool(model.is_dynamic()))
        if tried[-1]:
            return original(self, model)
        raise RuntimeError("fixed sizes are refused")

    monkeypatch.setattr(sessions._InOpenVINO, "_compiled", refusing)
    compiled = fxquant.compile(small, torch.randn(1, 3, 17, 17), runtime="openvino", threads=1)
    for shape in SHAPES:
        assert compiled(torch.randn(shape)).shape == (shape[0], 5)
    assert tried == [False, True]


@needs_openvino
def test_a_file_that_is_refused_is_told_when_it_is_compiled(small, monkeypatch):
    def refusing(self: Any, model: Any) -> Any:
        raise RuntimeError("there is no such operator")

    monkeypatch.setattr(sessions._InOpenVINO, "_compiled", refusing)
    with pytest.raises(ExportError, match=r"OpenVINO [\d.]+\S* refuses the file: there is no such operator"):
        fxquant.compile(small, runtime="openvino")
    with pytest.raises(ExportError, match="refuses the file"):
        openvino_session(b"no file")


JOINED = {
    "norm": Dense,
    "relu": lambda: Dense(nn.ReLU()),
    "pool": lambda: Dense(nn.AvgPool2d(2)),
    "times": lambda: Dense(nn.ReLU(), Times()),
    "twice": lambda: Dense(Times(), Times()),
    "swish": lambda: Dense(None, nn.Hardswish()),
}
RUN = """
import sys
import torch
from fxquant.runtimes.openvino import openvino_session
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        session = openvino_session(file.read(), 1)
    own, expected = torch.load(path + ".pt")
    for x, y in zip(own, expected):
        far = (session([x])[0] - y).abs() > 0.02 * y.abs().max()
        assert far.double().mean() < 0.02, path
    print(path, "fixed" if session._fixed else "free", flush=True)
"""


@pytest.mark.long
@needs_openvino
def test_files_that_would_end_the_process_run(tmp_path):
    """In a process of its own, which is what ended."""
    files, made = [], {}
    for target in ("x86", "openvino"):
        for name, model in JOINED.items():
            files.append(str(tmp_path / f"{name} {target}"))
            own = made[files[-1]] = made_from(model(), torch.randn(4, 3, 16, 16), target)
            (tmp_path / files[-1]).write_bytes(own.content)
            inputs = [torch.randn(2, 3, 16, 16), torch.randn(1, 3, 12, 20)]
            torch.save((inputs, [own.model.reference_outputs([x])[0] for x in inputs]), f"{files[-1]}.pt")
    done = subprocess.run([sys.executable, "-c", RUN, *files], capture_output=True, text=True, check=False)
    told = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert done.returncode == 0 and list(told) == files, f"{list(told)}\n{done.stderr[-2000:]}"
    assert told[str(tmp_path / "norm x86")] == told[str(tmp_path / "swish x86")] == "fixed"
    assert told == {
        name: "fixed" if takes_fixed_sizes(read(late(own.content))) else "free" for name, own in made.items()
    }


def late(content: bytes) -> bytes:
    return joined_late(content) if any(reads_a_concat(onnx.load_from_string(content).graph)) else content


def reads_a_concat(graph: Any) -> list[str]:
    """The roundings that read a Concat."""
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    return [n.output[0] for n in graph.node if n.op_type == "QuantizeLinear" and made_by.get(n.input[0]) == "Concat"]


@pytest.mark.long
@pytest.mark.parametrize("name", JOINED)
def test_rounding_before_joining_changes_no_bit(name):
    made, x = made_from(JOINED[name](), torch.randn(4, 3, 16, 16)), torch.randn(3, 3, 16, 16)
    changed = joined_late(made.content)
    assert reads_a_concat(graph_of(made)) and not reads_a_concat(onnx.load_from_string(changed).graph)
    (expected,), (actual,) = (onnxruntime_session(own, threads=1)([x]) for own in (made.content, changed))
    assert torch.equal(actual, expected)


@pytest.mark.long
def test_what_lies_on_the_grid_already_is_not_rounded_before_joining():
    made = made_from(Dense(), torch.randn(4, 3, 16, 16))
    before, after = kinds_of(made), OnnxFile(joined_late(made.content), made.model, made.opset, ())
    assert kinds_of(after)["QuantizeLinear"] == before["QuantizeLinear"] - 1

    class Unlike(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x.sigmoid(), x.tanh()], 1).relu()

    made = made_from(Unlike(), torch.randn(4, 3, 5, 5))
    x, changed = torch.randn(2, 3, 5, 5), joined_late(made.content)
    assert_same_bits(onnxruntime_session(changed, 1)([x])[0], onnxruntime_session(made.content, 1)([x])[0])


@pytest.mark.long
def test_only_files_for_openvino_round_before_joining():
    for target, before in (("x86", True), ("onnxruntime", True), ("tensorrt", True), ("openvino", False)):
        graph = graph_of(made_from(Dense(), torch.randn(4, 3, 16, 16), target))
        assert bool(reads_a_concat(graph)) == before, target


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "takes"), [("norm", True), ("pool", True), ("swish", True), ("times", False), ("twice", False)]
)
def test_files_that_openvino_may_compile_for_fixed_sizes(name, takes):
    content = make_file(JOINED[name]())
    assert takes_fixed_sizes(read(joined_late(content))) == takes


def make_file(model: nn.Module) -> bytes:
    return made_from(model, torch.randn(4, 3, 16, 16)).content


@pytest.mark.long
@needs_openvino
def test_what_follows_from_the_length_alone_stays_free(compilations):
    ids = torch.randint(0, 30, (2, 7))
    prepared = fxquant.calibrate(fxquant.prepare(Positions().eval(), (ids,)), [ids], progress=False)
    made = make_onnx(prepared, ids)
    assert not takes_fixed_sizes(read(made.content))
    compiled = fxquant.compile(prepared, ids, runtime="openvino", threads=1)
    for shape in ((2, 7), (1, 16), (5, 3)):
        x = torch.randint(0, 30, shape)
        assert (compiled(x) - made.model.reference_outputs([x])[0]).abs().max() < 1e-4
    assert compilations == [True]
