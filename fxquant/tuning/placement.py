"""tune_placement: which regions of a calibrated model are worth quantizing, by what a runtime measures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tabulate import tabulate
from torch import nn
from tqdm.auto import tqdm

from fxquant.capture.islands import Model, graphs_of
from fxquant.errors import FxquantError, InputError, Refusal
from fxquant.export.deployment import example_call
from fxquant.export.interleaved_timing import InterleavedTimes, time_interleaved
from fxquant.export.runtimes import Compiled
from fxquant.export.to_onnx import deployed
from fxquant.flow import freeze, require_level
from fxquant.installed import require
from fxquant.recipe import Recipe
from fxquant.runtimes import RUNNABLE
from fxquant.tuning.placing import place_again
from fxquant.tuning.regions import HALF, half_regions, regions_of
from fxquant.tuning.search import INT8, Kept, Search, Step

__all__ = ["Placement", "tune_placement"]

_ROUNDS, _FINAL_ROUNDS = 9, 21


@dataclass(frozen=True)
class Placement:
    """What ``tune_placement`` measured and decided; prints as a table.

    Attributes:
        runtime: where it was measured.
        steps: what was tried, in order.
        milliseconds: a call in the confirmation: ``all int8``, ``all float`` where it could be had, and ``tuned`` where
            the search found another placement.
        chosen: which of them the model is.
        kept_float: the paths of what stays in float, as recipes select them.
        quantizable: how many paths there are.
        bfloat16: whether what stays in float computes in bfloat16; None where that was not asked for.
        seconds: what the whole took.
        out_of_time: whether regions were left when the budget was used up.
    """

    runtime: str
    steps: tuple[Step, ...]
    milliseconds: dict[str, float]
    chosen: str
    kept_float: tuple[str, ...]
    quantizable: int
    seconds: float
    out_of_time: bool
    bfloat16: bool | None = None

    def __str__(self) -> str:
        shown = {
            "tried": [f"{step.region} in {step.to}" for step in self.steps],
            "before ms": ["" if step.before is None else f"{step.before:.3g}" for step in self.steps],
            "after ms": ["" if step.after is None else f"{step.after:.3g}" for step in self.steps],
            "has to gain": ["" if step.margin is None else f"{step.margin:.1%}" for step in self.steps],
            "": [step.note or ("kept" if step.kept else "not kept") for step in self.steps],
        }
        sides = ("left", "right", "right", "right", "left")
        table = tabulate(shown, headers="keys", disable_numparse=True, colalign=sides)
        final = ", ".join(f"{name} {value:.3g} ms" for name, value in self.milliseconds.items())
        stays = ", ".join(self.kept_float[:12]) + (" …" if len(self.kept_float) > 12 else "")
        left = "; the budget ended before every region was tried" if self.out_of_time else ""
        return "\n".join(
            [
                *(line.rstrip() for line in table.splitlines()),
                "",
                f"{self.runtime}, interleaved at the end: {final} → {self.chosen}",
                f"in float: {len(self.kept_float)} of {self.quantizable} ops{': ' * bool(stays)}{stays}",
                *self._half_lines(),
                f"{self.seconds:.0f} s{left}",
            ]
        )

    def _half_lines(self) -> list[str]:
        if self.bfloat16 is None:
            return []
        if self.bfloat16:
            return ["what stays in float computes in bfloat16, which was faster"]
        tried = any(step.to == "bfloat16" and step.before is not None for step in self.steps)
        why = "bfloat16 was not faster" if tried else "bfloat16 could not be tried"
        return [f"what stays in float computes in float32: {why}"]


def tune_placement(
    prepared: Model,
    example_inputs: Any = None,
    *,
    runtime: str = "torch",
    threads: int | None = None,
    budget: float = 60.0,
    bfloat16: bool = False,
    progress: bool = True,
) -> Model:
    """Keep those regions in float whose integer form is slower in a runtime, by measuring it.

    Regions (all ops of a kind, stages of the network, single ops) are tried one after another: each is kept in float, or
    taken back, where a call then takes less time by more than the spread of the measurement. At the end all-int8,
    all-float and what was found are interleaved, and the fastest is returned; so the result is never slower than either
    plain placement by the measurement it was chosen by. Ranges stay as they were calibrated.

    Example:
        >>> print(fxquant.tune_placement(prepared, images, budget=1).placement)

    Args:
        prepared: a calibrated or trained model; not touched.
        example_inputs: what to time, as for ``prepare``; None for noise of the shapes that it was prepared with.
        runtime: ``torch``, ``onnxruntime`` or ``openvino``; another runtime, machine, batch size or number of threads
            may want another placement.
        threads: how many the runtime uses; None for its own choice.
        budget: seconds for the search; building and timing one placement takes seconds itself, and the two plain
            placements and the confirmation are measured in any case.
        bfloat16: let what stays in float compute in bfloat16 where that is faster. It keeps eight significant bits of
            every float; only OpenVINO has it, on processors that do. The choice is the recipe's ``float_dtype``, which
            ``save`` keeps and ``compile(..., runtime="openvino")`` follows; other runtimes compute in float32.
        progress: show a progress bar on a terminal.

    Returns:
        A prepared model to ``convert``, ``compile`` or ``export_onnx``, with what was measured as its attribute
        ``placement``: ``print(tuned.placement)``.

    Raises:
        LevelError, CalibrationError: the model is not prepared, or has no ranges yet.
        InputError: an argument does not fit.
        MissingPackageError: the runtime is not installed.
        ExportError: the runtime cannot run the model even as it is.
    """
    _require_fit(prepared, runtime, threads, budget)
    if bfloat16:
        _require_half(runtime)
    began, regions = time.perf_counter(), regions_of(prepared)
    regions = half_regions(regions) if bfloat16 else regions
    bench = _Bench(prepared, example_inputs, runtime, threads, bfloat16)
    with tqdm(total=len(regions), desc="tune_placement", disable=not progress or None) as bar:

        def show(name: str) -> None:
            bar.update()
            bar.set_postfix_str(name)

        search = Search(regions, bench.measure, budget, time.perf_counter, show)
        chosen = search.run()
    tuned = bench.placed(chosen)
    tuned.placement = _report(search, chosen, runtime, time.perf_counter() - began, bfloat16)
    return tuned


def _report(search: Search, chosen: Kept, runtime: str, seconds: float, bfloat16: bool) -> Placement:
    everything = search.regions[-1].paths
    names = {INT8: "all int8", everything: "all float", everything | {HALF}: "all bfloat16"}
    return Placement(
        runtime=runtime,
        steps=tuple(search.steps),
        milliseconds={names.get(kept, "tuned"): value for kept, value in search.final.items()},
        chosen=names.get(chosen, "tuned"),
        kept_float=tuple(sorted(chosen - {HALF})),
        quantizable=len(everything),
        seconds=seconds,
        out_of_time=search.out_of_time,
        bfloat16=HALF in chosen if bfloat16 else None,
    )


def _require_fit(prepared: nn.Module, runtime: str, threads: int | None, budget: float) -> None:
    own = RUNNABLE.get(runtime)
    if own is None:
        known = ", ".join(name for name, other in RUNNABLE.items() if not other.no_placement)
        raise InputError(f"runtime={runtime!r} is not known. Choose one of {known}.")
    if own.no_placement:
        raise InputError(
            f"runtime={runtime!r}: {own.no_placement}, so there is no placement to choose.\n"
            f"  what to do: compile(model, runtime={runtime!r}) without it, or tune for another runtime."
        )
    if not budget > 0:
        raise InputError(f"budget={budget}: a search needs time. Give a positive number of seconds.")
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads}: a runtime needs at least one. Give a positive number, or None.")
    require_level(prepared, ("prepared",), "tune_placement")
    freeze(prepared)
    if own.package:
        require(own.package, f"runtime={runtime!r}", own.extra)


def _require_half(runtime: str) -> None:
    has = RUNNABLE[runtime].bfloat16
    if has is None:
        others = " or ".join(name for name, own in RUNNABLE.items() if own.bfloat16 is not None)
        raise InputError(
            f"bfloat16=True: {runtime} has nothing that computes in it: its kernels on the CPU compute in integers and "
            f"float32.\n  what to do: leave bfloat16 out, or tune for {others}."
        )
    if not has():
        raise InputError(
            f"bfloat16=True: {runtime} does not compute in bfloat16 on this processor.\n  what to do: leave bfloat16 out, "
            "or tune where the model will run (x86 with AVX512-BF16 or AMX)."
        )


class _Bench:
    """Builds placements in a runtime and times them."""

    def __init__(
        self, prepared: nn.Module, example_inputs: Any, runtime: str, threads: int | None, bfloat16: bool = False
    ) -> None:
        self.prepared, self.runtime, self.threads = prepared, runtime, threads
        recipe: Recipe = next(iter(graphs_of(prepared).values())).settings["recipe"]
        self.recipe = replace(recipe, float_dtype="float32") if bfloat16 else recipe
        self.call = example_call(prepared, example_inputs)
        self.example = self.call.kwargs or self.call.args
        self.built: dict[Kept, Compiled] = {}
        self.refused: dict[Kept, Refusal] = {}

    def placed(self, kept: Kept) -> Any:
        """The prepared model with ``kept`` in float."""
        settings = [*((path, None) for path in sorted(kept - {HALF})), *self.recipe.pairs]
        float_dtype = "bfloat16" if HALF in kept else self.recipe.float_dtype
        return place_again(self.prepared, replace(self.recipe, settings=settings, float_dtype=float_dtype))

    def measure(self, placements: Sequence[Kept], final: bool) -> dict[Kept, InterleavedTimes]:
        """Each interleaved with the others; what is not among them is forgotten, but for all-int8 and all-float."""
        names = {str(index): kept for index, kept in enumerate(placements)}
        runs = {name: partial(self._get(kept), *self.call.args, **self.call.kwargs) for name, kept in names.items()}
        found = time_interleaved(runs, rounds=_FINAL_ROUNDS if final else _ROUNDS)
        first = list(self.built)[:2]
        self.built = {kept: run for kept, run in self.built.items() if kept in placements or kept in first}
        return {names[name]: own for name, own in found.items()}

    def _get(self, kept: Kept) -> Compiled:
        if kept in self.refused:
            raise self.refused[kept].with_traceback(None)
        if kept not in self.built:
            try:
                self.built[kept] = self._compiled(self.placed(kept))
            except FxquantError as error:
                if kept == INT8:
                    raise
                self.refused[kept] = Refusal(f"cannot be built: {str(error).splitlines()[0]}")
                raise self.refused[kept] from error
        return self.built[kept]

    def _compiled(self, placed: Any) -> Compiled:
        own = RUNNABLE[self.runtime]
        model = deployed(placed, self.example, dynamic="none")
        return Compiled(own.name, own.compiled(model, self.threads))
