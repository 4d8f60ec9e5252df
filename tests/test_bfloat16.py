"""What stays in float in bfloat16: as the recipe says, in OpenVINO, and as tune_placement finds by measuring."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from comparisons import assert_same_bits
from op_cases import mostly_long, prepared_of
from torch import Tensor, nn

import fxquant
from fxquant import Op, Recipe
from fxquant.capture.islands import graphs_of
from fxquant.errors import InputError, RecipeError
from fxquant.export.interleaved_timing import InterleavedTimes
from fxquant.export.to_onnx import make_onnx
from fxquant.graph.text import graph_text
from fxquant.runtimes import RUNTIMES
from fxquant.runtimes import openvino as sessions
from fxquant.runtimes.openvino import has_bfloat16, openvino_session
from fxquant.tuning import placement
from fxquant.tuning.regions import HALF, Region, half_regions, regions_of
from fxquant.tuning.search import INT8, Kept, Search

HERE = find_spec("openvino") is not None and has_bfloat16()
needs_bfloat16 = pytest.mark.skipif(not HERE, reason="no OpenVINO, or it does not compute in bfloat16 here")

ONE_ROUNDING = 10 * math.log10(12 * 2**14 * 3 / (2 * math.log(2)))
"""Signal to noise of rounding to 8 significant bits, in decibels: a step of 2^-7 is uniform noise of variance 2^-14/12, and
the mean square of mantissas that are spread evenly by their logarithm is 3 / (2 ln 2)."""

LEAST = ONE_ROUNDING - 10 * math.log10(2 * 3 + 4) - 6
"""For ``Net``, which rounds inputs and weights of three layers and what four other ops make; sums may cancel half of a
signal."""


class Net(nn.Module):
    """Three layers, the activations between them, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 32, 3), nn.Conv2d(32, 32, 3, padding=1)
        self.gelu, self.fc = nn.GELU(), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        return self.fc((self.gelu(self.two(x)) + x).mean((2, 3)))


X = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(3))


def net() -> Net:
    torch.manual_seed(5)
    return Net().eval()


def tuned_for(recipe: Recipe):
    return prepared_of(net(), X, recipe)


def in_openvino(recipe: Recipe) -> Tensor:
    return fxquant.compile(tuned_for(recipe), X, runtime="openvino", threads=1)(X)


def sqnr(actual: Tensor, expected: Tensor) -> float:
    noise, signal = ((actual - expected).double().square().sum(), expected.double().square().sum())
    return 10 * math.log10(float(signal) / float(noise)) if noise else math.inf


@needs_bfloat16
def test_floats_in_bfloat16_are_the_model_within_eight_bits():
    with torch.no_grad():
        expected = net()(X)
    assert sqnr(in_openvino(Recipe(default=None)), expected) > 100
    found = sqnr(in_openvino(Recipe(default=None, float_dtype="bfloat16")), expected)
    assert LEAST < found < ONE_ROUNDING + 6


@needs_bfloat16
@pytest.mark.parametrize("kept", mostly_long([("two", "gelu"), ("one", "relu"), ("fc",), ()], [("fc",)]), ids=" ".join)
def test_a_region_in_bfloat16_beside_integers(kept):
    """Integers may turn by a step where a float at a border did, which is no more than their own rounding makes."""
    with torch.no_grad():
        expected = net()(X)
    plain, half = (
        in_openvino(Recipe([(path, None) for path in kept if path != "relu"], float_dtype=dtype))
        for dtype in ("float32", "bfloat16")
    )
    assert sqnr(half, expected) > sqnr(plain, expected) - 3 and sqnr(half, plain) > LEAST
    assert torch.equal(half, plain) == (not kept), "where all is in integers there is nothing to compute otherwise"


@needs_bfloat16
def test_nothing_changes_where_it_is_not_asked_for():
    import openvino

    content = make_onnx(tuned_for(Recipe([("two", None)])), X).content
    core = openvino.Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    expected = core.compile_model(core.read_model(content), "CPU", settings)([X.numpy()])[0]
    assert_same_bits(in_openvino(Recipe([("two", None)])), torch.from_numpy(expected.copy()))


