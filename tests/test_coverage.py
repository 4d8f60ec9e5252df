"""Coverage: MACs and weights counted against numbers worked out by hand, at every level, and ``require``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fxquant
from fxquant.capture.islands import graphs_of
from fxquant.errors import FxquantError, InputError
from fxquant.reporting.census import Share, short
from fxquant.reporting.coverage import coverage


class Net(nn.Module):
    """MACs on (1, 3, 8, 8):  a: 8·64·27 = 13824,  b (2 groups): 8·64·36 = 18432,  t: 8·64·4·4 = 8192,  fc: 2·4 = 8."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.t = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = torch.cumsum(self.b(x), 2)
        x = F.relu(self.t(x))
        return self.fc(x.mean((2, 3)))


MACS = {"a": 13824, "b": 18432, "t": 8 * 64 * 4 * 4, "fc": 8}
WEIGHTS = {"a": 8 * 3 * 9, "b": 8 * 4 * 9, "t": 8 * 4 * 4, "fc": 8}
INPUT = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)


def _prepared(*keep_float: str):
    torch.manual_seed(0)
    recipe = fxquant.Recipe([(name, None) for name in keep_float])
    return fxquant.calibrate(fxquant.prepare(Net(), INPUT, recipe=recipe), [INPUT], progress=False)


def _levels(*keep_float: str):
    prepared = _prepared(*keep_float)
    frozen = fxquant.freeze(prepared)
    return prepared, frozen, fxquant.convert(frozen)


@pytest.mark.parametrize("keep_float", [(), ("a",), ("b",), ("t",), ("fc",), ("a", "t")])
def test_macs_and_weights_are_exact_at_every_level(keep_float):
    for module in _levels(*keep_float):
        found = coverage(module)
        assert found.macs.total == sum(MACS.values()), module.level
        assert found.macs.integer == sum(v for k, v in MACS.items() if k not in keep_float), module.level
        assert found.weights.total == sum(WEIGHTS.values()), module.level
        assert found.weights.integer == sum(v for k, v in WEIGHTS.items() if k not in keep_float), module.level
        assert found.macs_share == pytest.approx(found.macs.integer / found.macs.total)


def test_float_ops_have_place_reason_and_source():
    found = coverage(_prepared("t"))
    cumsum, transposed = found.float_ops
    assert (cumsum.path, cumsum.op, cumsum.macs) == ("cumsum", "cumsum", 0)
    assert cumsum.reason == "cumsum is not in the op table"
    assert "test_coverage.py:" in cumsum.source
    assert (transposed.path, transposed.reason) == ("t", "the recipe keeps it in float")
    assert transposed.macs == MACS["t"]


def test_ops_are_counted():
    ops = {count.op: count for count in coverage(_prepared("t")).ops}
    assert (ops["Conv2d"].integer, ops["Conv2d"].float) == (2, 0)
    assert (ops["ConvTranspose2d"].integer, ops["ConvTranspose2d"].float) == (0, 1)
    assert ops["Conv2d"].macs == MACS["a"] + MACS["b"]


def test_integer_models_name_their_kernels():
    prepared, _, integer = _levels()
    assert coverage(prepared).kernels == {}
    kernels = coverage(integer).kernels
    assert kernels["a"].split(":")[0] in ("native", "onednn", "fbgemm", "reference")
    assert set(kernels) == {"a", "b", "t", "fc", "mean"}
    assert "kernel" in str(coverage(integer))
    assert "kernel" not in str(coverage(prepared))


class Attends(nn.Module):
    """Attention has four projections, then q·k and a·v of two heads."""

    macs = 4 * 5 * 8 * 8 + 2 * 2 * 5 * 5 * 4

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.attention(x, x, x)[0]


def test_attention_counts_every_product():
    for module in (fxquant.prepare(Attends(), torch.randn(1, 5, 8)), fxquant.prepare(Attends(), torch.randn(2, 5, 8))):
        found = coverage(module)
        assert found.macs.total % (5 * 8 * 8 + Attends.macs) == 0
        assert found.macs.unknown == 0 and found.macs_share == 1.0


def test_a_named_leaf_is_float_work():
    found = coverage(fxquant.prepare(Attends(), torch.randn(1, 5, 8), leaves=["attention"]))
    assert found.macs == Share(5 * 8 * 8, 5 * 8 * 8 + Attends.macs)
    (island,) = found.islands
    assert (island.path, island.is_named, island.macs) == ("attention", True, Attends.macs)
    assert [(op.path, op.macs) for op in found.float_ops] == [("attention", Attends.macs)]


