"""Small drawings of one tensor each, as SVG written by hand.

A histogram is some 1 KB so; matplotlib writes 15 to 20 KB for it, and a page has hundreds. Vega-Lite and Plotly bring code
of 0.8 and 4.5 MB.
"""

from __future__ import annotations

import math

from fxquant.analysis.measures import Histogram
from fxquant.page.markup import Markup, join, tag

__all__ = ["bar", "histogram"]

_WIDTH, _HEIGHT, _FOOT = 320, 84, 14
_MOST_LINES = 64
"""Levels of a grid that are drawn as lines; of finer ones only the span."""


def histogram(found: Histogram, label: str) -> Markup:
    """Counts on a scale of roots, so that tails show; the grid's span behind them, its levels where they are few."""
    span = found.high - found.low or 1.0

    def at(x: float) -> float:
        return round((x - found.low) / span * _WIDTH, 1)

    most = math.sqrt(max(found.counts)) or 1.0
    width = _WIDTH / len(found.counts)
    steps = [f"M0 {_HEIGHT}"]
    for i, count in enumerate(found.counts):
        height = round(_HEIGHT - math.sqrt(count) / most * (_HEIGHT - 4), 1)
        steps.append(f"V{height}H{round((i + 1) * width, 1)}")
    left, right = at(found.grid_low), at(found.grid_high)
    grid = tag("rect", x=left, y=0, width=round(max(right - left, 0.5), 1), height=_HEIGHT, _class="grid")
    levels = None
    if found.levels <= _MOST_LINES:
        count = found.levels - 1
        lines = "".join(f"M{round(left + (right - left) * i / count, 1)} 0V{_HEIGHT}" for i in range(count + 1))
        levels = tag("path", d=lines, _class="level")
    zero = tag("path", d=f"M{at(0.0)} 0V{_HEIGHT}", _class="zero") if found.low <= 0 <= found.high else None
    ends = [
        tag("text", f"{found.low:.3g}", x=0, y=_HEIGHT + 11),
        tag("text", f"{found.high:.3g}", x=_WIDTH, y=_HEIGHT + 11, text_anchor="end"),
    ]
    clipped = f", {100 * found.clipped:.2g} % beyond it" if found.clipped else ""
    words = (
        f"{label}: grid {found.grid_low:.3g} … {found.grid_high:.3g}, {found.levels} levels of {found.step:.3g}, "
        f"{100 * found.used:.3g} % of its span used{clipped}"
    )
    box = f"0 0 {_WIDTH} {_HEIGHT + _FOOT}"
    bars = tag("path", d="".join([*steps, f"V{_HEIGHT}Z"]), _class="counts")
    drawn = tag("svg", grid, levels, zero, bars, *ends, viewBox=box, _class="histogram", role="img", aria_label=words)
    return tag("figure", drawn, tag("figcaption", words))


def bar(value: float | None, most: float = 60.0) -> Markup:
    """A number of decibels with a bar of that length, red where little is left."""
    if value is None or math.isnan(value):
        return Markup("")
    if math.isinf(value):
        return join(["exact" if value > 0 else "lost"])
    share = min(max(value / most, 0.0), 1.0)
    kind = "bad" if value < 20 else "fair" if value < 30 else "good"
    return tag("span", f"{value:.1f}", _class=f"bar {kind}", style=f"--share:{100 * share:.0f}%")
