"""The parts of a prepared model that can be kept in float: single ops, stages of the network, all ops of a kind."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxquant.behaviour import Passing, Weighted
from fxquant.capture.islands import graphs_of
from fxquant.graph.leveled import LeveledModule
from fxquant.ops.calls import behaviour_of
from fxquant.passes.apply_recipe import site_of
from fxquant.passes.facts import Placed
from fxquant.tuning.placing import canonical_of

__all__ = ["HALF", "Region", "half_regions", "regions_of"]

HALF = "(bfloat16)"
"""Among the paths of what is kept in float: that all of it computes in bfloat16. No module has such a path."""

_DEPTH = 3


@dataclass(frozen=True)
class Region:
    """Ops that go to float, or back, together.

    Attributes:
        name: how the report calls it.
        paths: the ops, as a recipe selects them.
        to, back: what they compute in when they are kept in float, and when they are not.
    """

    name: str
    paths: frozenset[str]
    to: str = "float"
    back: str = "int8"


@dataclass(frozen=True)
class _Unit:
    """What no quantizer stands between: an op with what is fused into it."""

    paths: frozenset[str]
    kind: str
    size: int
    has_weights: bool


def regions_of(prepared: nn.Module) -> list[Region]:
    """Every region worth trying, those that promise most first; the last covers all that is quantized.

    Ops that only pass values on follow what they read, so that they are in none.
    """
    units = _merged(_units(prepared))
    everything = frozenset[str]().union(*(unit.paths for unit in units))
    light = [unit for unit in units if not unit.has_weights]
    found = [Region("every op without weights", _paths(light))]
    for kind in sorted({unit.kind for unit in units}, key=lambda kind: _kind_rank(units, kind)):
        found.append(Region(f"every {kind}", _paths(unit for unit in units if unit.kind == kind)))
    found += _stages(units)
    found += [Region(min(unit.paths), unit.paths) for unit in sorted(units, key=lambda unit: -unit.size)]
    distinct = {region.paths: region for region in reversed(found) if region.paths and region.paths != everything}
    ordered = [region for region in found if distinct.get(region.paths) is not None]
    first = {region.paths: region for region in reversed(ordered)}
    return [*sorted(first.values(), key=ordered.index), Region("everything", everything)]


def half_regions(regions: Sequence[Region]) -> list[Region]:
    """``regions``, behind what can be had from bfloat16: for everything, for what stays in float, for the first of them.

    What is gained by an op in bfloat16 may not be had in float32, so the three take their ops along.
    """
    alone = Region("what stays in float", frozenset({HALF}), "bfloat16", "float32")
    both = [Region(own.name, own.paths | {HALF}, "bfloat16") for own in (regions[-1], regions[0])]
    distinct = {region.paths: region for region in (both[0], alone, both[1])}
    return [*distinct.values(), *regions]


def _kind_rank(units: list[_Unit], kind: str) -> tuple[bool, int]:
    """Ops without weights first, then those that move most."""
    own = [unit for unit in units if unit.kind == kind]
    return own[0].has_weights, -sum(unit.size for unit in own)


def _stages(units: list[_Unit]) -> list[Region]:
    """The modules of the model that hold several units, larger ones first."""
    held: dict[str, list[_Unit]] = {}
    for unit in units:
        steps = min(unit.paths).split(".")[:-1]
        for depth in range(1, min(len(steps), _DEPTH) + 1):
            held.setdefault(".".join(steps[:depth]), []).append(unit)
    sized = {name: sum(unit.size for unit in own) for name, own in held.items() if len(own) > 1}
    return [Region(name, _paths(held[name])) for name in sorted(sized, key=lambda name: -sized[name])]


def _paths(units: Iterable[_Unit]) -> frozenset[str]:
    return frozenset[str]().union(*(unit.paths for unit in units))


def _units(prepared: nn.Module) -> list[_Unit]:
    found = []
    canonical = graphs_of(canonical_of(prepared))
    for path, graph in graphs_of(prepared).items():
        nodes = {node.name: node for node in graph.graph.nodes}
        originals = {node.name: node for node in canonical[path].graph.nodes}
        for node in graph.graph.nodes:
            if not _ends_a_unit(node):
                continue
            chain = [nodes[name] for name in Placed(node).chain if name in nodes] or [node]
            paths = frozenset(site_of(canonical[path], originals[link.name]).path for link in chain)
            weighted = isinstance(behaviour_of(chain[0]), Weighted)
            found.append(_Unit(paths, _kind(graph, chain[0]), _elements(node), weighted))
    return found


def _ends_a_unit(node: fx.Node) -> bool:
    if node.op != "call_module" or "entry" not in node.meta or "reason" in node.meta or Placed(node).continues:
        return False
    behaviour = behaviour_of(node)
    is_quantized = bool(Placed(node).quantized or Placed(node).leaves_as_float)
    return is_quantized and (not isinstance(behaviour, Passing) or len(Placed(node).chain) > 1)


def _kind(graph: LeveledModule, node: fx.Node) -> str:
    part: Any = graph.get_submodule(str(node.target))
    title, groups = node.meta["entry"].title, getattr(part, "groups", 1)
    is_depthwise = isinstance(groups, int) and groups > 1 and groups == getattr(part, "in_channels", 0)
    return f"depthwise {title}" if is_depthwise else str(title)


def _elements(node: fx.Node) -> int:
    shape = node.meta.get("shape")
    sizes = [size for size in shape if isinstance(size, int)] if isinstance(shape, tuple) else []
    return math.prod(sizes)


def _merged(units: list[_Unit]) -> list[_Unit]:
    """Units that a recipe cannot tell apart (two additions in one module have one path) as one."""
    merged: list[_Unit] = []
    for unit in units:
        same = [own for own in merged if own.paths & unit.paths]
        paths = unit.paths.union(*(own.paths for own in same))
        size = unit.size + sum(own.size for own in same)
        merged = [own for own in merged if own not in same]
        merged.append(_Unit(paths, unit.kind, size, unit.has_weights or any(own.has_weights for own in same)))
    return merged
