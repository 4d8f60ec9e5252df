"""Range estimators: folds over batches that end in the range ``[low, high]`` a grid has to cover.

    minmax           low = min x,  high = max x
    moving_average   high ← max(m, (1 - c) · high + c · m),  m = max(sample), sample by sample; low likewise
    percentile:P     the smallest range that leaves out at most 100 - P percent of the values at either end (99.99)
    lp:p             argmin over ranges of  Σ_bins count · E|x - x̂|^p,  x uniform within its bin; mse is p = 2.4
    kl               the range after which the rounded histogram diverges least from the whole one, see ``kl``
    auto             the one of these with which the layers that read the tensor lose least, see ``choose_ranges``

The range does not depend on how the samples are cut into batches. ``minmax`` and the histograms are exact folds. The
moving average runs over samples (dimension 0), not over batches. It grows at once, so that what passes is not clipped,
and shrinks slowly, so that an outlier is forgotten. Each of its steps is the larger of two non-decreasing affine maps,
hence n of them at once are the largest of n + 1 plain averages, each started at one of the samples, or before them:

    high ← max( a_0, …, a_n ),   a_k = (1 - c)^(n-k) · m_k + Σ_{i>k} c (1 - c)^(n-i) · m_i,   m_0 = high.

An estimator is stateless; its state is a dictionary of tensors of fixed shapes, which ``update`` changes in place.
Source: Krishnamoorthi, 1806.08342, §3.1 (moving average); Nagel et al., 2106.08295, §3.1 (mse); the norm p = 2.4 is
that of Wei et al., 2203.05740.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from fxquant.errors import SchemeError
from fxquant.numerics.affine import scale_and_zero_point
from fxquant.numerics.estimator_names import estimator_and_parameter
from fxquant.numerics.histogram import Histogram, MinMax, channel_extrema, clamped, occupied, sample_extrema
from fxquant.numerics.kl import KullbackLeibler
from fxquant.numerics.scheme import Scheme

__all__ = ["ESTIMATOR", "Auto", "MeanSquareError", "MinMax", "MovingAverage", "Percentile", "RangeEstimator"]


class RangeEstimator(Protocol):
    """What all estimators can do. Every state holds float32 ``low`` and ``high``, ``+inf`` and ``-inf`` at first."""

    def initial_state(self, channels: int | None, *, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """The state before any observation, for one range or ``channels`` of them."""
        ...

    def update(
        self,
        state: dict[str, Tensor],
        x: Tensor,
        *,
        axis: int | None,
        lower: float | None = None,
        upper: float | None = None,
    ) -> None:
        """Fold ``x``, clamped to ``[lower, upper]``, into ``state``. NaN and infinities reach ``low`` and ``high``.

        Args:
            state: what ``initial_state`` gave; changed in place.
            x: floating point, any shape and memory format; read without a copy. Without ``axis``, dimension 0 counts
                samples; with it, all of ``x`` is one sample. Empty tensors are ignored.
            axis: the channel axis where the state has channels.
            lower, upper: a clamp that stands before the quantizer.
        """
        ...

    def merge(self, state: dict[str, Tensor], other: Mapping[str, Tensor]) -> None:
        """Fold what was found from nothing on other data into ``state``; exact, but for an average, which has an order."""
        ...

    def range(self, state: dict[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
        """The range ``(low, high)``, float32, for :func:`fxquant.numerics.affine.scale_and_zero_point`."""
        ...


class MovingAverage(MinMax):
    """The extrema of single samples, followed at once when the range grows and by a moving average when it shrinks.

    A plain average of samples' extrema (Krishnamoorthi, 1806.08342, §3.1, over batches) clips about every other sample,
    which costs accuracy at 8 bits and more below.

    Args:
        rate: weight ``c`` of one sample in shrinking. The default halves the distance to a smaller range in 140 samples.
    """

    def __init__(self, *, rate: float = 0.005) -> None:
        if not 0.0 < rate <= 1.0:
            raise SchemeError(f"rate={rate!r}: the weight of a sample in the moving average lies in (0, 1].")
        self.rate = rate

    @torch.no_grad()
    def update(
        self,
        state: dict[str, Tensor],
        x: Tensor,
        *,
        axis: int | None,
        lower: float | None = None,
        upper: float | None = None,
    ) -> None:
        if x.numel() == 0:
            return
        if axis is None:
            lows, highs = clamped(sample_extrema(x), lower, upper)
        else:
            low, high = clamped(channel_extrema(x, axis), lower, upper)
            lows, highs = low[None], high[None]
        unseen = state["low"] > state["high"]
        for name, values, sign in (("low", lows, -1.0), ("high", highs, 1.0)):
            start = torch.where(unseen, values[0], state[name])
            state[name].copy_(sign * self._fold(sign * start, sign * values))

    def _fold(self, start: Tensor, values: Tensor) -> Tensor:
        """The upper bound after the samples' maxima ``values`` ``(n,)`` or ``(n, C)``."""
        m = torch.cat([start[None], values]).double()
        n = values.shape[0]
        age = torch.arange(n, -1, -1, device=m.device, dtype=torch.float64).reshape(-1, *[1] * (m.ndim - 1))
        kept = torch.pow(1.0 - self.rate, age)
        shares = self.rate * kept * m
        later = shares.flip(0).cumsum(0).flip(0) - shares
        return (kept * m + later).amax(0).float()


