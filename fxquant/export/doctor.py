"""doctor: what this machine and its packages give an integer model, and what would give more."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from fxquant import processor
from fxquant.errors import Refusal
from fxquant.kernels.native.compiler import compiler
from fxquant.kernels.native.library import missing
from fxquant.runtimes import RUNTIMES
from fxquant.runtimes import Runtime as Place

__all__ = ["Diagnosis", "Runtime", "doctor"]


@dataclass(frozen=True)
class Runtime:
    """One place where an integer model can run.

    Attributes:
        name: as ``compile`` and ``export`` call it.
        version: of its package; empty where it is not installed.
        status: what it gives on this processor, or how to get it.
    """

    name: str
    version: str
    status: str


@dataclass(frozen=True)
class Diagnosis:
    """What ``doctor`` found.

    Attributes:
        processor: its name.
        cores: how many this process may use.
        instruction_set: what integer kernels use here, see ``fxquant.processor``.
        saturates: whether sums of two u8·s8 products saturate in 16 bits in other runtimes here.
        compiler: the C++ compiler that the native kernels would be compiled with; empty where there is none.
        runtimes: every one of ``fxquant.runtimes`` that says what it gives here.
        notes: what to do, in sentences.
    """

    processor: str
    cores: int
    instruction_set: str
    saturates: bool
    compiler: str
    runtimes: tuple[Runtime, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        facts = [
            ("processor", f"{self.processor}, {self.cores} core{'s' if self.cores > 1 else ''}"),
            ("instruction set", self.instruction_set),
            ("C++ compiler", self.compiler or "none"),
        ]
        rows = [(own.name, own.version or "not installed", own.status) for own in self.runtimes]
        parts = [
            tabulate(facts, tablefmt="plain", disable_numparse=True),
            tabulate(rows, headers=["runtime", "version", "here"], disable_numparse=True),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n\n".join(parts)


def doctor() -> Diagnosis:
    """Look at the processor, the compiler and the runtimes; kernels that no wheel brought are compiled if they never were.

    Raises:
        InputError: ``FXQUANT_ISA`` names no instruction set of this processor.
    """
    saturates = processor.adds_pairs_in_16_bits()
    runtimes = [_found(own, saturates) for own in RUNTIMES.values() if own.status is not None]
    return Diagnosis(
        processor.processor_name(),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        processor.instruction_set(),
        saturates,
        compiler(),
        tuple(runtimes),
        tuple(_notes(missing(), saturates)),
    )


def _notes(native: Refusal | None, saturates: bool) -> list[str]:
    notes = []
    if native is not None:
        notes.append(
            f"without the native kernels models run on torch's operators, which are slower; {native}. "
            "A wheel brings them compiled; else a C++ compiler (g++, clang++, or $CXX) is needed once on a machine."
        )
    if saturates:
        notes.append(
            "this processor adds u8·s8 products by twos in 16 bits, which saturates in ONNX Runtime and OpenVINO; models "
            "prepared with processor='any' (the default) or 'avx2' are right, with processor='vnni' they are not."
        )
    if asked := os.environ.get(processor.VARIABLE):
        notes.append(f"{processor.VARIABLE}={asked} hides what this processor has above it from fxquant.")
    return notes


def _found(own: Place, saturates: bool) -> Runtime:
    """What is here of one runtime."""
    found = own.version()
    assert own.status is not None
    return Runtime(own.name, found, own.status(saturates) if found else own.how_to_install)
