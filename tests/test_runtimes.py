"""compile: the native kernels as a runtime, what they refuse, and the choice that ``auto`` makes."""

from __future__ import annotations

import ast
import copy
import gc
import pickle
import re
import threading
import warnings
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from awkward import Structured
from comparisons import assert_same_bits
from digits import DigitsNet
from op_cases import prepared_of
from state_traps import CountingBuffer
from torch import Tensor, nn

import fxquant
from fxquant import installed
from fxquant.analysis.file_info import info
from fxquant.benchmark.memory import peak_memory
from fxquant.errors import ExportError, InputError, Refusal
from fxquant.export import runtimes
from fxquant.export.interleaved_timing import InterleavedTimes, time_interleaved
from fxquant.kernels import runner
from fxquant.kernels.native import library
from fxquant.kernels.native import model as native_kernels
from fxquant.runtimes import RUNNABLE as RUNTIMES
from fxquant.runtimes.native import native_model

ROOT = Path(__file__).resolve().parents[1]
HERE = library.missing()
needs_native = pytest.mark.skipif(HERE is not None, reason=f"no native kernels: {HERE}")
elsewhere = "no compiler was found"


@pytest.fixture
def no_native(monkeypatch):
    """A machine that the native kernels are not for."""
    monkeypatch.setattr(native_kernels, "missing", lambda: Refusal(elsewhere))


@pytest.fixture
def no_packages(monkeypatch):
    """Without what writes files, which takes seconds, and what reads them."""
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)


class Sums(nn.Module):
    """Computes something in floats between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)).cumsum(-1))


class Halves(nn.Module):
    """Goes another way for large images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.max_pool2d(x, 2) if x.shape[-1] > 24 else x))


@pytest.fixture(scope="module")
def digits():
    """A calibrated model."""
    torch.manual_seed(1)
    return prepared_of(DigitsNet().eval(), torch.rand(4, 1, 8, 8))


def told(compiled: runtimes.Compiled) -> dict[str, runtimes.Timing]:
    return {own.runtime: own for own in compiled.report}


@needs_native
@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 64), ("mobilenet_v3_small", 64), pytest.param("densenet121", 32, marks=pytest.mark.long)],
)
def test_native_gives_the_bits_of_the_reference_on_real_models(name, size):
    torch.manual_seed(2)
    model = torchvision.models.get_model(name, weights=None).eval()
    prepared = prepared_of(model, torch.randn(2, 3, size, size))
    compiled = fxquant.compile(prepared, torch.randn(1, 3, size, size), runtime="native")
    exact = fxquant.convert(prepared, kernels="reference")
    assert compiled.runtime == "native" and repr(compiled) == "<compiled for native>"
    for batch, side in ((1, size), (3, size), (2, size + 32)):
        x = torch.randn(batch, 3, side, side)
        with torch.no_grad():
            assert_same_bits(compiled(x), exact(x), f"{name} {batch} {side}")


@needs_native
@pytest.mark.parametrize("ready", [lambda m: m, fxquant.freeze, fxquant.convert], ids=["prepared", "frozen", "integer"])
@pytest.mark.parametrize("threads", [None, 1, 2, 3])
def test_any_level_and_number_of_threads_gives_the_same_bits(digits, ready, threads):
    x, before = torch.rand(5, 1, 8, 8), torch.get_num_threads()
    with torch.no_grad():
        expected = fxquant.convert(digits, kernels="reference")(x)
    model = ready(digits)
    text, state = str(model), {name: value.clone() for name, value in model.state_dict().items()}
    assert_same_bits(fxquant.compile(model, x[:1], runtime="native", threads=threads)(x), expected)
    assert_same_bits(fxquant.compile(model, runtime="native", threads=threads)(x), expected)
    assert torch.get_num_threads() == before and str(model) == text
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@needs_native
def test_a_model_that_is_being_trained_runs_as_in_eval_mode():
    convolution = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)
    model = nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    x = torch.randn(4, 3, 9, 9)
    prepared = fxquant.prepare(model, x, qat=True).train()
    prepared(x).sum().backward()
    expected = fxquant.convert(prepared, kernels="reference").eval()
    with torch.no_grad():
        assert_same_bits(fxquant.compile(prepared, x, runtime="native")(x), expected(x))
    assert prepared.training


