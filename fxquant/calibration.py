"""The steps of calibration: batches through a prepared model whose quantizers observe."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fxquant.capture.islands import graphs_of
from fxquant.errors import CalibrationError
from fxquant.inputs import arguments_of, move_to
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.nn.folding import Folding

__all__ = ["Counted", "activation_quantizers", "length_of", "observing", "read_weights", "run_batches"]


def run_batches(
    prepared: Any,
    quantizers: dict[str, FakeQuantize],
    loader: Iterable[Any],
    forward: Callable[[Any, Any], Any] | None,
    batches: int | None,
    progress: bool,
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Send ``batches`` of ``loader`` through the model; arguments as of ``fxquant.calibrate``.

    Returns:
        What sends the last batch through once more, and the first one.

    Raises:
        CalibrationError: there is none, or a batch gives activations that are not finite.
    """
    runs: list[Callable[[], Any]] = []
    total = batches if batches is not None else length_of(loader)
    bar = tqdm(itertools.islice(loader, batches), total=total, desc="calibrate", disable=not progress or None)
    for count, batch in enumerate(bar, start=1):
        runs[1:] = [partial(_run, prepared, forward, batch)]
        runs[-1]()
        _require_finite(quantizers, count)
    if not runs:
        raise CalibrationError(
            "calibrate was given an empty loader: no range can be set. Check that the data set is not empty and that a "
            "generator was not used up before."
        )
    return runs[-1], runs[0]


def _run(prepared: Any, forward: Callable[[Any, Any], Any] | None, batch: Any) -> None:
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
        if isinstance(quantizer, WeightQuantize) and isinstance(weight, torch.Tensor) and not quantizer.pinned:
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
