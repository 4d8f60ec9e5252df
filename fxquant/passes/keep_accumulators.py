"""keep_accumulators: find the wide results that go on unrounded into the op that reads them.

    conv ─────────┐                              conv ──▶ silu ──▶ rounded
                  add ──▶ relu ──▶ rounded
    rounded ──────┘

A runtime that computes a weighted op and what follows it in one kernel never sees the tensor between; rounding it there
would cost accuracy, and often the fusion too. Of a sum's operands, one can be such a tensor.
"""

from __future__ import annotations

from torch import fx

from fxquant.behaviour import Clamping, Weighted
from fxquant.graph.edit import Edit
from fxquant.graph.leveled import LeveledModule
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.passes.facts import Placed
from fxquant.passes.merge_clamps import head_of
from fxquant.targets import X86, Target

__all__ = ["keep_accumulators"]


def keep_accumulators(module: LeveledModule, *, target: Target = X86) -> LeveledModule:
    """Mark each weighted op whose result goes on wide, and the operand of its reader that takes it.

    Args:
        module: a canonical graph whose chains are known.
        target: names the ops that read accumulators.

    Law:
        The graph is unchanged; a wide result has one reader, which reads no other wide one.
    """
    edit = Edit(module, by="keep_accumulators")
    for node in edit.nodes:
        if Placed(node).quantized and "entry" in node.meta and node.meta["entry"].name in target.reads_accumulators:
            _take(edit, node)
    return edit.done()


def _take(edit: Edit, reader: fx.Node) -> None:
    call = call_of(reader, edit.module(reader))
    if reader.op == "call_module" and call.entry.parametric:
        return
    for name in call.entry.operand_names:
        operand = call.operand(name)
        if operand is not None and _is_accumulator(operand) and len(operand.users) == 1:
            if sum(other is operand for other in call.operands) == 1:
                Placed(operand).stays_wide = True
                Placed(reader).wide_operand = name
                edit.note(operand, f"{reader.name} reads its accumulator")
                return


def _is_accumulator(node: fx.Node) -> bool:
    """Whether ``node`` is a weighted op, or the batch norm that will be folded into one, and nothing clamps it."""
    if not Placed(node).quantized or "chain" not in Placed(node) or isinstance(behaviour_of(node), Clamping):
        return False
    return isinstance(behaviour_of(head_of(node)), Weighted)
