"""What is wrong at a layer, in words: found by comparing what its grid leaves with what a grid over its own data would.

    scale       the grid is much wider than the data: most of its integers are never used
    shared      values that are joined or passed on have one grid, which is too wide for this one's
    saturates   values lie beyond the grid, and what they lose is most of what is lost
    outliers    a few channels reach many times as far as the others, which share a scale with them and keep few levels
    bits        the grid fits its values, and has too few levels for them
    island      a module runs its author's own code in float
    float       an op stays in float

A fault's ``cost`` orders the list. For the first three it is in dB: what the grid leaves less than min-max over the batch
would; a quarter of it where the grid is shared and fits another value. Too few bits cost what is missing to 20 dB. Outliers
cost the dB that the median channel loses to them beyond 20, which is a usual spread. What stays in float costs no accuracy:
it is set at 10, and more by its share of the multiply-accumulates.
Source: outlier channels: Xiao et al., SmoothQuant, 2211.10438, §3; Nagel et al., 1906.04721, §3.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from fxquant.analysis.measures import Error, Histogram
from fxquant.reporting.coverage import Coverage
from fxquant.reporting.findings_text import island_name
from fxquant.reporting.rows import source_line

__all__ = ["Fault", "Measured", "faults_of", "few_bits", "float_faults"]

_WORTH_TELLING = 3.0
"""In dB: what the grid of an activation has to lose against min-max; calibration on other data loses less."""
_WEIGHT_WORTH_TELLING = 9.0
"""Likewise for weights, whose scales are raised up to twofold where sums of pairs have to fit into 16 bits."""
_HARMLESS = 40.0
"""In dB: what an op may lose without being worth a word, however much better a grid could be had."""
_POOR = 20.0
"""In dB: an op whose own roundings leave less is told even where its grid fits."""
_OUTLIER = 10.0
"""The reach of a channel by that of the median channel, from which on it is an outlier."""
_FEW = 0.1
"""Of the channels: more than these are no outliers, but a spread."""
_STAYS_FLOAT, _BY_SHARE = 10.0, 30.0


@dataclass(frozen=True)
class Fault:
    """Something that is wrong.

    Attributes:
        path: where.
        kind: ``scale``, ``shared``, ``saturates``, ``outliers``, ``bits``, ``island`` or ``float``; with ``weight``
            before it for weights.
        what: what was found, with its numbers.
        repair: what to do.
        cost: how bad it is; orders faults, see the head of this file.
    """

    path: str
    kind: str
    what: str
    repair: str
    cost: float

    def __str__(self) -> str:
        return f"{self.path}: {self.what}; {self.repair}"


@dataclass(frozen=True)
class Measured:
    """What was measured at one op: of its result, and of its weight, what they lose, what they would lose on a min-max grid
    of their own, their histograms, and the largest magnitude of each channel; and the other ops with the same quantizer that
    use it well."""

    path: str
    bits: int | None
    fixed: bool
    shared_with: tuple[str, ...]
    result: Error | None
    best: Error | None
    histogram: Histogram | None
    peaks: Tensor | None
    weight_bits: int | None
    weight: Error | None
    weight_best: Error | None
    weight_histogram: Histogram | None
    weight_peaks: Tensor | None


def faults_of(measured: Measured) -> Iterator[Fault]:
    """What is wrong at one op."""
    path = measured.path
    if not measured.fixed:
        found = _grid(path, "", measured.result, measured.best, measured.histogram, _WORTH_TELLING)
        yield from (_as_shared(fault, measured.shared_with) for fault in found)
    yield from _outliers(path, "", measured.peaks)
    yield from _grid(
        path, "weight ", measured.weight, measured.weight_best, measured.weight_histogram, _WEIGHT_WORTH_TELLING
    )
    yield from _outliers(path, "weight ", measured.weight_peaks)


def _grid(
    path: str, of: str, error: Error | None, best: Error | None, histogram: Histogram | None, least: float
) -> Iterator[Fault]:
    if error is None or best is None or histogram is None or not math.isfinite(best.sqnr):
        return
    cost = best.sqnr - error.sqnr if math.isfinite(error.sqnr) else 200.0
    if cost < least or error.sqnr > _HARMLESS:
        return
    lost = f"{error.sqnr:.1f} dB are left, where a grid over its own values leaves {best.sqnr:.1f}"
    whose = "its weight" if of else "its result"
    if histogram.clipped > 0 and histogram.used >= 0.5:
        share = f"{100 * histogram.clipped:.2g} % of the values lie beyond the grid"
        past = (histogram.reach - 1) * max(-histogram.grid_low, histogram.grid_high)
        far = f"up to {histogram.reach:.4g} times as far" if past > histogram.step / 2 else "where it ends at 0"
        what = f"{whose} saturates: {share}, {far}"
        repair = (
            "calibrate with data of its range, or with estimator='minmax'"
            if not of
            else "unpin it, or pin a larger scale"
        )
        yield Fault(path, f"{of}saturates", f"{what}; {lost}", repair, cost)
    elif histogram.used < 0.5:
        used = max(1, round(histogram.used * (histogram.levels - 1)))
        what = f"the scale of {whose} is wrong: {1 / max(histogram.used, 1e-9):.3g} times as large as its values need"
        repair = "calibrate anew with data of its range" if not of else "unpin it, or pin a smaller scale"
        yield Fault(
            path, f"{of}scale", f"{what}, which use some {used} of {histogram.levels} levels; {lost}", repair, cost
        )
    else:
        yield Fault(path, f"{of}scale", f"the grid of {whose} does not fit its values: {lost}", "calibrate anew", cost)


def _as_shared(fault: Fault, others: tuple[str, ...]) -> Fault:
    """A fault of a grid, where that has to fit other values too."""
    if not others or fault.kind != "scale":
        return fault
    what = f"shares its grid with {', '.join(others[:3])}; {fault.what}"
    repair = "keep what joins them in float, or bring them to one range, if this matters"
    return replace(fault, kind="shared", what=what, repair=repair, cost=fault.cost / 4)


def _outliers(path: str, of: str, peaks: Tensor | None) -> Iterator[Fault]:
    if peaks is None or not bool((peaks > 0).any()):
        return
    usual = float(peaks[peaks > 0].median())
    far = (peaks >= _OUTLIER * usual).nonzero().flatten().tolist()
    if not far or len(far) > max(1, _FEW * len(peaks)):
        return
    ratio = float(peaks.max()) / usual
    far.sort(key=lambda channel: -float(peaks[channel]))
    named = ", ".join(map(str, far[:4])) + (f" and {len(far) - 4} more" if len(far) > 4 else "")
    whose = f"{'output channel' if of else 'channel'}{'s' if len(far) > 1 else ''}"
    what = f"outlier {whose} {named}: up to {ratio:.3g} times as far as the median of {len(peaks)}"
    repair = (
        "give the weight one scale per channel"
        if of
        else "keep this op in float, give it more bits, or spread the range"
    )
    yield Fault(path, f"{of}outliers", what, repair, 20 * math.log10(ratio / _OUTLIER))


def few_bits(alone: dict[str, float], bits: dict[str, int]) -> Iterator[Fault]:
    """One fault for all ops that have none and lose too much by their own roundings: ``alone`` in dB by path."""
    poor = sorted((sqnr, path) for path, sqnr in alone.items() if sqnr < _POOR)
    if poor:
        sqnr, path = poor[0]
        more = f", and less than {_POOR:.0f} dB of {len(poor) - 1} more ops" if len(poor) > 1 else ""
        what = f"{bits[path]} bits leave {sqnr:.1f} dB of it by its own roundings, though its grid fits{more}"
        repair = "fxquant.recover chooses better roundings; or give these ops more bits, see the sensitivity"
        yield Fault(path, "bits", what, repair, min(_POOR - sqnr, _POOR))


def float_faults(covered: Coverage) -> Iterator[Fault]:
    """What stays in float although nobody asked for it: each island, and the ops of one reason together."""
    total = covered.macs.total if covered.macs else 0
    islands = {island.path for island in covered.islands}
    for island in covered.islands:
        if not island.is_named:
            where = f" ({source_line(island.source)})" if island.source else ""
            share = (island.macs or 0) / total if total else 0.0
            of = f", {100 * share:.2g} % of the multiply-accumulates" if share else ""
            what = f"an island, which runs its own code in float{of}: {island.cause}{where}"
            yield Fault(island_name(island.path), "island", what, island.advice, _STAYS_FLOAT + _BY_SHARE * share)
    together: dict[str, list[tuple[str, int]]] = {}
    for op in covered.float_ops:
        if op.path not in islands:
            together.setdefault(op.reason, []).append((op.path, op.macs or 0))
    for reason, ops in together.items():
        share = sum(macs for _, macs in ops) / total if total else 0.0
        more = f" and {len(ops) - 1} more" if len(ops) > 1 else ""
        what = f"stays in float{more}: {reason}"
        yield Fault(ops[0][0], "float", what, "see fxquant.coverage(model)", _BY_SHARE * share)
