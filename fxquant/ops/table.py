"""The op table: which entry a call belongs to, and the named fake-quant class of each function.

The families are imported here and nowhere else; an entry enters the table by being made.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import fx, nn

from fxquant.nn.modules import QuantOp, QuantWeightedOp
from fxquant.ops import arithmetic, embedding, layout, measuring, normalization, pointwise, reduction, weighted
from fxquant.ops.behaviour import Weighted
from fxquant.ops.entry import ENTRIES, OpEntry

__all__ = ["FAMILIES", "TABLE", "entries_for", "is_inplace", "quant_op_class"]

FAMILIES = (weighted, normalization, pointwise, arithmetic, reduction, layout, embedding, measuring)

TABLE = ENTRIES
"""Every entry by name."""


@cache
def _index() -> dict[tuple[str, Any], list[OpEntry]]:
    index: dict[tuple[str, Any], list[OpEntry]] = {}
    for entry in TABLE.values():
        functions = {entry.function, *entry.functions, *entry.inplace_functions}
        keys = [("call_function", f) for f in functions]
        keys += [("call_method", m) for m in (*entry.methods, *entry.inplace_methods)]
        keys += [("call_module", m) for m in entry.modules]
        keys += [("named", name) for name in entry.named_functions]
        for key in keys:
            index.setdefault(key, []).append(entry)
    return index


def entries_for(node: fx.Node, module: nn.Module | None) -> list[OpEntry]:
    """The entries that know this spelling; empty for an op that is not in the table."""
    key = type(module) if node.op == "call_module" else node.target
    found = _index().get((node.op, key), [])
    if not found and node.op == "call_function":
        qualified = f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', '')}"
        found = _index().get(("named", qualified), [])
    return found


def is_inplace(entry: OpEntry, node: fx.Node, module: nn.Module | None) -> bool:
    """Whether this call overwrites its first operand."""
    if node.op == "call_module":
        return bool(getattr(module, "inplace", False))
    return node.target in (*entry.inplace_functions, *entry.inplace_methods) or node.kwargs.get("inplace") is True


def quant_op_class(entry: OpEntry) -> type[QuantOp]:
    """The fake-quant module class of a function: ``QuantReLU`` for ``relu``, ``QuantAdd`` for ``add``."""
    return globals()["Quant" + entry.title]


for _entry in TABLE.values():
    _base = QuantWeightedOp if isinstance(_entry.behaviour, Weighted) else QuantOp
    _doc = f"A call of ``{_entry.name}`` in a prepared graph."
    _name = "Quant" + _entry.title
    globals()[_name] = type(_name, (_base,), {"__module__": __name__, "__doc__": _doc})
