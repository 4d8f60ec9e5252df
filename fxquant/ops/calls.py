"""Reading a graph as calls of ops: which entry a node belongs to, and its arguments by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxquant.behaviour import Behaviour, FloatOnly
from fxquant.errors import InputError, Refusal
from fxquant.ops.entry import Call, OpEntry
from fxquant.ops.example import example
from fxquant.ops.layout import identity
from fxquant.ops.table import entries_for

__all__ = ["FLOAT", "behaviour_of", "call_of", "recognize"]

FLOAT = OpEntry(
    name="float",
    function=identity,
    signature="input*",
    behaviour=FloatOnly("it is not in the op table"),
    example=example(lambda x: torch.cumsum(x * 0.9, dim=1) * 0.5, (2, 3)),
)
"""The entry of every call that stays in float; why is written on the node."""


def behaviour_of(node: fx.Node) -> Behaviour | None:
    """The behaviour of a canonical node; None for inputs, attributes and the output."""
    if "reason" in node.meta:
        return FloatOnly(node.meta["reason"])
    entry = node.meta.get("entry")
    return None if entry is None else entry.behaviour


def call_of(node: fx.Node, module: nn.Module | None) -> Call:
    """A canonical node as a call; ``module`` is the module it calls, if it calls one."""
    entry: OpEntry = node.meta["entry"]
    return Call(entry, _arguments(entry, node, module), node, module)


def _arguments(entry: OpEntry, node: fx.Node, module: nn.Module | None) -> dict[str, Any]:
    if entry.order and node.target in entry.functions:
        if node.kwargs or len(node.args) != len(entry.order):
            raise Refusal(f"{entry.name} is called with other arguments than {', '.join(entry.order)}")
        return entry.bind((), dict(zip(entry.order, node.args, strict=True)))
    if node.op != "call_module":
        return entry.bind(node.args, dict(node.kwargs))
    assert module is not None
    if "attributes" in module.__dict__:
        return entry.bind(node.args, {**module.__dict__["attributes"], **node.kwargs})
    if len(node.args) != 1 or node.kwargs:
        raise Refusal(f"{type(module).__name__} is called with more than its input")
    return {entry.operand_names[0]: node.args[0], **entry.read_module(module)}


def recognize(node: fx.Node, module: nn.Module | None) -> Call | Refusal:
    """The call that a captured node is; refused where it stays in float.

    Raises:
        InputError: the check of an op's entry gives neither None nor a ``Refusal``.
    """
    name = type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
    found = Refusal(f"{name} is not in the op table")
    if module is not None and (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks):
        return Refusal(f"{name} has hooks, which run as they are")
    for entry in entries_for(node, module):
        try:
            call = Call(entry, _arguments(entry, node, module), node, module)
        except Refusal as refusal:
            found = refusal.with_traceback(None)
            continue
        if entry.accepts is not None and not entry.accepts(call):
            continue
        answer = entry.check(call) if entry.check is not None else None
        if answer is not None and not isinstance(answer, Refusal):
            raise InputError(
                f"the check of op {entry.name!r} gave {answer!r}.\n"
                "  what to do: let it give None, or fxquant.errors.Refusal(why)."
            )
        return answer or call
    return found
