"""The diff of a model and what it became: one line per node.

    layer    float         quantized           weight           output       range            scale    zp
    conv1    Conv2d        QuantConv2d         s8 per-channel   → relu
    bn1      BatchNorm2d   folded into conv1
    relu     ReLU          QuantReLU                            u8 affine    [0, 6.31]       0.0247     0
    pool     MaxPool2d     QuantMaxPool2d                       = relu

``→ relu``: relu's quantizer rounds this result too, once for the whole chain; ``= relu``: the same quantizer as relu's.
A model with islands has a heading for each of its graphs, and a line for each island.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tabulate import tabulate
from torch import nn

from fxquant.capture.capture import capture
from fxquant.capture.islands import (
    Island,
    Specialization,
    graphs_of,
    islands_of,
    level_of,
    map_graphs,
)
from fxquant.errors import InputError
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.numerics.scheme import OBSERVED, Scheme
from fxquant.passes.canonicalize import canonicalize
from fxquant.reporting.census import Share, is_float_op, macs_share, module_at, nodes_of, uncounted, weights_share
from fxquant.reporting.findings_text import holds_text, island_line, island_name
from fxquant.reporting.island_macs import example_call, own_macs
from fxquant.reporting.paths import elide, near
from fxquant.reporting.rows import Row, rows, source_line, target_of
from fxquant.reporting.terminal import paint, terminal_width, visible_length, wants_color
from fxquant.targets import X86

__all__ = ["Diff", "GraphRows", "diff", "row_cells"]

_UNKNOWN = "–"
_HELD = 3
_LEGEND = {
    "→": "→ x  rounded once, by x's quantizer",
    "=": "= x  shares x's quantizer",
    _UNKNOWN: "–  known after calibration",
}
_LIMITS = ((60, 60), (48, 32), (40, 28), (32, 24), (26, 20), (20, 16))
"""How long paths and names in cells may be, from the gentlest to the least that can be read."""


@dataclass(frozen=True)
class GraphRows:
    """One graph of a model: where it stands, a ``Row`` a node, and what it holds for given."""

    path: str
    rows: tuple[Row, ...]
    specializations: tuple[Specialization, ...]


@dataclass(frozen=True)
class Diff:
    """What became of each node, as data and as text.

    Attributes:
        parts: the model's graphs and islands, outer ones first.
        name: the model's class.
        levels: the levels before and after.
        calibrated: whether every range is known.
        macs: the MACs in integers and in all; None without recorded shapes.
        weights: the weights in integers and in all.
        float_ops: the number of ops that compute in float.
        target: the name of the runtime that the second model was prepared for.
        recipe: the preset that its recipe was made of; empty for another recipe.
    """

    parts: tuple[GraphRows | Island, ...]
    name: str
    levels: tuple[str, str]
    calibrated: bool
    macs: Share | None
    weights: Share
    float_ops: int
    target: str = X86.name
    recipe: str = ""
    color: bool | None = None
    width: int | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of all graphs, in order; the text leaves out those that only read shapes."""
        return tuple(row for part in self.parts if isinstance(part, GraphRows) for row in part.rows)

    @property
    def islands(self) -> tuple[Island, ...]:
        """The modules that run their author's own code."""
        return tuple(part for part in self.parts if isinstance(part, Island))

    def text(self, *, color: bool = False, width: int | None = None) -> str:
        """The whole diff.

        Args:
            color: whether to use terminal colours.
            width: shorten paths and wrap notes to so many columns; None for lines of any length.
        """
        shown = [row for row in self.rows if row.state != "shape"]
        header, lines = _columns(shown, self.levels)
        head, body = _table(header, lines, shown, color=color, width=width)
        hidden = len(self.rows) - len(shown)
        title = [*_wrapped(self._title(), width)]
        parts = [paint("\n".join(title), "bold" if color else None), "", *head, *self._by_part(body, color, width), ""]
        legend = _legend(lines, hidden)
        if legend:
            parts += [paint("\n".join(_wrapped(legend, width)), "dim" if color else None)]
        return "\n".join([*parts, *_wrapped(self.summary(), width)])

    def _by_part(self, body: list[str], color: bool, width: int | None) -> Iterator[str]:
        """The lines of the table, with a heading for each graph and island where there are several."""
        remaining = iter(body)
        for part in self.parts:
            if isinstance(part, Island):
                told = "\n".join(_wrapped(island_line(part), width))
                yield "\n" + paint(told, "yellow" if color else None)
                continue
            if len(self.parts) > 1:
                yield "\n" + paint(f"graph {island_name(part.path)}", "bold" if color else None)
            for _ in range(sum(row.state != "shape" for row in part.rows)):
                yield next(remaining)
            for line in holds_text(part.specializations, limit=_HELD):
                yield paint("\n".join(_wrapped(f"    holds: {line}", width)), "dim" if color else None)

    def summary(self) -> str:
        """One line: the shares of MACs and weights in integers, and the number of float ops."""
        shares = [_share(self.macs, "MACs"), _share(self.weights, "weights")]
        unknown = "" if self.macs else "; give prepare example_inputs for MACs"
        unknown += "".join(f"; {words}" for words in uncounted(self.macs))
        return f"in integers: {', '.join(s for s in shares if s)}; float ops: {self.float_ops}{unknown}"

    def _title(self) -> str:
        state = "" if self.calibrated or self.levels[1] != "prepared" else ", not calibrated"
        made_for = "" if self.target == X86.name else f" for {self.target}"
        preset = f", preset {self.recipe}" if self.recipe else ""
        return f"{self.name}: {self.levels[0]} → {self.levels[1]}{made_for}{preset}{state}"

    def __str__(self) -> str:
        color = wants_color() if self.color is None else self.color
        return self.text(color=color, width=self.width or terminal_width())