@needs_native
def test_calls_from_several_threads_do_not_meet(digits):
    compiled = fxquant.compile(digits, runtime="native", threads=1)
    inputs = [torch.rand(1 + i % 3, 1, 8, 8) for i in range(8)]
    with torch.no_grad():
        exact = fxquant.convert(digits, kernels="reference")
        expected = [exact(x) for x in inputs]
    found: list[list[Tensor]] = [[] for _ in inputs]

    def work(index: int) -> None:
        found[index] += [compiled(inputs[index]) for _ in range(50)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for results, y in zip(found, expected, strict=True):
        assert len(results) == 50
        for result in results:
            assert_same_bits(result, y)


@needs_native
@pytest.mark.parametrize("kind", ["dataclass", "dict", "tuple"])
def test_native_calls_and_results_have_the_models_own_structure_or_it_says_which_op(kind):
    example = {"x": torch.randn(5, 6), "extra": {"shift": torch.randn(5, 4)}, "double": True}
    prepared = prepared_of(Structured(kind).eval(), example)
    try:
        compiled = fxquant.compile(prepared, example, runtime="native")
    except ExportError as error:
        assert re.search(r"no native kernels: \w+ \(\w+\)|returns what no native kernel", str(error))
        return
    with torch.no_grad():
        expected = fxquant.convert(prepared, kernels="reference")(**example)
    actual = compiled(**example)
    assert type(actual) is type(expected)
    if kind == "dataclass":
        actual, expected = vars(actual), vars(expected)
    assert_same_bits(actual, expected)


@needs_native
def test_inputs_that_native_does_not_take(digits):
    compiled = fxquant.compile(digits, runtime="native")
    before = torch.get_num_threads()
    for wrong in (
        torch.ones(2, 1, 8, 8, dtype=torch.int64),
        torch.zeros(0, 1, 8, 8),
        "digits",
        [torch.rand(1, 1, 8, 8)],
    ):
        with pytest.raises(InputError, match="native kernels"):
            compiled(wrong)
    with pytest.raises(InputError, match=r"on meta"):
        compiled(torch.rand(1, 1, 8, 8, device="meta"))
    for wrong in (torch.rand(2, 2, 8, 8), torch.rand(2, 1, 16, 16), torch.rand(1, 8, 8)):
        with pytest.raises(InputError, match=r"(stem|fc) \((conv2d|linear)\).*(a layer for \d+ channels|3 axes)"):
            compiled(wrong)
    with pytest.raises(InputError, match=r"do not take this call: .*\n  what to do: .*runtime='torch'"):
        fxquant.compile(digits, runtime="native", threads=3)(torch.rand(4, 1, 8))
    assert torch.get_num_threads() == before
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    y = compiled(x)
    assert not y.requires_grad and torch.equal(y, compiled(x.detach()))


def test_an_op_without_a_native_kernel_is_named(no_packages):
    x = torch.randn(2, 3, 9, 9)
    prepared = prepared_of(nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2, dilation=2), nn.ReLU()).eval(), x)
    if HERE is None:
        with pytest.raises(ExportError, match=r"no native kernels: _0[^\n]*\n  what to do: .*'torch'"):
            fxquant.compile(prepared, x, runtime="native")
    compiled = fxquant.compile(prepared, x)
    assert compiled.runtime != "native" and told(compiled)["native"].milliseconds is None
    assert str(told(compiled)["native"]).startswith("native cannot: no native kernels: ")


