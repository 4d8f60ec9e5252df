"""Some nodes of a graph as a graph of their own, over the same modules."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from fxquant.graph.leveled import LeveledModule

__all__ = ["excerpt"]

_KEPT = ("shape", "dtype")
"""What an input keeps of what is known of the node that it stands for."""


def excerpt(
    graph: LeveledModule, nodes: Sequence[fx.Node], wanted: Collection[fx.Node], constants: Collection[fx.Node]
) -> tuple[LeveledModule, tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """A graph that computes ``nodes`` from what they read.

    Args:
        graph: whose nodes they are; not changed.
        nodes: in its order.
        wanted: nodes that others read.
        constants: nodes that read tensors of ``graph``, which the excerpt may do itself.

    Returns:
        A graph whose nodes have the names that they had and whose modules and tensors are those of ``graph``, with a tuple
        as its result; the nodes that its inputs stand for, in order; and those of ``nodes`` in its result.
    """
    made, own = fx.Graph(), set(nodes)
    read = list(dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in own))
    takes = tuple(node for node in read if node not in constants)
    twins = {node: made.placeholder(node.name) for node in takes}
    for node, twin in twins.items():
        twin.meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
    for node in (*(node for node in read if node in constants), *nodes):
        twins[node] = made.node_copy(node, twins.__getitem__)
    gives = tuple(node for node in nodes if node in wanted)
    made.output(tuple(twins[node] for node in gives))
    module = LeveledModule(graph, made)
    module.meta.pop("call", None)  # how the whole graph is called
    return module, takes, gives
