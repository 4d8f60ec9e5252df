"""bench: a model's latency, size, memory and accuracy in int8, runtime by runtime, beside float."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from fxquant.benchmark.contenders import Contender, contenders_of
from fxquant.benchmark.memory import peak_memory
from fxquant.benchmark.table import Benchmark, Row
from fxquant.capture.calls import Call, as_call
from fxquant.capture.islands import level_of
from fxquant.capture.values import unchanged
from fxquant.errors import CalibrationError, FxquantError, InputError, Refusal
from fxquant.export.agreement import GOOD_SQNR, together
from fxquant.export.deployment import example_call
from fxquant.export.finding import finding
from fxquant.export.interleaved_timing import time_interleaved
from fxquant.export.signature import tensors_of
from fxquant.export.tolerance import exact_outputs, least_sqnr
from fxquant.flow import calibrate, convert, freeze, prepare
from fxquant.inputs import arguments_of
from fxquant.nn.fake_quantize import FakeQuantize
from fxquant.nn.integer import IntegerOp
from fxquant.recipe import Recipe
from fxquant.runtimes import RUNNABLE
from fxquant.targets import X86, Target

__all__ = ["bench"]

_NOISE = "calibrated on noise: its SQNR is that of noise, and says nothing about real data"
_EXAMPLE = "calibrated on the example inputs, and its SQNR is of those: an optimistic one"


def bench(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    calibration: Iterable[Any] | None = None,
    recipe: Recipe | None = None,
    target: str | Target = X86,
    processor: str | None = None,
    reference: nn.Module | None = None,
    runtimes: str | Sequence[str] = "auto",
    threads: int | Sequence[int] | None = None,
    batches: int | Sequence[int] | None = None,
    compiled: bool = False,
    compile_limit: float = 120.0,
    memory: bool = True,
    noise: bool = False,
    rounds: int = 9,
    progress: bool = True,
) -> Benchmark:
    """Measure a model in float and in int8, in every runtime, interleaved within one process.

    Example:
        >>> print(fxquant.bench(model, images, calibration=loader, runtimes=["torch"], threads=1, memory=False))

    Args:
        model: a float model, unmodified, which is prepared and calibrated here; or what ``prepare``, ``freeze`` or
            ``convert`` returned. Not touched.
        example_inputs: as for ``prepare``; None for calibration's first batch, or noise of the shapes of ``prepare``.
        calibration: batches to calibrate on, as for ``calibrate``; the example inputs where None.
        recipe, target, processor: how a float model is quantized, as for ``prepare``.
        reference: the float model to compare a converted one with.
        runtimes: ``auto`` for all, or the names of some: ``torch``, ``native``, ``onnxruntime``, ``openvino``, or one of
            your own (``fxquant.runtimes``). One that is not installed, or does not take the model, gets a row that says so.
        threads: how many threads, one number or several; None for the runtimes' own choice.
        batches: batch sizes, one or several: the rows of the example, repeated or cut off. None for the example as it is.
        compiled, compile_limit: also time the float model behind ``torch.compile``; seconds that compiling may take.
        memory: also measure what each needs in a process of its own, which takes some seconds each.
        noise: the example inputs are noise, and the table shall say so.
        rounds: rounds of each contender.
        progress: show a progress bar on a terminal.

    Raises:
        InputError: an argument does not fit, or there are no inputs.
        CaptureError, CalibrationError: as for ``prepare`` and ``calibrate``.
    """
    wanted, every_threads, sizes = _runtimes(runtimes), _numbers(threads, "threads"), _numbers(batches, "batches")
    if rounds < 1:
        raise InputError(f"rounds={rounds}: give 1 or more.")
    if not isinstance(model, nn.Module):
        raise InputError(f"bench takes an nn.Module, and was given a {type(model).__name__}.")
    how = {"recipe": recipe, "target": target, "processor": processor}
    float_model, int8, example, notes = _made_ready(model, example_inputs, calibration, how, reference, noise, progress)
    cases = [(size, count) for size in sizes for count in every_threads]
    with unchanged(int8, but=IntegerOp):  # a model may write to its buffers
        found = contenders_of(float_model, int8, example, wanted, compile_limit if compiled else None)
        expected = _outputs(float_model, example)
        with tqdm(total=len(cases) * len(found) * rounds, desc="bench", disable=not progress or None) as bar:
            rows = [_case(found, _with_rows(example, size), count, rounds, memory, bar) for size, count in cases]
        quality = _qualities(found, int8, example, every_threads[0], expected, notes)
    return Benchmark(type(model).__name__, tuple(_with_quality(row, quality) for row in chain(*rows)), tuple(notes))


def _runtimes(asked: str | Sequence[str]) -> tuple[str, ...]:
    names = tuple(RUNNABLE) if asked == "auto" else (asked,) if isinstance(asked, str) else tuple(asked)
    for name in names:
        if name not in RUNNABLE:
            raise InputError(f"runtimes: {name!r} is not known. Choose among {', '.join(RUNNABLE)}, or 'auto'.")
    return names


def _numbers(given: int | Sequence[int] | None, what: str) -> tuple[int | None, ...]:
    numbers = (given,) if given is None or isinstance(given, int) else tuple(given)
    if not numbers or any(number is not None and number < 1 for number in numbers):
        raise InputError(f"{what}={given!r}: give a positive number, or several.")
    return numbers


def _made_ready(
    model: nn.Module,
    example_inputs: Any,
    calibration: Iterable[Any] | None,
    how: dict[str, Any],
    reference: nn.Module | None,
    noise: bool,
    progress: bool,
) -> tuple[nn.Module | None, Any, Call, list[str]]:
    """The float model, the int8 model, the example, and what has to be said of them."""
    level = level_of(model)
    if example_inputs is None and calibration is not None:
        calibration = iter(calibration)
        first = next(calibration, None)
        if first is None:
            raise CalibrationError("calibration is empty: no range can be set.")
        args, kwargs = arguments_of(model, first)
        example_inputs, calibration = kwargs or args, chain([first], calibration)
    if example_inputs is None and level is None:
        raise InputError(
            "bench needs inputs to run on.\n  what to do: give example_inputs, as for fxquant.prepare, or calibration."
        )
    noise = noise or example_inputs is None
    example = as_call(model, example_inputs) if example_inputs is not None else example_call(model, None)
    given = example.kwargs or example.args
    notes: list[str] = []
    float_model = None if reference is None else copy.deepcopy(reference).eval()
    if level is None:
        float_model = float_model or copy.deepcopy(model).eval()
    if level in (None, "prepared"):
        prepared = prepare(model, given, **how) if level is None else copy.deepcopy(model).eval()
        if level == "prepared" and float_model is None:
            float_model = _without_quantizers(prepared)
            notes.append("float is the prepared graph with its quantizers off, batch norms folded")
        if level is None or calibration is not None or not _is_calibrated(prepared):
            calibrate(prepared, [given] if calibration is None else calibration, progress=progress)
            if calibration is None:
                notes.append(_NOISE if noise else _EXAMPLE)
        int8 = convert(prepared)
    else:
        int8 = convert(model) if level == "frozen" else model
    if noise and _NOISE not in notes and float_model is not None:
        notes.append("its inputs are noise: so SQNR is of noise, and says nothing about real data")
    return float_model, int8, example, notes


def _is_calibrated(prepared: nn.Module) -> bool:
    try:
        freeze(prepared)
    except CalibrationError:
        return False
    return True


def _without_quantizers(prepared: nn.Module) -> nn.Module:
    twin: nn.Module = copy.deepcopy(prepared)
    for part in twin.modules():
        if isinstance(part, FakeQuantize):
            part.enabled = False
    return twin


def _with_rows(example: Call, size: int | None) -> Call:
    """``example`` with ``size`` rows in every tensor that has as many as the first."""
    rows = _rows(example)
    if size is None or size == rows:
        return example

    def change(x: Tensor) -> Tensor:
        return x[torch.arange(size) % rows].contiguous() if x.ndim and x.shape[0] == rows else x

    args, kwargs = pytree.tree_map_only(Tensor, change, (example.args, example.kwargs))
    return Call(args, kwargs)


def _rows(call: Call) -> int:
    tensors = [x for x in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor) and x.ndim]
    return int(tensors[0].shape[0]) if tensors else 1


def _case(
    found: list[Contender], call: Call, threads: int | None, rounds: int, memory: bool, bar: Any
) -> list[tuple[Contender, Row]]:
    """Every contender on one call, interleaved."""
    runs, notes = {}, dict[str, str]()
    for contender in found:
        key = f"{contender.name} {contender.runtime}"
        bar.set_postfix_str(key)
        try:
            runs[key] = partial(contender.build(call, threads), *call.args, **call.kwargs)
            runs[key]()
        except (Refusal, FxquantError) as error:
            runs.pop(key, None)
            notes[key] = str(error).splitlines()[0]
            bar.update(rounds)
    bar.set_postfix_str("")
    timed = time_interleaved(runs, rounds=rounds, done=bar.update)
    base, rows = timed.get("float torch"), []
    for contender in found:
        key = f"{contender.name} {contender.runtime}"
        row: dict[str, Any] = {"batch": _rows(call), "threads": threads, "note": notes.get(key, "")}
        if (own := timed.get(key)) is not None:
            row |= {"milliseconds": 1e3 * own.median, "spread": 1e3 * own.spread, "size": contender.size()}
            row |= {} if base is None else {"speedup": base.median / own.median}
            carried = contender.carried(call) if memory else None
            peak = None if carried is None else peak_memory(carried, threads)
            row |= {"note": peak.why} if isinstance(peak, Refusal) else {"memory": peak}
        rows.append((contender, Row(contender.name, contender.runtime, **row)))
    return rows


@torch.no_grad()
def _outputs(model: nn.Module | None, call: Call) -> list[Tensor] | None:
    if model is None:
        return None
    return [y.detach().double() for y in tensors_of(model(*call.args, **call.kwargs)) if y.is_floating_point()]


def _qualities(
    found: list[Contender],
    int8: Any,
    call: Call,
    threads: int | None,
    expected: list[Tensor] | None,
    notes: list[str],
) -> dict[str, dict[str, float | None]]:
    """Decibels of each int8 contender: over all floating outputs against float, and against the exact integers.

    What agrees too little with these is noted.
    """
    exact = exact_outputs(int8, call)
    qualities: dict[str, dict[str, float | None]] = {}
    for contender in found:
        key = f"{contender.name} {contender.runtime}"
        qualities[key] = {}
        if contender.name != "int8":
            continue
        try:
            result = tensors_of(contender.build(call, threads)(*call.args, **call.kwargs))
        except (Refusal, FxquantError):
            continue
        agreement = together(result, exact)
        qualities[key] = {"sqnr": _sqnr(result, expected), "agreement": agreement}
        if agreement < GOOD_SQNR:
            notes.append(
                str(finding(RUNNABLE[contender.runtime].title, agreement, int8, least_sqnr(int8, call, exact)))
            )
    return qualities


def _sqnr(result: list[Tensor], expected: list[Tensor] | None) -> float | None:
    """None where there is nothing to compare."""
    own = [y.detach().double() for y in result if y.is_floating_point()]
    if expected is None or [y.shape for y in own] != [y.shape for y in expected] or not own:
        return None
    noise = sum(float((a - b).square().sum()) for a, b in zip(own, expected, strict=True))
    signal = sum(float(b.square().sum()) for b in expected)
    return math.inf if not noise else 10 * math.log10(signal / noise) if signal else -math.inf


def _with_quality(measured: tuple[Contender, Row], found: dict[str, dict[str, float | None]]) -> Row:
    contender, row = measured
    if row.milliseconds is None:
        return row
    return Row(**{**row.__dict__, **found[f"{contender.name} {contender.runtime}"]})
