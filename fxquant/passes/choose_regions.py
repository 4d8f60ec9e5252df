"""choose_regions: which tensors are made of integers, and where float begins and ends."""

from __future__ import annotations

from torch import fx

from fxquant.behaviour import Measuring, Passing, Rescaling
from fxquant.graph.edit import Edit
from fxquant.graph.leveled import LeveledModule
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.ops.entry import Call
from fxquant.passes.facts import Placed

__all__ = ["choose_regions", "quantized_operands"]


def quantized_operands(call: Call) -> list[fx.Node]:
    """The operands of a quantized op that have to be quantized tensors themselves; one that comes wide, or is read
    unrounded, does not."""
    facts = Placed(call.node)
    unrounded = {facts.wide_operand, *facts.exact_operands}
    behaviour = call.entry.behaviour
    if isinstance(behaviour, Passing):
        return call.operands
    if isinstance(behaviour, Rescaling):
        names = call.entry.operand_names if behaviour.inputs is None else behaviour.inputs
        return [node for name in names if name not in unrounded and (node := call.operand(name)) is not None]
    name = call.entry.operand_names[0]
    first = call.operand(name)
    return [] if first is None or name in unrounded else [first]


def choose_regions(module: LeveledModule) -> LeveledModule:
    """Mark each tensor ``quantized`` or not.

    An op with a setting makes a quantized tensor and wants quantized operands. An op that passes values on follows its
    input. An input of the model, a parameter, or the result of a float op is quantized where a quantized op reads it,
    directly or through ops that pass it on.

    An op that joins what a float op gives as a container is float as well, for no quantizer fits in between.

    Law:
        The graph is unchanged; every operand that a quantized op wants quantized is marked so.
    """
    edit = Edit(module, by="choose_regions")
    for node in edit.nodes:
        _leave_floats_in_a_container(edit, node)
    calls = {
        n: call_of(n, edit.module(n)) for n in edit.nodes if "setting" in Placed(n) and Placed(n).setting is not None
    }
    wanted: set[fx.Node] = set()
    for node in reversed(edit.nodes):
        call = calls.get(node)
        if call is None:
            continue
        if not isinstance(call.entry.behaviour, Passing) or node in wanted:
            wanted.update(quantized_operands(call))
    for node in edit.nodes:
        Placed(node).quantized = _is_quantized(node, calls.get(node), wanted)
    return edit.done()


def _leave_floats_in_a_container(edit: Edit, node: fx.Node) -> None:
    if Placed(node).setting is None or "reason" in node.meta or not isinstance(behaviour_of(node), Passing):
        return
    for operand in call_of(node, edit.module(node)).operands:
        if operand.meta.get("is_container") and (Placed(operand).setting is None or "reason" in operand.meta):
            Placed(node).setting, node.meta["reason"] = None, f"it reads {operand.name}, a container of floats"


def _is_quantized(node: fx.Node, call: Call | None, wanted: set[fx.Node]) -> bool:
    if node.op == "output" or isinstance(behaviour_of(node), Measuring):
        return False
    if call is None:
        return node in wanted and not node.meta.get("is_container", False)
    if isinstance(call.entry.behaviour, Passing):
        return bool(call.operands) and all(Placed(operand).quantized for operand in call.operands)
    return True
