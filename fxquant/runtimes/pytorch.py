"""PyTorch on a CPU: the integer model on torch's own int8 operators, with the least of Python between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from fxquant.kernels.frozen import fastest
from fxquant.kernels.operators import operators
from fxquant.kernels.runner import by_reference, on_torch
from fxquant.runtimes.runtime import Deployed, Run, Runtime
from fxquant.targets import X86

__all__ = ["PYTORCH", "exact", "torch_threads"]


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Inside, torch uses that many threads; as many as ever where None."""
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _open(model: Deployed, threads: int | None) -> Run:
    """As a program for the example's shapes; as it is where no example is known."""
    own = on_torch(model.integer.eval())
    run: Run = own
    if model.call is not None:
        with torch.no_grad(), torch_threads(threads):
            run = fastest(own, *model.call.args, **model.call.kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), torch_threads(threads):
            return run(*args, **kwargs)

    return call


def exact(integer: Any) -> Run:
    """The integer model by the exact reference, which runs everything."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), by_reference(integer):
            return integer(*args, **kwargs)

    return call


def _version() -> str:
    return str(torch.__version__)


def _status(saturates: bool) -> str:
    found = operators()
    if found is None:
        return "no int8 operators that are right here: models run by the exact reference, slowly"
    names = ", ".join(engine.name for engine in found.engines) or "no engine"
    return f"int8 operators: {names}" + ("; a layer whose sums could saturate runs by the reference" * saturates)


PYTORCH = Runtime(
    name="torch",
    title="torch",
    target=X86,
    open=_open,
    found=_version,
    status=_status,
)
