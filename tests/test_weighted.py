"""Integer convolutions and linear layers against an oracle of Python integers that shares no code with them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from comparisons import assert_ops_agree
from integer_oracle import accumulate, requantized
from op_cases import calibrated, recipe_with
from torch import nn

import fxquant
from fxquant import Scheme
from fxquant.nn.accumulating import IntegerWeighted
from fxquant.ops.example import example

PER_TENSOR = Scheme(symmetric=True, signed=True, narrow_range=True)
FOUR_BITS = Scheme(bits=4, symmetric=True, signed=True, per_channel=True)
LAYERS = {
    "conv1d reflect": (nn.Conv1d(6, 9, 3, stride=2, padding=2, dilation=2, groups=3, padding_mode="reflect"), (2, 6, 17)),
    "conv1d same": (nn.Conv1d(4, 6, 4, padding="same", dilation=3, bias=False), (2, 4, 15)),
    "conv2d": (nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2), (2, 6, 11, 9)),
    "conv2d depthwise": (nn.Conv2d(6, 12, 3, padding=1, groups=6), (2, 6, 7, 8)),
    "conv2d circular": (nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular"), (2, 3, 6, 7)),
    "conv2d replicate": (nn.Conv2d(3, 4, 3, padding=2, padding_mode="replicate", stride=2), (2, 3, 6, 7)),
    "conv2d valid": (nn.Conv2d(3, 4, 2, padding="valid"), (2, 3, 6, 7)),
    "conv3d": (nn.Conv3d(4, 6, (2, 3, 3), stride=(1, 2, 1), padding=(1, 0, 1), groups=2), (2, 4, 5, 7, 6)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=3, padding=1, output_padding=2, groups=2), (2, 4, 9)),
    "conv_transpose2d": (
        nn.ConvTranspose2d(6, 8, (3, 4), stride=2, padding=1, output_padding=1, groups=2, dilation=(2, 1)), (2, 6, 5, 6),
    ),
    "conv_transpose3d": (nn.ConvTranspose3d(4, 4, 2, stride=(2, 1, 2), padding=(1, 0, 0), bias=False), (2, 4, 3, 4, 3)),
    "linear": (nn.Linear(12, 7), (3, 5, 12)),
    "linear wide": (nn.Linear(3000, 3), (2, 3000)),
}  # fmt: skip


def oracle(layer: nn.Module, frozen: nn.Module, q_x: np.ndarray, rounding: str) -> np.ndarray:
    """What the layer's integers must be, from the frozen model's scales and float parameters alone."""
    part = next(p for p in frozen.modules() if isinstance(p, type(layer)))
    x_grid = next(
        p for n, p in frozen.named_modules() if n.endswith("_quantizer") and hasattr(p, "output_quantizer")
    ).output_quantizer
    y_grid, w_grid = part.output_quantizer, part.weight_quantizer
    s_w = w_grid.scale.double().reshape(-1).numpy()
    channels = getattr(layer, "out_channels", None) or layer.out_features
    s_w = np.tile(s_w, channels // len(s_w))
    w = part.weight.detach().double().numpy()
    axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
    per_weight = s_w[: w.shape[axis]].reshape([-1 if i == axis else 1 for i in range(w.ndim)])
    q_w = np.rint(w / per_weight).astype(np.int64)
    assert np.abs(w / per_weight - q_w).max() < 1e-2, "frozen weights lie on their grid"
    s_x = float(x_grid.scale)
    acc = accumulate(q_x.astype(np.int64) - int(x_grid.zero_point), q_w, layer)
    acc = np.moveaxis(acc, -1 if isinstance(layer, nn.Linear) else 1, 0)
    bias = np.zeros(channels) if part.bias is None else part.bias.detach().double().numpy()
    out = np.empty_like(acc)
    for c in range(channels):
        m = s_x * s_w[c] / float(y_grid.scale)
        m = Fraction(float(np.float32(m)) if rounding == "single" else m)
        b = round(bias[c] / (s_x * s_w[c]))
        for index, value in np.ndenumerate(acc[c]):
            q = requantized(int(value) + b, m, rounding) + int(y_grid.zero_point)
            out[(c, *index)] = min(max(q, y_grid.scheme.qmin), y_grid.scheme.qmax)
    return np.moveaxis(out, 0, -1 if isinstance(layer, nn.Linear) else 1)


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("rounding", ["single", "double"])
@pytest.mark.parametrize("weight", [None, PER_TENSOR, FOUR_BITS], ids=["per channel", "per tensor", "4 bits"])
@pytest.mark.parametrize("name", LAYERS)
def test_integers_are_exactly_the_oracles(name, weight, rounding):
    layer, shape = LAYERS[name]
    case = example(layer, shape)()
    frozen = fxquant.freeze(calibrated(case, recipe_with(weight=weight)))
    integer = fxquant.convert(frozen, rounding=rounding)
    kernel = next(p for p in integer.modules() if isinstance(p, IntegerWeighted))
    q_x = np.random.default_rng(5).integers(0, 256, shape)
    got = kernel(torch.from_numpy(q_x).to(torch.uint8)).numpy()
    expected = oracle(layer, frozen, q_x, rounding)
    assert np.array_equal(got, expected), f"{(got != expected).sum()} of {got.size} differ"
    assert len(np.unique(expected)) >= min(20, expected.size // 2)


@pytest.mark.parametrize(("rounding", "bits"), [("single", 24), ("double", 31)])
def test_significant_bits_of_multipliers(rounding, bits):
    """Kernels that rescale in float32 rely on those of ``single``."""
    layer, shape = LAYERS["conv2d depthwise"]
    integer = fxquant.convert(calibrated(example(layer, shape)(), recipe_with()), rounding=rounding)
    q = next(p for p in integer.modules() if isinstance(p, IntegerWeighted)).multiplier
    assert ((q >= 2**30) & (q < 2**31)).all()
    assert (q % 2 ** (31 - bits) == 0).all()
    assert (q % 2 ** (32 - bits) != 0).any()


def test_wide_accumulators_stay_exact():
    """Partial sums beyond 2**24 leave float32; the kernel has to notice by itself."""
    layer = nn.Linear(5000, 2, bias=False)
    case = example(layer, (2, 5000))()
    with torch.no_grad():
        layer.weight.abs_().clamp_(min=0.25)
    recipe = recipe_with(
        activation=Scheme(bits=16), weight=Scheme(bits=16, symmetric=True, signed=True, per_channel=True)
    )
    frozen = fxquant.freeze(calibrated(case, recipe))
    kernel = next(p for p in fxquant.convert(frozen).modules() if isinstance(p, IntegerWeighted))
    q_x = np.random.default_rng(6).integers(0, 2**16, (3, 5000))
    got = kernel(torch.from_numpy(q_x).to(torch.int32)).numpy()
    assert np.array_equal(got, oracle(layer, frozen, q_x, "single"))


class HeldByTheModel(nn.Module):
    """A linear layer called as a function, one of whose channels has next to no weights and lives by its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.full((4,), 5.0))
        with torch.no_grad():
            self.weight[2] *= 1e-12

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias) * 0.5


def test_a_function_calls_bias_that_outgrows_its_grid():
    model, x = HeldByTheModel(), torch.randn(8, 4)
    frozen = fxquant.freeze(fxquant.calibrate(fxquant.prepare(model, x), [x], progress=False))
    assert_ops_agree(frozen, fxquant.convert(frozen), (x,))