@needs_native
def test_a_function_of_floats_between_native_parts(no_packages):
    x = torch.randn(2, 3, 9, 9)
    prepared = prepared_of(Sums().eval(), x)
    compiled = fxquant.compile(prepared, x, runtime="native")
    assert torch.equal(compiled(x), fxquant.convert(prepared, kernels="reference")(x))
    assert told(fxquant.compile(prepared, x))["native"].milliseconds is not None


@pytest.mark.parametrize("runtime", ["torch", pytest.param("native", marks=needs_native), "auto"])
def test_what_compile_tries_leaves_the_model_s_buffers_alone(runtime, no_packages):
    """They moved on with each call that was tried or measured."""
    x = torch.ones(2, 4)
    integer = fxquant.convert(prepared_of(CountingBuffer().eval(), x))
    compiled = fxquant.compile(integer, x, runtime=runtime)
    assert not integer.count
    expected = copy.deepcopy(integer)
    for _ in range(2):
        assert torch.allclose(compiled(x), expected(x), atol=0.01)


def test_bench_leaves_the_model_s_buffers_alone(no_packages):
    x = torch.ones(2, 4)
    integer = fxquant.convert(prepared_of(CountingBuffer().eval(), x))
    fxquant.bench(integer, x, runtimes=["torch"], rounds=2, memory=False, progress=False)
    assert not integer.count


def test_a_machine_that_is_not_for_it_is_told_why(digits, no_native, no_packages):
    with pytest.raises(ExportError, match=f"{elsewhere}\n  what to do"):
        fxquant.compile(digits, runtime="native")
    compiled = fxquant.compile(digits, torch.rand(1, 1, 8, 8))
    assert compiled.runtime != "native" and elsewhere in repr(compiled)
    rows = fxquant.bench(
        fxquant.convert(digits), torch.rand(1, 1, 8, 8), runtimes="native", rounds=2, memory=False
    ).rows
    assert [(row.runtime, row.milliseconds) for row in rows] == [("native", None)] and elsewhere in rows[0].note


@needs_native
def test_what_is_no_graph_on_the_cpu_is_refused(digits):
    with pytest.raises(ExportError, match="the model is not on the CPU"):
        native_model(fxquant.convert(digits).to("meta"))
    with pytest.raises(ExportError, match="a Linear is no graph"):
        native_model(nn.Linear(3, 3))


def test_a_condition_on_sizes_is_not_lost():
    """The user's own code asks for sizes around a graph, and goes the other way where they are others."""
    prepared, wide = prepared_of(Halves().eval(), torch.rand(1, 3, 16, 16)), torch.rand(1, 3, 32, 32)
    compiled = fxquant.compile(prepared, runtime="torch" if HERE else "native")
    with torch.no_grad():
        assert torch.equal(compiled(wide), fxquant.convert(prepared, kernels="reference")(wide))
        assert compiled(wide).shape[-1] == 14


