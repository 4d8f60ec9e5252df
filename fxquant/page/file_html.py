"""The page of a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxquant.analysis.file_layers import FileLayer
from fxquant.page.charts import bar, histogram
from fxquant.page.drawing import draw
from fxquant.page.html import cards, document, fault_list, find, legend, sections
from fxquant.page.markup import Markup, anchor, join, table, tag
from fxquant.page.numbers import agreement_words

if TYPE_CHECKING:
    from fxquant.page.file_report import FileReport

__all__ = ["page_of_file"]

_DRAWN = 400
"""Tensors whose histograms are drawn."""


def page_of_file(report: FileReport) -> str:
    """The whole page of a file's report."""
    rows = _rows(report)
    shown = [
        ("wrong", "What is wrong", _faults(report, rows)),
        ("graph", "Graph", _graph(report)),
        ("errors", "Tensors and their grids", _layers(report)),
        ("histograms", "Histograms", _histograms(report)),
        ("facts", "The file", table(["", "what"], [[name, value] for name, value in report.info.facts.items()])),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    told = f"{report.info.form} · {versions} · made in {report.seconds:.0f} s"
    head = join([tag("h1", report.name), tag("p", told, _class="soft")])
    outputs = [tag("li", agreement_words(own)) for own in report.outputs]
    top = [cards(report.numbers()), tag("ul", *outputs) if outputs else None]
    return document(report.name, join([head, *sections(shown, join(top))]))


def _rows(report: FileReport) -> dict[str, str]:
    """The id of the first row of each path."""
    found: dict[str, str] = {}
    for i, layer in enumerate(report.layers):
        found.setdefault(layer.path, anchor("row", "t", i))
    return found


def _faults(report: FileReport, rows: dict[str, str]) -> Markup:
    if report.faults:
        return fault_list(report.faults, lambda path: tag("a", path, href=f"#{rows[path]}") if path in rows else path)
    words = "Nothing was found: each grid fits its values, and no product computes in float."
    if not report.batches:
        words += " Without data, only constants could be looked at."
    return tag("p", words)


def _graph(report: FileReport) -> Markup | None:
    if report.graph is None:
        return None
    own = {name for name, *_ in report.graph.nodes}
    links = {}
    for i, layer in enumerate(report.layers):
        if layer.kind == "activation":
            links[layer.path] = anchor("row", "t", i)
        else:
            links.setdefault(layer.path, anchor("row", "t", i))
    to = {name: links.get(path) for name, path, *_ in report.graph.nodes if name in own}
    hint = "Wheel or pinch zooms, dragging moves, a click on a node leads to its row, where it has a grid."
    return join([legend(("integer", "float", "input")), draw(report.graph, 0, rows=to), tag("p", hint, _class="soft")])


def _layers(report: FileReport) -> Markup:
    bars = {10: "weight", 11: "by_rounding", 12: "accumulated"}
    rows = []
    for layer, cells in zip(report.layers, report.cells(), strict=True):
        errors = {i: getattr(layer, name) for i, name in bars.items()}
        drawn = {i: bar(None if error is None else error.sqnr) for i, error in errors.items()}
        rows.append([drawn.get(i, cell) for i, cell in zip(report.columns(), cells, strict=True)])
    ids = [anchor("row", "t", i) for i in range(len(rows))]
    words = "In the order of the file. Used is the share of the grid's span that the values take up. "
    if not report.batches:
        words += (
            "Nothing was run: give data to see what roundings do, and the float model to see what is lost against it."
        )
    elif not report.outputs:
        words += (
            "By rounding is a tensor behind its rounding against the tensor before it. Nothing is compared with float."
        )
    else:
        words += "Weight and accumulated are against float, by rounding against the same tensor before it."
    left = [note for note in report.notes() if note.startswith("no grid")]
    shown = table(list(report.header()), rows, ids=ids) if rows else tag("p", "There is no grid in this file.")
    return join([tag("p", words, _class="soft"), find("errors"), shown, *(tag("p", n, _class="soft") for n in left)])


def _histograms(report: FileReport) -> Markup | None:
    shown = [layer for layer in report.layers if layer.histogram is not None]
    if not shown:
        return None
    words = (
        "Heights are square roots of counts. Green is the span of the grid, green lines are its levels where they are at "
        "most 64."
    )
    more = tag("p", f"and {len(shown) - _DRAWN} more, in the JSON") if len(shown) > _DRAWN else None
    return join([tag("p", words, _class="soft"), *(_block(layer) for layer in shown[:_DRAWN]), more])


def _block(layer: FileLayer) -> Markup:
    faults = tag("span", ", ".join(fault.kind for fault in layer.faults), _class="kind") if layer.faults else None
    head = tag("summary", tag("b", layer.name), f" {layer.op} ", faults)
    drawn = histogram(layer.histogram, layer.kind) if layer.histogram is not None else None
    opened = {"open": "open"} if layer.faults else {}
    return tag("details", head, tag("div", drawn, _class="pair"), id=anchor("histogram", layer.name), **opened)
