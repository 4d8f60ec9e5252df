"""Orders of a graph's nodes, and its parts: weighted ops late, residual units as blocks."""

from __future__ import annotations

from torch import fx

from fxquant.behaviour import Weighted
from fxquant.graph.leveled import LeveledModule
from fxquant.ops.calls import behaviour_of

__all__ = ["late_weights", "may_write", "units"]


def late_weights(graph: LeveledModule) -> list[fx.Node]:
    """The nodes in an order of execution in which every weighted op stands as late as what reads it allows.

    Where a node may write into its operands the order stays as it is.
    """
    nodes = list(graph.graph.nodes)
    if any(may_write(node) for node in nodes):
        return nodes
    waiting = {node: len(node.all_input_nodes) for node in nodes}
    place = {node: i for i, node in enumerate(nodes)}
    light: list[fx.Node] = []
    weighted: list[fx.Node] = []
    done: list[fx.Node] = []

    def is_ready(node: fx.Node) -> None:
        (weighted if isinstance(behaviour_of(node), Weighted) else light).append(node)

    for node in nodes:
        if not waiting[node]:
            is_ready(node)
    while light or weighted:
        group = light or weighted
        node = min(group, key=place.__getitem__)
        group.remove(node)
        done.append(node)
        for user in node.users:
            waiting[user] -= 1
            if not waiting[user]:
                is_ready(user)
    return done


def units(graph: LeveledModule) -> list[list[fx.Node]]:
    """The compute nodes in blocks that one tensor enters and one leaves: residual units, and single layers in a chain.

    A block ends behind a node that is all that later nodes still read; measures of shapes that are read later do not count.
    A chain that one quantizer ends (convolution, norm, activation) stays in one block.
    """
    order = [node for node in graph.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    last = {read: i for i, node in enumerate(order) for read in node.all_input_nodes}
    blocks: list[list[fx.Node]] = [[]]
    open_values: set[fx.Node] = {node for node in graph.graph.nodes if node.op == "placeholder" and node in last}
    for i, node in enumerate(order):
        blocks[-1].append(node)
        open_values = {value for value in open_values if last[value] > i}
        if last.get(node, -1) > i and node.meta.get("is_tensor", True):
            open_values.add(node)
        if open_values == {node} and not node.meta.get("continues"):
            blocks.append([])
    return [block for block in blocks if block]


def may_write(node: fx.Node) -> bool:
    """Whether a node runs code that the op table does not know, under a name by which torch's functions write in place."""
    if node.op not in ("call_function", "call_method") or "reason" not in node.meta:
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name == "setitem" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