class Percentile(Histogram):
    """Leaves out at most ``100 - percentile`` percent of the values at either end, to the width of a bin.

    Args:
        percentile: above 50, up to 100.
    """

    def __init__(self, *, percentile: float = 99.99) -> None:
        if not 50.0 < percentile <= 100.0:
            raise SchemeError(f"percentile={percentile!r} must lie in (50, 100].")
        self.percentile = percentile

    @torch.no_grad()
    def range(self, state: dict[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
        edges, width = self.edges_of(state)
        below = state["counts"].long().cumsum(-1)
        total = below[..., -1:]
        fraction = (100.0 - self.percentile) / 100.0
        dropped = torch.floor(total.double() * (fraction * (1.0 + 1e-9)) + 1e-9).long()  # 100 - 99.9 is not 0.1
        first = (below <= dropped).sum(-1).clamp(max=edges.numel() - 2)
        last = (below < total - dropped).sum(-1).clamp(max=edges.numel() - 2)
        low, high = (edges[first] * width).float(), (edges[last + 1] * width).float()
        return torch.maximum(low, state["low"]), torch.minimum(high, state["high"])


class MeanSquareError(Histogram):
    """The range whose grid gives the least error ``Σ |x - x̂|^norm``, clipping included; never more than minmax's.

    Candidates are the observed extrema times factors between 1 and 0.01 in geometric steps: first both ends together,
    then, for affine schemes, one end at a time. It reads results back to the host.

    Args:
        norm: the exponent; 2.4 clips a little less than the mean square does.
        steps: how many factors are tried.
    """

    def __init__(self, *, norm: float = 2.4, steps: int = 128) -> None:
        if norm <= 0 or steps < 2:
            raise SchemeError(f"norm={norm!r} must be positive, and steps={steps!r} at least 2.")
        self.norm, self.steps = norm, steps

    @torch.no_grad()
    def range(self, state: dict[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
        low, high = state["low"].clamp(max=0.0), state["high"].clamp(min=0.0)
        factors = torch.logspace(0.0, -2.0, self.steps, device=low.device)
        if low.ndim:
            return self._best_of_channels(state, low, high, factors, scheme)
        edges, width = self.edges_of(state)
        counts, edges = occupied(state["counts"], edges * width)
        lows, highs = low * factors, high * factors
        best = self._best(counts, edges, lows, highs, scheme)
        if not scheme.symmetric and bool((low < 0) & (high > 0)):
            for _ in range(2):
                best = self._best(counts, edges, best[0].expand_as(highs), highs, scheme)
                best = self._best(counts, edges, lows, best[1].expand_as(lows), scheme)
        return best

    def _best(
        self, counts: Tensor, edges: Tensor, lows: Tensor, highs: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        """The candidate with the least error; the first, which is the widest, among equals."""
        best = (self._errors(edges, lows, highs, scheme) @ counts).argmin()
        return lows[best], highs[best]

    def _best_of_channels(
        self, state: dict[str, Tensor], low: Tensor, high: Tensor, factors: Tensor, scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        """The same for each channel. In units of the largest magnitude all channels share their candidates."""
        edges, _ = self.edges_of(state)
        errors = state["counts"].double() @ self._errors(edges / edges[-1], -factors, factors, scheme).T
        limit = factors[errors.argmin(-1)] * torch.maximum(-low, high)
        return torch.maximum(low, -limit), torch.minimum(high, limit)

    def _errors(self, edges: Tensor, lows: Tensor, highs: Tensor, scheme: Scheme) -> Tensor:
        """The mean error ``(candidates, bins)`` of values that are uniform between neighbouring ``edges``."""
        scale, zero_point = scale_and_zero_point(lows, highs, scheme)
        s, z = scale.double()[:, None], zero_point.double()[:, None]
        u = edges / s
        n = torch.round(u).clamp(scheme.qmin - z, scheme.qmax - z)
        # ∫_0^u |v - n(v)|^p dv: n whole cells around levels, and what lies between the last level and u.
        power = self.norm + 1.0
        rest = u - n
        cell: float = 2.0 * 0.5**power
        integral = (n * cell + rest.sign() * rest.abs().pow(power)) / power
        return integral.diff(dim=1) / u.diff(dim=1) * s.pow(self.norm)


class Auto(Histogram):
    """One of several estimators that read the same histogram.

    The state's ``auto`` says which one: float32 votes ``(candidates,)`` or ``(candidates, C)``, 1 for the estimator that was
    chosen and 0 for the others; the most votes win. Averages of models average votes, which they cannot do with numbers of
    estimators. ``fxquant.choose_ranges`` votes while calibrating; until then, and in training, it is ``mse``.
    """

    def initial_state(self, channels: int | None, *, device: torch.device | str | None = None) -> dict[str, Tensor]:
        state = super().initial_state(channels, device=device)
        state["auto"] = torch.zeros(len(self.candidates(state)), *state["low"].shape, device=device)
        state["auto"][1] = 1.0
        return state

    def candidates(self, state: dict[str, Tensor]) -> tuple[str, ...]:
        """The names that there are to choose from, the first two being ``minmax`` and ``mse``."""
        return _OF_CHANNELS if state["low"].ndim else _OF_TENSORS

    @torch.no_grad()
    def choose(self, state: dict[str, Tensor], which: Tensor) -> None:
        """Let ``state`` name candidate ``which``: whole numbers of ``low``'s shape, or one for all channels."""
        votes = state["auto"]
        votes.zero_().scatter_(0, which.expand(votes.shape[1:])[None], 1.0)

    def chosen(self, state: dict[str, Tensor]) -> Tensor:
        """The candidate's number, int64, of ``low``'s shape."""
        return state["auto"].argmax(0)

    @torch.no_grad()
    def range(self, state: dict[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
        chosen = self.chosen(state)
        if not state["low"].ndim:
            return ESTIMATOR[self.candidates(state)[int(chosen)]].range(state, scheme)
        low, high = state["low"], state["high"]
        for i in chosen.unique().tolist():
            ends = ESTIMATOR[self.candidates(state)[i]].range(state, scheme)
            low, high = (torch.where(chosen == i, *both) for both in zip(ends, (low, high), strict=True))
        return low, high


_OF_TENSORS = ("minmax", "mse", "lp:2", "lp:4", "percentile:99.99", "percentile:99.9", "kl")
_OF_CHANNELS = ("minmax", "mse", "lp:2", "lp:4")
"""Saved votes are in this order: new names go to the end."""


class _Estimators(dict[str, RangeEstimator]):
    """Those without a parameter, and every other one once it was asked for."""

    def __missing__(self, name: str) -> RangeEstimator:
        kind, parameter = estimator_and_parameter(name)
        assert parameter is not None
        self[name] = Percentile(percentile=parameter) if kind == "percentile" else MeanSquareError(norm=parameter)
        return self[name]


ESTIMATOR: dict[str, RangeEstimator] = _Estimators(
    minmax=MinMax(),
    moving_average=MovingAverage(),
    percentile=Percentile(),
    mse=MeanSquareError(),
    kl=KullbackLeibler(),
    auto=Auto(),
)
"""The estimators by the names that a scheme gives them."""
