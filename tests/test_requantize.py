"""Requantization against Python integers and fractions, which neither overflow nor round."""

from __future__ import annotations

import random
from fractions import Fraction
from math import floor, frexp

import pytest
import torch

from fxquant.errors import SchemeError
from fxquant.numerics.requantize import ROUNDINGS, combine, common_multipliers, quantize_multiplier, requantize


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Waiting for a second thread costs more than it computes where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def oracle_multiplier(m: float) -> tuple[int, int]:
    fraction, exponent = frexp(m)
    q = floor(Fraction(fraction) * 2**31 + Fraction(1, 2))
    if q == 2**31:
        q, exponent = q // 2, exponent + 1
    if q == 0 or exponent < -31:
        return 0, 0
    return (2**31 - 1, 30) if exponent > 30 else (q, exponent)


def half_up(value: Fraction) -> int:
    return floor(value + Fraction(1, 2))


def half_away(value: Fraction) -> int:
    return half_up(value) if value >= 0 else -half_up(-value)


def oracle_single(a: int, q: int, e: int) -> int:
    return half_up(Fraction(a * q) * Fraction(2) ** (e - 31))


def oracle_double(a: int, q: int, e: int) -> int:
    high = half_up(Fraction(a * 2 ** max(e, 0) * q, 2**31))
    return half_away(Fraction(high, 2 ** max(-e, 0)))


def oracle_float(a: int, q: int, e: int) -> int:
    return round(float(a) * (q * 2.0 ** (e - 31)))


ORACLE = {"single": oracle_single, "double": oracle_double, "float": oracle_float}


def accumulators(rng: random.Random, bits: int) -> list[int]:
    edges = [0, 1, 2, 3, 2**bits - 1, 2 ** (bits - 1)]
    mixed = [rng.randrange(2 ** rng.randrange(1, bits + 1)) for _ in range(300)]
    return sorted({sign * v for v in edges + mixed for sign in (1, -1)})


MULTIPLIERS = [
    0.5,
    0.25,
    0.75,
    1.0,
    1 / 3,
    0.0123,
    2.0**-8,
    3e-5,
    2.0**-31,
    1.7e-9,
    1 - 2.0**-40,
    1.5,
    7.25,
    1000.3,
    2.0**20,
]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("m", MULTIPLIERS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_equals_exact_arithmetic(rounding, m, dtype):
    values = accumulators(random.Random(0), 31)
    q, e = quantize_multiplier(torch.tensor(m, dtype=torch.float64))
    got = requantize(torch.tensor(values, dtype=dtype), q, e, rounding=rounding)
    assert got.dtype == torch.int64
    assert got.tolist() == [ORACLE[rounding](a, int(q), int(e)) for a in values]


@pytest.mark.parametrize("m", [m for m in MULTIPLIERS if m <= 2])
def test_single_is_exact_for_wide_accumulators(m):
    values = accumulators(random.Random(1), 60)
    q, e = quantize_multiplier(torch.tensor(m, dtype=torch.float64))
    got = requantize(torch.tensor(values), q, e)
    assert got.tolist() == [oracle_single(a, int(q), int(e)) for a in values]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_ties(rounding):
    """A quarter of -8…8: the three ways differ only on the halves."""
    values = list(range(-8, 9))
    q, e = quantize_multiplier(torch.tensor(0.25, dtype=torch.float64))
    got = requantize(torch.tensor(values), q, e, rounding=rounding).tolist()
    rule = {"single": half_up, "float": round}.get(rounding)
    if rule is not None:
        assert got == [rule(Fraction(v, 4)) for v in values]
    # The doubling high product by Q = 2^30 halves first, so ties of the first step go up, those of the second away.
    if rounding == "double":
        assert got == [half_away(Fraction(half_up(Fraction(v, 2)), 2)) for v in values]


def test_multipliers_equal_frexp():
    rng = random.Random(2)
    values = [rng.random() * 2.0 ** rng.randrange(-40, 36) for _ in range(500)]
    values += [0.0, 1.0, 2.0**-32, 2.0**-33, 2.0**30, 1 - 2.0**-53, 2.0**-32 * (1 - 2.0**-40)]
    q, e = quantize_multiplier(torch.tensor(values, dtype=torch.float64).reshape(3, -1))
    assert q.shape == e.shape == (3, len(values) // 3)
    assert list(zip(q.flatten().tolist(), e.flatten().tolist(), strict=True)) == [oracle_multiplier(v) for v in values]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.5])
def test_bad_multipliers(bad):
    with pytest.raises(SchemeError, match="multipliers must be finite and not negative"):
        quantize_multiplier(torch.tensor([1.0, bad]))
    if bad != -0.5:
        with pytest.raises(SchemeError, match="finite"):
            common_multipliers(torch.tensor([1.0, bad]))


