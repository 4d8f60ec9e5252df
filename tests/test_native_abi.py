"""The structures that Python fills are those that the library reads: each field's place, size and kind, each number."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from fxquant.errors import Refusal
from fxquant.kernels.native import library
from fxquant.kernels.native.abi import differences, layout_of

NUMBERS = {"Kind": library.KINDS, "Flag": library.FLAGS}


@pytest.fixture(scope="module")
def handle() -> Any:
    reason = library.missing()
    if reason is not None:
        pytest.skip(f"the native kernels are not for this machine: {reason}")
    return library.load().handle


def swapped(structure: Any, a: str, b: str) -> Any:
    """A structure with two fields of one type in each other's place."""
    names = {a: b, b: a}
    fields = [(names.get(name, name), kind) for name, kind in structure._fields_]
    made = type(structure.__name__, (ctypes.Structure,), {"_fields_": fields})
    assert ctypes.sizeof(made) == ctypes.sizeof(structure), "what a comparison of sizes cannot see"
    return made


def with_other(structure: Any, name: str, kind: Any) -> Any:
    fields = [(n, kind if n == name else k) for n, k in structure._fields_]
    return type(structure.__name__, (ctypes.Structure,), {"_fields_": fields})


def found(handle: Any, structures: dict[str, Any], numbers: Any = NUMBERS) -> str:
    return "; ".join(differences(handle, layout_of({**library._STRUCTURES, **structures}, numbers)))


def test_python_and_the_library_agree(handle):
    assert not found(handle, {})


@pytest.mark.parametrize(
    ("name", "a", "b"),
    [
        ("Step", "weight", "bias"),
        ("Step", "x", "z"),
        ("Step", "units", "outer"),
        ("Tensor", "row", "image"),
        ("Requantization", "constants", "table"),
        ("Requantization", "low", "high"),
        ("Addition", "shift", "low"),
        ("PaddingRegion", "tap", "bias"),
        ("Window", "kernel", "stride"),
        ("Attention", "score", "result"),
    ],
)
def test_two_fields_in_each_others_place_are_found(handle, name, a, b):
    told = found(handle, {name: swapped(library._STRUCTURES[name], a, b)})
    assert f"{name}.{a} is" in told and f"{name}.{b} is" in told


def test_a_field_that_is_another_kind_missing_or_new_is_found(handle):
    assert "Requantization.magic is" in found(
        handle, {"Requantization": with_other(library.Requantization, "magic", ctypes.c_int64)}
    )
    less = type("PaddingRegion", (ctypes.Structure,), {"_fields_": library.PaddingRegion._fields_[:-1]})
    assert "PaddingRegion.bias is known to C++ alone" in found(handle, {"PaddingRegion": less})
    more = type("Window", (ctypes.Structure,), {"_fields_": [*library.Window._fields_, ("more", ctypes.c_int32)]})
    assert "Window.more is known to Python alone" in found(handle, {"Window": more})


def test_numbers_of_kinds_and_flags_are_held_too(handle):
    kinds = {**library.KINDS, "table": library.KINDS["add"], "add": library.KINDS["table"]}
    told = found(handle, {}, {"Kind": kinds, "Flag": library.FLAGS})
    assert "Kind.TABLE is" in told and "Kind.ADD is" in told
    assert "Flag.TIES is" in found(handle, {}, {"Kind": library.KINDS, "Flag": {**library.FLAGS, "ties": 64}})


def test_a_library_that_differs_is_not_loaded(handle, monkeypatch):
    monkeypatch.setitem(library._STRUCTURES, "Step", swapped(library.Step, "weight", "bias"))
    with pytest.raises(Refusal, match=r"reads other structures than fxquant fills: .*Step\.weight is"):
        library._open(library.chosen_set())
