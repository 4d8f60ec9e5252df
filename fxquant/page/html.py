"""The page: one HTML file with its styles, its script and its drawings inside, which asks the network for nothing."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fxquant.analysis.counts import LayerError
from fxquant.analysis.faults import Fault
from fxquant.page.charts import bar, histogram
from fxquant.page.drawing import draw
from fxquant.page.markup import Markup, anchor, join, table, tag
from fxquant.page.numbers import agreement_words, percent, summary_numbers
from fxquant.reporting.census import short
from fxquant.reporting.diff import Diff, GraphRows, row_cells
from fxquant.reporting.findings_text import holds_text, island_line, island_name
from fxquant.reporting.rows import Row, source_line
from fxquant.reporting.tabled import megabytes

if TYPE_CHECKING:
    from fxquant.page.report import Report

__all__ = ["cards", "document", "fault_list", "find", "legend", "page_of", "sections"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_STATES = {
    "integer": "computes in integers",
    "border": "quantize or dequantize",
    "float": "stays in float",
    "input": "input or output",
}
_HISTOGRAMS = 400
"""Layers whose histograms are drawn; a page of more would leave 3 MB behind."""


def page_of(report: Report) -> str:
    """The whole page of a report."""
    links = _Links(report.diff)
    parts = [
        ("wrong", "What is wrong", _faults(report, links)),
        ("graph", "Graph", _graph(report)),
        ("errors", "Errors by layer", _errors(report, links)),
        ("sensitivity", "Sensitivity", _sensitivity(report, links)),
        ("float", "What stays in float", _in_float(report, links)),
        ("audit", "Overflow and saturation", _audit(report)),
        ("diff", "What became of each node", _diff(report)),
        ("histograms", "Histograms", _histograms(report, links)),
        *((anchor("more", name), name, tag("pre", text)) for name, text in report.sections.items()),
        ("recipe", "Recipe", _recipe(report)),
    ]
    return document(report.title, join([_head(report), *sections(parts, _cards(report))]))


def sections(parts: Sequence[tuple[str, str, Markup | None]], top: Markup) -> list[Markup]:
    """Links to all parts that there are, what stands above them, and each part: id, title and body."""
    shown = [(name, title, body) for name, title, body in parts if body]
    nav = tag("nav", *(tag("a", title, href=f"#{name}") for name, title, _ in shown))
    return [nav, top, *(tag("section", tag("h2", title), body, id=name) for name, title, body in shown)]


def document(title: str, body: Markup) -> str:
    """A page with the styles and the script of all our pages."""
    source = importlib.resources.files("fxquant.page") / "source"
    style, script = ((source / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", f"{title}: fxquant"),
        tag("style", Markup(style)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', body, tag('script', Markup(script))), lang='en')}\n"


class _Links:
    """Where a path's row, and its histograms, are on the page."""

    def __init__(self, compared: Diff) -> None:
        self.rows: dict[str, str] = {}
        for number, part in enumerate(part for part in compared.parts if isinstance(part, GraphRows)):
            for row in part.rows:
                own = anchor("row", number, row.name)
                self.rows.setdefault(row.path, own)
                prefix = part.path and f"{part.path}."
                self.rows.setdefault(f"{prefix}{row.name}", own)
                if row.state == "input":  # its rounding is a module beside it
                    self.rows.setdefault(f"{prefix}{row.name}_quantizer", own)

    def to(self, path: str) -> Markup | str:
        """The path, which leads to its row where it has one."""
        own = self.rows.get(path)
        return path if own is None else tag("a", path, href=f"#{own}")


def _head(report: Report) -> Markup:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    target = f" for {report.coverage.target}"
    told = f"{report.name}, {report.diff.levels[1]}{target} · {versions} · made in {report.seconds:.0f} s"
    return join([tag("h1", report.title), tag("p", told, _class="soft")])


def cards(numbers: Sequence[tuple[str, str, str]]) -> Markup:
    """Each number, with its name above it and a word below."""
    shown = [
        tag("div", tag("span", name, _class="soft"), tag("b", value), tag("span", more, _class="soft"), _class="card")
        for name, value, more in numbers
    ]
    return tag("div", *shown, _class="cards")


