"""apply_recipe: write on each op the setting that the recipe gives it, or that it stays in float."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace

from torch import fx

from fxquant.behaviour import ChannelAffine, FloatOnly, Measuring, Passing, Weighted
from fxquant.errors import InputError, Refusal
from fxquant.graph.edit import Edit
from fxquant.graph.leveled import LeveledModule
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.passes.facts import Placed
from fxquant.recipe import FIRST, INPUT, LAST, OUTPUT, Place, Recipe, Site
from fxquant.targets import X86, Target
from fxquant.targets.fitting import filled

__all__ = ["apply_recipe", "op_path", "places_of", "require_fit", "site_of"]


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
    places = places_of(module)
    sites: list[Site] = []
    for node in edit.nodes:
        if node.op == "placeholder" and INPUT in places.get(node.name, ()):
            sites.append(Site(node.name, "", None, frozenset([INPUT])))
            chosen = recipe.choose(sites[-1])
            if chosen is not None:
                setting = recipe.setting(chosen)
                Placed(node).entering = None if setting is None else setting.activation
            continue
        behaviour = behaviour_of(node)
        if behaviour is None or isinstance(behaviour, Measuring):
            continue
        site = replace(site_of(module, node), places=places.get(node.name, frozenset()))
        sites.append(site)
        if isinstance(behaviour, FloatOnly):
            continue
        chosen = recipe.choose(site)
        setting = recipe.setting(chosen)
        if chosen is not None and recipe.pairs[chosen][0] == OUTPUT and setting is not None and setting.activation:
            Placed(node).rounds_output = True
        refusal = None if setting is None else _lacks(node, target)
        Placed(node).setting = None
        if setting is None or refusal is not None:
            node.meta["reason"] = "the recipe keeps it in float" if refusal is None else refusal.why
        else:
            weight = {"has_weight": isinstance(behaviour, Weighted), "in_groups": _computes_in_groups(edit, node)}
            ends = chosen is None or recipe.pairs[chosen][0] in (FIRST, LAST)
            weight["may_share"] = bool(recipe.title) and ends  # settings of a preset, which knows no ops
            Placed(node).setting = filled(setting, target, site.op, path=site.path, **weight)
    return edit.done(sites=sites)


def places_of(module: LeveledModule) -> dict[str, frozenset[Place]]:
    """The places of a canonical graph's nodes, by name; none in a part of a model that is captured in parts."""
    if module.meta.get("path"):
        return {}
    nodes, found = list(module.graph.nodes), dict[str, set[Place]]()
    weighted = {node for node in nodes if isinstance(behaviour_of(node), Weighted)}
    behind, ahead = set[fx.Node](), set[fx.Node]()
    for node in nodes:
        if any(read in weighted or read in behind for read in node.all_input_nodes):
            behind.add(node)
    for node in reversed(nodes):
        if any(user in weighted or user in ahead for user in node.users):
            ahead.add(node)
    for node in nodes:
        own = found.setdefault(node.name, set())
        own |= {INPUT} if node.op == "placeholder" else set()
        own |= {FIRST} if node in weighted and node not in behind else set()
        own |= {LAST} if node in weighted and node not in ahead else set()
    todo = [read for node in nodes if node.op == "output" for read in node.all_input_nodes]
    while todo:
        node = todo.pop()
        if OUTPUT not in found[node.name] and node.op != "placeholder":
            found[node.name].add(OUTPUT)
            todo.extend(node.all_input_nodes if isinstance(behaviour_of(node), Passing) else ())
    return {name: frozenset(places) for name, places in found.items() if places}


def _computes_in_groups(edit: Edit, node: fx.Node) -> bool:
    groups = call_of(node, edit.module(node)).attributes.get("groups", 1)
    return isinstance(groups, int) and groups > 1


def _lacks(node: fx.Node, target: Target) -> Refusal | None:
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


def require_fit(graphs: Iterable[LeveledModule], recipe: Recipe, *, name: str, alone: bool = False) -> None:
    """Hold the recipe against all graphs of a model.

    A single layer of torch (``alone``) may stay in float as a whole, which a warning says.

    Raises:
        RecipeError: a selector matches nothing.
        InputError: the model has no op that can be quantized.
    """
    graphs = list(graphs)
    recipe.require_all_used([site for graph in graphs for site in graph.meta.pop("sites", ())])
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    if not any("setting" in Placed(node) for node in nodes):
        reasons = [f"    {n.name}: {n.meta['reason']}" for n in nodes if "reason" in n.meta]
        found = f"{name} has no op that fxquant can quantize.\n"
        found += "\n".join(reasons[:10]) if reasons else "    its forward calls no op"
        if not alone:
            raise InputError(found)
        warnings.warn(f"{found}\n  It stays in float.", stacklevel=3)
