"""tune_placement: the search on invented times, placing anew on real graphs, and the whole in the real runtimes."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant import Op, Recipe, Scheme, Setting
from fxquant.capture.islands import graphs_of
from fxquant.errors import CalibrationError, ExportError, InputError, LevelError, Refusal
from fxquant.export.interleaved_timing import InterleavedTimes
from fxquant.graph.text import graph_text
from fxquant.nn.fake_quantize import FakeQuantize
from fxquant.tuning import placement
from fxquant.tuning.placing import canonical_of, place_again
from fxquant.tuning.regions import Region, regions_of
from fxquant.tuning.search import INT8, Kept, Search

ALL = frozenset("abcd")
REGIONS = [*(Region(name, frozenset(name)) for name in "abcd"), Region("everything", ALL)]


class Runtime:
    """A clock, and measurements by a given cost in milliseconds; each takes ``seconds``."""

    def __init__(self, cost: Callable[[Kept], float | None], *, noise: float = 0.0, seconds: float = 1.0) -> None:
        self.cost, self.noise, self.seconds, self.now = cost, noise, seconds, 0.0
        self.random = random.Random(0)
        self.asked: list[tuple[Kept, ...]] = []

    def measure(self, placements: Sequence[Kept], final: bool) -> dict[Kept, InterleavedTimes]:
        self.asked.append(tuple(placements))
        self.now += self.seconds
        costs = {kept: self.cost(kept) for kept in placements}
        for value in costs.values():
            if value is None:
                raise Refusal("no kernel")
        jitter = lambda: 1 + self.noise * self.random.uniform(-1, 1)  # noqa: E731
        return {kept: InterleavedTimes(tuple(1e-3 * v * jitter() for _ in range(9))) for kept, v in costs.items() if v}

    def search(self, budget: float = 1e6) -> tuple[Search, Kept]:
        found = Search(REGIONS, self.measure, budget, lambda: self.now)
        return found, found.run()


def additive(**gains: float) -> Callable[[Kept], float]:
    """10 ms in integers, and for each part in float so much more."""
    return lambda kept: 10.0 + sum(gains[part] for part in kept)


def test_what_is_slower_in_integers_goes_to_float():
    search, chosen = Runtime(additive(a=-2.0, b=3.0, c=-1.0, d=1.0)).search()
    assert chosen == frozenset("ac")
    assert search.final == pytest.approx({INT8: 10.0, ALL: 11.0, chosen: 7.0})
    assert [(s.region, s.kept) for s in search.steps[:5]] == [
        ("everything", False),
        ("a", True),
        ("b", False),
        ("c", True),
        ("d", False),
    ]
    assert not search.out_of_time


def test_where_float_is_faster_regions_go_back_to_integers():
    search, chosen = Runtime(additive(a=-5.0, b=2.0, c=-1.0, d=-1.0)).search()
    assert chosen == frozenset("acd")
    back = next(step for step in search.steps if step.kept and not step.to_float)
    assert (back.region, back.before, back.after) == ("b", pytest.approx(5.0), pytest.approx(3.0))


def test_gains_that_come_only_together_are_found_in_a_later_round():
    cost = lambda kept: 10.0 - 2.0 * ("b" in kept) - 3.0 * ({"a", "b"} <= kept) + 20.0 * bool(kept & {"c", "d"})  # noqa: E731
    assert Runtime(cost).search()[1] == frozenset("ab")


@pytest.mark.parametrize("seed", range(20))
def test_the_result_is_never_slower_than_either_plain_placement(seed):
    own = random.Random(seed)
    gains = {part: own.uniform(-3, 3) for part in "abcd"}
    coupled = own.uniform(-3, 3)
    runtime = Runtime(
        lambda kept: 15.0 + sum(gains[p] for p in kept) + coupled * ("a" in kept and "c" not in kept), noise=0.2
    )
    search, chosen = runtime.search()
    assert search.final[chosen] <= min(search.final[INT8], search.final[ALL])
    assert set(runtime.asked[-1]) >= {INT8, ALL, chosen}


@pytest.mark.parametrize(("gain", "taken"), [(0.1, False), (1.5, True)])
def test_noise_does_not_decide(gain, taken):
    cost = additive(a=-gain, b=2.0, c=2.0, d=2.0)
    search, chosen = Runtime(cost, noise=0.03).search()
    assert chosen == (frozenset("a") if taken else INT8)
    assert all(
        step.margin >= 0.02 and step.kept == (1 - step.after / step.before > step.margin) for step in search.steps[:1]
    )
    _, quiet = Runtime(additive(a=-0.19, b=2.0, c=2.0, d=2.0)).search()  # 1.9 %, and no noise at all
    assert quiet == INT8


def test_the_fastest_rounds_have_to_agree_with_the_middle_ones():
    disturbed = InterleavedTimes((0.010, *(0.030,) * 8))  # something else ran in most of the rounds of all-int8
    runtime = Runtime(additive(a=2.0, b=2.0, c=2.0, d=2.0))
    measure = runtime.measure
    runtime.measure = lambda kept, final: {**measure(kept, final), **({} if final else {INT8: disturbed})}
    search, chosen = runtime.search()
    assert chosen == INT8 and not search.steps[0].kept and search.steps[0].after < search.steps[0].before


def test_a_gain_that_the_confirmation_does_not_see_is_given_up():
    runtime = Runtime(additive(a=-2.0, b=2.0, c=2.0, d=2.0))
    measure = runtime.measure
    runtime.measure = lambda kept, final: (
        {k: InterleavedTimes((0.01,) * 9) for k in kept} if final else measure(kept, final)
    )
    assert runtime.search()[1] == INT8


@pytest.mark.parametrize(("budget", "steps"), [(0.1, 1), (3.5, 3), (100.0, 9)])
def test_the_budget_ends_the_search(budget, steps):
    search, chosen = Runtime(additive(a=-1.0, b=-1.0, c=-1.0, d=-0.9)).search(budget)
    assert len(search.steps) <= steps and search.out_of_time == (budget < 10)
    assert search.final[chosen] <= 10.0


def test_what_cannot_be_built_is_told_and_left_alone():
    cost = lambda kept: None if "b" in kept else 10.0 - ("a" in kept)  # noqa: E731
    search, chosen = Runtime(cost).search()
    assert chosen == frozenset("a") and ALL not in search.final
    notes = {step.region: step.note for step in search.steps if step.note}
    assert notes == {"everything": "no kernel", "b": "no kernel"}


class Net(nn.Module):
    """Chains, a reused function, a join, a gate, and a head whose accumulator leaves as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.dw = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-2), nn.Conv2d(8, 8, 3, groups=8)
        self.block, self.fc = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Hardswish()), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dw(F.relu(self.bn(self.conv(x))))
        z = self.block(y)
        y = F.max_pool2d(torch.cat([z + y, y * torch.sigmoid(z)], 1), 2)
        return self.fc(y.mean((2, 3)))


