"""Instruction sets that this processor may lack, and sanitizers, as programs: the kernels with ``run_plan.cpp`` around them,
compiled for a set, and started under an emulator where that has to be.

Inside ``computing_with(PROGRAMS["neon_dotprod"].library(folder))`` a ``NativeModel`` has weights that are laid out for that
set, and a call of it is computed by the program.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

from plan_memory import Memory

from fxquant import processor
from fxquant.kernels.native import compiler, library, lowering, model
from fxquant.kernels.native.abi import layout_of
from fxquant.kernels.native.library import Library
from fxquant.kernels.native.sets import SETS, InstructionSet

__all__ = ["PROGRAMS", "ForeignLibrary", "Program", "computing_with"]

HERE = Path(__file__).resolve().parent
_ROWS = {row.name: row for row in SETS}
_SHARED = ("-fPIC", "-shared")


@dataclass(frozen=True)
class Program:
    """How a set's program is made and started.

    Attributes:
        row: the set.
        compiler: its name, and options of its own.
        emulator: what starts the program, with options.
        environment: what the program's environment has besides.
        threads: that compute.
        needs: the set that this processor must have.
    """

    row: InstructionSet
    compiler: tuple[str, ...] = ("g++",)
    emulator: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    threads: int = 2
    needs: str = "plain"

    def compiled(self, source: str, folder: Path) -> Path:
        """A source of this folder as a program."""
        made = folder / source.removesuffix(".cpp")
        options = [option for option in compiler.OPTIONS if option not in _SHARED]
        own = [f'-DFXQUANT_ISA_HEADER="{self.row.header}"', f"-I{compiler.SOURCE}", *self.row.flags, *self.compiler[1:]]
        command = [self.compiler[0], *options, *own, str(HERE / source), "-o", str(made), "-pthread"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert not done.returncode, f"{' '.join(command)}\n{done.stderr}"
        return made

    def run(self, made: Path, *arguments: str, given: bytes = b"") -> bytes:
        """What a program writes, which must end well and say nothing else.

        Raises:
            AssertionError: it does not, with what it says.
        """
        done = subprocess.run(
            [*self.emulator, str(made), *arguments],
            input=given,
            capture_output=True,
            check=False,
            timeout=300,
            env={**os.environ, **dict(self.environment)},
        )
        said = done.stderr.decode(errors="replace")
        assert not done.returncode and not said, f"{self.row.name} ended with {done.returncode}: {said}"
        return done.stdout

    def missing(self) -> str | None:
        """The first thing that this machine lacks."""
        if self.needs not in processor._sets_here():
            return f"a processor with {self.needs}"
        for tool in (self.compiler[0], *self.emulator[:1]):
            if shutil.which(tool) is None:
                return tool
        for option in self.compiler[1:]:
            if option.startswith("-fsanitize="):
                for name in ("libasan.so", "libubsan.so"):
                    found = subprocess.run(
                        [self.compiler[0], f"-print-file-name={name}"], capture_output=True, text=True, check=True
                    )
                    if not Path(found.stdout.strip()).is_absolute():
                        return name
        return None

    def library(self, folder: Path) -> ForeignLibrary:
        """The program as the kernels' library, which must read the structures that Python fills."""
        made = self.compiled("run_plan.cpp", folder)
        lines = [line.split() for line in self.run(made, "about").decode().splitlines()]
        entries = {name: (int(at), int(size), kind) for name, at, size, kind in (e for e in lines if len(e) == 4)}
        assert entries == layout_of(library._STRUCTURES, {"Kind": library.KINDS, "Flag": library.FLAGS})
        about = {name: int(number) for name, number in (e for e in lines if len(e) == 2)}
        assert about.pop("runs_here"), f"{self.row.name} says that it does not run under {self.emulator}"
        pairs = bool(about.pop("pairs_of_bytes"))
        return ForeignLibrary(None, self.row.name, pairs_of_bytes=pairs, **about, program=self, made=made)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class ForeignLibrary(Library):
    """Kernels in a process of their own."""

    program: Program
    made: Path
    runs: list[int] = field(default_factory=list, compare=False)

    def run(self, steps: object, count: int, threads: int | None = None) -> None:
        memory = Memory(steps, count)
        memory.restore(self.program.run(self.made, given=memory.dump(threads or self.program.threads)))
        self.runs.append(count)


def _arm(name: str, cpu: str) -> Program:
    return Program(_ROWS[name], ("aarch64-linux-gnu-g++", "-static"), ("qemu-aarch64", "-cpu", cpu))


def _sanitized(name: str) -> Program:
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
    options = (("ASAN_OPTIONS", "detect_stack_use_after_return=1"), ("UBSAN_OPTIONS", "print_stacktrace=1"))
    return Program(_ROWS[name], ("g++", *flags), environment=options, needs=name)


def _avx_vnni() -> Program:
    """With the dot product of AVX512, which another processor may have instead."""
    flags = (*_ROWS["avx2"].flags, "-mavx512vl", "-mavx512vnni")
    compiler = ("g++", "-include", str(HERE / "avx_vnni_by_avx512.h"))
    return Program(replace(_ROWS["avx_vnni"], flags=flags), compiler, needs="avx512_vnni")


PROGRAMS = {
    "neon_dotprod": _arm("neon_dotprod", "cortex-a76"),  # which has no i8mm
    "neon_i8mm": _arm("neon_i8mm", "max"),
    "plain on ARM": _arm("plain", "cortex-a53"),  # which has no dot products
    "avx_vnni by AVX512": _avx_vnni(),
    "plain, sanitized": _sanitized("plain"),
    "avx2, sanitized": _sanitized("avx2"),
}


@contextmanager
def computing_with(foreign: Library) -> Iterator[None]:
    """Inside, native models are made for another library than this processor's."""
    with mock.patch.object(lowering, "load", lambda: foreign), mock.patch.object(model, "missing", lambda: None):
        yield
