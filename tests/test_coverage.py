"""Coverage: MACs and weights counted against numbers worked out by hand, at every level, and ``require``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import FxquantError, InputError
from fxquant.report.census import Share, short
from fxquant.report.coverage import coverage


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
    assert kernels["a"] == "reference"
    assert set(kernels) == {"a", "b", "t", "fc", "mean"}
    assert "kernel" in str(coverage(integer))
    assert "kernel" not in str(coverage(prepared))


def test_unknown_modules_are_counted_by_running_them_without_data():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(8, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.into(x)
            return self.attention(x, x, x)[0]

    prepared = fxquant.prepare(Attends(), torch.randn(1, 5, 8))
    found = coverage(prepared)
    attention = next(op for op in found.float_ops if op.path == "attention")
    assert attention.macs == 4 * 5 * 8 * 8 + 2 * 2 * 5 * 5 * 4  # four projections, then q·k and a·v of two heads
    assert found.macs == Share(5 * 8 * 8, 5 * 8 * 8 + attention.macs)


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
