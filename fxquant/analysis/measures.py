"""What rounding does to a tensor, folded over batches: signal to noise, steps of the grid, clipped shares, histograms.

    SQNR = 10 log10( Σ x² / Σ (x̂ - x)² )      in dB, x the float tensor and x̂ what stands in its place
    LSB  = (x̂ - x) / scale                     in steps of the grid that x is rounded to

Source: Krishnamoorthi, 1806.08342, §2; ONNX Runtime, *Quantization debugging* (signal to quantization noise ratio).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.numerics.affine import broadcast, scale_and_zero_point
from fxquant.numerics.gradients import fake_quantize
from fxquant.numerics.scheme import Scheme

__all__ = ["Error", "Histogram", "HistogramCount", "Noise", "channel_peaks", "divergence", "finite", "on_own_grid"]

BINS = 64
_AT_ONCE = 2**24
"""torch.histc counts in the type of its input, and float32 stops counting there."""


@dataclass(frozen=True)
class Error:
    """How far a tensor is from what it is in float.

    Attributes:
        sqnr: signal to noise in dB; infinite where nothing differs, minus infinite where there is noise and no signal.
        lsb: root mean square of the difference in steps of the grid; None where the tensor has none.
        lsb_max: the largest difference, likewise.
        largest: the largest difference in the tensor's own unit.
        values: how many numbers were compared.
    """

    sqnr: float
    lsb: float | None
    lsb_max: float | None
    largest: float
    values: int


class Noise:
    """Sums of squares over batches, in float64; ``error`` is what they come to."""

    def __init__(self) -> None:
        self.signal = self.noise = self.steps = self.largest = self.largest_step = 0.0
        self.values = 0
        self.has_steps = False

    def add(self, actual: Tensor, expected: Tensor, scale: Tensor | None = None, axis: int | None = None) -> None:
        """Count ``actual`` against ``expected``, of one shape; ``scale`` is the grid's, per channel along ``axis``.

        Where both are the same infinity, as masked scores are, or both NaN, there is neither signal nor noise.
        """
        if not expected.numel():
            return
        actual, expected = actual.detach().float(), expected.detach().float()
        alike = (actual == expected) | (torch.isnan(actual) & torch.isnan(expected))
        apart = (actual - expected).masked_fill(alike, 0.0).nan_to_num(math.inf, math.inf, -math.inf)
        self.signal += _square(finite(expected))
        self.noise += _square(apart)
        self.largest = max(self.largest, float(apart.abs().max()))
        self.values += expected.numel()
        if scale is not None:
            steps = apart / broadcast(scale.float(), apart.ndim, axis)
            self.steps += _square(steps)
            self.largest_step = max(self.largest_step, float(steps.abs().max()))
            self.has_steps = True

    def error(self) -> Error | None:
        """What was counted; None where nothing was."""
        if not self.values:
            return None
        return Error(
            sqnr=_decibels(self.signal, self.noise),
            lsb=math.sqrt(self.steps / self.values) if self.has_steps else None,
            lsb_max=self.largest_step if self.has_steps else None,
            largest=self.largest,
            values=self.values,
        )


def finite(x: Tensor) -> Tensor:
    """``x`` with 0 for what is infinite or NaN."""
    return x.nan_to_num(0.0, 0.0, 0.0)


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.detach().flatten(), dtype=torch.float64)) ** 2


def divergence(actual: Tensor, expected: Tensor) -> float:
    """Σ KL(p || q) over rows in nats, p and q the softmax of ``expected`` and ``actual`` (n, classes), at least 0.

    A class that ``expected`` excludes (-inf) counts nothing; roundings of float64 below 0 are 0.
    """
    p, q = expected.detach().double().log_softmax(1), actual.detach().double().log_softmax(1)
    return max(float(torch.where(torch.isneginf(expected), 0.0, p.exp() * (p - q)).sum()), 0.0)


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf


@dataclass(frozen=True)
class Histogram:
    """How often a tensor's float values fall into bins of one width, with the grid that they are rounded to.

    Attributes:
        low, high: where the first bin begins and the last one ends; what lies beyond is counted in these two.
        counts: values in each bin.
        grid_low, grid_high: the smallest and the largest real number of the grid.
        step: its scale; of a grid per channel the mean.
        levels: how many integers it has.
        used: the largest share of the grid's span that the values take up, 0 to 1.
        reach: the same, and above 1 where values lie beyond the grid: how many times as far as it reaches they do.
        clipped: the share of the values that lie beyond the grid by more than half a step.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    grid_low: float
    grid_high: float
    step: float
    levels: int
    used: float
    reach: float
    clipped: float


