"""The project's own build: a wheel carries the native kernels, and runs them where there is no compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fxquant import processor
from fxquant.kernels.native import compiler, library, sets

ROOT = Path(__file__).parents[1]
COMPILED = "fxquant/kernels/native/compiled/"
needs_a_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not compiler.compiler(), reason="kernels are compiled on Linux, by a C++ compiler"
)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Asks for the library where there is no compiler, an empty cache, and an installation that carries ``folder``."""

    def ask(folder: Path) -> library.Library | str:
        for name, value in {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": "", "CXX": ""}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(library, "CARRIED", folder)
        library._attempt.cache_clear()
        refusal = library.missing()
        return library.load() if refusal is None else str(refusal)

    yield ask
    monkeypatch.undo()
    library._attempt.cache_clear()


@pytest.fixture
def carried(tmp_path) -> Path:
    """The library for this processor in a folder of its own, as a wheel brings it."""
    if (reason := library.missing()) is not None:
        pytest.skip(f"the native kernels are not for this machine: {reason}")
    library.load()
    made = compiler.find(compiler.CARRIED, sets.chosen_set()) or compiler.find(
        compiler.cache_folder(), sets.chosen_set()
    )
    assert made is not None
    folder = tmp_path / "compiled"
    folder.mkdir()
    return Path(shutil.copy(made, folder / made.name))


def test_what_is_carried_needs_no_compiler(carried, tmp_path):
    """In a process of its own, which has no other copy of the library."""
    script = (
        f"from pathlib import Path; from fxquant.kernels.native import library; "
        f"library.CARRIED = Path({str(carried.parent)!r}); print(library.missing(), library.load().handle._name)"
    )
    places = {"PATH": "", "CXX": "", "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    taken = {"FXQUANT_ISA": os.environ["FXQUANT_ISA"]} if "FXQUANT_ISA" in os.environ else {}
    said = run(sys.executable, "-c", script, cwd=tmp_path, **places, **taken)
    assert said.splitlines()[-1] == f"None {carried}"
    assert not (tmp_path / "cache").exists()


def test_what_is_carried_for_other_sources_is_not_taken(fresh, carried):
    other = carried.with_name(carried.name.replace("native-", "native-x"))
    carried.rename(other)
    assert "no C++ compiler" in fresh(other.parent) and "carries none for" in fresh(other.parent)


def test_what_is_carried_and_broken_is_not_loaded(fresh, carried):
    carried.write_bytes(carried.read_bytes()[:-7])
    assert "carries none for" in fresh(carried.parent), "its name says what is in it"


def test_what_is_carried_and_cannot_be_loaded_is_compiled_instead(fresh, carried):
    """As where the C library is older than the one it was made with."""
    carried.unlink()
    content = b"made for something else"
    name = f"native-{compiler._key(sets.chosen_set())}-{compiler._digest(content)}.so"
    (carried.parent / name).write_bytes(content)
    told = fresh(carried.parent)
    assert "no C++ compiler" in told and "what this installation carries does not do" in told and name in told


def test_the_sets_to_carry_are_those_of_the_architecture(monkeypatch):
    for is_arm, table in ((False, processor._X86), (True, processor._ARM)):
        monkeypatch.setattr(processor, "is_arm", lambda own=is_arm: own)
        names = [row.name for row in sets.sets_to_carry()]
        assert names == [row.name for row in sets.SETS if row.name in table] and "plain" in names


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What the build reads, where it may write."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "fxquant", folder / "fxquant", ignore=shutil.ignore_patterns("__pycache__", "compiled"))
    return folder


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints; its own words where it fails."""
    clean = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "FXQUANT_ISA", "FXQUANT_KERNELS")
    }
    every = {**clean, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1", **environment}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=every, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def wheel_of(source: Path, out: Path, **environment: str) -> tuple[Path, str]:
    """The one wheel that pip makes, without network, and what it says."""
    options = ("--no-build-isolation", "--no-deps", "--no-index", "-v", "-w", str(out))
    said = run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=out, **environment)
    (made,) = out.glob("*.whl")
    return made, said


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return wheel_of(source, tmp_path_factory.mktemp("wheel"), FXQUANT_KERNELS="all")[0]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-index", "--no-compile", "--target", str(folder))
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=folder)
    return folder


def from_the_wheel(installed: Path, tmp_path: Path, script: str, **environment: str) -> str:
    """What a script prints with the installed package, a path without a compiler and an empty cache, which stays empty."""
    nothing = tmp_path / "bin"
    nothing.mkdir(exist_ok=True)
    places = {"PYTHONPATH": str(installed), "PATH": str(nothing), "CXX": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    said = run(sys.executable, "-c", script, cwd=tmp_path, **places, **environment)
    assert not (tmp_path / "cache" / "fxquant").exists()
    return said


SMALL = """
import torch, fxquant
from fxquant import processor
from fxquant.kernels.native import compiler, library
from fxquant.kernels.native.model import NativeModel

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 40, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(40, 9, 1)).eval()
images = torch.randn(4, 3, 9, 7)
prepared = fxquant.calibrate(fxquant.prepare(model, images), [images], progress=False)
int8, reference = fxquant.convert(prepared), fxquant.convert(prepared, kernels="reference")
for x in (images, images[:1] * 3):
    assert torch.equal(NativeModel(reference)(x), reference(x)) and torch.equal(int8(x), reference(x))
assert set(fxquant.coverage(int8).kernels.values()) == {"native"}, fxquant.coverage(int8)
print(library.load().name, library.load().handle._name, fxquant.__file__)
"""
DEMO = """
from fxquant import cli
from fxquant.kernels.native.library import Library

calls, before = [], Library.run
Library.run = lambda self, *args: (calls.append(self.handle._name), before(self, *args))[1]
cli.main(["demo"])
print(len(calls), "native calls of", set(calls))
"""


@pytest.mark.long
@needs_a_compiler
def test_a_wheel_is_for_its_platform_and_any_python(wheel):
    architecture = "aarch64" if processor.is_arm() else "x86_64"
    assert wheel.name.endswith(f"-py3-none-linux_{architecture}.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        about = file.read(next(name for name in names if name.endswith("/WHEEL"))).decode()
    assert "Root-Is-Purelib: false" in about and not [name for name in names if ".data/" in name]
    made = [name.removeprefix(COMPILED).split("-")[1] for name in names if name.startswith(COMPILED)]
    assert sorted(made) == sorted(row.name for row in sets.sets_to_carry())


@pytest.mark.long
@needs_a_compiler
@pytest.mark.parametrize("name", processor._sets_here())
def test_the_reference_s_bits_without_a_compiler(installed, tmp_path, name):
    """With each instruction set of this processor."""
    said = from_the_wheel(installed, tmp_path, SMALL, FXQUANT_ISA=name)
    taken, path, package = said.split()
    assert path.startswith(str(installed / COMPILED)) and package.startswith(str(installed)), said
    below = processor._X86 if not processor.is_arm() else processor._ARM
    assert below[taken] <= below[name], said


@pytest.mark.long
@needs_a_compiler
def test_the_demo_natively_from_the_wheel(installed, tmp_path):
    said = from_the_wheel(installed, tmp_path, DEMO)
    count, _, _, *paths = said.splitlines()[-1].split()
    assert int(count) > 0 and str(installed / COMPILED) in " ".join(paths), said


@pytest.mark.long
def test_without_a_compiler_the_wheel_is_pure_and_says_so(source, tmp_path):
    made, said = wheel_of(source, tmp_path, CXX="/nonexistent/compiler")
    assert made.name.endswith("-py3-none-any.whl")
    assert "native kernels for plain: " in said and "/nonexistent/compiler" in said
    assert not [name for name in zipfile.ZipFile(made).namelist() if name.startswith(COMPILED)]


@pytest.mark.long
def test_wheels_that_are_given_away_are_whole_or_an_error(source, tmp_path):
    with pytest.raises(AssertionError, match="not all could be compiled"):
        wheel_of(source, tmp_path, CXX="false", FXQUANT_KERNELS="all")
    with pytest.raises(AssertionError, match="FXQUANT_KERNELS='some' is not known"):
        wheel_of(source, tmp_path, FXQUANT_KERNELS="some")
    assert wheel_of(source, tmp_path, FXQUANT_KERNELS="none")[0].name.endswith("-py3-none-any.whl")


def made_by_the_backend(hook: str, source: Path, out: Path) -> tuple[str, str]:
    """The name of what a hook of the build's backend makes, and what it says."""
    script = f"from setuptools import build_meta; print('made:', build_meta.{hook}({str(out)!r}))"
    said = run(sys.executable, "-c", script, cwd=source)
    return re.search(r"^made: (.*)$", said, re.M)[1], said


@pytest.mark.long
def test_a_source_distribution_has_what_the_build_needs(source, tmp_path):
    name, _ = made_by_the_backend("build_sdist", source, tmp_path)
    with tarfile.open(tmp_path / name) as file:
        inside = {Path(*Path(member).parts[1:]) for member in file.getnames()}
    headers = {path.relative_to(ROOT) for path in compiler.SOURCE.iterdir()}
    assert headers | {Path("setup.py"), Path("pyproject.toml"), Path("fxquant/py.typed")} <= inside
    out = tmp_path / "out"
    out.mkdir()
    assert wheel_of(tmp_path / name, out, CXX="false")[0].name.endswith("-py3-none-any.whl")


@pytest.mark.long
def test_an_editable_installation_compiles_nothing(source, tmp_path):
    name, said = made_by_the_backend("build_editable", source, tmp_path)
    assert name.endswith("-py3-none-any.whl") and "compiled when they are first used" in said
    assert not (source / COMPILED).exists()
