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
from fxquant.errors import FxquantError, MissingPackageError, Refusal
from fxquant.export.deployment import Deployment
from fxquant.export.to_onnx import OnnxFile, deployed
from fxquant.export.trace import first_line
from fxquant.runtimes import RUNNABLE, Runtime
from fxquant.runtimes.pytorch import torch_threads

__all__ = ["Contender", "contenders_of"]

Run = Callable[..., Any]


@dataclass(frozen=True)
class Contender:
    """One line of the table before it is measured.

    Attributes:
        name: ``float``, ``float compiled`` or ``int8``.
        runtime: what computes it.
        build: from a call and a number of threads to a callable with the model's signature; may raise
            a ``Refusal``, which is its note.
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
    model = deployed(int8, example.kwargs or example.args)
    file, saved = _File(model), _once(partial(_saved_size, int8))
    for name, runtime in RUNNABLE.items():
        if name not in runtimes:
            continue
        if runtime.takes_file:
            build, carried = partial(file.build, runtime), partial(file.carry, runtime)
            found.append(Contender("int8", name, build, file.size, carried))
        else:
            build, carried = partial(_in_process, model, runtime), partial(_carry, int8, runtime=runtime)
            found.append(Contender("int8", name, build, saved, carried))
    return found


def _in_torch(run: Run, threads: int | None) -> Run:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), torch_threads(threads):
            return run(*args, **kwargs)

    return call


def _in_process(model: Deployment, runtime: Runtime, call: Call, threads: int | None) -> Run:
    return runtime.compiled(model.with_call(call), threads)


def _compiled(model: nn.Module, limit: float, call: Call, threads: int | None) -> Run:
    """``torch.compile``, compiled for ``call``; whatever goes wrong inside it is a fact about it."""
    run = _in_torch(torch.compile(copy.deepcopy(model)), threads)
    try:
        with time_limit(limit):
            run(*call.args, **call.kwargs)
    except OutOfTimeError:
        raise Refusal(f"torch.compile took more than {limit:g} s") from None
    except Exception as error:  # compilers raise what they like
        raise Refusal(f"torch.compile fails: {first_line(error)[:160]}") from error
    return run


class _File:
    """The ONNX file, made once, when it is first needed."""

    def __init__(self, model: Deployment) -> None:
        self.model = model

    def content(self) -> OnnxFile:
        try:
            made: OnnxFile = self.model.file()
        except MissingPackageError:
            raise Refusal(_missing("pip install 'fxquant[onnx]'")) from None
        except FxquantError as error:
            raise Refusal(f"no ONNX file: {first_line(error)[:160]}") from error
        return made

    def build(self, runtime: Runtime, call: Call, threads: int | None) -> Run:
        if not runtime.is_installed():
            raise Refusal(_missing(runtime.how_to_install))
        self.content()
        try:
            return runtime.compiled(self.model, threads)
        except FxquantError as error:
            raise Refusal(first_line(error)[:160]) from error

    def size(self) -> int | None:
        return self.content().size

    def carry(self, runtime: Runtime, call: Call) -> Carried:
        made = self.content()
        tensors = made.model.signature.tensors(call.args, call.kwargs)
        content = made.content if made.pair is None else made.pair.path
        return {"runtime": runtime, "content": content, "tensors": tensors}


def _carry(model: nn.Module, call: Call, *, runtime: Runtime | str = "torch") -> Carried:
    return {"runtime": runtime, "model": model, "call": (call.args, call.kwargs)}


def _missing(remedy: str) -> str:
    return f"not installed: {remedy}"


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
