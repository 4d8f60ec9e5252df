"""The affine map against fractions of Python integers, which round half to even and never err."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

from fxquant.errors import SchemeError
from fxquant.numerics.affine import broadcast, dequantize, quantize, scale_and_zero_point, smallest_scale
from fxquant.numerics.scheme import Scheme

RANGES = [
    (-1.0, 1.0), (-0.3, 2.7), (0.0, 6.0), (1.0, 5.0), (-5.0, -1.0), (-1e-6, 1e6), (-1e6, 1e-6), (-1e-20, 3e-20),
    (-1e30, 1e30), (-3.4e38, 3.4e38), (-0.1, 0.1000001), (0.0, 1e-30),
]  # fmt: skip
SCHEMES = [
    Scheme(bits=bits, symmetric=symmetric, signed=signed, narrow_range=narrow)
    for bits in (2, 3, 4, 7, 8, 12, 16)
    for symmetric in (False, True)
    for signed, narrow in ((False, False), (True, False), (True, True))
]


def level(x: float, scale: float, zero_point: int, qmin: int, qmax: int) -> int:
    """Round half to even of the float32 quotient, saturated."""
    quotient = float(torch.tensor(Fraction(x) / Fraction(scale), dtype=torch.float64).float())
    return min(max(round(Fraction(quotient)) + zero_point, qmin), qmax)


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 2.0**-7, 0.0173, 250.0])
@pytest.mark.parametrize("zero_point, qmin, qmax", [(0, -127, 127), (128, 0, 255), (7, 0, 15), (-3, -128, 127)])
def test_quantize_equals_fractions(scale, zero_point, qmin, qmax):
    rng = random.Random(0)
    s = torch.tensor(scale)
    x = torch.tensor([(rng.randrange(-300, 300) + rng.choice([0, 0.5, rng.random()])) * float(s) for _ in range(500)])
    q = quantize(x, s, torch.tensor(zero_point, dtype=torch.int32), qmin, qmax)
    assert q.dtype == torch.float32
    assert q.tolist() == [level(v, float(s), zero_point, qmin, qmax) for v in x.tolist()]


def test_ties_go_to_even_before_the_zero_point_is_added():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    q = quantize(x, torch.tensor(1.0), torch.tensor(1, dtype=torch.int32), -128, 127)
    assert q.tolist() == [1, 3, 3, 1, -1, -1]


def test_divides_rather_than_multiplies_by_the_inverse():
    """Numbers whose quotient and product with the inverse round apart."""
    s = torch.tensor(0.3)
    x = (torch.arange(-20000, 20000) + 0.5) * s
    q = quantize(x, s, torch.tensor(0), -(2**15), 2**15 - 1)
    assert q.tolist() == [level(v, float(s), 0, -(2**15), 2**15 - 1) for v in x.tolist()]
    assert not torch.equal(q, torch.round(x * (1.0 / s)))


def test_per_channel_equals_channel_by_channel():
    torch.manual_seed(0)
    x, scale, zero_point = torch.randn(3, 5, 4), torch.rand(5) + 0.01, torch.arange(5, dtype=torch.int32)
    q = quantize(x, scale, zero_point, -8, 7, axis=1)
    y = dequantize(q, scale, zero_point, axis=1)
    for c in range(5):
        expected = quantize(x[:, c], scale[c], zero_point[c], -8, 7)
        assert torch.equal(q[:, c], expected)
        assert torch.equal(y[:, c], dequantize(expected, scale[c], zero_point[c]))


def test_broadcast():
    assert broadcast(torch.ones(5), 4, 1).shape == (1, 5, 1, 1)
    assert broadcast(torch.ones(5), 2, -1).shape == (1, 5)
    assert broadcast(torch.ones(()), 4, 1).shape == ()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("low, high", RANGES)
def test_grids_cover_their_range_and_hold_zero(scheme, low, high):
    scale, zero_point = scale_and_zero_point(torch.tensor(low), torch.tensor(high), scheme)
    s, z = Fraction(float(scale)), int(zero_point)
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    assert s > 0 and scheme.qmin <= z <= scheme.qmax
    zero = quantize(torch.zeros(3), scale, zero_point, scheme.qmin, scheme.qmax)
    assert dequantize(zero, scale, zero_point).tolist() == [0.0] * 3 and zero.tolist() == [z] * 3
    # Nudging moves the ends by half a step; float32 rounding of the scale by some parts in 2^24 of the range.
    slack = s * (0 if scheme.symmetric else Fraction(1, 2)) + s * (scheme.qmax - scheme.qmin) * Fraction(4, 2**24)
    ends = min(Fraction(float(torch.tensor(low))), 0), max(Fraction(float(torch.tensor(high))), 0)
    assert (scheme.qmin - z) * s <= ends[0] + slack
    assert (scheme.qmax - z) * s >= ends[1] - slack
    if scheme.symmetric:
        assert z == (0 if scheme.signed else 2 ** (scheme.bits - 1))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_grid_is_the_finest(scheme):
    """A step is the range divided by the steps it has to span, to float32's precision."""
    low, high = -0.75, 1.9
    scale, _ = scale_and_zero_point(torch.tensor(low), torch.tensor(high), scheme)
    if scheme.symmetric:
        middle = 0 if scheme.signed else 2 ** (scheme.bits - 1)
        exact = max(Fraction(high) / (scheme.qmax - middle), Fraction(-low) / (middle - scheme.qmin))
    else:
        exact = (Fraction(high) - Fraction(low)) / (scheme.qmax - scheme.qmin)
    assert abs(Fraction(float(scale)) / exact - 1) < Fraction(4, 2**24)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dead_channels(scheme):
    low, high = torch.tensor([0.0, -1.0, 0.0]), torch.tensor([0.0, 2.0, 1e-44])
    scale, zero_point = scale_and_zero_point(low, high, scheme)
    assert scale[0] == 1.0 and scale[2] == 1.0 and 0 < scale[1] <= 2
    q = quantize(torch.zeros(3), scale, zero_point, scheme.qmin, scheme.qmax, axis=0)
    assert dequantize(q, scale, zero_point, axis=0).tolist() == [0.0, 0.0, 0.0]
    assert 1 / smallest_scale() < float("inf")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_bounds_of_the_grid(scheme):
    assert scheme.qmax - scheme.qmin == 2**scheme.bits - 1 - int(scheme.narrow_range)
    info = torch.iinfo(scheme.storage_dtype)
    assert info.min <= scheme.qmin and scheme.qmax <= info.max


@pytest.mark.parametrize(
    "settings",
    [{"bits": 1}, {"bits": 17}, {"bits": True}, {"bits": 8.0}, {"estimator": "max"}, {"per_channel": True},
     {"narrow_range": True}],
)  # fmt: skip
def test_schemes_that_cannot_be(settings):
    with pytest.raises(SchemeError):
        Scheme(**settings)
