"""The C++ library behind the native kernels: its structures, where it is taken from, and whether it runs here."""

from __future__ import annotations

import ctypes
import sys
from ctypes import Structure, c_double, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from fxquant.errors import Refusal
from fxquant.kernels.native.abi import differences, layout_of
from fxquant.kernels.native.compiler import CARRIED, cache_folder, compile_into, compiler, find
from fxquant.kernels.native.sets import InstructionSet, chosen_set

__all__ = [
    "FLAGS",
    "KINDS",
    "Addition",
    "AttentionNumbers",
    "Library",
    "Requantization",
    "Step",
    "TensorView",
    "Window",
    "PaddingRegion",
    "load",
    "missing",
]

_NAMES = (
    *("quantize", "convolution", "depthwise", "maximum", "average", "table", "add", "multiply", "affine", "copy"),
    *("dequantize", "depthwise three", "attention", "layer norm", "softmax", "winograd", "winograd input"),
)
KINDS = {name: index for index, name in enumerate(_NAMES)}
"""As ``Kind`` in tensor.h."""
FLAGS = {"adds": 1, "to_float": 2, "counts_padding": 4, "grouped": 8, "linear": 16, "ties": 32, "in_float64": 64}
"""As ``Flag`` in tensor.h."""

_Pair = c_int32 * 2


class TensorView(Structure):
    """``Tensor`` of tensor.h."""

    _fields_: ClassVar[Any] = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("pixel", "row", "image")),
        *((name, c_int32) for name in ("n", "h", "w", "c")),
    ]


class Window(Structure):
    """``Window`` of tensor.h."""

    _fields_: ClassVar[Any] = [(name, _Pair) for name in ("kernel", "stride", "padding", "dilation")]


class Requantization(Structure):
    """``Requantization`` of tensor.h."""

    _fields_: ClassVar[Any] = [
        ("constants", c_void_p),
        ("table", c_void_p),
        ("magic", c_double),
        ("low", c_int32),
        ("high", c_int32),
    ]


class Addition(Structure):
    """``Addition`` of tensor.h."""

    _fields_: ClassVar[Any] = [
        ("constant", c_int64),
        ("q", _Pair),
        *((name, c_int32) for name in ("shift", "low", "high")),
    ]


class PaddingRegion(Structure):
    """``PaddingRegion`` of tensor.h."""

    _fields_: ClassVar[Any] = [
        *((name, c_int32) for name in ("i", "y", "x", "n", "h", "w", "taps", "inside")),
        *((name, c_void_p) for name in ("tap", "bias")),
    ]


class Step(Structure):
    """``Step`` of tensor.h."""

    _fields_: ClassVar[Any] = [
        ("kind", c_int32),
        ("flags", c_int32),
        *((name, TensorView) for name in "xzy"),
        ("window", Window),
        *((name, c_int32) for name in ("groups", "taps", "depth", "blocks")),
        *((name, c_void_p) for name in ("weight", "bias", "border")),
        *((name, c_void_p) for name in ("halves", "half_four", "half_first", "regions")),
        ("out", Requantization),
        ("add", Addition),
        ("numbers", c_void_p),
        ("scale", c_double * 2),
        ("zero_point", _Pair),
        *((name, c_int32) for name in ("units", "outer", "region_count")),
        ("scratch", c_void_p),
        ("slot", c_int64),
    ]


class AttentionNumbers(Structure):
    """``Attention`` of attention.h."""

    _fields_: ClassVar[Any] = [
        ("value", TensorView),
        *((name, c_int32) for name in ("zero_query", "zero_key", "zero_value", "causal")),
        ("score", c_double),
        ("result", c_double),
    ]


_STRUCTURES = {
    **{cls.__name__: cls for cls in (Window, Requantization, Addition, PaddingRegion, Step)},
    "Tensor": TensorView,
    "Attention": AttentionNumbers,
}
"""By their names in C++."""


@dataclass(frozen=True)
class Library:
    """The kernels, compiled for one instruction set.

    Attributes:
        handle: the shared library.
        name: of the set.
        weight_size: bytes of a weight as the kernels multiply it, 1 or 2.
        pairs_of_bytes: whether a layer may have weights of bytes instead whose products are added by twos in 16 bits.
        blocks_together: blocks of 16 output channels whose weights lie beside each other.
        centre: what the kernels take off each byte that they multiply by a weight.
    """

    handle: ctypes.CDLL
    name: str
    weight_size: int
    pairs_of_bytes: bool
    blocks_together: int
    centre: int

    def run(self, steps: Any, count: int, threads: int) -> None:
        """Compute an array of ``Step``."""
        self.handle.fxquant_run(ctypes.addressof(steps), count, threads, _parallel())


def missing() -> Refusal | None:
    """Why the native kernels do not run on this machine; None where they do."""
    found = _attempt(chosen_set())
    return found if isinstance(found, Refusal) else None


@cache
def _attempt(row: InstructionSet) -> Library | Refusal:
    try:
        return _open(row)
    except Refusal as refusal:
        return refusal


def load() -> Library:
    """The library for the instruction set in use: the installation's own, else compiled if it never was.

    Raises:
        Refusal: it cannot be had on this machine.
        InputError: ``FXQUANT_ISA`` names no set of this processor.
    """
    found = _attempt(chosen_set())
    if isinstance(found, Refusal):
        raise found.with_traceback(None)
    return found


def _open(row: InstructionSet) -> Library:
    carried, why = find(CARRIED, row), f"this installation carries none for {row.name}"
    if carried is not None:
        try:
            return _loaded(carried, row)
        except Refusal as refusal:  # made for a newer C library, say
            why = f"what this installation carries does not do: {refusal}"
    made = find(cache_folder(), row)
    if made is None:
        try:
            made = _compiled(row)
        except Refusal as refusal:
            raise Refusal(f"{refusal}; {why}") from refusal
    return _loaded(made, row)


def _compiled(row: InstructionSet) -> Path:
    if compiler():
        print(f"fxquant: compiling its kernels for {row.name}, once on this machine …", file=sys.stderr, flush=True)
    return compile_into(cache_folder(), row)


def _loaded(made: Path, row: InstructionSet) -> Library:
    try:
        library = ctypes.CDLL(str(made))
    except OSError as error:
        raise Refusal(f"{made} could not be loaded: {error}") from error
    if not library.fxquant_runs_here():
        raise Refusal("the compiled library does not fit this processor")
    if found := list(differences(library, layout_of(_STRUCTURES, {"Kind": KINDS, "Flag": FLAGS}))):
        raise Refusal(f"the compiled library reads other structures than fxquant fills: {'; '.join(found[:3])}")
    library.fxquant_run.argtypes = [c_void_p, ctypes.c_int, ctypes.c_int, c_void_p]
    library.fxquant_run.restype = None
    size, pairs = library.fxquant_weight_size(), bool(library.fxquant_pairs_of_bytes())
    return Library(library, row.name, size, pairs, library.fxquant_blocks_together(), library.fxquant_centre())


@cache
def _parallel() -> int:
    """The address of ``GOMP_parallel`` of the OpenMP that torch has loaded; 0 where there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value or 0
    except (AttributeError, OSError):
        return 0
