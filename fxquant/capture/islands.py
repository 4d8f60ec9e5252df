"""A captured model as a tree: graphs, and between them modules that run their author's own code (islands).

The top is a graph, or, where the top module could not be traced, that module itself with graphs in place of its parts.
A graph may call islands, which may hold graphs again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import nn

from fxquant.capture.findings import Island, Specialization
from fxquant.graph.edit import clone_module
from fxquant.graph.leveled import ISLAND_MARK, LeveledModule, is_container

__all__ = [
    "Island",
    "Model",
    "Specialization",
    "graphs_of",
    "islands_of",
    "level_of",
    "map_graphs",
    "mark_island",
    "specializations_of",
]

Model = TypeVar("Model", bound=nn.Module)
"""A captured model, or one made of it: what a verb takes and gives back."""


def mark_island(module: nn.Module, island: Island) -> None:
    """Write on ``module`` that it is an island."""
    module.__dict__[ISLAND_MARK] = island


def graphs_of(module: nn.Module) -> dict[str, LeveledModule]:
    """Every graph of a captured model by its path, outer ones first; the path of the top is empty."""
    return {path: part for path, part in module.named_modules() if isinstance(part, LeveledModule)}


def level_of(module: nn.Module) -> str | None:
    """The level of a captured model's graphs; None for a model that fxquant has not captured."""
    return next((graph.level for graph in graphs_of(module).values()), None)


def islands_of(module: nn.Module) -> tuple[Island, ...]:
    """Every module that runs as its author wrote it because it could not be traced."""
    return tuple(part.__dict__[ISLAND_MARK] for part in module.modules() if ISLAND_MARK in part.__dict__)


def specializations_of(module: nn.Module) -> tuple[Specialization, ...]:
    """Every answer that the graphs of ``module`` hold for given."""
    return tuple(
        node.meta["specialization"]
        for graph in graphs_of(module).values()
        for node in graph.graph.nodes
        if "specialization" in node.meta
    )


def _keep_what_is_read(before: LeveledModule, after: nn.Module) -> None:
    """Leave a layer's float parameters on its graph where code around it reads them."""
    for name in before.meta.get("read_from_outside", ()):
        if name not in after._parameters and name not in after._buffers:
            value = getattr(before, name, None)
            if value is None or isinstance(value, nn.Parameter):
                kept = None if value is None else nn.Parameter(value.detach().clone(), requires_grad=False)
                after.register_parameter(name, kept)
            else:
                after.register_buffer(name, value.detach().clone())


def map_graphs(module: nn.Module, change: Callable[[LeveledModule], LeveledModule]) -> nn.Module:
    """A model like ``module`` with ``change`` applied to each of its graphs; nothing of ``module`` is touched."""
    done: dict[nn.Module, nn.Module] = {}

    def visit(part: nn.Module) -> nn.Module:
        if part not in done:
            if isinstance(part, LeveledModule):
                done[part] = change(part)
                _keep_what_is_read(part, done[part])
                replace_inside(done[part])
            elif any(isinstance(inner, LeveledModule) for inner in part.modules()):
                done[part] = _with_parts(part, {name: visit(child) for name, child in _children(part)})
            else:
                done[part] = part
        return done[part]

    def replace_inside(graph: nn.Module) -> None:
        for name, child in _children(graph):
            if is_container(child):
                replace_inside(child)
            elif (changed := visit(child)) is not child:
                graph._modules[name] = changed

    return visit(module)


def _children(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in list(part._modules.items()):
        if child is not None:
            yield name, child


def _with_parts(part: nn.Module, parts: dict[str, nn.Module]) -> nn.Module:
    twin: nn.Module = clone_module(part)
    for name, child in parts.items():
        twin._modules[name] = child
        if twin.__dict__.get(name) is part._modules[name]:  # a method that was captured
            twin.__dict__[name] = child
    return twin
