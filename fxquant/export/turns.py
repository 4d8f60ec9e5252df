"""Timing several callables in turns, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Turns", "take_turns"]

_ROUNDS, _LEAST_SECONDS = 9, 0.02
_MOST_CALLS = 200


@dataclass(frozen=True)
class Turns:
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


def take_turns(
    runs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = _ROUNDS,
    least: float = _LEAST_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
    done: Callable[[], Any] | None = None,
) -> dict[str, Turns]:
    """Call each in turn, in an order that moves on by one each round, and return the times of each.

    A turn is as many calls as take ``least`` seconds, behind one that is not counted.

    Args:
        runs: what to call, by name.
        rounds: turns of each.
        least: seconds that a turn should take.
        clock: what time it is, in seconds.
        done: called after every turn, for a progress bar.
    """
    names, calls = list(runs), dict[str, int]()
    for name in names:
        runs[name]()
        start = clock()
        runs[name]()
        calls[name] = max(1, min(_MOST_CALLS, int(least / max(clock() - start, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            if len(names) > 1:
                runs[name]()  # what another has put out of the caches, or left spinning, is not this one's
            start = clock()
            for _ in range(calls[name]):
                runs[name]()
            times[name].append((clock() - start) / calls[name])
            if done is not None:
                done()
    return {name: Turns(tuple(own)) for name, own in times.items()}
