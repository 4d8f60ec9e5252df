"""The search for a placement: regions go to float, and back, one at a time, and stay where the runtime was faster.

It knows nothing of models: what it is given to measure is a set of paths that are kept in float.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fxquant.errors import Refusal
from fxquant.export.interleaved_timing import InterleavedTimes
from fxquant.tuning.regions import Region

__all__ = ["INT8", "Search", "Step"]

Kept = frozenset[str]
"""The paths of what is kept in float, with ``HALF`` among them where that computes in bfloat16."""
Measure = Callable[[Sequence[Kept], bool], Mapping[Kept, InterleavedTimes]]
"""Times of several placements, interleaved; the flag asks for the longer measurement of the end."""

INT8: Kept = frozenset()
_LEAST_GAIN = 0.02


@dataclass(frozen=True)
class Step:
    """One thing that was tried.

    Attributes:
        region: its name.
        to_float: whether it went to float; else back to integers.
        to: what it then computed in.
        before, after: milliseconds a call without and with it, of the same rounds; None where it could not be built.
        margin: how much faster it had to be, as a share: the spread of the paired rounds, or 2 % where that is less.
        kept: whether it was.
        note: why it could not be built.
    """

    region: str
    to_float: bool
    before: float | None = None
    after: float | None = None
    margin: float | None = None
    kept: bool = False
    note: str = ""
    to: str = "float"


@dataclass
class Search:
    """Greedy, from the faster of all-int8 and all-float.

    Args:
        regions: what to try, in order; the last one is everything.
        measure: see ``Measure``; raises ``Refusal``.
        budget: seconds. No step begins that would end later, if it took as long as the longest so far; the two
            placements of the start and the confirmation at the end are measured in any case.
        clock: what time it is, in seconds.
        on_step: called with the name of each region before it is tried.

    Attributes:
        steps: what was tried.
        final: milliseconds of each placement in the confirmation.
        out_of_time: whether regions were left when the budget was used up.
    """

    regions: Sequence[Region]
    measure: Measure
    budget: float
    clock: Callable[[], float]
    on_step: Callable[[str], object] = lambda name: None
    steps: list[Step] = field(default_factory=list)
    final: dict[Kept, float] = field(default_factory=dict)
    out_of_time: bool = False
    _longest: float = 0.0

    def run(self) -> Kept:
        """What to keep in float: by the confirmation, no slower than all-int8 and than all-float."""
        began, everything = self.clock(), self.regions[-1].paths
        current = self._start(everything)
        self._longest = (self.clock() - began) / 2  # two were built, and a step builds one
        seen, improved = {INT8, everything}, True
        while improved and not self.out_of_time:
            improved = False
            for region in self.regions:
                trial = current - region.paths if region.paths <= current else current | region.paths
                if trial in seen:
                    continue
                if self.clock() - began + self._longest > self.budget:
                    self.out_of_time = True
                    break
                seen.add(trial)
                if self._is_better(region, current, trial):
                    current, improved = trial, True
        return self._confirmed(current, everything)

    def _start(self, everything: Kept) -> Kept:
        try:
            times = self.measure([INT8, everything], False)
        except Refusal as refusal:
            self.steps.append(Step("everything", True, note=refusal.why))
            return INT8
        better = self._compare(self.regions[-1], True, times[INT8], times[everything])
        return everything if better else INT8

    def _is_better(self, region: Region, current: Kept, trial: Kept) -> bool:
        self.on_step(region.name)
        began, to_float = self.clock(), not region.paths <= current
        try:
            times = self.measure([current, trial], False)
        except Refusal as refusal:
            self.steps.append(Step(region.name, to_float, note=refusal.why, to=_goal(region, to_float)))
            return False
        finally:
            self._longest = max(self._longest, self.clock() - began)
        return self._compare(region, to_float, times[current], times[trial])

    def _compare(self, region: Region, to_float: bool, before: InterleavedTimes, after: InterleavedTimes) -> bool:
        (gain, margin), goal = _gain(before, after), _goal(region, to_float)
        milliseconds = 1e3 * before.median, 1e3 * after.median
        self.steps.append(Step(region.name, to_float, *milliseconds, margin, gain > margin, to=goal))
        return gain > margin

    def _confirmed(self, current: Kept, everything: Kept) -> Kept:
        """The faster of the two plain placements, unless ``current`` is faster than it by more than the spread."""
        placements = list(dict.fromkeys((INT8, everything, current)))
        try:
            times = self.measure(placements, True)
        except Refusal:  # all in float cannot be had; the others were
            placements = list(dict.fromkeys((INT8, current)))
            times = self.measure(placements, True)
        self.final = {kept: 1e3 * times[kept].median for kept in placements}
        plain = min((kept for kept in (INT8, everything) if kept in times), key=lambda kept: times[kept].median)
        if current in (INT8, everything):
            return plain
        gain, margin = _gain(times[plain], times[current])
        return current if gain > margin and times[current].median <= times[plain].median else plain


def _goal(region: Region, to_float: bool) -> str:
    return region.to if to_float else region.back


def _gain(before: InterleavedTimes, after: InterleavedTimes) -> tuple[float, float]:
    """How much less a call takes, as a share, and what that has to exceed not to be noise.

    The median of paired rounds and the fastest rounds both have to say so: on a machine that others use too, the one is
    shifted by what comes and goes between rounds, and the other by a lucky moment.
    """
    ratios = [new / old for old, new in zip(before.seconds, after.seconds, strict=True)]
    gain = 1.0 - max(statistics.median(ratios), min(after.seconds) / min(before.seconds))
    return gain, max(_LEAST_GAIN, InterleavedTimes(tuple(ratios)).spread)
