"""apply_recipe: write on each op the setting that the recipe gives it, or that it stays in float."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from fxquant.errors import InputError
from fxquant.graph.edit import Edit
from fxquant.graph.leveled import LeveledModule
from fxquant.ops.behaviour import FloatOnly, Measuring
from fxquant.ops.calls import behaviour_of
from fxquant.recipe import Recipe, Site

__all__ = ["apply_recipe", "op_path", "require_fit", "site_of"]


def op_path(node: fx.Node) -> str:
    """Where an op stands in the user's model: its module's path, or its caller's path and the op's name."""
    if node.op == "call_module":
        return str(node.target)
    inside = node.meta.get("module_path") or ""
    entry = node.meta["entry"]
    if inside and node.meta.get("was_module"):
        return inside
    return f"{inside}.{entry.name}" if inside else entry.name


def apply_recipe(module: LeveledModule, *, recipe: Recipe) -> LeveledModule:
    """Give each op its setting; selectors see the model's own paths, module classes and the table's op names.

    Law:
        The graph is unchanged; an op that the recipe leaves in float carries the reason.
    """
    edit = Edit(module, by="apply_recipe")
    sites: list[Site] = []
    for node in edit.nodes:
        behaviour = behaviour_of(node)
        if behaviour is None or isinstance(behaviour, Measuring):
            continue
        site = site_of(module, node)
        sites.append(site)
        if isinstance(behaviour, FloatOnly):
            continue
        setting = recipe.setting(recipe.choose(site))
        node.meta["setting"] = setting
        if setting is None:
            node.meta["reason"] = "the recipe keeps it in float"
    return edit.done(sites=sites)


def site_of(module: LeveledModule, node: fx.Node) -> Site:
    """What selectors are held against for an op of a canonical graph."""
    part = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    layer, path = module.meta.get("layer"), str(module.meta.get("path") or "")
    if layer:
        return Site(path, node.meta["entry"].name, layer)
    kind = type(part) if part is not None else node.meta.get("was_module")
    return Site(f"{path}.{op_path(node)}" if path else op_path(node), node.meta["entry"].name, kind)


def require_fit(graphs: Iterable[LeveledModule], recipe: Recipe, *, name: str) -> None:
    """Hold the recipe against all graphs of a model.

    Raises:
        RecipeError: a selector matches nothing.
        InputError: the model has no op that can be quantized.
    """
    graphs = list(graphs)
    recipe.require_all_used([site for graph in graphs for site in graph.meta.pop("sites", ())])
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    if not any("setting" in node.meta for node in nodes):
        reasons = [f"    {n.name}: {n.meta['reason']}" for n in nodes if "reason" in n.meta]
        raise InputError(
            f"{name} has no op that fxquant can quantize.\n"
            + ("\n".join(reasons[:10]) if reasons else "    its forward calls no op")
        )
