"""The places of a prepared model where something is rounded: weights, and results of ops with a quantizer of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxquant.capture.islands import graphs_of
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.fake_quantize import FakeQuantize
from fxquant.reporting.census import absolute, module_at
from fxquant.reporting.rows import op_text

__all__ = ["Spot", "end_of_chain", "spots_of"]


@dataclass(frozen=True, eq=False)
class Spot:
    """One op that rounds something.

    Attributes:
        path: where it is in the model, as the diff names it.
        op: its class.
        part: its module in the prepared model.
        grid: the quantizer on whose grid its result ends: its own, or that of the last link of its fused chain; None where
            the result stays float.
        rounds: whether it rounds its result itself.
        weight: the quantizer of its weight; None for ops without one.
        key: its graph's path and the name of the chain's last node, which the integer model keeps.
    """

    path: str
    op: str
    part: Any
    grid: FakeQuantize | None
    rounds: bool
    weight: FakeQuantize | None
    key: tuple[str, str]

    @property
    def bits(self) -> int:
        """The fewest bits of what it rounds."""
        own = [self.grid] if self.rounds and self.grid is not None else []
        return min(q.scheme.bits for q in (*own, *([self.weight] if self.weight is not None else [])))


def spots_of(prepared: nn.Module) -> list[Spot]:
    """Every op that rounds something, each module once, in the order of execution."""
    found: dict[nn.Module, Spot] = {}
    for graph_path, graph in graphs_of(prepared).items():
        for node in graph.graph.nodes:
            part = module_at(graph, node)
            if part is not None and part not in found:
                found.update((part, spot) for spot in _spot(graph_path, graph, node, part))
    return list(found.values())


def _spot(graph_path: str, graph: LeveledModule, node: fx.Node, part: Any) -> Iterator[Spot]:
    own = getattr(part, "output_quantizer", None)
    weight = getattr(part, "weight_quantizer", None)
    rounds = isinstance(own, FakeQuantize) and bool(part.applies)
    if not rounds and not isinstance(weight, FakeQuantize):
        return
    end = end_of_chain(node)
    last: Any = module_at(graph, end)
    grid = getattr(last, "output_quantizer", None)
    yield Spot(
        path=absolute(graph, str(node.target)),
        op=op_text(graph, node).removeprefix("Quant"),
        part=part,
        grid=grid if isinstance(grid, FakeQuantize) else None,
        rounds=rounds,
        weight=weight if isinstance(weight, FakeQuantize) else None,
        key=(graph_path, end.name),
    )


def end_of_chain(node: fx.Node) -> fx.Node:
    """The last link of the fused chain that ``node`` is in: the one that rounds."""
    while node.meta.get("continues") and len(node.users) == 1:
        (node,) = node.users
    return node
