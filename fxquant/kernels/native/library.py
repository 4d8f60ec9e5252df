"""The C++ library behind the native kernels: its structures, how it is compiled and kept, and whether it runs here."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from ctypes import Structure, c_double, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch

__all__ = [
    "FLAGS",
    "KINDS",
    "Addition",
    "AttentionNumbers",
    "Requantization",
    "Step",
    "TensorView",
    "Window",
    "Zone",
    "load",
    "missing",
    "run_steps",
]

_SOURCE = Path(__file__).parent / "source"
_INSTRUCTIONS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx512vbmi")
_OPTIONS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-mfma", *(f"-m{name}" for name in _INSTRUCTIONS))

_NAMES = (
    *("quantize", "convolution", "depthwise", "maximum", "average", "table", "add", "multiply", "affine", "copy"),
    *("dequantize", "depthwise three", "attention", "layer norm", "softmax"),
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


class Zone(Structure):
    """``Zone`` of tensor.h."""

    _fields_: ClassVar[Any] = [
        *((name, c_int32) for name in ("i", "y", "x", "n", "h", "w", "points", "inside")),
        *((name, c_void_p) for name in ("point", "bias")),
    ]


class Step(Structure):
    """``Step`` of tensor.h."""

    _fields_: ClassVar[Any] = [
        ("kind", c_int32),
        ("flags", c_int32),
        *((name, TensorView) for name in "xzy"),
        ("window", Window),
        *((name, c_int32) for name in ("groups", "taps", "depth", "blocks")),
        *((name, c_void_p) for name in ("weight", "bias", "border", "zones")),
        ("out", Requantization),
        ("add", Addition),
        ("numbers", c_void_p),
        ("scale", c_double * 2),
        ("zero_point", _Pair),
        *((name, c_int32) for name in ("units", "outer", "zone_count")),
    ]


class AttentionNumbers(Structure):
    """``Attention`` of attention.h."""

    _fields_: ClassVar[Any] = [
        ("value", TensorView),
        *((name, c_int32) for name in ("zero_query", "zero_key", "zero_value", "causal")),
        ("score", c_double),
        ("result", c_double),
    ]


class _UnusableError(Exception):
    """The library cannot be had; the message is a reason for the user."""


def missing() -> str | None:
    """Why the native kernels do not run on this machine; None where they do."""
    try:
        load()
    except _UnusableError as reason:
        return str(reason)
    return None


@cache
def _attempt() -> ctypes.CDLL | _UnusableError:
    try:
        return _open()
    except _UnusableError as reason:
        return reason


def load() -> ctypes.CDLL:
    """The library, compiled if it never was.

    Raises:
        _UnusableError: it cannot be had on this machine.
    """
    found = _attempt()
    if isinstance(found, _UnusableError):
        raise found
    return found


def _open() -> ctypes.CDLL:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise _UnusableError(f"it is written for Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    lacking = set(_INSTRUCTIONS) - _instructions_here()
    if lacking:
        raise _UnusableError(f"this processor lacks {', '.join(sorted(lacking))}")
    made = _compiled()
    try:
        library = ctypes.CDLL(str(made))
    except OSError as error:
        raise _UnusableError(f"{made} could not be loaded: {error}") from error
    if not library.fxquant_runs_here() or library.fxquant_step_size() != ctypes.sizeof(Step):
        raise _UnusableError("the compiled library does not fit this processor or this version of fxquant")
    library.fxquant_run.argtypes = [c_void_p, ctypes.c_int, ctypes.c_int, c_void_p]
    library.fxquant_run.restype = None
    return library


def _instructions_here() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return {name.replace("_", "") for name in flags.split()}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _compiled() -> Path:
    """The shared library's file, by what it was compiled from."""
    sources = sorted(_SOURCE.iterdir())
    content = b"".join(path.name.encode() + path.read_bytes() for path in sources)
    key = _digest(content + " ".join(_OPTIONS).encode())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxquant"
    for made in sorted(root.glob(f"native-{key}-*.so")):
        if made.name == f"native-{key}-{_digest(made.read_bytes())}.so":  # whole, and not another's
            return made
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise _UnusableError("it is compiled when first used, and no C++ compiler was found (g++, clang++, or $CXX)")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            fresh = Path(folder) / "fresh.so"
            command = [*compiler.split(), *_OPTIONS, str(_SOURCE / "plan.cpp"), "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
                raise _UnusableError(f"{compiler} could not compile it: {first}")
            content = fresh.read_bytes()
            made = root / f"native-{key}-{_digest(content)}.so"
            fresh.replace(made)
    except (OSError, subprocess.SubprocessError) as error:
        raise _UnusableError(f"it could not be compiled into {root}: {error}") from error
    return made


@cache
def _parallel() -> int:
    """The address of ``GOMP_parallel`` of the OpenMP that torch has loaded; 0 where there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value or 0
    except (AttributeError, OSError):
        return 0


def run_steps(steps: Any, count: int) -> None:
    """Compute an array of ``Step`` with as many threads as torch uses."""
    load().fxquant_run(ctypes.addressof(steps), count, torch.get_num_threads(), _parallel())