@pytest.fixture
def example():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def model_of(*, qat: bool = False) -> Net:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.bn.weight.copy_(torch.linspace(-1, 1.5, 8))
        net.bn.running_var.copy_(torch.linspace(0.3, 2, 8))
    return net.train(qat)


def prepared_of(x: Tensor, *, recipe: Recipe | None = None):
    return fxquant.calibrate(fxquant.prepare(model_of(), x, recipe=recipe), [x], progress=False)


def with_float(prepared, *paths: str) -> Recipe:
    recipe = prepared.settings["recipe"]
    return Recipe([*((path, None) for path in paths), *recipe.settings], default=recipe.default)


def ranges(module) -> dict[str, tuple[float, int]]:
    parts = module.named_modules()
    return {
        name: (float(q.scale), int(q.zero_point))
        for name, q in parts
        if isinstance(q, FakeQuantize) and not q.scale.ndim
    }


def test_the_canonical_graph_is_the_float_one(example):
    prepared = prepared_of(example)
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        expected = prepared(example)
    canonical = canonical_of(prepared)
    assert canonical.level == "canonical" and torch.equal(canonical(example), expected)
    assert not [part for part in canonical.modules() if isinstance(part, FakeQuantize)]


def test_the_same_recipe_gives_the_same_model(example):
    wide = Setting(activation=Scheme(bits=16))
    prepared = prepared_of(example, recipe=Recipe([("block.0", None), (Op("sigmoid"), wide)]))
    again = place_again(prepared, prepared.settings["recipe"])
    assert graph_text(again) == graph_text(prepared)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in prepared.state_dict().items())
    assert torch.equal(again(example), prepared(example))
    notes = [node.meta["notes"] for node in prepared.graph.nodes]
    assert notes == [node.meta["notes"] for node in again.graph.nodes]