def diff(before: nn.Module, after: nn.Module, *, color: bool | None = None, width: int | None = None) -> Diff:
    """Compare a model with what ``prepare`` or ``convert`` made of it.

    Example:
        >>> print(fxquant.diff(model, prepared))

    Args:
        before: the float model, or an earlier level of it, such as the prepared model.
        after: what fxquant made of it.
        color: colours when printed; None for yes on a terminal where ``NO_COLOR`` is not set.
        width: columns when printed; None for the terminal's, and unlimited elsewhere.

    Raises:
        InputError: ``after`` is not fxquant's, or was made from another model.
        CaptureError: ``before`` cannot be traced.
    """
    level = level_of(after)
    if level is None:
        raise InputError(
            f"diff was given a {type(after).__name__} as its second model, which fxquant did not make.\n"
            "  what to do: diff(model, prepared) or diff(model, int8), with what prepare or convert returned."
        )
    old, old_level = before, level_of(before)
    if old_level is None:
        old = _captured_like(after, before)
    if level_of(old) == "captured":
        old = map_graphs(old, canonicalize)
    return Diff(
        parts=tuple(_parts(old, after)),
        name=after.__class__.__name__,
        levels=(old_level or "float", level),
        calibrated=is_calibrated(after),
        macs=macs_share(after, own_macs(after)),
        weights=weights_share(after),
        float_ops=sum(is_float_op(node, module_at(graph, node)) for graph, node in nodes_of(after)),
        target=target_of(after).name,
        recipe=next(iter(graphs_of(after).values())).settings["recipe"].title,
        color=color,
        width=width,
    )


def _captured_like(after: nn.Module, model: nn.Module) -> nn.Module:
    """``model`` captured as it was when ``after`` was made of it."""
    settings = next(iter(graphs_of(after).values())).settings
    call = example_call(after)
    example = None if call is None else call[1] or call[0]
    leaves = settings.get("leaves", ())
    try:
        captured = capture(model, example, for_training=settings.get("qat", False), leaves=leaves)
    except InputError as error:
        if example is None:
            raise
        raise InputError(f"the second model was not made from the first, as that tells: {error}") from error
    return captured.model


def _parts(before: nn.Module, after: nn.Module) -> Iterator[GraphRows | Island]:
    """The graphs and islands of ``after``, outer ones first, each graph against that of ``before``."""
    old, new = graphs_of(before), graphs_of(after)
    islands = {island.path: island for island in islands_of(after)}
    for path, _ in after.named_modules():
        if path in new:
            if path not in old:
                raise InputError(
                    f"the second model was not made from the first, of which {island_name(path)} is not captured.\n"
                    "  what to do: give diff the model that you gave to prepare; where example_inputs hold objects other "
                    "than tensors, numbers and containers of them, compare diff(prepared, int8)."
                )
            yield GraphRows(path, tuple(rows(old[path], new[path])), _held(new[path]))
        elif path in islands:
            yield islands[path]


def _held(graph: LeveledModule) -> tuple[Specialization, ...]:
    """What this graph itself holds for given; not the graphs in its islands."""
    return tuple(n.meta["specialization"] for n in graph.graph.nodes if "specialization" in n.meta)


def is_calibrated(module: nn.Module) -> bool:
    """Whether every activation quantizer knows its range."""
    return all(q.ready for q in module.modules() if isinstance(q, FakeQuantize) and not isinstance(q, WeightQuantize))


def _share(share: Share | None, of: str) -> str:
    if share is None:
        return ""
    percent, _, counts = str(share).partition(" (")
    return f"{percent} of {of} ({counts}"


def row_cells(row: Row) -> list[str]:
    """A row as texts: layer, float, what it became, weight, output, range, scale, zero point, and the note."""
    return [row.path, row.before, _after(row), _weight(row.weight), _output(row), *_numbers(row), _note(row)]