def _cards(report: Report) -> Markup:
    notes = [tag("p", note, _class="soft") for note in report.notes]
    outputs = [tag("li", agreement_words(own)) for own in report.outputs]
    return join([cards(summary_numbers(report)), tag("ul", *outputs) if outputs else None, *notes])


def _faults(report: Report, links: _Links) -> Markup:
    if not report.faults:
        return tag(
            "p", "Nothing was found: each grid fits its values, no channel stands out, and no op was left in float."
        )
    return fault_list(report.faults, links.to)


def fault_list(faults: Sequence[Fault], link: Callable[[str], Markup | str]) -> Markup:
    """The worst of them, where each is, and what to do."""
    items = [
        tag(
            "li",
            tag("span", fault.kind, _class="kind"),
            tag("b", link(fault.path)),
            f": {fault.what}. ",
            tag("i", f"What to do: {fault.repair}."),
            _class=fault.kind.split()[-1],
        )
        for fault in faults[:20]
    ]
    more = len(faults) - len(items)
    return join([tag("ol", *items, _class="faults"), tag("p", f"and {more} more") if more else None])


def _graph(report: Report) -> Markup:
    parts: list[Any] = [legend(_STATES)]
    for number, graph in enumerate(report.graphs):
        if len(report.graphs) > 1:
            parts.append(tag("h3", f"graph {island_name(graph.path)}"))
        parts.append(draw(graph, number))
    parts.append(tag("p", "Wheel or pinch zooms, dragging moves, a click on a node leads to its row.", _class="soft"))
    return join(parts)


def legend(states: Iterable[str]) -> Markup:
    """What the colours of nodes mean."""
    shown = [tag("span", tag("i", style=f"background:var(--{state})"), _STATES[state]) for state in states]
    return tag("p", *shown, _class="legend soft")


def find(of: str) -> Markup:
    """A field that leaves only the rows with a word."""
    return tag("input", type="search", placeholder="find", _class="find", data_of=of, aria_label="rows with this word")


def _errors(report: Report, links: _Links) -> Markup:
    header = list(report.errors.header())
    rows = []
    for layer, cells in zip(report.errors.layers, report.errors.cells(), strict=True):
        errors = (layer.weight, layer.weight_alone, layer.activation_alone, layer.alone, layer.accumulated)
        bars = [bar(None if error is None else error.sqnr) for error in errors]
        rows.append([links.to(layer.path), cells[1], *bars, *cells[7:10], cells[10]])
    words = (
        "SQNR against the float network, worst by a layer's own roundings first. Weight: the weight itself. By weight, by "
        "result, alone: what rounding the weight, the result, or both does to the result when the inputs are float. "
        "Accumulated: with everything before it rounded too; LSB are steps of the result's grid."
    )
    notes = [note for note in report.errors.notes() if not note.startswith("wrong: ")]
    left = [tag("p", note, _class="soft") for note in notes]
    return join([tag("p", words, _class="soft"), find("errors"), table(header, rows), *left])


def _sensitivity(report: Report, links: _Links) -> Markup | None:
    found = report.sensitivity
    if found is None:
        return None
    rows = []
    for layer, cells in zip(found.layers, found.cells(), strict=True):
        bars = [bar(layer.sqnr.get(bits)) for bits in found.bits]
        rows.append([links.to(layer.path), *cells[1:3], *bars, *cells[3 + len(bars) :]])
    words = "The model's output when this layer alone is rounded and everything else is float, most sensitive first."
    body = table(list(found.header()), rows) if rows else None
    notes = [tag("p", note, _class="soft") for note in found.notes()]
    return join([tag("p", words, _class="soft"), find("sensitivity"), body, *notes])


def _in_float(report: Report, links: _Links) -> Markup | None:
    covered = report.coverage
    parts: list[Any] = []
    if covered.float_ops:
        rows = [
            [links.to(op.path), op.op, op.reason, source_line(op.source), "" if op.macs is None else short(op.macs)]
            for op in covered.float_ops
        ]
        parts.append(table(["layer", "op", "why", "source", "MACs [1]"], rows))
    if covered.islands:
        rows = [
            [island_name(i.path), i.cause, source_line(i.source), i.advice, "?" if i.macs is None else short(i.macs)]
            for i in covered.islands
        ]
        words = "Islands: modules that run their author's own code in float, the graphs inside them aside."
        parts += [tag("p", words), table(["island", "why", "source", "what to do", "MACs [1]"], rows)]
    if covered.skipped_folds:
        folds = [[links.to(fold.path), fold.reason] for fold in covered.skipped_folds]
        parts.append(table(["batch norm not folded", "why"], folds))
    return join(parts) if parts else None