class HistogramCount:
    """Counts one tensor over batches. The bins cover the grid and the first batch."""

    def __init__(self, scale: Tensor, zero_point: Tensor, scheme: Scheme, axis: int | None) -> None:
        self.scale, self.scheme, self.axis = scale.float(), scheme, axis
        self.lower = (scheme.qmin - zero_point) * self.scale
        self.upper = (scheme.qmax - zero_point) * self.scale
        self.counts: Tensor | None = None
        self.low = self.high = 0.0
        self.reach = 0.0
        self.beyond = self.values = 0

    def add(self, x: Tensor) -> None:
        """Count the values of ``x`` before they are rounded, those that are finite."""
        x = finite(x.detach().float())
        if not x.numel():
            return
        lower, upper, step = (broadcast(t, x.ndim, self.axis) for t in (self.lower, self.upper, self.scale))
        if self.counts is None:
            self.low = min(float(self.lower.min()), float(x.min()))
            self.high = max(float(self.upper.max()), float(x.max()), self.low + 1e-30)
            self.counts = torch.zeros(BINS, dtype=torch.float64)
        for part in x.flatten().split(_AT_ONCE):
            self.counts += torch.histc(part.clamp(self.low, self.high), BINS, self.low, self.high).double().cpu()
        self.beyond += int(((x < lower - step / 2) | (x > upper + step / 2)).sum())
        self.values += x.numel()
        parts = torch.maximum(_share(x, upper), _share(-x, -lower))
        self.reach = max(self.reach, float(parts.max()))

    def histogram(self) -> Histogram | None:
        """What was counted; None where nothing was."""
        if self.counts is None:
            return None
        return Histogram(
            low=self.low,
            high=self.high,
            counts=tuple(int(count) for count in self.counts),
            grid_low=float(self.lower.min()),
            grid_high=float(self.upper.max()),
            step=float(self.scale.mean()),
            levels=self.scheme.qmax - self.scheme.qmin + 1,
            used=min(self.reach, 1.0),
            reach=self.reach,
            clipped=self.beyond / self.values,
        )


def _share(x: Tensor, bound: Tensor) -> Tensor:
    """How much of the way from zero to ``bound`` the values reach, where there is such a way."""
    shares = torch.where(bound > 0, x / bound.clamp(min=1e-30), torch.zeros_like(x))
    return shares.amax() if shares.numel() else shares.new_zeros(())


def on_own_grid(x: Tensor, scheme: Scheme, axis: int | None) -> Tensor:
    """``x`` rounded to the finest grid of ``scheme`` that covers its own values: what a grid can give it at best without
    clipping."""
    if not x.numel():
        return x
    if axis is None:
        low, high = torch.aminmax(x)
    else:
        rows = x.transpose(0, axis).flatten(1)
        low, high = rows.amin(1), rows.amax(1)
    scale, zero_point = scale_and_zero_point(low, high, scheme)
    return fake_quantize(x, scale, zero_point, scheme.qmin, scheme.qmax, axis=axis)


def channel_peaks(x: Tensor) -> Tensor | None:
    """The largest magnitude of each channel ``(C,)``: axis 1 of feature maps of four or five dimensions, else the last."""
    if x.ndim < 2 or not x.numel():
        return None
    axis = 1 if x.ndim in (4, 5) else x.ndim - 1
    return finite(x.detach()).abs().transpose(0, axis).flatten(1).amax(1)
