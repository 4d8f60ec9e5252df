"""The instruction sets that the native kernels are compiled for, a processor's from the least to the most: a row each."""

from __future__ import annotations

from dataclasses import dataclass

from fxquant import processor

__all__ = ["SETS", "InstructionSet", "chosen_set", "sets_to_carry"]


@dataclass(frozen=True)
class InstructionSet:
    """What a compiler has to know.

    Attributes:
        name: as in ``fxquant.processor``.
        header: in ``source``, with the vocabulary that everything else is written in.
        flags: of g++ and clang++.
    """

    name: str
    header: str
    flags: tuple[str, ...] = ()


_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, *(f"-mavx512{name}" for name in ("f", "bw", "dq", "vl")))
_ARM = "-march=armv8.2-a+dotprod"

SETS = (
    InstructionSet("plain", "isa_plain.h"),
    InstructionSet("avx2", "isa_avx2.h", _AVX2),
    InstructionSet("avx_vnni", "isa_avx_vnni.h", (*_AVX2, "-mavxvnni")),
    InstructionSet("avx512", "isa_avx512.h", _AVX512),
    InstructionSet("avx512_vnni", "isa_avx512.h", (*_AVX512, "-mavx512vnni", "-mavx512vbmi")),
    InstructionSet("neon_dotprod", "isa_neon_dot.h", (_ARM,)),
    InstructionSet("neon_i8mm", "isa_neon_dot.h", (f"{_ARM}+i8mm",)),
)


def chosen_set() -> InstructionSet:
    """The most that this processor has and ``FXQUANT_ISA`` does not hide."""
    return [row for row in SETS if processor.has(row.name)][-1]


def sets_to_carry() -> list[InstructionSet]:
    """What a wheel is made with: all that some processor of this architecture has."""
    return [row for row in SETS if row.name in processor.sets_of_architecture()]
