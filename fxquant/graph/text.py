"""Graphs as stable text: one line per node, the same for the same graph, for tests, errors and people."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

__all__ = ["graph_text", "node_text", "target_text"]


def target_text(node: fx.Node) -> str:
    """What ``node`` runs: a module's class and path, or a function's or method's name."""
    if node.op == "call_module":
        module = node.graph.owning_module
        found: Any = module
        for part in str(node.target).split("."):
            found = getattr(found, part, None)
        name = found._get_name() if isinstance(found, nn.Module) else "?"
        return f"{name}[{node.target}]"
    if node.op == "call_method":
        return f".{node.target}"
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target)


def _argument_text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_argument_text(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_argument_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return ":".join("" if part is None else _argument_text(part) for part in (value.start, value.stop, value.step))
    return repr(value)


def node_text(node: fx.Node) -> str:
    """``name = Target(args)``, without types or hashes."""
    if node.op == "placeholder":
        return f"{node.name} = input"
    if node.op == "output":
        return f"return {_argument_text(node.args[0])}"
    if node.op == "get_attr":
        return f"{node.name} = self.{node.target}"
    arguments = [_argument_text(a) for a in node.args]
    arguments += [f"{k}={_argument_text(v)}" for k, v in node.kwargs.items()]
    return f"{node.name} = {target_text(node)}({', '.join(arguments)})"


def graph_text(module: fx.GraphModule) -> str:
    """The whole graph, a line per node in execution order."""
    return "\n".join(node_text(node) for node in module.graph.nodes)
