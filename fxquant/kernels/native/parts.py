"""An integer graph in parts, those that the native kernels have and those between them.

A graph that does not lower as a whole (an island, an op on 16 bits, a part of three dimensions) is cut so that as much as
can be runs natively. What a part takes and gives are floats, bytes, and numbers that were read off shapes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fxquant.errors import Refusal
from fxquant.graph.excerpt import excerpt
from fxquant.graph.leveled import LeveledModule
from fxquant.kernels.native.lowering import Survey, survey
from fxquant.nn.integer import IntegerOp, Quantize, multiplies

__all__ = ["Part", "Parts", "cut_up"]

_LEAST = 3
"""Ops beyond rounding that a part without weights has natively, at least: with fewer, calling it costs what it saves."""


@dataclass(frozen=True)
class Part:
    """A part of a graph.

    Attributes:
        module: its own graph, whose nodes have the names that they had; its modules are the model's.
        native: whether it is for the native kernels.
        takes: the nodes of the whole graph that it takes, in the order of its inputs.
        gives: those that it gives, in the order of its results.
        last: those that nothing reads after it.
    """

    module: LeveledModule
    native: bool
    takes: tuple[fx.Node, ...]
    gives: tuple[fx.Node, ...]
    last: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Parts:
    """A graph in parts.

    Attributes:
        inputs: the graph's, in order.
        attributes: nodes that read a tensor of the graph in each call.
        parts: in the order in which they run.
        result: the graph's result, with nodes.
    """

    inputs: tuple[fx.Node, ...]
    attributes: tuple[fx.Node, ...]
    parts: tuple[Part, ...]
    result: Any

    @property
    def native(self) -> list[str]:
        """The names of the nodes that are for the native kernels."""
        nodes = (node for part in self.parts if part.native for node in part.module.graph.nodes)
        return [node.name for node in nodes if node.op == "call_module"]


def cut_up(graph: LeveledModule, refusal: Refusal) -> Parts | Refusal:
    """The parts of a graph that the native kernels refused.

    Args:
        graph: an integer graph.
        refusal: what they said; a node that it names is in no native part.

    Returns:
        The parts; ``refusal`` where no part is worth it.
    """
    nodes = _Nodes(graph, survey(graph), refusal)
    levels = nodes.levels()
    while weak := nodes.weak(levels):
        nodes.outside |= weak
        levels = nodes.levels()
    found = {level for node, level in levels.items() if node.op != "placeholder"}
    if len(found) < 2 or not any(level % 2 for level in found):
        return refusal  # nothing is native, or all of it would be, and that was refused
    constants = {node for node in graph.graph.nodes if node.op == "get_attr"} - nodes.shared
    return _cut(graph, levels, constants)


class _Nodes:
    """The nodes of a graph, each outside or natively, and when it can run: at an even level outside, at an odd natively."""

    def __init__(self, graph: LeveledModule, found: Survey, refusal: Refusal) -> None:
        self.graph, self.lines = graph, found.lines
        self.sizes = self._sizes()
        self.shared = self._shared()
        refused = refusal.where.partition(":")[0]
        self.outside = {node for node, line in self.lines.items() if line.name == refused or not self._can(node, found)}
        self._keep_tuples_together()

    def _can(self, node: fx.Node, found: Survey) -> bool:
        line = found.lines[node]
        if node.op == "placeholder" or node in found.refusals:
            return False
        return node not in self.shared and (line.operation is not None or line.moves)

    def _shared(self) -> set[fx.Node]:
        """The nodes whose memory may be that which another one writes into: what lies between them computes nothing anew."""
        writing = [node for node in self.lines if self._writes(node)]
        found = {other for node in writing for other in (node, *node.all_input_nodes) if other in self.lines}
        names: dict[Any, list[fx.Node]] = {}  # of one tensor, or of parts of it
        for node in self.lines:
            if node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(self.graph)
                kept = value.untyped_storage().data_ptr() if isinstance(value, Tensor) else id(value)
                names.setdefault(kept, []).append(node)
        alike = {node: own for own in names.values() for node in own}
        left = list(found)
        while left:
            node = left.pop()
            for other in (*node.all_input_nodes, *node.users, *alike.get(node, ())):
                line = self.lines.get(other)
                if line is None or line.operation is not None or other in found or other in self.sizes:
                    continue
                found.add(other)
                left.append(other)
        return found

    def _sizes(self) -> set[fx.Node]:
        """The nodes that are read off shapes alone."""
        found = set[fx.Node]()
        for node, line in self.lines.items():
            shaped = isinstance(node.meta.get("shape"), tuple)
            if line.measures or (node.all_input_nodes and not shaped and found.issuperset(node.all_input_nodes)):
                found.add(node)
        return found

    def _keep_tuples_together(self) -> None:
        """What is no tensor, and no number, does not pass from part to part: what gives and what reads it are one part.

        What an island gives is not known beforehand; what an integer op reads is a tensor.
        """
        changed = True
        while changed:
            changed = False
            for node in self.lines:
                known = isinstance(node.meta.get("shape"), tuple) or node in self.sizes
                if known or node.op in ("get_attr", "placeholder"):
                    continue
                users = (user for user in node.users if user in self.lines and user not in self.sizes)
                group = {node, *(user for user in users if not isinstance(self._part(user), IntegerOp))}
                if group & self.outside and group - self.outside:
                    self.outside |= group
                    changed = True

    def levels(self) -> dict[fx.Node, int]:
        """When each node can run, but for constants, which are read where they are wanted."""
        found: dict[fx.Node, int] = {}
        ordered = read = written = 0
        for node in self.lines:
            if node.op == "get_attr":
                continue
            level = max((found[source] for source in node.all_input_nodes if source in found), default=0)
            if node not in self.sizes:
                if self._acts(node):  # in the order in which it was written
                    level = max(level, ordered)
                reads = not self.shared.isdisjoint(node.all_input_nodes)
                if reads:
                    level = max(level, written)
                if self._writes(node):
                    level = max(level, read)
                level += level % 2 != int(node not in self.outside)
                ordered = level if self._acts(node) else ordered
                read = max(read, level) if reads else read
                written = level if self._writes(node) else written
            found[node] = level
        return found

    def _writes(self, node: fx.Node) -> bool:
        """Whether a node writes in place; integer ops give new tensors."""
        return "writes" in node.meta and not isinstance(self._part(node), IntegerOp)

    def _acts(self, node: fx.Node) -> bool:
        """Whether a node may do more than give its result, or depend on more than its inputs."""
        if node in self.shared:
            return True
        if node.op == "call_module":
            return not isinstance(self._part(node), IntegerOp)
        return "reason" in node.meta or getattr(node.target, "is_check", False)

    def weak(self, levels: dict[fx.Node, int]) -> set[fx.Node]:
        """The nodes of native parts that are not worth a call."""
        by_level: dict[int, list[fx.Node]] = {}
        for node, level in levels.items():
            if level % 2 and node not in self.sizes:
                by_level.setdefault(level, []).append(node)
        return {node for nodes in by_level.values() if not self._is_worth(nodes) for node in nodes}

    def _is_worth(self, nodes: Iterable[fx.Node]) -> bool:
        parts = [self._part(node) for node in nodes if self.lines[node].operation is not None]
        working = [part for part in parts if isinstance(part, IntegerOp) and not isinstance(part, Quantize)]
        return len(working) >= _LEAST or any(multiplies(part) for part in working)

    def _part(self, node: fx.Node) -> Any:
        return self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _cut(graph: LeveledModule, levels: dict[fx.Node, int], constants: set[fx.Node]) -> Parts:
    """The graph cut between the levels of its nodes; native parts hold the constants that they read."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    by_level: dict[int, list[fx.Node]] = {}
    for node, level in levels.items():
        if node.op != "placeholder":
            by_level.setdefault(level, []).append(node)
    wanted, parts = set(output.all_input_nodes), list[Part]()
    for level in sorted(by_level, reverse=True):
        native = bool(level % 2)
        module, takes, gives = excerpt(graph, by_level[level], wanted, constants if native else ())
        parts.insert(0, Part(module, native, takes, gives, tuple(node for node in takes if node not in wanted)))
        wanted |= set(takes)
    inputs = tuple(node for node in graph.graph.nodes if node.op == "placeholder")
    return Parts(inputs, tuple(node for node in wanted if node.op == "get_attr"), tuple(parts), output.args[0])
