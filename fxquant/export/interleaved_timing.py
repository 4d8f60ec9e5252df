"""Interleaved timing of several callables, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["InterleavedTimes", "time_interleaved"]

_ROUNDS, _LEAST_SECONDS = 9, 0.02
_MOST_CALLS = 200
_FEWEST_ROUNDS = 3
_LONG = 0.05
"""Seconds of a call beside which what another has left behind, in caches and spinning threads, weighs nothing."""


@dataclass(frozen=True)
class InterleavedTimes:
    """Seconds of a call, one number a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the interval that holds the middle half of the rounds."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2


def time_interleaved(
    runs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = _ROUNDS,
    least: float = _LEAST_SECONDS,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    done: Callable[[], Any] | None = None,
) -> dict[str, InterleavedTimes]:
    """Call each in turn, in an order that moves on by one each round, and return the times of each.

    A turn is as many calls as take ``least`` seconds, behind one that is not counted, and counts as its middle call: a
    call that the system interrupts does not weigh on it.

    Args:
        runs: what to call, by name.
        rounds: rounds of each.
        least: seconds that a turn should take.
        seconds: once they have gone no further round begins, but three are taken in any case.
        clock: what time it is, in seconds.
        done: called after every turn, for a progress bar.
    """
    names, began = list(runs), clock()
    usual = {name: _warm(runs[name], clock) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds if names else 0):
        if index >= _FEWEST_ROUNDS and clock() - began >= seconds:
            break
        first = index % len(names)
        for name in names[first:] + names[:first]:
            if len(names) > 1 and usual[name] < _LONG:
                runs[name]()  # what another has put out of the caches, or left spinning, is not this one's
            calls = max(1, min(_MOST_CALLS, int(least / usual[name])))
            times[name].append(statistics.median(_timed(runs[name], clock) for _ in range(calls)))
            if done is not None:
                done()
    return {name: InterleavedTimes(tuple(own)) for name, own in times.items()}


def _warm(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    """What a call takes, more or less, after one that prepares it."""
    run()
    found = _timed(run, clock)
    return max(found if found >= _LONG else min(found, _timed(run, clock)), 1e-6)


def _timed(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start
