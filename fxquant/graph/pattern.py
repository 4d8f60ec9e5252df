"""Matching straight chains of nodes: the next link, or a ``Refusal`` where the chain breaks, which reaches the diff."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from fxquant.errors import Refusal

__all__ = ["next_in_chain", "nodes_in", "reads_alone"]


def next_in_chain(node: fx.Node) -> fx.Node | Refusal:
    """The one node that reads ``node``, or why there is none."""
    users = list(node.users)
    if len(users) != 1:
        others = ", ".join(user.name for user in users[1:4])
        return Refusal(
            f"{node.name}'s output is not used" if not users else f"{node.name}'s output is also used by {others}"
        )
    if users[0].op == "output":
        return Refusal(f"{node.name} is an output of the model")
    return users[0]


def reads_alone(read: fx.Node, held: Callable[[str], Any]) -> bool:
    """Whether the tensor that ``read`` gets is read by no other node, and by no module that is called, and for one op.

    Args:
        read: a ``get_attr``.
        held: gives the tensor at a path.
    """
    path = str(read.target)
    for other in read.graph.nodes:
        if other.op == "get_attr" and other is not read and held(str(other.target)) is held(path):
            return False
        if other.op == "call_module" and path.startswith(f"{other.target}."):
            return False
    return len(read.users) == 1


def nodes_in(value: Any) -> Iterator[fx.Node]:
    """Every node inside an argument, through lists, tuples, dicts and slices."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from nodes_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from nodes_in(item)
    elif isinstance(value, slice):
        yield from nodes_in((value.start, value.stop, value.step))
