"""Runtimes as objects: one entered from outside the package is used by every verb, and models are made ready once."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from digits import DigitsNet
from op_cases import prepared_of
from torch import Tensor, nn

import fxquant
from fxquant import flow
from fxquant.errors import ExportError, InputError, MissingPackageError, SchemeError
from fxquant.export import qdq_model
from fxquant.export.doctor import doctor
from fxquant.export.to_onnx import deployed, make_onnx
from fxquant.runtimes import RUNNABLE, RUNTIMES, Runtime, register
from fxquant.runtimes import RUNNABLE as RUN_BY_COMPILE
from fxquant.targets import TARGETS, get

GUIDE = (Path(__file__).resolve().parents[1] / "docs" / "guide.md").read_text(encoding="utf-8")


def evaluator_session(file: Any, threads: int | None = None) -> Any:
    """ONNX's own evaluator in Python, written against the standard."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load_from_string(file) if isinstance(file, bytes) else onnx.load(file)
    evaluator = ReferenceEvaluator(model)

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        feeds = {value.name: x.detach().numpy() for value, x in zip(model.graph.input, tensors, strict=True)}
        return [torch.from_numpy(y.copy()) for y in evaluator.run(None, feeds)]

    return run


def mark(model: Any) -> bool:
    """A pass over files, whose trace anyone can read."""
    model.metadata_props["marked"] = "yes"
    return True


def at_most_three_layers(file: Any) -> list[Any]:
    """A rule over files."""
    import onnx

    graph = onnx.load_from_string(file).graph
    layers = [node.name for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return [SimpleNamespace(refused=True)] if len(layers) > 3 else []


MINE = replace(
    get("onnxruntime"),
    name="evaluator",
    title="The evaluator",
    file_rules="evaluator",
    integer_ops=None,
    rounding="float",
)
EVALUATOR = Runtime(
    name="evaluator",
    title="The evaluator",
    target=MINE,
    session=evaluator_session,
    package="onnx",
    extra="onnx",
    status=lambda saturates: "runs files slowly",
    file_passes=(mark,),
    file_rules=at_most_three_layers,
)


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    pytest.importorskip("onnxscript")
    for registry in (RUNTIMES, TARGETS):
        before = dict(registry)
        monkeypatch.setitem(registry, "evaluator", None)
        registry.pop("evaluator")
        assert registry == before
    return register(EVALUATOR)


@pytest.fixture(scope="module")
def digits() -> Any:
    torch.manual_seed(1)
    return prepared_of(DigitsNet().eval(), torch.rand(4, 1, 8, 8))


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 4)).eval()


X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(7))


def placed_for_it() -> Any:
    return fxquant.calibrate(fxquant.prepare(small(), X, target="evaluator"), [X], progress=False)


def test_a_runtime_from_outside_runs_models(entered):
    prepared = placed_for_it()
    compiled = fxquant.compile(prepared, X, runtime="evaluator")
    assert repr(compiled) == "<compiled for evaluator>"
    expected = fxquant.convert(prepared, kernels="reference")(X)
    step = (expected.max() - expected.min()) / 255
    assert (compiled(X) - expected).abs().max() <= 1.01 * step
    found = {own.runtime: own for own in fxquant.compile(prepared, X).report}
    assert set(found) == set(RUNNABLE) and "evaluator" in found and found["evaluator"].milliseconds is not None
    assert found["evaluator"].agreement >= 40


@pytest.mark.long
def test_a_runtime_from_outside_is_timed_placed_and_diagnosed(entered):
    rows = fxquant.bench(
        placed_for_it(), X, runtimes=["torch", "evaluator"], rounds=1, memory=False, progress=False
    ).rows
    row = next(row for row in rows if row.runtime == "evaluator")
    assert row.milliseconds and row.size and row.agreement >= 40 and not row.note
    tuned = fxquant.tune_placement(placed_for_it(), X, runtime="evaluator", budget=1e-3, progress=False)
    assert tuned.placement.runtime == "evaluator" and tuned.placement.milliseconds
    own = next(own for own in doctor().runtimes if own.name == "evaluator")
    assert own.status == "runs files slowly" and own.version
    with pytest.raises(InputError, match=r"Choose one of .*evaluator, auto"):
        fxquant.compile(placed_for_it(), X, runtime="evaluater")


