"""fxquant's own kernels: the graph, or all of it that they have, with the integers of the exact reference."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch

from fxquant.errors import ExportError, InputError, Refusal
from fxquant.graph.leveled import LeveledModule
from fxquant.kernels.native.library import missing
from fxquant.kernels.native.model import NativeModel
from fxquant.kernels.runner import natively_in_parts
from fxquant.runtimes.pytorch import torch_threads
from fxquant.runtimes.runtime import Deployed, Run, Runtime
from fxquant.targets import X86

__all__ = ["NATIVE", "native_model"]


def native_model(int8: Any) -> Run:
    """A converted model on the native kernels: whole where they have all of it, else in parts, with torch's operators
    between them. Whether they have all of its ops may only show when it is first called.

    Raises:
        ExportError: this machine is not for them, or nothing of the model; says why.
    """
    if any(x.device.type != "cpu" for x in (*int8.parameters(), *int8.buffers())):
        raise _refused(Refusal("the model is not on the CPU"))
    found = _whole(int8)
    return _in_parts(int8, found) if isinstance(found, Refusal) else found


def _whole(int8: Any) -> NativeModel | Refusal:
    if not isinstance(int8, LeveledModule):
        return Refusal(f"a {type(int8).__name__} is no graph")
    try:
        return NativeModel(int8)
    except Refusal as refusal:
        return refusal


def _in_parts(int8: Any, refusal: Refusal) -> Run:
    found = natively_in_parts(int8.eval()) if missing() is None else None
    if found is None:
        raise _refused(refusal) from None
    model = found

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    return run


def _refused(refusal: Refusal) -> ExportError:
    return ExportError(
        f"no native kernels: {refusal}\n"
        "  what to do: compile(..., runtime='torch') runs every op, runtime='auto' takes the fastest that can."
    )


def _open(model: Deployed, threads: int | None) -> Run:
    """Called once where an example is known, so that the model is known to fit."""
    run = native_model(model.integer)
    if model.call is not None:
        with torch_threads(threads):
            try:
                run(*model.call.args, **model.call.kwargs)
            except Refusal as refusal:
                run = _in_parts(model.integer, refusal)
                run(*model.call.args, **model.call.kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch_threads(threads):
            try:
                return run(*args, **kwargs)
            except Refusal as refusal:
                raise InputError(
                    f"the native kernels do not take this call: {refusal}.\n"
                    "  what to do: compile(..., runtime='torch') takes whatever the model takes."
                ) from None

    return call


def _version() -> str:
    return version("fxquant")


def _status(saturates: bool) -> str:
    refusal = missing()
    return "the reference's integers" if refusal is None else f"cannot run: {refusal}"


NATIVE = Runtime(
    name="native",
    title="native",
    target=X86,
    open=_open,
    alone=native_model,
    found=_version,
    status=_status,
    no_placement=Refusal("the native kernels compute in integers whatever they have"),
)
