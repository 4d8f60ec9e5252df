"""The op table as a person reads it: one row per op, read off the entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tabulate import tabulate

from fxquant.behaviour import Behaviour, FloatOnly, Measuring, Passing
from fxquant.ops.entry import OpEntry
from fxquant.ops.table import TABLE

__all__ = ["op_rows", "op_table"]

_HEADERS = ["op", "behaviour", "in integers", "ONNX", "spelled"]


def op_table() -> str:
    """Every op with its behaviour, integer form, ONNX operator and spellings, sorted by name."""
    return tabulate(_rows(), headers=_HEADERS, disable_numparse=True)


def op_rows() -> list[dict[str, str]]:
    """The same as data: one dictionary an op."""
    return [dict(zip(_HEADERS, row, strict=True)) for row in _rows()]


def _rows() -> list[list[str]]:
    entries = [entry for entry in TABLE.values() if not isinstance(entry.behaviour, (FloatOnly, Measuring))]
    return [_row(entry) for entry in sorted(entries, key=lambda entry: entry.name)]


def _row(entry: OpEntry) -> list[str]:
    return [entry.name, _behaviour(entry.behaviour), _integer_form(entry), entry.onnx, _spellings(entry)]


def _behaviour(behaviour: Behaviour) -> str:
    joins = isinstance(behaviour, Passing) and behaviour.joins
    return type(behaviour).__name__.lower() + (", joins" if joins else "")


def _integer_form(entry: OpEntry) -> str:
    if entry.integer is None:
        return "nothing to do"
    name: str = entry.integer.__name__
    return name.removeprefix("Integer").removeprefix("integer_").replace("_", " ").lower()


def _spellings(entry: OpEntry) -> str:
    functions = [_name(f) for f in (entry.function, *entry.functions, *entry.inplace_functions)]
    methods = [f".{m}" for m in (*entry.methods, *entry.inplace_methods) if not m.startswith("__")]
    modules = [f"nn.{m.__name__}" for m in entry.modules]
    return " ".join(dict.fromkeys([*modules, *functions, *methods]))


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", function))
