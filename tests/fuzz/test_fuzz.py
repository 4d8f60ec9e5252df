"""Random networks in CI: those that Hypothesis draws, and numbered ones; `scripts/fuzz` runs thousands."""

from __future__ import annotations

import pytest
import vocabulary  # noqa: F401  enters the words
from generator import Network, networks, numbered, shrink, write
from hypothesis import HealthCheck, Phase, given, settings
from properties import QUICK, THOROUGH, Property, first_failure

from fxquant.nn.integer import IntegerOp

DRAWN = 20
LONG = 60
"""Numbers of the long test, of each of two processes of a test run: about a second each."""


def require(network: Network, properties: tuple[Property, ...]) -> None:
    """Raise ``AssertionError`` with the source of ``network``, unless every property holds of it."""
    failure = first_failure(network, properties)
    if failure is not None:
        name, error = failure
        raise AssertionError(f"{name}: {error}\n\n{write(network)}") from error


@settings(
    max_examples=DRAWN,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)
@given(networks())
def test_drawn(network):
    require(network, QUICK)


def numbered_and_small(number: int, properties: tuple[Property, ...]) -> None:
    network = numbered(number)
    failure = first_failure(network, properties)
    if failure is not None:
        kind = failure[0]
        require(shrink(network, lambda n: (first_failure(n, properties) or (None,))[0] == kind), properties)


@pytest.mark.parametrize("first", range(0, 20, 10))
def test_numbered(first):
    for number in range(first, first + 10):
        numbered_and_small(number, QUICK)


@pytest.mark.long
@pytest.mark.parametrize("first", (1000, 1060))
def test_numbered_thoroughly(first):
    """Every property but that of the slowest exporter, of networks that the quick test does not try."""
    for number in range(first, first + LONG):
        numbered_and_small(number, THOROUGH)


def test_a_network_is_what_its_number_says():
    one, again = numbered(7), numbered(7)
    assert one == again and write(one) == write(again) and numbered(8) != one
    assert sum(len(write(numbered(i)).splitlines()) for i in range(20)) > 20 * 20, "networks of hardly a line"


def test_shrinking_keeps_what_fails():
    network = next(n for n in map(numbered, range(99)) if "conv2d" in write(n) and write(n).count("\n") > 30)
    small = shrink(network, lambda n: "F.conv2d" in write(n) or "nn.Conv2d" in write(n))
    assert "onv2d" in write(small) and len(write(small)) < len(write(network)) / 1.5


def test_a_planted_defect_is_found(monkeypatch):
    """A kernel that is two steps off does not pass."""
    forward = IntegerOp.__call__

    def off(self, *args, **kwargs):
        value = forward(self, *args, **kwargs)
        return value + 2 if getattr(value, "dtype", None) is not None and not value.is_floating_point() else value

    monkeypatch.setattr(IntegerOp, "__call__", off)
    found = [first_failure(numbered(i), QUICK) for i in range(12)]
    assert sum(failure is not None for failure in found) > 6
