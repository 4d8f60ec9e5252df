"""What ``pyproject.toml`` cannot say: a wheel carries the native kernels, for each instruction set of its architecture.

    python -m build                           a source distribution, and a wheel with what compiles here
    FXQUANT_KERNELS=all python -m build       the same, and an error where a set does not compile: for wheels to give away
    FXQUANT_KERNELS=none pip install .        a wheel of Python alone

A wheel with kernels is ``py3-none-<platform>``: they are loaded by ctypes and know no Python. Where nothing can be compiled
the wheel is ``py3-none-any``, and compiles at first use if it finds a compiler there; so do editable installations, always.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError

package = ModuleType("fxquant")  # without its __init__.py, which wants torch
package.__path__ = [str(Path(__file__).parent / "fxquant")]
sys.modules["fxquant"] = package

from fxquant.errors import Refusal  # noqa: E402
from fxquant.kernels.native import compiler  # noqa: E402
from fxquant.kernels.native.sets import InstructionSet, sets_to_carry  # noqa: E402

CHOICES = ("", "all", "none")


class BuildKernels(Command):
    """A step of ``build``."""

    description = "compile the native kernels for every instruction set of this architecture"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str = None  # type: ignore[assignment]  # which asks ``build``

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    @property
    def folder(self) -> Path:
        return Path(self.build_lib) / compiler.CARRIED.relative_to(Path(package.__path__[0]).parent)

    def run(self) -> None:
        wanted = os.environ.get("FXQUANT_KERNELS", "")
        if wanted not in CHOICES:
            raise CompileError(f"FXQUANT_KERNELS={wanted!r} is not known: 'all', 'none', or not set.")
        shutil.rmtree(self.folder, ignore_errors=True)  # what an older build left
        if self.editable_mode or wanted == "none":
            self.announce("native kernels: compiled when they are first used", logging.INFO)
            return
        rows = sets_to_carry()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            refusals = dict(zip((row.name for row in rows), pool.map(self.compiled, rows), strict=True))
        for name, refusal in refusals.items():
            self.announce(
                f"native kernels for {name}: {refusal or 'compiled'}",
                logging.INFO if refusal is None else logging.WARNING,
            )
        failed = {name: str(refusal) for name, refusal in refusals.items() if refusal is not None}
        if failed and wanted == "all":
            raise CompileError(f"FXQUANT_KERNELS=all, but not all could be compiled: {failed}")

    def compiled(self, row: InstructionSet) -> Refusal | None:
        try:
            compiler.compile_into(self.folder, row)
        except Refusal as refusal:
            return refusal
        return None

    def get_source_files(self) -> list[str]:
        return ["setup.py"]

    def get_outputs(self) -> list[str]:
        return [str(path) for path in sorted(self.folder.glob("*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_kernels", None)]


class Wheel(bdist_wheel):
    def run(self) -> None:
        if not self.skip_build:
            self.run_command("build")
        carries = bool(self.get_finalized_command("build_kernels").get_outputs())
        self.root_is_pure, self.distribution.has_ext_modules = not carries, lambda: carries  # platlib, not purelib
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        return "py3", "none", platform


setup(cmdclass={"build": Build, "build_kernels": BuildKernels, "bdist_wheel": Wheel})
