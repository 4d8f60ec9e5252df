"""How the kernels are compiled: a shared library for each instruction set, named by what it was made from and what is in it.

Nothing here needs torch, so that ``setup.py`` compiles with it what a wheel carries (``CARRIED``). Where an installation
carries none that fits, ``library`` compiles with it when the kernels are first used, into ``cache_folder()``.

One library holds one set: no function that two of them have, no inline one of C++'s own either, comes from the wrong one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fxquant.errors import Refusal
from fxquant.kernels.native.sets import InstructionSet

__all__ = ["CARRIED", "OPTIONS", "SOURCE", "cache_folder", "compile_into", "compiler", "find"]

SOURCE = Path(__file__).parent / "source"
CARRIED = Path(__file__).parent / "compiled"
"""What an installed wheel brings; not there in a copy of the repository."""
OPTIONS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off")
"""Products and sums of floats are fused where the source says so and nowhere else, so that all sets give the same bits."""

_SECONDS = 300


def cache_folder() -> Path:
    """The folder for what is compiled at first use."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxquant"


def compiler() -> str:
    """The command of a C++ compiler; empty where none is found."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or ""


def find(folder: Path, row: InstructionSet) -> Path | None:
    """The library for a set in ``folder``, made from these sources with these options; None where there is none."""
    key = _key(row)
    for made in sorted(folder.glob(f"native-{key}-*.so")):
        if made.name == f"native-{key}-{_digest(made.read_bytes())}.so":  # whole, and not another's
            return made
    return None


def compile_into(folder: Path, row: InstructionSet) -> Path:
    """Compile the library for a set into ``folder``, where it appears whole or not at all.

    Raises:
        Refusal: there is no compiler, or it fails, or the folder cannot be written.
    """
    if sys.platform != "linux":
        raise Refusal(f"it is written for Linux, this is {sys.platform}")
    command = compiler()
    if not command:
        raise Refusal("no C++ compiler was found (g++, clang++, or $CXX)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / "fresh.so"
            whole = [*command.split(), *_options(row), str(SOURCE / "plan.cpp"), "-o", str(fresh)]
            done = subprocess.run(whole, capture_output=True, text=True, timeout=_SECONDS, check=False)
            if done.returncode:
                first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
                raise Refusal(f"{command} could not compile it for {row.name}: {first}")
            made = folder / f"native-{_key(row)}-{_digest(fresh.read_bytes())}.so"
            fresh.replace(made)
    except (OSError, subprocess.SubprocessError) as error:
        raise Refusal(f"it could not be compiled into {folder}: {error}") from error
    return made


def _options(row: InstructionSet) -> tuple[str, ...]:
    return (*OPTIONS, *row.flags, f'-DFXQUANT_ISA_HEADER="{row.header}"')


def _key(row: InstructionSet) -> str:
    content = b"".join(path.name.encode() + path.read_bytes() for path in sorted(SOURCE.iterdir()))
    return f"{row.name}-{_digest(content + ' '.join(_options(row)).encode())}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
