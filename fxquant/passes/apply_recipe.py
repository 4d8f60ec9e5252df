"""apply_recipe: write on each op the setting that the recipe gives it, or that it stays in float."""

from __future__ import annotations

from torch import fx

from fxquant.errors import InputError
from fxquant.graph.edit import Edit
from fxquant.graph.leveled import LeveledModule
from fxquant.ops.behaviour import FloatOnly, Measuring
from fxquant.ops.calls import behaviour_of
from fxquant.recipe import Recipe, Site

__all__ = ["apply_recipe", "op_path"]


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

    Raises:
        RecipeError: a selector matches nothing.
        InputError: the model has no op that can be quantized.
    """
    edit = Edit(module, by="apply_recipe")
    sites: list[Site] = []
    for node in edit.nodes:
        behaviour = behaviour_of(node)
        if behaviour is None or isinstance(behaviour, Measuring):
            continue
        part = edit.module(node)
        kind = type(part) if part is not None else node.meta.get("was_module")
        site = Site(op_path(node), node.meta["entry"].name, kind)
        sites.append(site)
        if isinstance(behaviour, FloatOnly):
            continue
        setting = recipe.setting(recipe.choose(site))
        node.meta["setting"] = setting
        if setting is None:
            node.meta["reason"] = "the recipe keeps it in float"
    _require_something(edit, module)
    recipe.require_all_used(sites)
    return edit.done()


def _require_something(edit: Edit, module: LeveledModule) -> None:
    if any("setting" in node.meta for node in edit.nodes):
        return
    reasons = [f"    {n.name}: {n.meta['reason']}" for n in edit.nodes if "reason" in n.meta]
    raise InputError(
        f"{module.__class__.__name__} has no op that fxquant can quantize.\n"
        + ("\n".join(reasons[:10]) if reasons else "    its forward calls no op")
    )
