"""apply_recipe: write on each op the setting that the recipe gives it, or that it stays in float."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from fxquant.errors import InputError
from fxquant.graph.edit import Edit
from fxquant.graph.leveled import LeveledModule
from fxquant.ops.behaviour import ChannelAffine, FloatOnly, Measuring, Weighted
from fxquant.ops.calls import behaviour_of
from fxquant.recipe import Recipe, Site
from fxquant.targets import X86, Target
from fxquant.targets.fitting import filled

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


def apply_recipe(module: LeveledModule, *, recipe: Recipe, target: Target = X86) -> LeveledModule:
    """Give each op its setting; selectors see the model's own paths, module classes and the table's op names.

    Args:
        module: a canonical graph.
        recipe: what is quantized how.
        target: fills in what the recipe leaves open, and keeps in float what it has no integers for.

    Law:
        The graph is unchanged; an op that the recipe or the target leaves in float carries the reason.
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
        reason = "the recipe keeps it in float" if setting is None else _lacks(node, target)
        node.meta["setting"] = None
        if setting is None or reason is not None:
            node.meta["reason"] = reason
        else:
            has_weight = isinstance(behaviour, Weighted)
            node.meta["setting"] = filled(setting, target, site.op, path=site.path, has_weight=has_weight)
    return edit.done(sites=sites)


def _lacks(node: fx.Node, target: Target) -> str | None:
    """Why the target leaves ``node`` in float; a batch norm behind a weighted op is that op's, and no op of its own."""
    before = node.args[0] if node.args else None
    if isinstance(behaviour_of(node), ChannelAffine) and isinstance(before, fx.Node):
        if isinstance(behaviour_of(before), Weighted) and len(before.users) == 1:
            node = before
    return target.lacks(node.meta["entry"].name)


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
