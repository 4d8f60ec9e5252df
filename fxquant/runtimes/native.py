"""fxquant's own kernels: the whole graph as one call, with the integers of the exact reference."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fxquant.errors import ExportError, InputError
from fxquant.graph.leveled import LeveledModule
from fxquant.kernels.native.library import missing
from fxquant.kernels.native.model import NativeModel, Unfit
from fxquant.runtimes.pytorch import torch_threads
from fxquant.runtimes.runtime import Deployed, Run, Runtime
from fxquant.targets import X86

__all__ = ["NATIVE", "native_model"]


def native_model(int8: Any) -> NativeModel:
    """A converted model on the native kernels; whether they have all of its ops may only show when it is first called.

    Raises:
        ExportError: this machine, or the model, is not for them; says why.
    """
    try:
        if not isinstance(int8, LeveledModule):
            raise Unfit(f"a {type(int8).__name__} is no graph")
        if any(x.device.type != "cpu" for x in (*int8.parameters(), *int8.buffers())):
            raise Unfit("the model is not on the CPU")
        return NativeModel(int8)
    except Unfit as reason:
        raise _unfit(reason) from None


def _unfit(reason: Unfit) -> ExportError:
    return ExportError(
        f"no native kernels: {reason}\n"
        "  what to do: compile(..., runtime='torch') runs every op, runtime='auto' takes the fastest that can."
    )


def _open(model: Deployed, threads: int | None) -> Run:
    """Called once where an example is known, so that the model is known to fit."""
    run = native_model(model.integer)
    if model.call is not None:
        try:
            with torch_threads(threads):
                run(*model.call.args, **model.call.kwargs)
        except Unfit as reason:
            raise _unfit(reason) from None

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch_threads(threads):
            try:
                return run(*args, **kwargs)
            except Unfit as reason:
                raise InputError(
                    f"the native kernels do not take this call: {reason}.\n"
                    "  what to do: compile(..., runtime='torch') takes whatever the model takes."
                ) from None

    return call


def _version() -> str:
    return version("fxquant")


def _status(saturates: bool) -> str:
    reason = missing()
    return "the reference's integers" if reason is None else f"cannot run: {reason}"


NATIVE = Runtime(
    name="native",
    title="native",
    target=X86,
    open=_open,
    alone=native_model,
    found=_version,
    status=_status,
    no_placement="the native kernels run whole integer graphs only",
)