class Residual(nn.Module):
    """A sum that takes a convolution's accumulator, where the target has such sums."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return F.relu(self.two(F.relu(self.one(x))) + x).mean((2, 3))


@pytest.mark.parametrize("target", ["x86", "openvino", "tensorrt"])
@pytest.mark.parametrize("path", ["two", "add", "one"])
def test_what_a_target_keeps_wide_is_decided_anew(example, target, path):
    """Facts and notes of a node are those of a model that was prepared so from the start."""
    torch.manual_seed(0)
    model = Residual().eval()
    prepared = fxquant.calibrate(fxquant.prepare(model, example, target=target), [example], progress=False)
    wide = [node.name for node in prepared.graph.nodes if node.meta.get("stays_wide")]
    assert wide == ([] if target == "x86" else ["two"])
    tuned = place_again(prepared, with_float(prepared, path))
    fresh = fxquant.prepare(model, example, target=target, recipe=with_float(prepared, path))
    assert graph_text(tuned) == graph_text(fresh)
    for own, other in zip(tuned.graph.nodes, fresh.graph.nodes, strict=True):
        for fact in ("stays_wide", "wide_operand"):
            assert own.meta.get(fact) == other.meta.get(fact)
        assert own.meta.get("notes", []) == other.meta.get("notes", [])


@pytest.mark.parametrize(
    "paths",
    [
        ("block",),
        ("conv", "relu"),
        ("dw",),
        ("add", "mul"),
        ("sigmoid",),
        ("fc",),
        ("mean", "fc"),
        ("block.1", "dw", "conv", "relu"),
    ],
    ids=" ".join,
)
def test_other_regions_keep_their_ranges(example, paths):
    """The model placed anew is the one prepared so from the start, with the ranges of the first calibration."""
    prepared = prepared_of(example)
    state, text = copy.deepcopy(prepared.state_dict()), graph_text(prepared)
    tuned = place_again(prepared, with_float(prepared, *paths))
    fresh = fxquant.prepare(model_of(), example, recipe=with_float(prepared, *paths))
    assert graph_text(tuned) == graph_text(fresh)
    assert tuned.state_dict().keys() == fresh.state_dict().keys()
    assert set(ranges(tuned).values()) <= set(ranges(prepared).values())
    assert all(q.ready for q in tuned.modules() if isinstance(q, FakeQuantize))
    assert graph_text(prepared) == text and all(torch.equal(v, state[k]) for k, v in prepared.state_dict().items())
    pointers = {p.data_ptr() for p in prepared.state_dict().values() if p.numel()}
    assert not pointers & {p.data_ptr() for p in tuned.state_dict().values() if p.numel()}
    reasons = [n.meta["reason"] for n in tuned.graph.nodes if "reason" in n.meta]
    assert len(reasons) == (2 if paths == ("block",) else len(paths))
    assert set(reasons) == {"the recipe keeps it in float"}
    error = (fxquant.convert(tuned)(example) - fxquant.freeze(tuned)(example)).abs().max()
    assert error <= 0.05 * fxquant.freeze(prepared)(example).abs().max()


def test_everything_in_float_is_the_float_model(example):
    prepared = prepared_of(example)
    paths = regions_of(prepared)[-1].paths
    tuned = place_again(prepared, with_float(prepared, *paths))
    with torch.no_grad():
        torch.testing.assert_close(fxquant.convert(tuned)(example), model_of()(example), rtol=1e-5, atol=1e-5)


def test_a_wider_tensor_keeps_its_range_where_its_op_goes_to_float(example):
    prepared = prepared_of(example, recipe=Recipe([("dw", Setting(activation=Scheme(bits=16)))]))
    wide = next(n for n in prepared.graph.nodes if n.name == "dw")
    grid = prepared.get_submodule(wide.target).output_quantizer.grid
    tuned = place_again(prepared, with_float(prepared, "dw"))
    quantizer = tuned.dw_quantizer.output_quantizer
    assert quantizer.ready and quantizer.scheme.bits == 8
    span = lambda g: float(g.scale) * (g.qmax - g.qmin)  # noqa: E731
    assert span(quantizer.grid) == pytest.approx(span(grid), rel=0.02)


def test_a_trained_model_keeps_training(example):
    prepared = fxquant.prepare(model_of(qat=True), example, qat=True)
    for _ in range(3):
        prepared.train()(example)
    tuned = place_again(prepared, with_float(prepared, "dw", "block"))
    assert tuned.training and torch.equal(tuned.bn.running_mean, prepared.bn.running_mean)
    assert set(ranges(tuned).values()) <= set(ranges(prepared).values())
    tuned(example).sum().backward()
    assert tuned.conv.weight.grad is not None and prepared.conv.weight.grad is None
    assert torch.isfinite(fxquant.convert(tuned.eval())(example)).all()


def test_regions_are_named_and_cover_everything(example):
    prepared = prepared_of(example)
    regions = {region.name: region.paths for region in regions_of(prepared)}
    assert regions["everything"] == {"conv", "relu", "dw", "block.0", "block.1", "add", "sigmoid", "mul", "mean", "fc"}
    assert regions["every op without weights"] == {"block.1", "add", "sigmoid", "mul", "mean"}
    assert regions["every Conv2d"] == {"conv", "relu", "block.0"} and regions["every depthwise Conv2d"] == {"dw"}
    assert regions["block"] == {"block.0", "block.1"} and regions["conv"] == {"conv", "relu"}
    assert len(set(regions.values())) == len(regions) and list(regions)[-1] == "everything"


class Branching(nn.Module):
    """An island at the top: it decides by data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(y) if float(y.sum()) > 0 else y