def test_bad_rounding():
    q, e = quantize_multiplier(torch.tensor(0.5))
    with pytest.raises(SchemeError, match="'up' is not known"):
        requantize(torch.tensor([1]), q, e, rounding="up")
    with pytest.raises(SchemeError, match="'up' is not known"):
        combine([torch.tensor([1])], q[None], e, rounding="up")


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_per_channel(rounding, axis):
    torch.manual_seed(0)
    m = torch.tensor([0.3, 1.9e-4, 2.5, 0.01], dtype=torch.float64)
    q, e = quantize_multiplier(m)
    acc = torch.randint(-(2**20), 2**20, (4, 4, 4))
    got = requantize(acc, q, e, axis=axis, rounding=rounding)
    for channel in range(4):
        alone = requantize(acc.select(axis, channel), q[channel], e[channel], rounding=rounding)
        assert torch.equal(got.select(axis, channel), alone)


def test_how_often_double_rounding_differs():
    """0.22 % of random accumulators, by one, against correct rounding; single rounding practically never."""
    torch.manual_seed(0)
    acc = torch.randint(-(2**17), 2**17, (400_000,))
    q, e = quantize_multiplier(torch.rand(acc.shape, dtype=torch.float64) * 5e-4 + 5e-4)
    exact = requantize(acc, q, e, rounding="float")
    double = requantize(acc, q, e, rounding="double") - exact
    single = requantize(acc, q, e, rounding="single") - exact
    assert 0.0005 < (double != 0).double().mean() < 0.005
    assert double.abs().max() == 1
    assert (single != 0).double().mean() < 1e-5


def test_fewer_bits_make_odd_multipliers():
    """What fits stays as it is; what does not becomes the odd neighbour, less than a unit of 24 bits away."""
    rng = random.Random(5)
    real = [rng.uniform(1, 2) * 2.0 ** rng.randrange(-20, 8) for _ in range(2000)]
    q, e = quantize_multiplier(torch.tensor(real, dtype=torch.float64), 24)
    for m, found, shift in zip(real, q.tolist(), e.tolist(), strict=True):
        assert found % 2**7 == 0 and found >> 7 & 1
        assert abs(Fraction(found) * Fraction(2) ** (shift - 31) - Fraction(m)) < Fraction(2) ** (shift - 24)
    exact = [1.0, 0.5, 3.0 * 2**-9, float(2**24 - 1), float(2**24 - 2) * 2**-30]
    q, e = quantize_multiplier(torch.tensor(exact, dtype=torch.float64), 24)
    assert torch.equal(torch.ldexp(q.double(), e - 31), torch.tensor(exact, dtype=torch.float64))


def test_common_multipliers_keep_31_bits():
    rng = random.Random(3)
    for _ in range(200):
        values = [rng.uniform(-1, 1) * 2.0 ** rng.randrange(-20, 20) for _ in range(rng.randrange(1, 5))]
        q, e = common_multipliers(torch.tensor(values, dtype=torch.float64))
        unit = Fraction(2) ** (int(e) - 31)
        assert q.dtype == e.dtype == torch.int64 and e.shape == ()
        assert 2**30 <= int(q.abs().max()) < 2**31
        for m, integer in zip(values, q.tolist(), strict=True):
            assert abs(integer * unit - Fraction(m)) <= unit / 2 + (unit / 2 if abs(integer) == 2**31 - 1 else 0)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("m", [(0.5, 0.5), (0.37, -1.21), (1e-3, 0.9), (3.7, 0.02), (0.25, -0.25), (2.0**-20, 1e-7)])
def test_combine_rounds_once(rounding, m):
    torch.manual_seed(0)
    a, b = torch.randint(-(2**17), 2**17, (20, 30)), torch.randint(-9, 9, (30,), dtype=torch.int32)
    q, e = common_multipliers(torch.tensor(m, dtype=torch.float64))
    got = combine([a, b], q, e, rounding=rounding)
    rule = round if rounding == "float" else half_up
    unit = Fraction(2) ** (int(e) - 31)
    for row, results in zip(a.tolist(), got.tolist(), strict=True):
        expected = [rule((x * int(q[0]) + y * int(q[1])) * unit) for x, y in zip(row, b.tolist(), strict=True)]
        assert results == expected


def test_combine_at_its_bound():
    q, e = common_multipliers(torch.tensor([1 - 2.0**-32, 1 - 2.0**-32], dtype=torch.float64))
    most = torch.tensor([2**30 - 1, -(2**30) + 1])
    assert combine([most, most], q, e).tolist() == [oracle_single(2 * int(v), int(q[0]), int(e)) for v in most]
