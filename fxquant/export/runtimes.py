"""compile: a quantized model as a callable that runs in the runtime of one's choice, or in the fastest installed.

The file for ONNX Runtime and OpenVINO is made in memory; beyond 2 GiB, which one protobuf cannot hold, in a temporary folder
that lives as long as what was compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxquant.capture.calls import Call
from fxquant.errors import ExportError, FxquantError, InputError
from fxquant.export.exchange_model import example_call, integer_model, needed_bits
from fxquant.export.installed import is_installed, require
from fxquant.export.sessions import Session, has_bfloat16, onnxruntime_session, openvino_session, run_session
from fxquant.export.signature import Signature
from fxquant.export.to_onnx import OnnxFile, make_onnx
from fxquant.export.turns import take_turns
from fxquant.graph.leveled import LeveledModule
from fxquant.kernels.frozen import fastest
from fxquant.kernels.native.model import NativeModel, Unfit

__all__ = [
    "EXTRA",
    "HALF_RUNTIMES",
    "RUNTIMES",
    "Compiled",
    "Timing",
    "compile",
    "compile_file",
    "native_model",
    "torch_threads",
]

RUNTIMES = ("torch", "native", "onnxruntime", "openvino")
_OPEN: dict[str, Callable[..., Session]] = {"onnxruntime": onnxruntime_session, "openvino": openvino_session}
EXTRA = {"onnxruntime": "onnx", "openvino": "openvino"}
"""The extra of fxquant that brings a runtime."""
HALF_RUNTIMES = {"openvino": has_bfloat16}
"""Runtimes that can compute floats in bfloat16, and whether they do on this processor; ONNX Runtime has no such kernels on
the CPU, and fxquant's own compute in integers and float32."""

_ROUNDS, _SECONDS = 25, 2.5
"""For ``auto``: turns of each runtime, of which fewer are taken once that much time has gone."""


@dataclass(frozen=True)
class Timing:
    """One runtime on the example: the median time of a call in milliseconds, or why there is none."""

    runtime: str
    milliseconds: float | None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.runtime} {self.reason if self.milliseconds is None else f'{self.milliseconds:.3g} ms'}"


class Compiled:
    """A model in a runtime, called as the model is; it returns what the model returns, in torch tensors.

    Attributes:
        runtime: where it runs.
        report: with ``auto``, one ``Timing`` for each runtime, the fastest first; empty otherwise.
    """

    def __init__(self, runtime: str, call: Callable[..., Any], report: tuple[Timing, ...] = ()) -> None:
        self.runtime, self._call, self.report = runtime, call, report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __repr__(self) -> str:
        compared = f", fastest of: {'; '.join(map(str, self.report))}" if self.report else ""
        return f"<compiled for {self.runtime}{compared}>"


def compile(model: Any, example_inputs: Any = None, *, runtime: str = "auto", threads: int | None = None) -> Compiled:
    """A quantized model as a callable for inference.

    Args:
        model: what ``calibrate``, ``freeze`` or ``convert`` returned; not touched.
        example_inputs: as for ``prepare``; None for noise of the shapes that the model was prepared with.
        runtime: ``torch`` (the integer model on torch's own int8 operators), ``native`` (our own kernels: the whole graph
            as one call, bit for bit the exact reference; for x86-64 with AVX512-VNNI, and compiled when first used),
            ``onnxruntime``, ``openvino``, or ``auto``: the fastest of those that are here and take the model, on the
            example, measured in turns for some seconds.
        threads: how many the runtime uses; None for its own choice. For torch and native, the number is set during each
            call.

    Raises:
        LevelError, CalibrationError: the model is not ready.
        MissingPackageError: the runtime, or what writes its file, is not installed.
        InputError, ExportError: as for ``export_onnx``; ``ExportError`` too where the native kernels do not have this
            machine or an op of the model.
    """
    if runtime not in (*RUNTIMES, "auto"):
        raise InputError(f"runtime={runtime!r} is not known. Choose one of {', '.join((*RUNTIMES, 'auto'))}.")
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads}: a runtime needs at least one. Give a positive number, or None.")
    if runtime == "auto":
        return _fastest(model, example_inputs, threads)
    if runtime == "torch":
        return Compiled("torch", _in_torch(model, example_inputs, threads))
    if runtime == "native":
        return Compiled("native", _in_native(model, example_inputs, threads))
    require(runtime, f"runtime={runtime!r}", EXTRA[runtime])
    return compile_file(runtime, make_onnx(model, example_inputs), threads)