@pytest.mark.long
def test_the_file_and_the_other_runtimes_do_not_know_it():
    plain, half = (tuned_for(Recipe([("two", None)], float_dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert graph_text(plain) == graph_text(half)
    for runtime in ("torch", "onnxruntime"):
        if runtime == "torch" or find_spec(runtime):
            both = [fxquant.compile(own, X, runtime=runtime, threads=1)(X) for own in (plain, half)]
            assert_same_bits(*both, runtime)
    if find_spec("onnxscript"):
        assert make_onnx(plain, X).content == make_onnx(half, X).content


@needs_bfloat16
def test_a_processor_without_it_computes_in_float32(monkeypatch):
    expected = in_openvino(Recipe([("two", None)]))
    monkeypatch.setattr(sessions, "has_bfloat16", lambda: False)
    assert_same_bits(in_openvino(Recipe([("two", None)], float_dtype="bfloat16")), expected)


def test_recipes_take_the_two_types_and_are_saved_with_theirs(tmp_path):
    with pytest.raises(RecipeError, match=r"float_dtype='float16' is not known\. Choose one of float32, bfloat16"):
        Recipe(float_dtype="float16")
    for dtype in ("float32", "bfloat16"):
        prepared = tuned_for(Recipe([("two", None), (Op("gelu"), None)], float_dtype=dtype))
        for model in (prepared, fxquant.freeze(prepared), fxquant.convert(prepared)):
            fxquant.save(model, tmp_path / "m.pt")
            loaded = fxquant.load(net(), tmp_path / "m.pt")
            assert loaded.settings["recipe"].float_dtype == dtype and torch.equal(loaded(X), model(X))
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    del content["recipe"]["float_dtype"]  # as files were before there was a choice
    torch.save(content, tmp_path / "m.pt")
    assert fxquant.load(net(), tmp_path / "m.pt").settings["recipe"].float_dtype == "float32"


# The search, on invented times.

ALL = frozenset("abcd")
LIGHT = frozenset("ab")
REGIONS = [
    *(Region("every op without weights", LIGHT), *(Region(name, frozenset(name)) for name in "abcd")),
    Region("everything", ALL),
]


def search(cost) -> tuple[Search, Kept]:
    measure = lambda kept, final: {own: InterleavedTimes((1e-3 * cost(own),) * 9) for own in kept}  # noqa: E731
    found = Search(half_regions(REGIONS), measure, 1e6, lambda: 0.0)
    return found, found.run()


def test_what_is_tried_in_bfloat16():
    own = half_regions(REGIONS)
    assert [(r.paths, r.to, r.back) for r in own[:3]] == [
        (ALL | {HALF}, "bfloat16", "int8"),
        ({HALF}, "bfloat16", "float32"),
        (LIGHT | {HALF}, "bfloat16", "int8"),
    ]
    assert own[3:] == REGIONS
    only = [Region("everything", ALL)]
    assert [r.paths for r in half_regions(only)] == [ALL | {HALF}, {HALF}, ALL]


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        (((-4, -4, -4, -4), 0.4), ALL | {HALF}),  # everything is faster in float, and faster still in bfloat16
        (((-2, -2, 9, 9), 0.5), LIGHT | {HALF}),
        (((2, 2, 90, 90), 0.1), LIGHT | {HALF}),  # in float32 they are not faster; in bfloat16 they are
        (((-2, -2, 9, 9), 1.5), LIGHT),  # bfloat16 is slower
        (((5, 5, 9, 9), 1.5), INT8),
    ],
    ids=["all bfloat16", "light", "only together", "slower", "all int8"],
)
def test_bfloat16_where_it_is_faster(costs, expected):
    gains, half = costs

    def cost(kept: Kept) -> float:
        own = [
            (5 + gain) * (half if HALF in kept else 1) for name, gain in zip("abcd", gains, strict=True) if name in kept
        ]
        return sum(own) + 5 * len(ALL - kept) + 0.5

    found, chosen = search(cost)
    assert chosen == expected and found.final[chosen] <= min(found.final[INT8], found.final[ALL])
    assert any(step.to == "bfloat16" for step in found.steps)


@pytest.mark.parametrize("seed", range(20))
def test_never_slower_than_either_plain_placement(seed):
    own = random.Random(seed)
    gains, half = {part: own.uniform(-3, 3) for part in "abcd"}, own.uniform(-2, 2)
    noise = lambda: 1 + 0.05 * own.uniform(-1, 1)  # noqa: E731
    cost = lambda kept: (15 + sum(gains[p] for p in kept - {HALF}) + half * (HALF in kept)) * noise()  # noqa: E731
    found, chosen = search(cost)
    assert found.final[chosen] <= min(found.final[INT8], found.final[ALL])


# The whole.


def prefer(best: Kept):
    asked: list[Kept] = []

    def measure(self, placements, final):
        asked.extend(placements)
        for kept in placements:
            self.placed(kept)
        return {kept: InterleavedTimes((1e-3 * (10 + len(kept ^ best)),) * 9) for kept in placements}

    return measure, asked


@needs_bfloat16
@pytest.mark.long
def test_what_was_measured_is_what_is_saved_and_compiled(tmp_path, monkeypatch):
    measure, _ = prefer(frozenset({"two", "gelu", HALF}))
    monkeypatch.setattr(placement._Bench, "measure", measure)
    prepared = prepared_of(net(), X)
    tuned = fxquant.tune_placement(prepared, X, runtime="openvino", bfloat16=True, budget=1e6, progress=False)
    report = tuned.placement
    assert report.chosen == "tuned" and set(report.kept_float) == {"two", "gelu"} and report.bfloat16 is True
    assert "what stays in float computes in bfloat16, which was faster" in str(report) and HALF not in str(report)
    assert "what stays in float in bfloat16" in str(report) and "everything in bfloat16" in str(report)
    assert "in float: 2 of" in str(report)
    content = make_onnx(tuned, X).content
    (wanted,) = openvino_session(content, 1, float_dtype="bfloat16")([X])
    assert not torch.equal(wanted, openvino_session(content, 1)([X])[0])
    assert_same_bits(fxquant.compile(tuned, X, runtime="openvino", threads=1)(X), wanted)
    fxquant.save(fxquant.convert(tuned), tmp_path / "int8.pt")
    loaded = fxquant.load(net(), tmp_path / "int8.pt")
    assert_same_bits(fxquant.compile(loaded, X, runtime="openvino", threads=1)(X), wanted)
    assert next(iter(graphs_of(prepared).values())).settings["recipe"].float_dtype == "float32"


@needs_bfloat16
def test_the_report_says_what_was_not_chosen(monkeypatch):
    for best, budget, message in (
        (INT8, 1e6, "float32: bfloat16 was not faster"),
        (INT8, 1e-9, "float32: bfloat16 could not be tried"),
        (regions_of(prepared_of(net(), X))[-1].paths | {HALF}, 1e6, "bfloat16, which was faster"),
    ):
        monkeypatch.setattr(placement._Bench, "measure", prefer(best)[0])
        tuned = fxquant.tune_placement(
            prepared_of(net(), X), X, runtime="openvino", bfloat16=True, budget=budget, progress=False
        )
        assert f"what stays in float computes in {message}" in str(tuned.placement)
        assert tuned.placement.chosen == ("all int8" if best == INT8 else "all bfloat16")


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_nothing_is_tried_in_bfloat16_unasked(runtime, monkeypatch):
    if runtime != "torch":
        pytest.importorskip(runtime)
    measure, asked = prefer(frozenset({"two", HALF}))
    monkeypatch.setattr(placement._Bench, "measure", measure)
    tuned = fxquant.tune_placement(prepared_of(net(), X), X, runtime=runtime, budget=1e6, progress=False)
    assert asked and not any(HALF in kept for kept in asked)
    assert tuned.placement.bfloat16 is None and "bfloat16" not in str(tuned.placement)
    assert tuned.settings["recipe"].float_dtype == "float32"


@pytest.mark.long
@needs_bfloat16
def test_by_real_times():
    prepared = prepared_of(net(), X, Recipe(float_dtype="bfloat16"))
    tuned = fxquant.tune_placement(prepared, X, runtime="openvino", threads=1, bfloat16=True, budget=4, progress=False)
    report = tuned.placement
    assert report.milliseconds[report.chosen] == min(
        report.milliseconds[n] for n in ("all int8", "all float", report.chosen)
    )
    assert {"all int8", "all float"} <= set(report.milliseconds) and report.bfloat16 in (True, False)
    assert tuned.settings["recipe"].float_dtype == ("bfloat16" if report.bfloat16 else "float32")
    with torch.no_grad():
        assert sqnr(fxquant.compile(tuned, X, runtime="openvino", threads=1)(X), net()(X)) > 15


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_runtimes_without_it_say_so(runtime):
    with pytest.raises(InputError, match=rf"(?s){runtime} has nothing that computes in it.*what to do: .*openvino"):
        fxquant.tune_placement(prepared_of(net(), X), X, runtime=runtime, bfloat16=True)


def test_processors_without_it_say_so(monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setitem(RUNTIMES, "openvino", replace(RUNTIMES["openvino"], bfloat16=lambda: False))
    with pytest.raises(InputError, match=r"(?s)openvino does not compute in bfloat16 on this processor.*what to do"):
        fxquant.tune_placement(prepared_of(net(), X), X, runtime="openvino", bfloat16=True)
