"""The steps of calibration: batches through a prepared model whose quantizers observe."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fxquant.capture.islands import graphs_of
from fxquant.errors import CalibrationError, InputError
from fxquant.inputs import arguments_of, move_to
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.nn.folding import Folding
from fxquant.nn.processes import merge_calibrations, of_all
from fxquant.numerics.ranges import ESTIMATOR

__all__ = [
    "Counted",
    "activation_quantizers",
    "as_before_on_failure",
    "begin_together",
    "end_together",
    "length_of",
    "observing",
    "read_weights",
    "require_batches",
    "run_batches",
]


def require_batches(loader: Any, batches: Any, verb: str) -> None:
    """Raise unless ``loader`` may give batches, and ``batches`` is a number of them or None."""
    if not isinstance(loader, Iterable) or isinstance(loader, (str, bytes, Mapping)):
        kind = "one batch, a dict" if isinstance(loader, Mapping) else f"what is none, of class {type(loader).__name__}"
        raise InputError(
            f"{verb} takes an iterable of batches, and was given {'no data' if loader is None else kind}.\n"
            "  what to do: give a DataLoader, a generator, or a list of batches: [batch]."
        )
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        raise InputError(f"batches={batches!r}: how many of the loader's batches to take, at least 1; None for all.")


def run_batches(
    prepared: nn.Module,
    quantizers: dict[str, FakeQuantize],
    loader: Iterable[Any],
    forward: Callable[[Any, Any], Any] | None,
    batches: int | None,
    progress: bool,
    verb: str = "calibrate",
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Send ``batches`` of ``loader`` through the model; arguments as of ``fxquant.calibrate``, which is one ``verb``.

    Returns:
        What sends the last batch through once more, and the first one.

    Raises:
        CalibrationError: there is none, or a batch gives activations that are not finite.
        InputError: the loader is no iterable of batches.
    """
    require_batches(loader, batches, verb)
    runs: list[Callable[[], Any]] = []
    total = batches if batches is not None else length_of(loader)
    bar = tqdm(itertools.islice(loader, batches), total=total, desc=verb, disable=not progress or None)
    for count, batch in enumerate(bar, start=1):
        runs[1:] = [partial(_run, prepared, forward, batch)]
        runs[-1]()
        _require_finite(quantizers, count)
    if not runs:
        raise CalibrationError(
            f"{verb} was given an empty loader: no range can be set. Check that the data set is not empty and that a "
            "generator was not used up before."
        )
    return runs[-1], runs[0]


def _run(prepared: nn.Module, forward: Callable[[Any, Any], Any] | None, batch: Any) -> None:
    if forward is not None:
        forward(prepared, batch)
    else:
        args, kwargs = arguments_of(prepared, move_to(prepared, batch))
        prepared(*args, **kwargs)


def _require_finite(quantizers: dict[str, FakeQuantize], batch: int) -> None:
    observed = {name: q.range_state() for name, q in quantizers.items() if q.fixed_range is None}
    if not observed:
        return
    low = torch.stack([state["low"] for state in observed.values()])
    high = torch.stack([state["high"] for state in observed.values()])
    bad = torch.isnan(low) | torch.isnan(high) | torch.isneginf(low) | torch.isposinf(high)
    if not bool(bad.any()):
        return
    names = [name for name, wrong in zip(observed, bad.tolist(), strict=True) if wrong]
    raise CalibrationError(
        f"calibration batch {batch} gave NaN or infinite activations, first at {names[0]!r}"
        f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}. Ranges are as they were before.\n"
        "  what to do: check this batch's inputs for NaN, and whether the float model gives finite outputs on it."
    )


@contextmanager
def as_before_on_failure(quantizers: dict[str, FakeQuantize]) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Inside, a copy of what each range's estimator knows by now, which it gets back where anything fails."""
    saved = {name: {k: v.clone() for k, v in q.range_state().items()} for name, q in quantizers.items()}
    try:
        yield saved
    except BaseException:
        for name, quantizer in quantizers.items():
            for key, value in quantizer.range_state().items():
                value.copy_(saved[name][key])
        raise


def begin_together(quantizers: dict[str, FakeQuantize]) -> None:
    """Let those that follow what all processes see begin anew, so that what each process finds can be added up."""
    for quantizer in _together(quantizers).values():
        quantizer.reset()


def end_together(quantizers: dict[str, FakeQuantize], saved: dict[str, dict[str, Tensor]]) -> bool:
    """Give each of those its ``saved`` state and what all processes have found since.

    Extrema and histograms are exact. A moving average runs over samples in their order, which there is none between
    processes: it gets the widest range of all.

    Returns:
        Whether there were any.
    """
    together = _together(quantizers)
    if not together:
        return False
    founds = of_all({path: {k: v.clone().cpu() for k, v in q.range_state().items()} for path, q in together.items()})
    for path, quantizer in together.items():
        state = quantizer.range_state()
        for name, value in saved[path].items():
            state[name].copy_(value)
        merge_calibrations(ESTIMATOR[quantizer.scheme.estimator], state, [found[path] for found in founds])
    return True


def _together(quantizers: dict[str, FakeQuantize]) -> dict[str, FakeQuantize]:
    return {path: one for path, one in quantizers.items() if one.synchronized and one.fixed_range is None}


@contextmanager
def observing(quantizers: Iterable[FakeQuantize]) -> Iterator[None]:
    """Inside, quantizers follow the range of what they see."""
    quantizers = list(quantizers)
    for quantizer in quantizers:
        quantizer.observing = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.observing = False


def activation_quantizers(module: nn.Module) -> dict[str, FakeQuantize]:
    """Every activation quantizer once, by the name of the first module that holds it, in the order of execution."""
    found: dict[FakeQuantize, str] = {}
    for path, graph in graphs_of(module).items():
        for node in graph.graph.nodes:
            part = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            quantizer = getattr(part, "output_quantizer", None)
            if isinstance(quantizer, FakeQuantize):
                found.setdefault(quantizer, f"{path}.{node.target}" if path else str(node.target))
    return {name: quantizer for quantizer, name in found.items()}


def read_weights(module: nn.Module) -> None:
    """Let every weight quantizer of a module know its weight, so that reports show scales; pinned grids stay."""
    for part in module.modules():
        quantizer = getattr(part, "weight_quantizer", None)
        weight = part.rounded_parameters()[0] if isinstance(part, Folding) else getattr(part, "weight", None)
        if isinstance(quantizer, WeightQuantize) and isinstance(weight, Tensor) and not quantizer.pinned:
            quantizer.refresh(weight)


def length_of(loader: Iterable[Any]) -> int | None:
    """How many batches a loader has, if it knows."""
    return len(loader) if isinstance(loader, Sized) else None


class Counted:
    """An iterable with the length of another, for the progress bar."""

    def __init__(self, items: Iterable[Any], length: int | None) -> None:
        self._items, self._length = items, length

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return self._length or 0
