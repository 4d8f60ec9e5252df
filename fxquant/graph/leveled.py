"""A ``torch.fx.GraphModule`` that knows its level and keeps the facts of its nodes through copying and pickling.

fx pickles a graph module as source code and traces that again, which drops ``node.meta`` and may reorder nodes. Here the
nodes themselves are written, so that a model read from disk prints the same diff as the one that was saved.

What is known of a node stands in ``node.meta``, written by capture and the passes: ``module_path``, where in the
user's model it was called; ``source``, that call's ``file:line``; ``shape`` and ``dtype`` where an example was run;
``notes``, what passes declined to do and why; ``absorbed``, the names of nodes that this one does too now, each with
``folded`` or ``merged``; ``by``, the pass that made it; ``origin``, the user's nodes it stands for.
"""

from __future__ import annotations

import importlib
import math
import operator
from typing import Any

import torch
from torch import fx, nn

__all__ = ["LEVELS", "LeveledModule"]

LEVELS = ("captured", "canonical", "prepared", "frozen", "integer")

_NAMESPACES = (torch, torch.nn.functional, torch.Tensor, operator, math, torch.linalg, torch.special)


class LeveledModule(fx.GraphModule):
    """What every pass takes and gives: a graph, its modules, and the level whose laws it obeys.

    Attributes:
        level: one of ``LEVELS``.
        settings: what the graph was made with (recipe, mode, input shapes); plain data that is saved with the model.
    """

    def __init__(self, root: nn.Module | dict[str, Any], graph: fx.Graph, class_name: str = "LeveledModule") -> None:
        super().__init__(root, graph, class_name)
        self.meta.update(getattr(root, "meta", {}) if isinstance(root, nn.Module) else {})
        if isinstance(root, nn.Module):
            self.adopt_order(root)

    def adopt_order(self, source: nn.Module) -> None:
        """Order parameters and submodules as in ``source``, so that an optimizer's state still loads; new ones come last.

        fx makes containers anew and fills them in the order of use.
        """
        containers = dict(source.named_modules(remove_duplicate=False))
        for path, part in self.named_modules():
            if path in containers and (part is self or type(part) is nn.Module):
                for registry in ("_modules", "_parameters", "_buffers"):
                    given, own = list(containers[path].__dict__[registry]), part.__dict__[registry]
                    names = [n for n in given if n in own] + [n for n in own if n not in given]
                    part.__dict__[registry] = {name: own[name] for name in names}

    @property
    def level(self) -> str:
        return self.meta.get("level", "captured")

    @property
    def settings(self) -> dict[str, Any]:
        return self.meta.setdefault("settings", {})

    def __deepcopy__(self, memo: Any) -> LeveledModule:
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, LeveledModule)
        twin.__class__.__name__ = self.__class__.__name__  # fx names every copy GraphModule
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        state = {k: v for k, v in self.__dict__.items() if k not in ("_graph", "_tracer_cls", "_tracer_extras")}
        return _rebuild, (self.__class__.__name__, state, [_record(node) for node in self.graph.nodes])


class _Reference:
    """Stands for a node inside pickled arguments."""

    def __init__(self, name: str) -> None:
        self.name = name


def _record(node: fx.Node) -> tuple[Any, ...]:
    by_name: Any = lambda n: _Reference(n.name)  # noqa: E731
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), by_name)
    target = node.target if isinstance(node.target, str) else _function_path(node.target)
    meta = {k: v for k, v in node.meta.items() if k not in ("nn_module_stack", "stack_trace", "val")}
    return node.name, node.op, target, args, kwargs, meta


def _function_path(function: Any) -> tuple[str, str]:
    for space in _NAMESPACES:
        name = getattr(function, "__name__", "")
        if getattr(space, name, None) is function:
            return (space.__module__ + ".Tensor", name) if space is torch.Tensor else (space.__name__, name)
    return function.__module__, function.__qualname__


def _function(path: tuple[str, str]) -> Any:
    module, name = path
    if module.endswith(".Tensor"):
        return getattr(torch.Tensor, name)
    found: Any = __import__("builtins") if module == "_operator_builtin" else importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _rebuild(class_name: str, state: dict[str, Any], records: list[tuple[Any, ...]]) -> LeveledModule:
    graph, nodes = fx.Graph(), dict[str, fx.Node]()

    def resolve(value: Any) -> Any:
        if isinstance(value, _Reference):
            return nodes[value.name]
        if isinstance(value, dict):
            return {k: resolve(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(resolve(value.start), resolve(value.stop), resolve(value.step))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(resolve(v) for v in value))
        return type(value)(resolve(v) for v in value) if isinstance(value, (list, tuple)) else value

    for name, op, target, args, kwargs, meta in records:
        target = _function(target) if isinstance(target, tuple) else target
        node = graph.create_node(op, target, tuple(resolve(a) for a in args), resolve(dict(kwargs)), name)
        node.meta = meta
        nodes[name] = node
    module = LeveledModule.__new__(LeveledModule)
    nn.Module.__init__(module)
    module.__dict__.update(state)
    module.__class__.__name__ = class_name
    module.__dict__["_tracer_cls"], module.__dict__["_tracer_extras"] = None, {}
    module.graph = graph
    return module
