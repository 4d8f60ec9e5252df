"""compile: a quantized model as a callable that runs in the runtime of one's choice, or in the fastest installed.

The file for ONNX Runtime and OpenVINO is made in memory; beyond 2 GiB, which one protobuf cannot hold, in a temporary folder
that lives as long as what was compiled.
"""

from __future__ import annotations

import math
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fxquant.capture.calls import Call
from fxquant.capture.values import unchanged
from fxquant.errors import FxquantError, InputError
from fxquant.export.agreement import GOOD_SQNR, together
from fxquant.export.deployment import Deployment
from fxquant.export.finding import finding
from fxquant.export.interleaved_timing import time_interleaved
from fxquant.export.signature import tensors_of
from fxquant.export.to_onnx import deployed
from fxquant.export.tolerance import exact_outputs, least_sqnr
from fxquant.inputs import describe_inputs, make_inputs
from fxquant.kernels.reference_layers import BY_REFERENCE
from fxquant.nn.integer import IntegerOp
from fxquant.runtimes import RUNNABLE, runtime_of
from fxquant.runtimes.pytorch import exact

__all__ = ["Compiled", "Origin", "Timing", "compile", "compile_again"]

_ROUNDS, _SECONDS = 25, 2.5
"""For ``auto``: rounds of each runtime, of which fewer are taken once that much time has gone."""


@dataclass(frozen=True)
class Timing:
    """One runtime on the example.

    Attributes:
        runtime: its name.
        milliseconds: the median time of a call; None where it was not timed.
        reason: why it was not timed, or why it agrees to less than 40 dB and is right all the same.
        agreement: how well its outputs agree with the exact integers', in decibels; None where they were not compared.
    """

    runtime: str
    milliseconds: float | None
    reason: str = ""
    agreement: float | None = None

    def __str__(self) -> str:
        if self.milliseconds is None:
            return f"{self.runtime} {self.reason}"
        exact = (
            "" if self.agreement is None else ", exact" if self.agreement == math.inf else f", {self.agreement:.0f} dB"
        )
        return f"{self.runtime} {self.milliseconds:.3g} ms{exact}{self.reason and f' ({self.reason})'}"


class Origin:
    """What a ``Compiled`` was made of, enough to make it again. The integer model is not kept for that: what runs holds the
    weights in a form of its own, and they would lie in memory twice.

    Args:
        model: the integer model.
        request: the runtime, as ``compile`` takes it; ``auto`` where it had nothing to measure.
        threads: likewise.
        inputs: the example, described; None where none is known, or none can be described.
    """

    def __init__(self, model: nn.Module, request: str, threads: int | None, inputs: Any) -> None:
        self.request, self.threads, self.inputs = request, threads, inputs
        self._model, self._version = weakref.ref(model), _version(model)

    @property
    def model(self) -> nn.Module:
        """The integer model.

        Raises:
            InputError: nobody has it any more, or its weights have changed.
        """
        model = self._model()
        if model is None:
            raise InputError(
                "a compiled model is saved, pickled and copied from the integer model that it was made of, and that has "
                "been let go.\n  what to do: int8 = fxquant.convert(prepared), or fxquant.load(model, path, "
                "recompile=False); fast = fxquant.compile(int8); and keep int8 as long as that."
            )
        if _version(model) != self._version:
            raise InputError(
                "the weights of the integer model have changed since it was compiled.\n  what to do: compile it again."
            )
        return model


def _version(model: nn.Module) -> int:
    """How often weights and biases were written to."""
    found = (b for name, b in model.named_buffers() if name.rpartition(".")[2] in ("weight", "bias"))
    return sum(b._version for b in found if not b.is_inference())


class Compiled:
    """A model in a runtime, called as the model is; it returns what the model returns, in torch tensors.

    ``fxquant.save`` and pickle write the integer model that it was made of, as long as that is there, and the runtime's
    name: what a runtime makes of a model is for one processor and one version, and is made again where it is read.

    Attributes:
        runtime: where it runs.
        report: with ``auto``, one ``Timing`` for each runtime, the fastest first; empty otherwise.
        origin: what ``compile`` made it of.
    """

    def __init__(self, runtime: str, call: Callable[..., Any], report: tuple[Timing, ...] = ()) -> None:
        self.runtime, self._call, self.report = runtime, call, report
        self.origin: Origin | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    @property
    def known_origin(self) -> Origin:
        """What it was made of.

        Raises:
            InputError: ``compile`` did not make it.
        """
        if self.origin is None:
            raise InputError("fxquant.compile did not make this, which knows of no model that it was made of.")
        return self.origin

    def __reduce__(self) -> tuple[Any, ...]:
        own = self.known_origin
        return compile_again, (own.model, own.request, own.threads, own.inputs)

    def __repr__(self) -> str:
        compared = f", fastest of: {'; '.join(map(str, self.report))}" if self.report else ""
        return f"<compiled for {self.runtime}{compared}>"


