"""What is counted at one place of a model while batches run, and what it comes to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.analysis.faults import Fault, Measured, faults_of
from fxquant.analysis.measures import Error, Histogram, HistogramCount, Noise, channel_peaks, finite, on_own_grid
from fxquant.analysis.spots import Spot
from fxquant.nn.fake_quantize import FakeQuantize
from fxquant.nn.modules import QuantWeightedOp
from fxquant.reporting.tabled import decibels

__all__ = ["Count", "LayerError", "cells_of", "record_of"]


@dataclass(frozen=True)
class LayerError:
    """What rounding costs at one op.

    Attributes:
        path, op: where it is in the model, and its class.
        bits: of its result's grid; None where it is not rounded.
        weight_bits: of its weight's grid; None for ops without one.
        weight: of the weight itself; LSB are steps of the weight's grid.
        weight_alone, activation_alone, alone, accumulated: at its result, see the head of this file; LSB are steps of the
            grid that its fused chain ends on. None where there is nothing of the kind.
        histogram, weight_histogram: of the float values and the float weights, with their grids.
        channel_ratio: the largest magnitude in any channel by that of the median channel; None without channels.
        not_measured: results that are masks or whole numbers, or of another shape than in float.
        faults: what is wrong here, in words.
    """

    path: str
    op: str
    bits: int | None
    weight_bits: int | None
    weight: Error | None
    weight_alone: Error | None
    activation_alone: Error | None
    alone: Error | None
    accumulated: Error | None
    histogram: Histogram | None
    weight_histogram: Histogram | None
    channel_ratio: float | None
    not_measured: int
    faults: tuple[Fault, ...]


class Count:
    """The sums of one spot."""

    def __init__(self, spot: Spot) -> None:
        self.spot = spot
        self.weight, self.by_weight, self.by_result, self.alone, self.accumulated = (Noise() for _ in range(5))
        self.best, self.weight_best = Noise(), Noise()
        self.seen: HistogramCount | None = None
        self.seen_weight: HistogramCount | None = None
        self.peaks: Tensor | None = None
        self.weight_peaks: Tensor | None = None
        self.not_measured = 0
        self.was_reached = False
        self.counted_weight = False

    def count_alone(self, args: Any, kwargs: Any, result: Any) -> None:
        """Count one call in the float network: what its own roundings would do to it."""
        spot, self.was_reached = self.spot, True
        if not isinstance(result, Tensor) or not result.is_floating_point():
            self.not_measured += 1
            return
        scale = None if spot.grid is None else spot.grid.grid.scale
        scale = scale if scale is not None and scale.ndim == 0 else None
        both = result
        if spot.weight is not None:
            given = kwargs.get("weight", args[1] if len(args) > 1 else None)
            own = None if isinstance(spot.part, QuantWeightedOp) else spot.part.rounded_parameters()[0]
            self._count_weight(given if own is None else own)
            with _on(spot.weight):
                both = spot.part.forward(*args, **kwargs)
            self.by_weight.add(both, result, scale)
        if spot.rounds and spot.grid is not None:
            with _on(spot.grid):
                self.by_result.add(spot.grid(result), result, scale)
                both = spot.grid(both)
            self._look_at(result, spot.grid)
        self.alone.add(both, result, scale)
        peaks = channel_peaks(result)
        if peaks is not None and (self.peaks is None or self.peaks.shape == peaks.shape):
            self.peaks = peaks if self.peaks is None else torch.maximum(self.peaks, peaks)

    def _look_at(self, x: Tensor, quantizer: FakeQuantize) -> None:
        grid = quantizer.grid
        if self.seen is None:
            self.seen = HistogramCount(grid.scale, grid.zero_point, grid.scheme, quantizer.axis)
        self.seen.add(x)
        self.best.add(on_own_grid(finite(x.float()), grid.scheme, quantizer.axis), finite(x))

    def _count_weight(self, weight: Tensor) -> None:
        quantizer = self.spot.weight
        if self.counted_weight or quantizer is None:
            return
        self.counted_weight, weight = True, weight.detach()
        with _on(quantizer):
            rounded = quantizer(weight)
        grid = quantizer.grid
        self.weight.add(rounded, weight, grid.scale, quantizer.axis)
        self.weight_best.add(on_own_grid(weight.float(), grid.scheme, quantizer.axis), weight)
        self.seen_weight = HistogramCount(grid.scale, grid.zero_point, grid.scheme, quantizer.axis)
        self.seen_weight.add(weight)
        self.weight_peaks = weight.abs().flatten(1).amax(1) if weight.ndim > 1 and grid.scale.ndim == 0 else None

    def count_accumulated(self, actual: Any, expected: Any) -> None:
        """Count one call in the quantized network against the same call in the float one."""
        if not isinstance(actual, Tensor) or not isinstance(expected, Tensor) or not expected.is_floating_point():
            return
        if actual.shape != expected.shape:
            self.not_measured += 1
            return
        scale = None if self.spot.grid is None else self.spot.grid.grid.scale
        self.accumulated.add(actual, expected, scale if scale is not None and scale.ndim == 0 else None)

    def nothing(self) -> str | None:
        """Why there are no numbers; None where there are some."""
        if not self.was_reached:
            return "no batch reaches it"
        return "its results are empty in these batches" if not (self.alone.values or self.not_measured) else None

    def uses_its_grid(self) -> bool:
        """Whether the values take up half of the grid or more."""
        return self.seen is not None and self.seen.reach >= 0.5

    def layer(self, shared_with: tuple[str, ...] = ()) -> LayerError:
        """What was counted; ``shared_with`` are other ops with the same quantizer, which use it well."""
        spot = self.spot
        ratio = _ratio(self.peaks)
        measured = Measured(
            path=spot.path,
            bits=None if spot.grid is None or not spot.rounds else spot.grid.scheme.bits,
            fixed=spot.grid is not None and spot.grid.fixed_range is not None,
            shared_with=shared_with,
            result=self.by_result.error(),
            best=self.best.error(),
            histogram=None if self.seen is None else self.seen.histogram(),
            peaks=self.peaks if spot.rounds else None,
            weight_bits=None if spot.weight is None else spot.weight.scheme.bits,
            weight=self.weight.error(),
            weight_best=self.weight_best.error(),
            weight_histogram=None if self.seen_weight is None else self.seen_weight.histogram(),
            weight_peaks=self.weight_peaks,
        )
        return LayerError(
            path=spot.path,
            op=spot.op,
            bits=measured.bits,
            weight_bits=measured.weight_bits,
            weight=measured.weight,
            weight_alone=self.by_weight.error(),
            activation_alone=measured.result,
            alone=self.alone.error(),
            accumulated=self.accumulated.error(),
            histogram=measured.histogram,
            weight_histogram=measured.weight_histogram,
            channel_ratio=ratio,
            not_measured=self.not_measured,
            faults=tuple(faults_of(measured)),
        )


def _ratio(peaks: Tensor | None) -> float | None:
    if peaks is None or not bool((peaks > 0).any()):
        return None
    return float(peaks.max() / peaks[peaks > 0].median())


@contextmanager
def _on(quantizer: FakeQuantize) -> Iterator[None]:
    """Inside, this quantizer alone rounds."""
    before, quantizer.enabled = quantizer.enabled, True
    try:
        yield
    finally:
        quantizer.enabled = before


def cells_of(layer: LayerError) -> list[str]:
    """A layer as a row of texts."""
    errors = (layer.weight, layer.weight_alone, layer.activation_alone, layer.alone, layer.accumulated)
    shown = [decibels(None if error is None else error.sqnr) for error in errors]
    last = layer.accumulated or layer.alone
    steps = [
        f"{value:.2f}" if value is not None else "" for value in ((last.lsb, last.lsb_max) if last else (None, None))
    ]
    clipped = "" if layer.histogram is None or not layer.histogram.clipped else f"{100 * layer.histogram.clipped:.2g}"
    return [layer.path, layer.op, *shown, *steps, clipped, "; ".join(fault.kind for fault in layer.faults)]


def record_of(layer: LayerError) -> dict[str, Any]:
    """A layer as plain numbers by name."""
    found: dict[str, Any] = {"layer": layer.path, "op": layer.op, "bits": layer.bits}
    for name in ("weight", "weight_alone", "activation_alone", "alone", "accumulated"):
        error: Error | None = getattr(layer, name)
        for measure in ("sqnr", "lsb", "lsb_max"):
            found[f"{name}_{measure}"] = None if error is None else getattr(error, measure)
    found["clipped"] = None if layer.histogram is None else layer.histogram.clipped
    found["channel_ratio"] = layer.channel_ratio
    found["what"] = "; ".join(str(fault) for fault in layer.faults)
    return found