def _audit(report: Report) -> Markup | None:
    found = report.coverage.audit
    if not found.layers and not found.findings:
        return None
    rows = [
        [
            layer.path,
            f"{100 * layer.int32_share:.2g}",
            str(layer.pair),
            f"{layer.narrowed or ''}",
            f"{layer.zero_channels or ''}",
            layer.kernel,
        ]
        for layer in sorted(found.layers, key=lambda layer: -layer.accumulator)
    ]
    header = [
        "layer",
        "of 32 bits [%]",
        "largest pair [1]",
        "narrowed [channels]",
        "all zero [channels]",
        "kernel here",
    ]
    return join([tag("pre", str(found)), table(header, rows)])


def _diff(report: Report) -> Markup:
    parts: list[Any] = [tag("p", report.diff.summary()), find("diff")]
    number = 0
    for part in report.diff.parts:
        if not isinstance(part, GraphRows):
            parts.append(tag("p", island_line(part), id=anchor("island", part.path)))
            continue
        if len(report.diff.parts) > 1:
            parts.append(tag("h3", f"graph {island_name(part.path)}"))
        shown = [row for row in part.rows if row.state != "shape"]
        drawn = {name for name, *_ in report.graphs[number].nodes} if number < len(report.graphs) else set()
        rows = [_diff_row(report, row, number, row.name in drawn) for row in shown]
        ids = [anchor("row", number, row.name) for row in shown]
        header = ["layer", "float", "quantized", "weight", "output", "range", "scale [1]", "zp [1]", "note", "source"]
        parts.append(table(header, rows, ids=ids, classes=[row.state for row in shown]))
        parts += [tag("p", f"holds: {line}", _class="soft") for line in holds_text(part.specializations, limit=6)]
        number += 1
    return join(parts)


def _diff_row(report: Report, row: Row, number: int, is_drawn: bool) -> list[Any]:
    path, *cells, note = row_cells(row)
    link = tag("a", path, href=f"#{anchor('node', number, row.name)}") if is_drawn else path
    return [link, *cells, note, source_line(row.source)]


def _histograms(report: Report, links: _Links) -> Markup:
    layers = [own for own in report.errors.layers if own.histogram is not None or own.weight_histogram is not None]
    words = (
        "Heights are square roots of counts, so that tails show. Green is the span of the grid, green lines are its levels "
        "where they are at most 64; what lies outside is clipped."
    )
    blocks = [_histogram_block(layer, links) for layer in layers[:_HISTOGRAMS]]
    more = len(layers) - len(blocks)
    return join([tag("p", words, _class="soft"), *blocks, tag("p", f"and {more} more, in the JSON") if more else None])


def _histogram_block(layer: LayerError, links: _Links) -> Markup:
    shown = [
        histogram(found, of)
        for found, of in ((layer.histogram, "result"), (layer.weight_histogram, "weight"))
        if found is not None
    ]
    alone = f"{layer.alone.sqnr:.1f} dB alone" if layer.alone is not None else ""
    clipped = f", {percent(layer.histogram.clipped)} clipped" if layer.histogram and layer.histogram.clipped else ""
    faults = tag("span", ", ".join(fault.kind for fault in layer.faults), _class="kind") if layer.faults else None
    head = tag(
        "summary", tag("b", layer.path), f" {layer.op} ", tag("span", alone, clipped, _class="soft"), " ", faults
    )
    opened: dict[str, Any] = {"open": "open"} if layer.faults else {}
    body = [tag("div", *shown, _class="pair"), tag("p", "row: ", links.to(layer.path), _class="soft")]
    return tag("details", head, *body, id=anchor("histogram", layer.path), **opened)


def _recipe(report: Report) -> Markup:
    button = tag("button", "copy", type="button", _class="copy", data_of="recipe-code")
    sizes = ", ".join(f"{name} {megabytes(size)}" for name, size in report.bytes.items())
    return join([button, tag("pre", report.recipe, id="recipe-code"), tag("p", f"parameters: {sizes}", _class="soft")])