def compile(
    model: nn.Module, example_inputs: Any = None, *, runtime: str = "auto", threads: int | None = None
) -> Compiled:
    """A quantized model as a callable for inference.

    Example:
        >>> fast = fxquant.compile(int8, images)
        >>> logits = fast(images)
        >>> print(*fast.report)

    Args:
        model: what ``calibrate``, ``freeze`` or ``convert`` returned; not touched.
        example_inputs: as for ``prepare``; None for noise of the shapes that the model was prepared with.
        runtime: ``torch`` (the integer model on torch's own int8 operators), ``native`` (our own kernels: the whole graph
            as one call, with the reference's integers but for what attention, layer norm and softmax evaluate in float32,
            or in parts with torch's operators between them; on Linux, compiled when first used where no wheel brought
            them), ``onnxruntime``, ``openvino``, or ``auto``: the fastest on the example, measured interleaved for some
            seconds, of those that are here, take the model, and give on the example what the exact integers give: to
            40 dB (noise of 1 % of the signal), or as far as one more rounding of each tensor would leave it if that is
            less; 99 of 100 equal elements of outputs that are no real numbers. ``report`` tells each one's agreement, and
            why one is left out.
        threads: how many the runtime uses; None for its own choice. For torch and native, the number is set during each
            call.

    Raises:
        LevelError, CalibrationError: the model is not ready.
        MissingPackageError: the runtime, or what writes its file, is not installed.
        InputError, ExportError: as for ``export_onnx``; ``ExportError`` too where the native kernels do not have this
            machine or anything of the model.
    """
    own = None if runtime == "auto" else runtime_of(runtime, also=("auto",))
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads}: a runtime needs at least one. Give a positive number, or None.")
    ready = deployed(model, example_inputs)
    with unchanged(ready.integer, but=IntegerOp):  # a model that writes to its buffers is called here too
        made = _fastest(ready, threads) if own is None else Compiled(own.name, own.compiled(ready, threads))
    unmeasured = any(own.runtime == made.runtime and own.milliseconds is None for own in made.report)
    made.origin = Origin(ready.integer, "auto" if unmeasured else made.runtime, threads, describe_inputs(ready.call))
    return made


def compile_again(int8: nn.Module, request: str, threads: int | None, inputs: Any) -> Compiled:
    """What was compiled from ``int8`` before, by what an ``Origin`` knew of it."""
    return compile(int8, make_inputs(inputs, torch.device("cpu")), runtime=request, threads=threads)


def _fastest(model: Deployment, threads: int | None) -> Compiled:
    """Every runtime that is installed and takes the model, measured interleaved on the example."""
    first = next(iter(RUNNABLE))
    found, failed, heard = dict[str, Compiled](), list[Timing](), list[warnings.WarningMessage]()
    for name, runtime in RUNNABLE.items():
        if not runtime.is_installed():
            failed.append(Timing(name, None, f"is not installed ({runtime.how_to_install})"))
            continue
        try:
            with _kept_back(heard):
                found[name] = Compiled(name, runtime.compiled(model, threads))
        except FxquantError as error:
            if name == first:
                raise
            failed.append(_failure(name, error))
    made = _chosen(model, found, failed)
    if made.runtime == first:
        for warning in heard:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return made


@contextmanager
def _kept_back(heard: list[warnings.WarningMessage]) -> Iterator[None]:
    """Keep back what is said of layers that run by the reference, which only matters where torch is chosen."""
    with warnings.catch_warnings(record=True) as every:
        warnings.filterwarnings("always", message=BY_REFERENCE)
        yield
    for warning in every:
        if re.match(BY_REFERENCE, str(warning.message)):
            heard.append(warning)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _chosen(model: Deployment, found: dict[str, Compiled], failed: list[Timing]) -> Compiled:
    """The fastest of those that are right, with the report."""
    first = next(iter(RUNNABLE))
    call = model.call
    if call is None:
        unknown = [Timing(name, None, "is not measured: no example is known") for name in found]
        return Compiled(first, found[first], (*unknown, *failed))
    agreed, said, wrong = _compared(model.integer, found, call)
    failed += wrong
    if len(found) == 1:
        own = Timing(first, None, "is all there is that is right" if wrong else "is all there is", agreed[first])
        return Compiled(first, found[first], (own, *failed))
    runs = {name: partial(own, *call.args, **call.kwargs) for name, own in found.items()}
    times = time_interleaved(runs, rounds=_ROUNDS, seconds=_SECONDS)
    order = sorted(times, key=lambda name: times[name].median)
    timed = (Timing(name, 1e3 * times[name].median, said.get(name, ""), agreed[name]) for name in order)
    report = (*timed, *failed)
    return Compiled(order[0], found[order[0]], report)


def _compared(
    int8: Any, found: dict[str, Compiled], call: Call
) -> tuple[dict[str, float], dict[str, str], list[Timing]]:
    """How well each runtime agrees with the exact integers on the example, and what is to be said of those that are right
    and yet below 40 dB; those that are wrong leave ``found``.

    Where torch's operators are among these, the exact reference takes their place: it runs everything.
    """
    with unchanged(int8, but=IntegerOp):
        expected, first = exact_outputs(int8, call), next(iter(RUNNABLE))
    agreed, said, wrong, least = dict[str, float](), dict[str, str](), list[Timing](), math.inf
    for name, own in list(found.items()):
        with unchanged(int8, but=IntegerOp):
            agreed[name] = together(tensors_of(own(*call.args, **call.kwargs)), expected)
        if agreed[name] >= GOOD_SQNR:
            continue
        least = least_sqnr(int8, call, expected) if least == math.inf else least
        said[name] = str(finding(RUNNABLE[name].title, agreed[name], int8, least))
        if agreed[name] < least:
            wrong.append(Timing(name, None, f"is left out: {said[name]}", agreed[name]))
            del found[name]
    if first not in found:
        found[first], agreed[first] = Compiled(first, exact(int8)), math.inf
    return agreed, said, wrong


def _failure(runtime: str, error: Exception) -> Timing:
    return Timing(runtime, None, f"cannot: {str(error).splitlines()[0]}")
