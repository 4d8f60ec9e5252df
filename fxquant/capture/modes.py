"""Merging what a module does in training mode with what it does in eval mode, where only the mode differs.

``F.batch_norm(x, ..., training=True)`` in one trace and ``training=False`` in the other are one call with
``training=<the mode>``. Anything else that differs is a difference in structure, and cannot be one graph.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxquant.capture.findings import require
from fxquant.capture.tracer_type import Tracing

__all__ = ["by_mode", "merge_modes", "record_of"]


class _DiffersError(Exception):
    pass


class _Same:
    def __init__(self, number: int) -> None:
        self.number = number


Record = tuple[list[tuple[Any, Any, Any, Any]], Any]


def record_of(result: Any, nodes: list[fx.Node]) -> Record:
    """What was traced, with the new nodes by number, so that it outlives them."""
    numbers = {node: _Same(i) for i, node in enumerate(nodes)}

    def plain(value: Any) -> Any:
        if issubclass(type(value), fx.Proxy):
            value = value.node
        if isinstance(value, fx.Node):
            return numbers.get(value, value)
        if isinstance(value, slice):
            return ("slice", plain(value.start), plain(value.stop), plain(value.step))
        if isinstance(value, (list, tuple)):
            return [type(value).__name__.removeprefix("immutable_"), *(plain(item) for item in value)]
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value

    rows = [
        (n.op, n.target, plain(n.args[:2] if n.target is require else n.args), plain(dict(n.kwargs))) for n in nodes
    ]
    return rows, plain(result)


def merge_modes(tracer: Tracing, training: Record, evaluation: Record, nodes: list[fx.Node]) -> bool:
    """Make ``nodes``, traced in eval mode, follow the mode at run time; False, and nothing done, where they cannot."""
    asked: list[tuple[fx.Node, Any, tuple[Any, Any]]] = []
    if len(training[0]) != len(evaluation[0]):
        return False
    try:
        _compare(training[1], evaluation[1], None)
        for node, one, other in zip(nodes, training[0], evaluation[0], strict=True):
            if one[:2] != other[:2]:
                return False
            for where, a, b in zip(("args", "kwargs"), one[2:], other[2:], strict=True):
                found: list[tuple[Any, tuple[Any, Any]]] = []
                _compare(a, b, found)
                asked += [(node, (where, *path), values) for path, values in found]
    except _DiffersError:
        return False
    flags = _Flags(tracer)
    for node, path, values in asked:
        _follow_mode(node, path, flags.node(*values))
    return True


def _compare(a: Any, b: Any, found: list[tuple[Any, tuple[Any, Any]]] | None, path: tuple[Any, ...] = ()) -> None:
    if isinstance(a, (bool, float)) and type(a) is type(b) and a != b and found is not None:
        found.append((path, (a, b)))
    elif isinstance(a, _Same) or isinstance(b, _Same):
        if not (isinstance(a, _Same) and isinstance(b, _Same) and a.number == b.number):
            raise _DiffersError
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and a[:1] == b[:1]:
        for i, (x, y) in enumerate(zip(a[1:], b[1:], strict=True)):
            _compare(x, y, found, (*path, i))
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            _compare(a[key], b[key], found, (*path, key))
    elif type(a) is not type(b) or not (a is b or a == b):
        raise _DiffersError


def by_mode(training: bool, in_training: Any, in_eval: Any) -> Any:
    """The value that an argument has in the present mode."""
    return in_training if training else in_eval


class _Flags:
    def __init__(self, tracer: Tracing) -> None:
        self._tracer = tracer

    def node(self, in_training: Any, in_eval: Any) -> fx.Node:
        """A node that is ``in_training`` in training mode and ``in_eval`` in eval mode."""
        flag = self._tracer.flag_node()
        if in_training is True:
            return flag
        with self._tracer.graph.inserting_after(flag):
            return self._tracer.create_node("call_function", by_mode, (flag, in_training, in_eval), {})


def _follow_mode(node: fx.Node, path: tuple[Any, ...], flag: fx.Node) -> None:
    def put(value: Any, rest: tuple[Any, ...]) -> Any:
        if not rest:
            return flag
        if isinstance(value, dict):
            return {**value, rest[0]: put(value[rest[0]], rest[1:])}
        items = list(value)
        items[rest[0]] = put(items[rest[0]], rest[1:])
        return tuple(items) if isinstance(value, tuple) else items

    if path[0] == "args":
        node.args = put(node.args, path[1:])
    else:
        node.kwargs = put(dict(node.kwargs), path[1:])
