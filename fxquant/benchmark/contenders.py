"""What ``bench`` times: eager float, compiled float, and the int8 model in each runtime."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.benchmark.memory import Carried
from fxquant.benchmark.time_limit import OutOfTimeError, time_limit
from fxquant.capture.calls import Call
from fxquant.checkpoint import save
from fxquant.errors import FxquantError, MissingPackageError
from fxquant.export.installed import is_installed
from fxquant.export.runtimes import EXTRA, RUNTIMES, compile, compile_file, torch_threads
from fxquant.export.to_onnx import OnnxFile, make_onnx

__all__ = ["Contender", "UnavailableError", "contenders_of"]

Run = Callable[..., Any]
_HERE = ("torch", "native")
"""Runtimes that take the model itself; the others take its file."""


class UnavailableError(Exception):
    """A contender that cannot run here; the message is its note. Never leaves this package."""


@dataclass(frozen=True)
class Contender:
    """One line of the table before it is measured.

    Attributes:
        name: ``float``, ``float compiled`` or ``int8``.
        runtime: what computes it.
        build: from a call and a number of threads to a callable with the model's signature; may raise
            ``UnavailableError``.
        size: bytes on disk, where it can be written.
        carried: what a process of its own needs to run a call, None where there is none.
    """

    name: str
    runtime: str
    build: Callable[[Call, int | None], Run]
    size: Callable[[], int | None]
    carried: Callable[[Call], Carried | None]


def contenders_of(
    float_model: nn.Module | None, int8: Any, example: Call, runtimes: Sequence[str], compile_limit: float | None
) -> list[Contender]:
    """Every contender, float first.

    Args:
        float_model: the model to compare with, where there is one.
        int8: the converted model.
        example: a call of both.
        runtimes: where int8 is to run.
        compile_limit: seconds that ``torch.compile`` may take; None to leave it out.
    """
    found = []
    if float_model is not None:
        size, carried = _once(partial(_state_size, float_model)), partial(_carry, float_model)
        found.append(Contender("float", "torch", lambda _, threads: _in_torch(float_model, threads), size, carried))
        if compile_limit is not None:
            build = partial(_compiled, float_model, compile_limit)
            found.append(Contender("float compiled", "torch", build, size, lambda _: None))
    file, saved = _File(int8, example), _once(partial(_saved_size, int8))
    for runtime in RUNTIMES:
        if runtime not in runtimes:
            continue
        if runtime in _HERE:
            build, carried = partial(_in_process, int8, runtime), partial(_carry, int8, runtime=runtime)
            found.append(Contender("int8", runtime, build, saved, carried))
        else:
            build, carried = partial(file.build, runtime), partial(file.carry, runtime)
            found.append(Contender("int8", runtime, build, file.size, carried))
    return found


def _in_torch(run: Run, threads: int | None) -> Run:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), torch_threads(threads):
            return run(*args, **kwargs)

    return call


def _in_process(int8: Any, runtime: str, call: Call, threads: int | None) -> Run:
    return compile(int8, call.kwargs or call.args, runtime=runtime, threads=threads)


def _compiled(model: nn.Module, limit: float, call: Call, threads: int | None) -> Run:
    """``torch.compile``, compiled for ``call``; whatever goes wrong inside it is a fact about it."""
    run = _in_torch(torch.compile(copy.deepcopy(model)), threads)
    try:
        with time_limit(limit):
            run(*call.args, **call.kwargs)
    except OutOfTimeError:
        raise UnavailableError(f"torch.compile took more than {limit:g} s") from None
    except Exception as error:  # compilers raise what they like
        raise UnavailableError(f"torch.compile fails: {_first_line(error)}") from error
    return run


class _File:
    """The ONNX file, made once, when it is first needed."""

    def __init__(self, int8: Any, example: Call) -> None:
        self.int8, self.example = int8, example
        self.made: OnnxFile | UnavailableError | None = None

    def content(self) -> OnnxFile:
        if self.made is None:
            try:
                self.made = make_onnx(self.int8, self.example.kwargs or self.example.args)
            except MissingPackageError:
                self.made = UnavailableError(_missing("onnx"))
            except FxquantError as error:
                self.made = UnavailableError(f"no ONNX file: {_first_line(error)}")
        if isinstance(self.made, UnavailableError):
            raise self.made
        return self.made

    def build(self, runtime: str, call: Call, threads: int | None) -> Run:
        if not is_installed(runtime):
            raise UnavailableError(_missing(EXTRA[runtime]))
        made = self.content()
        try:
            return compile_file(runtime, made, threads)
        except FxquantError as error:
            raise UnavailableError(_first_line(error)) from error

    def size(self) -> int | None:
        return self.content().size

    def carry(self, runtime: str, call: Call) -> Carried:
        made = self.content()
        tensors = made.model.signature.tensors(call.args, call.kwargs)
        content = made.content if made.pair is None else made.pair.path
        return {"runtime": runtime, "content": content, "tensors": tensors}


def _carry(model: nn.Module, call: Call, *, runtime: str = "torch") -> Carried:
    return {"runtime": runtime, "model": model, "call": (call.args, call.kwargs)}


def _missing(extra: str) -> str:
    return f"not installed: pip install 'fxquant[{extra}]'"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:160]


def _once(make: Callable[[], int]) -> Callable[[], int]:
    made: list[int] = []

    def known() -> int:
        if not made:
            made.append(make())
        return made[0]

    return known


def _state_size(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "float.pt")
        return (Path(folder) / "float.pt").stat().st_size


def _saved_size(int8: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        save(int8, Path(folder) / "int8.pt")
        return (Path(folder) / "int8.pt").stat().st_size
