"""A graph as a drawing: one box a node, layer below layer, coloured by what became of it; a click leads to its row.

A node stands below all that it reads, and under what it reads first where that place is free, so that a network's trunk is a
straight line and its shortcuts are bows beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fxquant.capture.islands import graphs_of
from fxquant.graph.leveled import LeveledModule
from fxquant.page.markup import Markup, anchor, tag
from fxquant.reporting.diff import Diff, GraphRows
from fxquant.reporting.paths import elide
from fxquant.reporting.rows import Row

__all__ = ["Drawn", "draw", "drawn_graphs"]

_WIDTH, _HEIGHT, _ACROSS, _DOWN = 168, 38, 30, 30
_SHOWN = ("integer", "border", "float", "input", "output")


@dataclass(frozen=True)
class Drawn:
    """A graph as it is drawn.

    Attributes:
        path: the graph's place in the model.
        nodes: name, what it is called, its op, and its state, in the order of execution.
        edges: pairs of names: what a node reads, past nodes that are not drawn, and the node.
    """

    path: str
    nodes: tuple[tuple[str, str, str, str], ...]
    edges: tuple[tuple[str, str], ...]


def drawn_graphs(after: nn.Module, compared: Diff) -> tuple[Drawn, ...]:
    """Every graph of a model, without what reads shapes and parameters."""
    graphs = graphs_of(after)
    return tuple(_drawn(part, graphs[part.path]) for part in compared.parts if isinstance(part, GraphRows))


def _drawn(part: GraphRows, graph: LeveledModule) -> Drawn:
    rows = {row.name: row for row in part.rows}
    read: dict[str, list[str]] = {}
    nodes: list[tuple[str, str, str, str]] = []
    edges: list[tuple[str, str]] = []
    for node in graph.graph.nodes:
        sources = list(dict.fromkeys(name for own in node.all_input_nodes for name in read.get(own.name, ())))
        state = _state(rows.get(node.name), node.op)
        if state not in _SHOWN:
            read[node.name] = sources if state == "shape" else []
            continue
        row = rows.get(node.name)
        nodes.append((node.name, row.path if row else node.name, _op(row, node.op), state))
        edges += [(source, node.name) for source in sources]
        read[node.name] = [node.name]
    return Drawn(part.path, tuple(nodes), tuple(edges))


def _state(row: Row | None, op: str) -> str:
    if op == "output":
        return "output"
    return row.state if row is not None else "shape"


def _op(row: Row | None, op: str) -> str:
    if row is None:
        return op
    return row.before if row.state == "float" else (row.after or row.before).removeprefix("Quant")


def _places(graph: Drawn) -> dict[str, tuple[int, int]]:
    """The layer and the column of each node."""
    read: dict[str, list[str]] = {name: [] for name, *_ in graph.nodes}
    for source, node in graph.edges:
        read[node].append(source)
    places: dict[str, tuple[int, int]] = {}
    taken: dict[int, set[int]] = {}
    for name, *_ in graph.nodes:
        sources = read[name]
        layer = 1 + max((places[source][0] for source in sources), default=-1)
        wanted = places[sources[0]][1] if sources else 0
        held = taken.setdefault(layer, set())
        column = next(wanted + way for way in _outwards() if wanted + way >= 0 and wanted + way not in held)
        held.add(column)
        places[name] = (layer, column)
    return places


def _outwards() -> Sequence[int]:
    return [way for distance in range(1000) for way in ((distance, -distance) if distance else (0,))]


def draw(graph: Drawn, number: int, rows: Mapping[str, str | None] | None = None) -> Markup:
    """The drawing; ``number`` is the graph's among all, as in the ids of rows; or ``rows`` gives the id for each node."""
    places = _places(graph)
    spots = {name: (column * (_WIDTH + _ACROSS), layer * (_HEIGHT + _DOWN)) for name, (layer, column) in places.items()}
    right = max((x for x, _ in spots.values()), default=0) + _WIDTH + 60
    bottom = max((y for _, y in spots.values()), default=0) + _HEIGHT
    edges = "".join(_edge(spots[source], spots[node]) for source, node in graph.edges)
    boxes = []
    for name, path, op, state in graph.nodes:
        x, y = spots[name]
        label = tag("text", elide(path, 24), x=x + _WIDTH / 2, y=y + 16)
        kind = tag("text", elide(op, 26), x=x + _WIDTH / 2, y=y + 30, _class="op")
        box = tag("rect", x=x, y=y, width=_WIDTH, height=_HEIGHT, rx=6)
        parts = tag("g", tag("title", f"{path}: {op}, {state}"), box, label, kind, _class=f"node {state}")
        own = anchor("row", number, name) if rows is None else rows.get(name)
        row = None if state == "output" or own is None else f"#{own}"
        boxes.append(tag("a", parts, href=row, id=anchor("node", number, name)) if row else parts)
    box_of_view = f"-30 -10 {right + 60} {bottom + 20}"
    drawn = tag("svg", tag("path", d=edges, _class="edges"), *boxes, viewBox=box_of_view, _class="graph", role="img")
    buttons = [
        tag("button", sign, type="button", data_zoom=how) for sign, how in (("+", "in"), ("−", "out"), ("fit", "fit"))
    ]
    return tag("div", tag("div", *buttons, _class="zoom"), drawn, _class="drawing")


def _edge(source: tuple[int, int], node: tuple[int, int]) -> str:
    x, y = source[0] + _WIDTH // 2, source[1] + _HEIGHT
    end, top = node[0] + _WIDTH // 2, node[1]
    far = top - y
    if far <= _DOWN:
        return f"M{x} {y}C{x} {y + far // 2} {end} {y + far // 2} {end} {top}"
    side = max(x, end) + _WIDTH // 2 + _ACROSS // 2  # round the boxes between
    return (
        f"M{x} {y}C{x} {y + 14} {side} {y + 6} {side} {y + 24}V{top - 24}C{side} {top - 6} {end} {top - 14} {end} {top}"
    )
