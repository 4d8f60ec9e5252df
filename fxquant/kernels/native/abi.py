"""Compares the structures that Python fills with those that the library reads, field by field."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["differences", "layout_of"]

Layout = dict[str, tuple[int, int, str]]
"""By name: a structure's ``(0, size, "s")``, a field's ``(offset, size, kind)``, a number's ``(value, 4, "i")``."""


class _Entry(ctypes.Structure):
    """``Entry`` of layout.h, whose own layout shows in the first name that is read wrong."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("at", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("kind", ctypes.c_char),
    )


def _kind(of: Any) -> str:
    while issubclass(of, ctypes.Array):
        of = of._type_
    if issubclass(of, ctypes.Structure):
        return "s"
    return "p" if of is ctypes.c_void_p else "f" if of in (ctypes.c_double, ctypes.c_float) else "i"


def layout_of(structures: Mapping[str, Any], numbers: Mapping[str, Mapping[str, int]]) -> Layout:
    """What Python has: ``structures`` by their names in C++, and ``numbers`` by the names of their enumerations there."""
    found: Layout = {}
    for name, structure in structures.items():
        found[name] = 0, ctypes.sizeof(structure), "s"
        for field, kind in structure._fields_:
            place = getattr(structure, field)
            found[f"{name}.{field}"] = place.offset, place.size, _kind(kind)
    for name, values in numbers.items():
        found |= {f"{name}.{key.replace(' ', '_').upper()}": (value, 4, "i") for key, value in values.items()}
    return found


def _of_library(library: Any) -> Layout:
    library.fxquant_layout.restype = ctypes.POINTER(_Entry)
    entries = library.fxquant_layout()
    every = (entries[i] for i in range(library.fxquant_layout_count()))
    return {entry.name.decode(): (entry.at, entry.size, entry.kind.decode()) for entry in every}


def differences(library: Any, here: Layout) -> Iterator[str]:
    """What a loaded library has otherwise than ``here``, in words."""
    there = _of_library(library)
    for name in {**here, **there}:
        if name not in here or name not in there:
            yield f"{name} is known to {'Python' if name in here else 'C++'} alone"
        elif here[name] != there[name]:
            yield f"{name} is {here[name]} in Python and {there[name]} in C++ (place or number, size, kind)"
