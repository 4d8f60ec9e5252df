"""Tests of the tests: defects are planted, and every comparison has to catch them.

Each defect is of a size that has shipped in some quantizer: a wrong epsilon, a lost bias, one level too many.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comparisons
import pytest
import torch
import torch.nn.functional as F
from comparisons import (
    assert_close_to_scale,
    assert_integers_agree,
    assert_ops_agree,
    assert_same_bits,
    assert_same_top1,
    assert_steps_apart,
    on_grid,
)
from integer_oracle import accumulate, requantized
from torch import Tensor, nn

import fxquant
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.accumulating import IntegerWeighted
from fxquant.passes import fold_batchnorm as folding


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, eps=1e-3)
        self.depthwise, self.fc = nn.Conv2d(6, 6, 3, groups=6), nn.Linear(6, 4)
        with torch.no_grad():
            self.bn.running_var.uniform_(0.05, 0.5)
            self.bn.running_mean.normal_()
            self.bn.weight.uniform_(-1.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn(self.conv(x)))
        y = F.relu(self.depthwise(y) + y[:, :, 1:-1, 1:-1])
        return self.fc(y.mean((2, 3)))


X = torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(4))


def pair() -> tuple[LeveledModule, LeveledModule]:
    torch.manual_seed(2)
    prepared = fxquant.calibrate(fxquant.prepare(Net().eval(), X, processor="vnni"), [X], progress=False)
    frozen = fxquant.freeze(prepared)
    return frozen, fxquant.convert(frozen)


def weighted(module: LeveledModule, name: str = "conv") -> Any:
    return module.get_submodule(name)


def doubled_scale(m: LeveledModule) -> None:
    weighted(m).shift += 1


def scale_of_another_channel(m: LeveledModule) -> None:
    weighted(m).multiplier.copy_(weighted(m).multiplier.roll(1))
    weighted(m).shift.copy_(weighted(m).shift.roll(1))


def swapped_channels(m: LeveledModule) -> None:
    weighted(m).weight[[0, 1]] = weighted(m).weight[[1, 0]]


def swapped_depthwise_channels(m: LeveledModule) -> None:
    part = weighted(m, "depthwise")
    part.weight[[2, 3]] = part.weight[[3, 2]]


def lost_bias(m: LeveledModule) -> None:
    weighted(m).bias.zero_()


def lost_bias_of_one_channel(m: LeveledModule) -> None:
    weighted(m).bias[3] = 0


def lost_bias_of_the_last_layer(m: LeveledModule) -> None:
    weighted(m, "fc").bias.zero_()


def clamp_one_level_low(m: LeveledModule) -> None:
    weighted(m).high -= 1


def clamp_one_level_high(m: LeveledModule) -> None:
    weighted(m).low += 1


def lost_relu6(m: LeveledModule) -> None:
    weighted(m).low -= 128


def wrong_input_zero_point(m: LeveledModule) -> None:
    weighted(m).offset += 1


def wrong_output_zero_point(m: LeveledModule) -> None:
    weighted(m).zero_point += 1


def rounds_down(m: LeveledModule) -> None:
    """Truncation instead of rounding: half a level on average."""
    part = weighted(m)
    right = part.emit
    part.emit = lambda rounded: right(rounded - (torch.arange(rounded.numel()).reshape(rounded.shape) % 2))


def wrong_weight(m: LeveledModule) -> None:
    weighted(m).weight[2, 1, 0, 0] += 8


def wrong_sum(m: LeveledModule) -> None:
    part = next(p for p in m.modules() if type(p).__name__ == "IntegerSum")
    part.multipliers[1] = part.multipliers[0]


def float32_overflow(m: LeveledModule) -> None:
    weighted(m).bias += 2**24


DEFECTS: list[Callable[[LeveledModule], None]] = [
    doubled_scale,
    scale_of_another_channel,
    swapped_channels,
    swapped_depthwise_channels,
    lost_bias,
    lost_bias_of_one_channel,
    lost_bias_of_the_last_layer,
    clamp_one_level_low,
    clamp_one_level_high,
    lost_relu6,
    wrong_input_zero_point,
    wrong_output_zero_point,
    rounds_down,
    wrong_weight,
    wrong_sum,
    float32_overflow,
]
INVISIBLE = {
    lost_relu6: "the grid of a ReLU6 ends where the clamp does",
    clamp_one_level_low: "",
    clamp_one_level_high: "",
}
"""Defects within one level: bounds of the law, found by the oracle that compares exactly."""


def test_the_sound_model_passes():
    frozen, integer = pair()
    assert_ops_agree(frozen, integer, (X,))
    with torch.no_grad():
        assert_close_to_scale(integer(X), frozen(X), 0.05)


@pytest.mark.parametrize("defect", [d for d in DEFECTS if d not in INVISIBLE], ids=lambda d: d.__name__)
def test_comparing_op_by_op_catches(defect):
    frozen, integer = pair()
    defect(integer)
    with pytest.raises(AssertionError):
        assert_ops_agree(frozen, integer, (X,))


@pytest.mark.parametrize("defect", [d for d in DEFECTS if d is not lost_relu6], ids=lambda d: d.__name__)
def test_the_exact_oracle_catches(defect):
    """Every kernel before and after the defect, in integers, on integers from the whole grid."""
    _, integer = pair()
    broken = copy.deepcopy(integer)
    defect(broken)
    q = torch.arange(3 * 10 * 10, dtype=torch.int64).reshape(1, 3, 10, 10).mul(37).remainder(256).to(torch.uint8)
    with pytest.raises(AssertionError):
        compare_kernels(broken, integer, q)


def compare_kernels(got: LeveledModule, expected: LeveledModule, q: Tensor) -> None:
    inputs = {"conv": q, "depthwise": q.repeat(1, 2, 1, 1), "fc": q.reshape(-1, 6)[:8]}
    for name, x in inputs.items():
        assert_same_bits(weighted(got, name)(x), weighted(expected, name)(x), name)
    sums = [next(p for p in m.modules() if type(p).__name__ == "IntegerSum") for m in (got, expected)]
    a = q.repeat(1, 2, 1, 1)
    assert_same_bits(sums[0](a, a.flip(3)), sums[1](a, a.flip(3)), "sum")


@pytest.mark.parametrize("defect", [lost_bias_of_one_channel, swapped_channels, wrong_input_zero_point, clamp_one_level_low],
                         ids=lambda d: d.__name__)  # fmt: skip
def test_the_python_integers_catch(defect):
    """The oracle of ``test_weighted`` against a broken kernel."""
    frozen, integer = pair()
    kernel: IntegerWeighted = weighted(integer)
    q = torch.arange(300, dtype=torch.int64).reshape(1, 3, 10, 10).mul(37).remainder(256).to(torch.uint8)
    acc = accumulate(q.long().numpy() - int(kernel.offset[0]), kernel.weight.long().numpy(), weighted(frozen))
    ratio = (
        frozen.get_submodule("x_quantizer").output_quantizer.scale.double()
        * weighted(frozen).weight_quantizer.scale.double()
    )
    out = frozen.get_submodule("relu6").output_quantizer
    multiplier = (ratio / out.scale.double()).tolist()
    bias, zero, high = kernel.bias.tolist(), int(out.zero_point), int(kernel.high)
    from fractions import Fraction

    expected = [
        min(max(requantized(int(v) + bias[c], Fraction(multiplier[c]), "single") + zero, int(kernel.low)), high)
        for c in range(6)
        for v in acc[0, c].reshape(-1)
    ]
    wanted = torch.tensor(expected).reshape(1, 6, 10, 10).to(torch.uint8)
    assert_same_bits(kernel(q), wanted)
    defect(integer)
    with pytest.raises(AssertionError):
        assert_same_bits(kernel(q), wanted)


@pytest.mark.parametrize("eps", [1e-5, 2e-3, 0.0], ids=["the default's", "twice", "none"])
def test_folding_with_another_epsilon_is_caught(monkeypatch, eps):
    right = folding.channel_affine_of

    def wrong(bn: nn.Module) -> tuple[Tensor, Tensor]:
        other = copy.deepcopy(bn)
        other.eps = eps
        return right(other)

    torch.manual_seed(2)
    model = Net().eval()
    monkeypatch.setattr(folding, "channel_affine_of", wrong)
    prepared = fxquant.prepare(model, X)
    with torch.no_grad(), fxquant.quantizers_off(prepared), pytest.raises(AssertionError):
        assert_close_to_scale(prepared(X), model(X), 1e-4)


FOLDS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "lost sign": lambda gain, offset: (gain.abs(), offset),
    "lost offset": lambda gain, offset: (gain, torch.zeros_like(offset)),
    "swapped channels": lambda gain, offset: (gain.roll(1), offset.roll(1)),
    "float16": lambda gain, offset: (gain.half().double(), offset.half().double()),
}


@pytest.mark.parametrize("name", FOLDS)
def test_a_wrong_fold_is_caught(monkeypatch, name):
    right = folding.channel_affine_of
    torch.manual_seed(2)
    model = Net().eval()
    monkeypatch.setattr(folding, "channel_affine_of", lambda bn: FOLDS[name](*right(bn)))
    prepared = fxquant.prepare(model, X)
    with torch.no_grad(), fxquant.quantizers_off(prepared), pytest.raises(AssertionError):
        assert_close_to_scale(prepared(X), model(X), 1e-5)


# The comparisons themselves.


def test_bits_are_compared_to_the_last_one():
    x = torch.randn(100)
    assert_same_bits(x, x.clone())
    y = x.clone()
    y[17] = torch.nextafter(y[17], torch.tensor(9.0))
    for wrong in (y, x[:99], x.double(), x.reshape(10, 10), [x], x + 1e-3):
        with pytest.raises(AssertionError):
            assert_same_bits(wrong, x)
    with pytest.raises(AssertionError, match="not finite"):
        assert_same_bits(x / 0, x / 0)
    with pytest.raises(AssertionError, match=r"2 tensors instead of 1|1 tensors instead of 2"):
        assert_same_bits((x,), (x, x))


def test_closeness_needs_a_signal():
    zero = torch.zeros(5)
    with pytest.raises(AssertionError, match="no signal"):
        assert_close_to_scale(zero, zero, 1.0)
    with pytest.raises(AssertionError, match="nothing to compare"):
        assert_close_to_scale(zero[:0], zero[:0], 1.0)
    x = torch.randn(1000)
    one = x.clone()
    one[3] += 0.01 * float(x.abs().max())
    assert_close_to_scale(one, x, 0.0101)
    with pytest.raises(AssertionError, match="off by"):
        assert_close_to_scale(one, x, 0.0099)
    with pytest.raises(AssertionError):
        assert_close_to_scale(x * float("nan"), x, 1.0)


def test_integers_are_compared_one_by_one():
    q = torch.randint(0, 256, (5000,))
    assert_integers_agree([(q, q)], at_least=5000)
    one, many = q.clone(), q.clone()
    one[7] += 2
    many[:6] += 1
    for wrong, says in ((one, "2 levels apart"), (many, "99.88"), (q.float(), "not integers"), (q[:9], "shape")):
        with pytest.raises(AssertionError, match=says):
            assert_integers_agree([(wrong, q)])
    with pytest.raises(AssertionError, match="only 5000 integers"):
        assert_integers_agree([(q, q)], at_least=20_000)
    with pytest.raises(AssertionError, match="only 0 integers"):
        assert_integers_agree([])


def test_steps_and_grids_and_classes():
    scale, zero_point = torch.tensor(0.1), torch.tensor(3)
    x = torch.arange(10) * 0.1
    assert_steps_apart(x + 0.0999, x, scale, 1.0)
    with pytest.raises(AssertionError, match="steps of the scale"):
        assert_steps_apart(x + 0.11, x, scale, 1.0)
    assert torch.equal(on_grid(x, scale, zero_point), torch.arange(10) + 3)
    with pytest.raises(AssertionError, match="do not lie on their grid"):
        on_grid(x + 0.01, scale, zero_point)
    logits = torch.eye(10)
    assert_same_top1(logits, logits, 1.0)
    with pytest.raises(AssertionError, match=r"agree on 0\.00%"):
        assert_same_top1(logits.roll(1, 1), logits, 0.5)


def test_a_comparison_that_compared_nothing_fails():
    frozen, _ = pair()
    with pytest.raises(AssertionError, match="no integer op was compared"):
        assert_ops_agree(frozen, frozen, (X,))


def test_every_comparison_is_held_here():
    with open(__file__, encoding="utf-8") as source:
        text = source.read()
    names = [n for n in vars(comparisons) if n.startswith("assert_") or n == "on_grid"]
    assert len(names) >= 7 and all(text.count(f"{name}(") >= 2 for name in names)