def test_auto_without_onnx_compares_torch_with_native(digits, no_packages):
    compiled = fxquant.compile(digits, torch.rand(1, 1, 8, 8))
    report = told(compiled)
    assert set(report) == set(RUNTIMES) and "pip install 'fxquant[openvino]'" in repr(compiled)
    if HERE is None:
        assert {name for name, own in report.items() if own.milliseconds is not None} == {"torch", "native"}
        assert compiled.runtime == compiled.report[0].runtime
    unknown = fxquant.prepare(DigitsNet().eval())
    fxquant.calibrate(unknown, [torch.rand(4, 1, 8, 8)], progress=False)
    compiled = fxquant.compile(unknown)
    assert compiled.runtime == "torch" and compiled(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert HERE is not None or "native is not measured: no example is known" in repr(compiled)


@needs_native
def test_auto_takes_native_where_it_is_fastest_and_torch_where_not(digits, monkeypatch, no_packages):
    for first in ("torch", "native"):

        def invented(runs, first=first, **options):
            assert options["seconds"] <= 3.0 and options["rounds"] >= 9
            return {name: InterleavedTimes((0.001 if name == first else 0.002,) * 3) for name in runs}

        monkeypatch.setattr(runtimes, "time_interleaved", invented)
        compiled = fxquant.compile(digits, torch.rand(1, 1, 8, 8))
        assert compiled.runtime == first == compiled.report[0].runtime and compiled.report[0].milliseconds == 1.0
        assert compiled(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@needs_native
def test_auto_says_what_runs_by_the_reference_where_it_takes_torch(digits, monkeypatch, no_packages):
    said = "3 layers of the model run by the exact reference"
    monkeypatch.setattr(runner, "told_of_layers", lambda *_: said)
    for first in ("torch", "native"):
        times = {"torch": 0.002, "native": 0.002, first: 0.001}
        invented = lambda runs, times=times, **_: {name: InterleavedTimes((times[name],) * 3) for name in runs}  # noqa: E731
        monkeypatch.setattr(runtimes, "time_interleaved", invented)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            assert fxquant.compile(digits, torch.rand(1, 1, 8, 8)).runtime == first
        assert [str(w.message) for w in heard] == [said] * (first == "torch")


class Tokens(nn.Module):
    """Called by name, with whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc = nn.Embedding(9, 8), nn.Linear(8, 5)

    def forward(self, words: Tensor, gain: Tensor) -> dict[str, Tensor]:
        return {"logits": self.fc(self.words(words) * gain)}


@pytest.mark.parametrize(
    "runtime",
    [
        "torch",
        pytest.param("native", marks=needs_native),
        pytest.param("auto", marks=needs_native),
        pytest.param("onnxruntime", marks=pytest.mark.long),
    ],
)
def test_what_was_compiled_is_saved_loaded_pickled_and_copied(digits, tmp_path, runtime, request):
    if runtime == "auto":
        request.getfixturevalue("no_packages")
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
    integer, x, path = fxquant.convert(digits), torch.rand(3, 1, 8, 8), tmp_path / "fast.pt"
    fast = fxquant.compile(integer, x, runtime=runtime, threads=1)
    fxquant.save(fast, path)
    again = fxquant.load(DigitsNet(), path)
    for other in (again, pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
        assert isinstance(other, runtimes.Compiled) and other.runtime == fast.runtime and other.report == ()
        assert other.origin.threads == 1
        for batch in (x, x[:1]):
            assert_same_bits(other(batch), fast(batch))
    plain = fxquant.load(DigitsNet(), path, recompile=False)
    assert_same_bits(plain(x), integer(x))
    assert torch.load(path, weights_only=True)["compiled"]["runtime"] == fast.runtime
    assert info(path).facts["compiled for"] == fast.runtime


def test_what_is_called_by_name_is_compiled_again(tmp_path):
    call = {"words": torch.randint(0, 9, (2, 4)), "gain": torch.rand(2, 4, 1)}
    integer = fxquant.convert(prepared_of(Tokens().eval(), call))
    fast = fxquant.compile(integer, call, runtime="torch")
    fxquant.save(fast, tmp_path / "fast.pt")
    again = fxquant.load(Tokens(), tmp_path / "fast.pt")
    assert_same_bits(again(**call)["logits"], fast(**call)["logits"])


def test_a_compiled_model_that_cannot_be_saved_says_why(digits, tmp_path):
    x, path = torch.rand(2, 1, 8, 8), tmp_path / "fast.pt"
    integer = fxquant.convert(digits)
    fast = fxquant.compile(integer, x, runtime="torch")
    layer = next(part for part in integer.modules() if hasattr(part, "weight"))
    layer.weight.copy_(layer.weight.clone())
    with pytest.raises(InputError, match=r"changed since it was compiled.*\n.*compile it again"):
        fxquant.save(fast, path)
    del integer, layer
    gc.collect()
    for ask in (lambda: fxquant.save(fast, path), lambda: pickle.dumps(fast), lambda: copy.deepcopy(fast)):
        with pytest.raises(InputError, match=r"has been let go.*\n  what to do: .*keep int8"):
            ask()
    with pytest.raises(InputError, match="did not make this"):
        fxquant.save(runtimes.Compiled("torch", print), path)
    assert not path.exists()


@needs_native
def test_a_runtime_that_is_not_there_any_more_is_told_and_the_model_can_be_had(digits, tmp_path, monkeypatch):
    integer, x = fxquant.convert(digits), torch.rand(2, 1, 8, 8)
    fxquant.save(fxquant.compile(integer, x, runtime="native"), tmp_path / "fast.pt")
    monkeypatch.setattr(native_kernels, "missing", lambda: Refusal(elsewhere))
    with pytest.raises(ExportError, match=elsewhere):
        fxquant.load(DigitsNet(), tmp_path / "fast.pt")
    plain = fxquant.load(DigitsNet(), tmp_path / "fast.pt", recompile=False)
    assert plain(x).shape == (2, 10)


class Clock:
    """Time that passes only in what is run."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, *seconds: float):
        """A callable that takes these times, one after another and from the start again."""
        calls = iter(range(10**9))

        def call() -> None:
            self.now += seconds[next(calls) % len(seconds)]

        return call


def test_turns_end_after_their_time_but_not_before_three_rounds():
    clock = Clock()
    found = time_interleaved({"a": clock.run(0.01), "b": clock.run(0.02)}, rounds=1000, seconds=2.0, clock=clock)
    assert 20 <= len(found["a"].seconds) == len(found["b"].seconds) < 60 and 2.0 <= clock.now < 2.2
    clock = Clock()
    found = time_interleaved({"a": clock.run(5.0), "b": clock.run(4.0)}, rounds=1000, seconds=2.0, clock=clock)
    assert found == {"a": InterleavedTimes((5.0,) * 3), "b": InterleavedTimes((4.0,) * 3)} and clock.now == 5 * 9.0


def test_calls_that_are_interrupted_do_not_decide():
    """a is faster, but every fifth of its calls meets something that takes ten times as long as the call."""
    clock = Clock()
    found = time_interleaved({"a": clock.run(*(0.002,) * 4, 0.02), "b": clock.run(0.003)}, clock=clock)
    assert found["a"].median == pytest.approx(0.002) and found["b"].median == pytest.approx(0.003)


def test_nothing_to_run_takes_no_turn():
    assert time_interleaved({}) == {}


@pytest.mark.long
@needs_native
def test_bench_times_native_and_measures_its_memory(digits):
    both, x = ["torch", "native"], torch.rand(2, 1, 8, 8)
    found = fxquant.bench(digits, x, runtimes=both, rounds=2, memory=False, progress=False)
    rows = {f"{row.contender} {row.runtime}": row for row in found.rows}
    row, other = rows["int8 native"], rows["int8 torch"]
    assert row.milliseconds > 0 and row.speedup > 0 and row.size == other.size and not row.note
    assert abs(row.sqnr - other.sqnr) < 1.0 and "int8, native" in str(found)
    peak = peak_memory({"runtime": "native", "model": fxquant.convert(digits), "call": ((x,), {})}, 1)
    assert isinstance(peak, int) or "lacks" in peak


def test_no_placement_for_native(digits):
    with pytest.raises(InputError, match=r"in integers whatever they have.*\n  what to do: compile"):
        fxquant.tune_placement(digits, runtime="native")


def test_the_sources_of_the_native_kernels_are_packaged():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    patterns = ast.literal_eval(re.search(r"^\[tool\.setuptools\.package-data\]\nfxquant = (\[.*?\])$", text, re.M)[1])
    files = [p.relative_to(ROOT / "fxquant").as_posix() for p in (ROOT / "fxquant").rglob("*") if p.is_file()]
    data = [name for name in files if not name.endswith((".py", ".pyc"))]
    assert "kernels/native/source/plan.cpp" in data
    assert not [name for name in data if not any(fnmatch(name, pattern) for pattern in patterns)]