def _columns(shown: Sequence[Row], levels: tuple[str, str]) -> tuple[list[str], list[list[str]]]:
    after = {"prepared": "quantized", "frozen": "frozen"}.get(levels[1], levels[1])
    header = ["layer", levels[0], after, "weight", "output", "range", "scale", "zp"]
    lines = [row_cells(row)[:-1] for row in shown]
    used = [i for i in range(len(header)) if i < 3 or any(line[i] for line in lines)]
    return [header[i] for i in used], [[line[i] for i in used] for line in lines]


def _after(row: Row) -> str:
    if row.state != "gone":
        return row.after
    return f"{row.how} into {near(row.into, row.path)}" if row.into else "removed (no-op)"


def _weight(scheme: Scheme | None) -> str:
    if scheme is None:
        return ""
    return f"s{scheme.bits} {'per-channel' if scheme.per_channel else 'per-tensor'}{_rule(scheme)}"


def _rule(scheme: Scheme) -> str:
    return "" if scheme.quantizer == OBSERVED else f" {scheme.quantizer}"


def _output(row: Row) -> str:
    if row.rounded_by:
        return f"→ {near(row.rounded_by, row.path)}"
    if row.shares:
        return f"= {near(row.shares, row.path)}"
    if row.output is not None:
        kind = "symmetric" if row.output.symmetric else "affine"
        return f"{'s' if row.output.signed else 'u'}{row.output.bits} {kind}{_rule(row.output)}"
    return "float" if row.state in ("integer", "border") else ""


def _numbers(row: Row) -> tuple[str, str, str]:
    if row.output is None or row.shares:
        return "", "", ""
    if row.range is None or row.scale is None:
        return _UNKNOWN, _UNKNOWN, _UNKNOWN
    low, high = row.range
    return f"[{low:.3g}, {high:.3g}]", f"{row.scale:.3g}", str(row.zero_point)


def _note(row: Row) -> str:
    note = row.note.removeprefix(f"{row.before} is ")
    place = source_line(row.source) if row.state == "float" else ""
    return f"{note} ({place})" if note and place else note


def _table(
    header: list[str], lines: list[list[str]], shown: Sequence[Row], *, color: bool, width: int | None
) -> tuple[list[str], list[str]]:
    """The two lines at the top, and a line for each row."""
    if width is not None and lines:
        lines = _fit(header, lines, width)
    if color:
        lines = [
            [paint(cell, _style(row, name)) for name, cell in zip(header, line, strict=True)]
            for row, line in zip(shown, lines, strict=True)
        ]
    align = ["right" if name in ("scale", "zp") else "left" for name in header]
    table = tabulate(lines, header, tablefmt="simple", colalign=align, disable_numparse=True)
    head, ruler, *body = (line.rstrip() for line in table.split("\n"))
    margin = sum(len(column) + 2 for column in ruler.split()[:3])
    noted = [_with_note(line, row, margin, color, width) for row, line in zip(shown, body, strict=True)]
    return [head, ruler], noted


def _with_note(line: str, row: Row, margin: int, color: bool, width: int | None) -> str:
    """A line of the table with its note behind it, or below it where the line would get too long."""
    note, used = _note(row), visible_length(line)
    if not note:
        return line
    style = ("yellow" if row.state == "float" or note.startswith("not folded") else "dim") if color else None
    start = max(used + 2, margin)
    if width is None or start + len(note) <= width:
        return line + " " * (start - used) + paint(note, style)
    wrapped = textwrap.wrap(f"↳ {note}", max(width - 4, 20), break_long_words=False, subsequent_indent="  ")
    return "\n".join([line, *(f"    {paint(part, style)}" for part in wrapped)])


def _fit(header: list[str], lines: list[list[str]], width: int) -> list[list[str]]:
    """Shorten paths until the table is at most ``width`` wide, no more than that needs."""
    for path, name in _LIMITS:
        fitted = [[elide(line[0], path), *(_shortened(cell, name) for cell in line[1:])] for line in lines]
        columns = zip(header, *fitted, strict=True)
        if sum(max(map(len, column)) + 2 for column in columns) - 2 <= width:
            break
    return fitted


def _shortened(cell: str, width: int) -> str:
    """A cell whose last word, where it is a long path, is elided."""
    words, _, last = cell.rpartition(" ")
    return f"{words} {elide(last, width)}".lstrip()


def _style(row: Row, column: str) -> str | None:
    if row.state == "gone":
        return "dim"
    if row.state == "float":
        return "yellow" if column != "float" else None
    if column in ("quantized", "frozen", "integer"):
        return "cyan" if row.state in ("border", "input") else "green"
    return "dim" if column == "output" and (row.shares or row.rounded_by) else None


def _legend(lines: list[list[str]], hidden: int) -> str:
    words = [text for mark, text in _LEGEND.items() if any(cell.startswith(mark) for line in lines for cell in line)]
    if hidden:
        words.append(f"{hidden} {'reading of a shape is' if hidden == 1 else 'readings of shapes are'} not shown")
    return " · ".join(words)


def _wrapped(text: str, width: int | None) -> list[str]:
    return [text] if width is None else textwrap.wrap(text, max(width, 20))