@pytest.mark.long
def test_its_passes_and_rules_hold_files_for_its_target_alone(entered, digits):
    import onnx

    made = make_onnx(placed_for_it(), X)
    assert [(p.key, p.value) for p in onnx.load_from_string(made.content).metadata_props] == [("marked", "yes")]
    assert not onnx.load_from_string(make_onnx(digits).content).metadata_props
    deep = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))).eval()
    x = torch.randn(5, 6)
    prepared = fxquant.calibrate(fxquant.prepare(deep, x, target="evaluator"), [x], progress=False)
    with pytest.raises(ExportError, match="The evaluator would refuse the file"):
        make_onnx(prepared, x)


def test_one_that_only_gets_files_says_how_to_get_there(digits):
    told = {"tensorrt": "export_onnx", "executorch": "export_executorch", "tflite": "export_tflite"}
    for name, remedy in told.items():
        assert name not in RUNNABLE and name in RUNTIMES
        with pytest.raises(InputError, match=rf"(?s)compile does not run models in .*what to do: .*{remedy}"):
            fxquant.compile(digits, runtime=name)


def test_a_package_that_is_not_here_is_named(digits):
    absent = replace(EVALUATOR, name="absent", package="no_such_package", extra="")
    with pytest.raises(MissingPackageError, match="no_such_package"):
        absent.compiled(deployed(digits), None)
    assert absent.how_to_install == "pip install no_such_package" and absent.version() == ""


def test_a_target_has_one_owner(entered):
    with pytest.raises(SchemeError, match="has a target named 'openvino', which is another target's name"):
        register(replace(EVALUATOR, name="other", target=replace(MINE, name="openvino")))
    assert "other" not in RUNTIMES and get("openvino") is RUNTIMES["openvino"].target
    again = register(replace(EVALUATOR, target=replace(MINE, title="Again")))
    assert get("evaluator").title == "Again" and RUNTIMES["evaluator"] is again


def test_every_runtime_is_in_the_readme():
    (listed,) = re.findall(r"# target: (.*)\n", GUIDE)
    assert re.split(r", | or ", listed) == list(TARGETS)
    assert all(own.title in GUIDE or own.name in GUIDE for own in RUNTIMES.values())
    assert list(RUN_BY_COMPILE) == ["torch", "native", "onnxruntime", "openvino"] == list(RUNNABLE)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each conversion of a whole model was done."""
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def counting(*args: Any, **kwargs: Any) -> Any:
            counts[original.__name__] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    for owner, name in ((flow, "freeze_graph"), (flow, "to_integer"), (qdq_model, "to_qdq")):
        count(owner, name)
    return counts


LEVELS = {"prepared": lambda m: m, "frozen": fxquant.freeze, "integer": fxquant.convert}
CASES = [(runtime, level) for runtime in ("auto", "torch", "onnxruntime") for level in LEVELS]


@pytest.mark.parametrize(
    ("runtime", "level"),
    [pytest.param(*case, marks=() if case in CASES[:1] + CASES[3:6] else pytest.mark.long) for case in CASES],
)
def test_a_model_is_made_ready_once(digits, counted, runtime, level):
    pytest.importorskip("onnxscript")
    model = LEVELS[level](digits)
    counted.clear()
    fxquant.compile(model, torch.rand(2, 1, 8, 8), runtime=runtime)
    assert all(count == 1 for count in counted.values()), counted
    once = {"prepared": (1, 1), "frozen": (0, 1), "integer": (0, 0)}[level]
    assert (counted["freeze"], counted["to_integer"]) == once
    assert counted["to_qdq"] == (runtime != "torch")