def test_graphs_between_islands_are_placed_too(example):
    prepared = fxquant.calibrate(fxquant.prepare(Branching().eval(), example), [example], progress=False)
    regions = {region.name: region.paths for region in regions_of(prepared)}
    assert regions["everything"] == {"stem.0", "stem.1", "head"}  # a container of torch's is selected part by part
    recipe = next(iter(graphs_of(prepared).values())).settings["recipe"]
    tuned = place_again(prepared, Recipe([("stem", None)], default=recipe.default))
    assert not [p for n, p in tuned.named_modules() if n.startswith("stem") and isinstance(p, FakeQuantize)]
    assert torch.isfinite(fxquant.convert(tuned)(example)).all()


@pytest.mark.long
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_in_every_runtime(example, runtime, tmp_path):
    if runtime != "torch":
        pytest.importorskip(runtime)
    prepared = prepared_of(example)
    text = graph_text(prepared)
    tuned = fxquant.tune_placement(prepared, example, runtime=runtime, threads=1, budget=0.01, progress=False)
    report = tuned.placement
    assert graph_text(prepared) == text and not hasattr(prepared, "placement")
    assert report.runtime == runtime and {"all int8", "all float"} <= set(report.milliseconds)
    assert report.milliseconds[report.chosen] == min(report.milliseconds.values())
    assert {"all int8": 0, "all float": 10}.get(report.chosen, len(report.kept_float)) == len(report.kept_float)
    assert report.steps[0].region == "everything" and "everything in float" in str(report)
    torch.testing.assert_close(tuned(example), model_of()(example), rtol=0.2, atol=0.05)
    fxquant.save(tuned, tmp_path / "tuned.pt")
    loaded = fxquant.load(model_of(), tmp_path / "tuned.pt")
    assert graph_text(loaded) == graph_text(tuned) and torch.equal(loaded(example), tuned(example))