def _in_torch(model: Any, example_inputs: Any, threads: int | None) -> Callable[..., Any]:
    """The integer model with the least of Python between its operators; as it is where no example is known."""
    run = integer_model(model).eval()
    example = _known_call(model, example_inputs)
    if example is not None:
        with torch.no_grad(), torch_threads(threads):
            run = fastest(run, *example.args, **example.kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), torch_threads(threads):
            return run(*args, **kwargs)

    return call


def _in_native(model: Any, example_inputs: Any, threads: int | None) -> Callable[..., Any]:
    """The integer model on the native kernels, called once where an example is known, so that it is known to fit."""
    run = native_model(integer_model(model))
    example = _known_call(model, example_inputs)
    if example is not None:
        try:
            with torch_threads(threads):
                run(*example.args, **example.kwargs)
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


def _known_call(model: Any, example_inputs: Any) -> Call | None:
    """The example as a call; None where none was given and the model was prepared without one."""
    try:
        return example_call(model, example_inputs)
    except InputError:
        if example_inputs is not None:
            raise
        return None


@contextmanager
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


def compile_file(runtime: str, made: OnnxFile, threads: int | None) -> Compiled:
    """A file in ONNX Runtime or OpenVINO, called as the model that it was made from.

    Raises:
        MissingPackageError: the runtime is not installed.
        ExportError: it refuses the file, or computes it wrongly.
    """
    if runtime == "openvino" and 16 in needed_bits(made.model.flat)[0]:
        raise ExportError(
            "OpenVINO computes tensors of more than 8 bits wrongly on the CPU (measured: off by a quarter of the largest "
            "output).\n  what to do: use onnxruntime, or a recipe with 8-bit activations."
        )
    options = {"float_dtype": made.model.float_dtype} if runtime in HALF_RUNTIMES else {}
    session, signature = _OPEN[runtime](made.source, threads, **options), made.model.signature
    run_session(session, made.model.inputs)  # OpenVINO compiles when it is called
    return Compiled(runtime, _caller(session, signature))


def _caller(session: Session, signature: Signature) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors: list[Tensor] = signature.tensors(args, kwargs)
        return signature.restore(run_session(session, tensors))

    return call


def _fastest(model: Any, example_inputs: Any, threads: int | None) -> Compiled:
    """Every runtime that is installed and takes the model, measured in turns on the example."""
    int8, failed = integer_model(model), list[Timing]()
    found = {"torch": Compiled("torch", _in_torch(int8, example_inputs, threads))}
    try:
        found["native"] = Compiled("native", _in_native(int8, example_inputs, threads))
    except FxquantError as error:
        failed.append(_failure("native", error))
    made = None
    if is_installed("onnx") and is_installed("onnxscript"):
        try:
            made = make_onnx(model, example_inputs)
        except ExportError as error:
            failed += [_failure(name, error) for name in _OPEN]
    for name in _OPEN:
        if not is_installed(name):
            failed.append(Timing(name, None, f"is not installed (pip install 'fxquant[{EXTRA[name]}]')"))
        elif made is not None:
            try:
                found[name] = compile_file(name, made, threads)
            except FxquantError as error:
                failed.append(_failure(name, error))
    call = _known_call(int8, example_inputs)
    if len(found) == 1:
        return Compiled("torch", found["torch"], (Timing("torch", None, "is all there is"), *failed))
    if call is None:
        unknown = [Timing(name, None, "is not measured: no example is known") for name in found]
        return Compiled("torch", found["torch"], (*unknown, *failed))
    runs = {name: partial(own, *call.args, **call.kwargs) for name, own in found.items()}
    turns = take_turns(runs, rounds=_ROUNDS, seconds=_SECONDS)
    order = sorted(turns, key=lambda name: turns[name].median)
    report = (*(Timing(name, 1e3 * turns[name].median) for name in order), *failed)
    return Compiled(order[0], found[order[0]], report)


def _failure(runtime: str, error: Exception) -> Timing:
    return Timing(runtime, None, f"cannot: {str(error).splitlines()[0]}")
