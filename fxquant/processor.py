"""What the processor at hand computes, and the switch that hides a part of it.

An instruction set is a name for what integer kernels may use. On x86-64, from the least to the most:

    plain          no vector instructions are assumed
    avx2           256 bits, no dot products: sums of two u8·s8 products saturate in 16 bits (``vpmaddubsw``)
    avx_vnni       256 bits, with ``vpdpbusd``, which adds four products into 32 bits
    avx512         512 bits, without it
    avx512_vnni    512 bits, with it

and on 64-bit ARM:

    plain          no vector instructions are assumed
    neon           128 bits, no dot products
    neon_dotprod   with ``sdot``, which adds four products of signed bytes into 32 bits
    neon_i8mm      with ``usdot``, which does so for unsigned by signed bytes

The environment variable ``FXQUANT_ISA`` names the most that fxquant may use: with ``FXQUANT_ISA=avx2`` it behaves, and is
tested, as on a processor without VNNI. What other libraries in the process do is not ours to switch;
``scripts/without-vnni`` hides the instructions from them too.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from pathlib import Path

from fxquant.errors import InputError

__all__ = [
    "INSTRUCTION_SETS",
    "VARIABLE",
    "adds_pairs_in_16_bits",
    "has",
    "instruction_set",
    "processor_name",
    "sets_of_architecture",
]

VARIABLE = "FXQUANT_ISA"

_AVX2 = frozenset({"avx2", "fma"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_X86 = {
    "plain": frozenset[str](),
    "avx2": _AVX2,
    "avx_vnni": _AVX2 | {"avxvnni"},
    "avx512": _AVX512,
    "avx512_vnni": _AVX512 | {"avx512vnni", "avx512vbmi"},
}
_ARM = {
    "plain": frozenset[str](),
    "neon": frozenset({"neon"}),
    "neon_dotprod": frozenset({"neon", "armdot"}),
    "neon_i8mm": frozenset({"neon", "armdot", "i8mm"}),
}
_AUXILIARY = {"neon": (16, 1), "armdot": (16, 20), "i8mm": (26, 13)}
"""Where Linux tells a process of ARM's features: an entry of its auxiliary vector (16: AT_HWCAP, 26: AT_HWCAP2), and a bit
of that (arch/arm64/include/uapi/asm/hwcap.h)."""

INSTRUCTION_SETS = (*_X86, *(name for name in _ARM if name not in _X86))
"""Every name that ``FXQUANT_ISA`` may have."""


def instruction_set() -> str:
    """The best instruction set of this processor, or the one that ``FXQUANT_ISA`` names.

    Raises:
        InputError: the variable names none that there is, or one that this processor lacks.
    """
    here, asked = _sets_here(), os.environ.get(VARIABLE, "").strip().lower()
    if not asked:
        return here[-1]
    if asked not in INSTRUCTION_SETS:
        raise InputError(f"{VARIABLE}={asked!r} is not known. Choose one of {', '.join(INSTRUCTION_SETS)}.")
    if asked not in here:
        raise InputError(f"{VARIABLE}={asked!r}: this processor does not have it. It has {', '.join(here)}.")
    return asked


def has(name: str) -> bool:
    """Whether the instruction set ``name`` may be used here: the processor has it, and ``FXQUANT_ISA`` does not hide it."""
    table = _table()
    return name in _sets_here() and table[name] <= table[instruction_set()]


def sets_of_architecture() -> tuple[str, ...]:
    """Every instruction set that some processor of this architecture has, from the least to the most."""
    return tuple(_table())


def adds_pairs_in_16_bits() -> bool:
    """Whether u8·s8 kernels of this processor add two products in 16 bits first, which saturates: x86 without VNNI."""
    return not is_arm() and not (has("avx_vnni") or has("avx512_vnni"))


def is_arm() -> bool:
    """Whether this is a 64-bit ARM processor; anything else counts as x86-64."""
    return platform.machine().lower() in ("aarch64", "arm64")


def processor_name() -> str:
    """The processor's name as the kernel or the platform tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _table() -> dict[str, frozenset[str]]:
    return _ARM if is_arm() else _X86


@cache
def _sets_here() -> tuple[str, ...]:
    return tuple(name for name, needs in _table().items() if needs <= _features())


def _auxiliary(kind: int) -> int:
    """An entry of the process's auxiliary vector."""
    library = ctypes.CDLL(None)
    library.getauxval.restype, library.getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return int(library.getauxval(kind))


def _features() -> set[str]:
    """What the processor has, by the kernel's names without underscores."""
    if is_arm() and platform.system() == "Linux":
        return {name for name, (kind, bit) in _AUXILIARY.items() if _auxiliary(kind) >> bit & 1}
    import torch  # here, since setup.py reads this file where there is no torch yet

    if hasattr(torch.cpu, "get_capabilities"):
        names = [name for name, value in torch.cpu.get_capabilities().items() if value is True]
    else:  # torch before 2.10
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        names = next((line for line in lines if line.lower().startswith(("flags", "features"))), "").split()
    renamed = {"fma3": "fma", "asimd": "neon", "asimddp": "armdot", "dot": "armdot"}
    return {renamed.get(name, name.replace("_", "")) for name in names}