def test_numbers_computed_in_the_model_do_not_hide_macs():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x) * x.shape[1] ** -0.5
            return y + x.new_zeros(x.shape[0], x.shape[1])

    found = coverage(fxquant.prepare(Scaled(), torch.randn(2, 8)))
    assert found.macs == Share(2 * 8 * 8, 2 * 8 * 8)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Head(nn.Module):
    """Chooses by values, and mixes channels with a weight of its own between two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = Part(), Part()
        self.mix = nn.Parameter(torch.eye(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.near(x)
        if y.sum().item() > 1e9:
            y = -y
        return self.far(torch.einsum("oc,nchw->nohw", self.mix, y))


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), Head()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        if x.shape[1] % 4 == 0:
            x = x * 1.5
        return self.head(x)


MIX, STEM, PART = 8 * 8 * 64, 8 * 64 * 27, 8 * 64 * 72


def _with_head_at_every_level():
    prepared = fxquant.prepare(WithHead().eval(), INPUT)
    fxquant.calibrate(prepared, [INPUT], progress=False)
    frozen = fxquant.freeze(prepared)
    return prepared, frozen, fxquant.convert(frozen)


def test_an_islands_own_code_is_float_and_its_graphs_count():
    for module in _with_head_at_every_level():
        found = coverage(module)
        assert found.macs == Share(STEM + 2 * PART, STEM + 2 * PART + MIX), module.level
        assert found.weights == Share(8 * 27 + 2 * 8 * 72, 8 * 27 + 2 * 8 * 72 + 64), module.level
        (island,) = found.islands
        assert (island.path, island.macs, island.is_named) == ("head", MIX, False)
        assert [(op.path, op.macs) for op in found.float_ops] == [("head", MIX)]
        assert {op.op: op.integer for op in found.ops}["Conv2d"] == 3
    assert {"head.near.conv", "head.far.conv"} <= set(found.kernels)


def test_islands_and_what_is_held_are_printed():
    found = coverage(_with_head_at_every_level()[0])
    text = str(found)
    (island,) = found.islands
    assert "capture: 1 island" in text and island.cause in text and island.advice in text
    assert "test_coverage.py:" in text.split("capture:")[1]
    (fact,) = found.specializations
    assert "% 4 == 0 is True" in fact.text and fact.text in text
    assert "capture: whole" in str(coverage(_prepared()))


def test_counting_leaves_no_trace():
    prepared = _with_head_at_every_level()[0].train()
    state = {name: value.clone() for name, value in prepared.state_dict().items()}
    numbers = torch.random.get_rng_state()
    coverage(prepared)
    assert torch.equal(numbers, torch.random.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in prepared.state_dict().items())
    assert all(part.training for part in prepared.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in prepared.modules())


def test_an_island_that_cannot_be_run_is_unknown():
    class Refuses(Head):
        def forward(self, x: Tensor) -> Tensor:
            if not x.any().item():
                raise ValueError("no zeros, please")
            return super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), Refuses())
    found = coverage(fxquant.prepare(model.eval(), INPUT))
    assert found.macs.unknown_islands == 1 and found.islands[0].macs is None
    assert "unknown inside 1 island" in str(found)


@pytest.mark.long
def test_a_model_whose_top_is_an_island():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.googlenet(weights=None, init_weights=False)
    found = coverage(fxquant.prepare(model, torch.randn(2, 3, 64, 64), qat=True))
    assert found.name == "GoogLeNet" and found.level == "prepared"
    assert any(island.path == "" for island in found.islands)
    assert found.macs_share == 1.0 and found.macs.unknown_islands == 0
    assert "inception3a.branch1.conv" not in {op.path for op in found.float_ops}
    assert "the top module" in str(found)


def test_a_weight_in_several_graphs_counts_once():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()
            self.first, self.second = nn.Sequential(self.part), nn.Sequential(self.part, nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y) if y.sum().item() < 1e9 else y

    prepared = fxquant.prepare(Shared(), torch.randn(2, 8, 8, 8), qat=True)
    assert set(graphs_of(prepared)) == {"first", "second"}
    assert coverage(prepared).weights == Share(8 * 72, 8 * 72)


def test_without_shapes_weights_are_counted_alone():
    found = coverage(fxquant.prepare(Net()))
    assert found.macs is None and found.macs_share is None
    assert found.weights_share == 1.0
    assert "MACs unknown without example_inputs" in str(found)
    assert found.require(1.0) is found


def test_skipped_folds_have_reasons():
    class Used(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + y

    (fold,) = coverage(fxquant.prepare(Used().eval(), INPUT)).skipped_folds
    assert fold.path == "bn"
    assert "conv's output is also used by" in fold.reason


def test_require_passes_and_raises():
    found = coverage(_prepared("b"))
    assert found.require(0.5) is found
    with pytest.raises(FxquantError, match=r"99 % are required[\s\S]*b: the recipe keeps it in float"):
        found.require(0.99)
    with pytest.raises(InputError, match="between 0 and 1"):
        found.require(95)


def test_require_takes_weights_where_shapes_are_not_known():
    found = coverage(fxquant.prepare(Net(), recipe=fxquant.Recipe([("a", None)])))
    with pytest.raises(FxquantError, match="weights are in integers"):
        found.require(0.9)


def test_a_float_model_is_refused():
    with pytest.raises(InputError, match="has not prepared"):
        coverage(Net())


def test_shares_are_never_rounded_up_to_all():
    assert str(Share(99_999, 100_000)) == "99.9 % (100 k of 100 k)"
    assert str(Share(5, 5)) == "100 % (5 of 5)"
    assert Share(0, 0).fraction == 1.0


@pytest.mark.parametrize(("count", "text"), [(999, "999"), (1_500, "1.5 k"), (1_814_073_344, "1.81 G")])
def test_short(count, text):
    assert short(count) == text


class _Deformable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.offsets = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 18, 1)
        self.deformed = torchvision.ops.DeformConv2d(8, 64, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.deformed(x, self.offsets(x))


class _Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.both = nn.Linear(16, 8), nn.Bilinear(8, 8, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        return self.both(x, x)


class _Contracted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.weight = nn.Linear(16, 8), nn.Parameter(torch.randn(8, 8, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,ijk,bj->bk", self.fc(x), self.weight, self.fc(x))


class _Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cell = nn.Linear(16, 8), nn.GRUCell(8, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(self.stem(x))


@pytest.mark.parametrize(
    ("build", "shape", "macs"),
    [
        (_Deformable, (2, 3, 16, 16), 512 * (3 * 8 * 9 + 8 * 18 + 8 * 64 * 9)),
        (_Bilinear, (2, 16), 2 * (16 * 8 + 8 * 8 * 64)),
        (_Contracted, (2, 16), None),
        (_Cell, (2, 16), 2 * (16 * 8 + 3 * 64 * (8 + 64))),
    ],
    ids=["deformable", "bilinear", "einsum", "gru cell"],
)
def test_heavy_ops_in_float_count(build, shape, macs):
    """What stays in float keeps ``require`` from passing, by its multiplications and by its weights."""
    found = coverage(fxquant.prepare(build().eval(), torch.randn(shape)))
    assert found.macs is not None
    assert macs is None or found.macs.total == macs
    assert found.weights_share < 0.1
    for share in (0.99, 0.5):
        with pytest.raises(FxquantError, match="are in integers"):
            found.require(share)


def test_weights_alone_fail_what_is_required():
    found = replace(coverage(fxquant.prepare(_Bilinear().eval(), torch.randn(2, 16))), macs=Share(100, 100))
    with pytest.raises(FxquantError, match=r"3\.0 % .* weights are in integers"):
        found.require(0.99)


class TwoBranches(nn.Module):
    """One of two convolutions, by the data."""

    def __init__(self) -> None:
        super().__init__()
        self.often, self.seldom = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.often(x) if x.mean() > 0 else self.seldom(x)


def test_what_no_graph_has_is_named():
    """A branch that the example did not take stays in float: it was missing from the list, and only shares told of it."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), TwoBranches()).eval()
    with torch.no_grad():  # means of the result on either side of zero
        model[0].weight.zero_()
        model[0].bias.fill_(1.0)
    prepared = fxquant.prepare(model, torch.ones(2, 3, 4, 4))
    fxquant.calibrate(prepared, [torch.ones(2, 3, 4, 4)], progress=False)
    for made in (prepared, fxquant.convert(prepared)):
        found = {op.path: op.reason for op in fxquant.coverage(made).float_ops}
        assert set(found) == {"1", "1.seldom"} and "did not call it" in found["1.seldom"]
        assert fxquant.coverage(made).weights.total - fxquant.coverage(made).weights.integer == 4 * 3 * 9
    with pytest.raises(FxquantError, match=r"1\.seldom"):
        fxquant.coverage(prepared).require(0.99)
    named = fxquant.prepare(model, torch.ones(2, 3, 4, 4), leaves=["1"])
    assert {op.path for op in fxquant.coverage(named).float_ops} == {"1"}, "what was asked for is told once"
