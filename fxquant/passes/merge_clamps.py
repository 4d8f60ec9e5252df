"""merge_clamps: find the chains whose inner results need no quantizer, because the last link's does for all.

    weighted op → (batch norm) → (clamp)          one integer op: accumulate, rescale, clamp
    add, mul, mean … → clamp                      likewise

A clamp that is merged costs nothing: the quantizer behind it clamps anyway, to bounds that now include the clamp's.
"""

from __future__ import annotations

from functools import partial

from torch import fx

from fxquant.behaviour import ChannelAffine, Clamping, Rescaling, Weighted
from fxquant.errors import Refusal
from fxquant.graph.edit import Edit
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.pattern import next_in_chain
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.passes.facts import Placed

__all__ = ["clamp_bounds", "head_of", "merge_clamps"]


def merge_clamps(module: LeveledModule, *, folds_first: bool = False) -> LeveledModule:
    """Mark the links of each chain: ``continues`` on all but the last, ``chain`` (the names, in order) on the last.

    Args:
        folds_first: batch norms are folded before weights are rounded, and not into their scales afterwards: then every
            weighted module takes them.

    Law:
        The graph is unchanged; only the last link of a chain is used outside of it.
    """
    edit = Edit(module, by="merge_clamps")
    inner: set[fx.Node] = set()
    for node in edit.nodes:
        if node in inner or not Placed(node).quantized or not _starts(node):
            continue
        chain = _grow(edit, node, folds_first)
        inner.update(chain)
        for link in chain[:-1]:
            Placed(link).continues = True
        Placed(chain[-1]).chain = [link.name for link in chain]
        Placed(chain[-1]).setting = Placed(node).setting
    return edit.done()


def _starts(node: fx.Node) -> bool:
    return isinstance(behaviour_of(node), (Weighted, Rescaling, ChannelAffine))


def _grow(edit: Edit, head: fx.Node, folds_first: bool) -> list[fx.Node]:
    chain = [head]
    for step in (partial(_batch_norm, folds_first=folds_first), _clamp):
        following = next_in_chain(chain[-1])
        if isinstance(following, Refusal) or not Placed(following).quantized:
            break
        if step(edit, chain[0], following):
            chain.append(following)
    return chain


def _batch_norm(edit: Edit, head: fx.Node, node: fx.Node, *, folds_first: bool) -> bool:
    """Only a weighted module's own weights can take a batch norm; a grouped transposed one shares scales across groups."""
    if not isinstance(behaviour_of(node), ChannelAffine) or not isinstance(behaviour_of(head), Weighted):
        return False
    part = edit.module(head)
    if part is None:
        edit.note(node, f"not folded: {head.name} is a function of parameters, and no module")
        return False
    behaviour = behaviour_of(head)
    assert isinstance(behaviour, Weighted)
    if behaviour.out_axis == 1 and int(getattr(part, "groups", 1)) > 1 and not folds_first:
        edit.note(node, f"not folded: {head.name} is transposed and grouped")
        return False
    if behaviour.channels_last and len(head.meta.get("shape", ())) != 2:
        edit.note(node, f"not folded: {head.name} may give more than (batch, features)")
        return False
    return True


def _clamp(edit: Edit, head: fx.Node, node: fx.Node) -> bool:
    return clamp_bounds(edit, node) is not None


def head_of(last: fx.Node) -> fx.Node:
    """The first link of the chain that ends in ``last``; itself where it is in none."""
    for _ in Placed(last).chain[1:]:
        before = last.args[0]
        assert isinstance(before, fx.Node)
        last = before
    return last


def clamp_bounds(edit: Edit, node: fx.Node) -> tuple[float | None, float | None] | None:
    """The bounds of a clamping op; None for any other op, and where a bound is not a number."""
    behaviour = behaviour_of(node)
    if not isinstance(behaviour, Clamping):
        return None
    bounds = behaviour.bounds(call_of(node, edit.module(node)))
    return None if isinstance(bounds, Refusal) else bounds
