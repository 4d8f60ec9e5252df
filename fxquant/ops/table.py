"""The op table: which entry a call belongs to, and the named fake-quant class of each function.

The families are imported here and nowhere else; an entry enters the table by being made, and the integer forms that entries
name enter theirs (``nn.form``) with ``fxquant.forms``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import fx, nn

import fxquant.forms  # noqa: F401 - enters the forms of the package
from fxquant.behaviour import Weighted
from fxquant.nn.modules import QuantOp, QuantWeightedOp
from fxquant.ops import (
    arithmetic,
    dropping,
    embedding,
    layout,
    measuring,
    normalization,
    pointwise,
    reduction,
    weighted,
)
from fxquant.ops.entry import ENTRIES, OpEntry

__all__ = ["FAMILIES", "TABLE", "entries_for", "is_inplace", "quant_op_class"]

FAMILIES = (weighted, normalization, pointwise, arithmetic, reduction, layout, dropping, embedding, measuring)

TABLE = ENTRIES
"""Every entry by name."""


@cache
def _index(size: int) -> dict[tuple[str, Any], list[OpEntry]]:
    """Entries by spelling, for a table of ``size`` entries: made again when one was added."""
    index: dict[tuple[str, Any], list[OpEntry]] = {}
    for entry in TABLE.values():
        functions = {entry.function, *entry.functions, *entry.inplace_functions}
        keys: list[tuple[str, Any]] = [("call_function", f) for f in functions]
        keys += [("call_method", m) for m in (*entry.methods, *entry.inplace_methods)]
        keys += [("call_module", m) for m in entry.modules]
        keys += [("named", name) for name in entry.named_functions]
        for key in keys:
            index.setdefault(key, []).append(entry)
    return index


def entries_for(node: fx.Node, module: nn.Module | None) -> list[OpEntry]:
    """The entries that know this spelling; empty for an op that is not in the table."""
    key = type(module) if node.op == "call_module" else node.target
    found = _index(len(TABLE)).get((node.op, key), [])
    if not found and node.op == "call_function":
        qualified = f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', '')}"
        found = _index(len(TABLE)).get(("named", qualified), [])
    return found


def is_inplace(entry: OpEntry, node: fx.Node, module: nn.Module | None) -> bool:
    """Whether this call overwrites its first operand."""
    if node.op == "call_module":
        return bool(getattr(module, "inplace", False))
    return node.target in (*entry.inplace_functions, *entry.inplace_methods) or node.kwargs.get("inplace") is True


def quant_op_class(entry: OpEntry) -> type[QuantOp]:
    """The fake-quant module class of a function: ``QuantReLU`` for ``relu``, ``QuantAdd`` for ``add``."""
    name = f"Quant{entry.title}"
    if name not in globals():
        base = QuantWeightedOp if isinstance(entry.behaviour, Weighted) else QuantOp
        doc = f"A call of ``{entry.name}`` in a prepared graph."
        globals()[name] = type(name, (base,), {"__module__": __name__, "__doc__": doc})
    made: type[QuantOp] = globals()[name]
    return made


def __getattr__(name: str) -> Any:
    """Lets pickle find the classes that ``quant_op_class`` makes when they are first asked for."""
    for entry in TABLE.values():
        if name == f"Quant{entry.title}":
            return quant_op_class(entry)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