@pytest.mark.long
def test_a_mixed_placement_runs_and_is_saved(example, tmp_path, monkeypatch):
    """With invented times, so that the search ends at a placement of both kinds."""
    monkeypatch.setattr(placement._Bench, "measure", _prefer(frozenset({"block.1", "dw"})))
    prepared = prepared_of(example)
    tuned = fxquant.tune_placement(prepared, example, budget=1e6, progress=False)
    assert tuned.placement.chosen == "tuned" and set(tuned.placement.kept_float) == {"block.1", "dw"}
    assert "every Hardswish in float" in str(tuned.placement) and "in float: 2 of 10 ops: block.1, dw" in str(
        tuned.placement
    )
    with torch.no_grad():
        expected = fxquant.freeze(tuned)(example)
    for runtime in (name for name in ("onnxruntime", "openvino") if find_spec(name)):
        actual = fxquant.compile(tuned, example, runtime=runtime, threads=1)(example)
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.02 * float(expected.abs().max()))
    integer = fxquant.convert(tuned)
    fxquant.save(integer, tmp_path / "int8.pt")
    assert torch.equal(fxquant.load(model_of(), tmp_path / "int8.pt")(example), integer(example))
    float_ops = {f.path for f in fxquant.coverage(integer).float_ops}
    assert {path.removesuffix("]") for path in float_ops} >= {"dw"}


def _prefer(best: Kept):
    def measure(self, placements, final):
        return {kept: InterleavedTimes((1e-3 * (10 + len(kept ^ best)),) * 9) for kept in placements}

    return measure


def test_what_the_runtime_refuses_is_told(example, monkeypatch):
    compiled = placement._Bench._compiled

    def refuse(self, placed):
        if not [part for part in placed.modules() if isinstance(part, FakeQuantize)]:
            raise ExportError("no floats here\n  what to do: nothing")
        return compiled(self, placed)

    monkeypatch.setattr(placement._Bench, "_compiled", refuse)
    tuned = fxquant.tune_placement(prepared_of(example), example, budget=0.01, progress=False)
    assert set(tuned.placement.milliseconds) == {"all int8"} and tuned.placement.chosen == "all int8"
    assert "cannot be built: no floats here" in str(tuned.placement)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "tensorrt"}, "'tensorrt' is not known. Choose one of torch, onnxruntime, openvino"),
        ({"budget": 0}, "budget=0"),
        ({"budget": -1.0}, "budget=-1.0"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_arguments_that_do_not_fit(example, options, message):
    with pytest.raises(InputError, match=message):
        fxquant.tune_placement(prepared_of(example), example, **options)


def test_models_that_are_not_ready(example):
    with pytest.raises(CalibrationError, match="no range yet"):
        fxquant.tune_placement(fxquant.prepare(model_of(), example), example)
    with pytest.raises(LevelError, match="tune_placement takes a model at level prepared"):
        fxquant.tune_placement(model_of(), example)
    with pytest.raises(LevelError, match="at level 'integer'"):
        fxquant.tune_placement(fxquant.convert(prepared_of(example)), example)
