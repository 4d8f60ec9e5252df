"""Range estimators: folds over batches that end in the range ``[low, high]`` a grid has to cover.

    minmax           low = min x,  high = max x
    moving_average   high ← max(m, (1 - c) · high + c · m),  m = max(sample), sample by sample; low likewise
    percentile       the smallest range that leaves out at most a fraction 1 - p of the values at either end
    mse              argmin over ranges of  Σ_bins count · E|x - x̂|^p,  x uniform within its bin

The range does not depend on how the samples are cut into batches. ``minmax`` and the histograms are exact folds. The
moving average runs over samples (dimension 0), not over batches. It grows at once, so that what passes is not clipped,
and shrinks slowly, so that an outlier is forgotten. Each of its steps is the larger of two non-decreasing affine maps,
hence n of them at once are the largest of n + 1 plain averages, each started at one of the samples, or before them:

    high ← max( a_0, …, a_n ),   a_k = (1 - c)^(n-k) · m_k + Σ_{i>k} c (1 - c)^(n-i) · m_i,   m_0 = high.

The histogram's bins are ``[i, i + 1) · 2^k``. As the width is a power of two and the grid is aligned at zero, a range
that grows merges neighbouring bins exactly, so that the counts depend on the data alone and not on their order.

An estimator is stateless; its state is a dictionary of tensors of fixed shapes, which ``update`` changes in place.
Source: Krishnamoorthi, 1806.08342, §3.1 (moving average); Nagel et al., 2106.08295, §3.1 (mse); the norm p = 2.4 is
that of Wei et al., 2203.05740.
"""

from __future__ import annotations

from math import inf
from typing import Protocol

import torch
from torch import Tensor

from fxquant.errors import SchemeError
from fxquant.numerics.affine import scale_and_zero_point
from fxquant.numerics.memory import flat_view, pieces
from fxquant.numerics.scheme import Scheme

__all__ = ["ESTIMATOR", "MeanSquareError", "MinMax", "MovingAverage", "Percentile", "RangeEstimator"]

_BINS = 4096
"""Bins of a tensor, half of them for each sign: a one-sided range spans 1024 to 2048 of them."""

_CHANNEL_BINS = 256
"""Bins of a channel of a weight."""

_LEAST_EXPONENT = -126


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

    def range(self, state: dict[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
        """The range ``(low, high)``, float32, for :func:`fxquant.numerics.affine.scale_and_zero_point`."""
        ...


class MinMax:
    """The smallest and the largest value seen."""

    def initial_state(self, channels: int | None, *, device: torch.device | str | None = None) -> dict[str, Tensor]:
        shape = () if channels is None else (channels,)
        return {"low": torch.full(shape, inf, device=device), "high": torch.full(shape, -inf, device=device)}

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
        low, high = _clamped(_extrema(x) if axis is None else _channel_extrema(x, axis), lower, upper)
        state["low"].copy_(torch.minimum(state["low"], low))
        state["high"].copy_(torch.maximum(state["high"], high))

    def range(self, state: dict[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
        return state["low"], state["high"]


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
            lows, highs = _clamped(_sample_extrema(x), lower, upper)
        else:
            low, high = _clamped(_channel_extrema(x, axis), lower, upper)
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


class _Histogram(MinMax):
    """A streaming histogram.

    One range: ``counts`` int64 ``(4096,)`` of the bins ``[i, i + 1) · 2^exponent``, ``-2048 ≤ i < 2048``.
    Channels: ``counts`` int32 ``(C, 256)``, 128 bins of equal width for each sign up to the channel's largest
    magnitude. As weights are seen whole, an update with an axis replaces what was there.
    """

    def initial_state(self, channels: int | None, *, device: torch.device | str | None = None) -> dict[str, Tensor]:
        state = super().initial_state(channels, device=device)
        if channels is None:
            state["counts"] = torch.zeros(_BINS, dtype=torch.int64, device=device)
            state["exponent"] = torch.full((), _LEAST_EXPONENT, dtype=torch.int64, device=device)
        else:
            state["counts"] = torch.zeros(channels, _CHANNEL_BINS, dtype=torch.int32, device=device)
        return state

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
        if axis is not None:
            _count_channels(state, x, axis, lower, upper)
            return
        super().update(state, x, axis=None, lower=lower, upper=upper)
        exponent = _exponent(state["low"], state["high"], state["exponent"])
        state["counts"].copy_(_merge(state["counts"], exponent - state["exponent"]))
        state["exponent"].copy_(exponent)
        _count(state["counts"], exponent, x, lower, upper)

    def _edges(self, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The bins' edges ``(bins + 1,)`` in units of their width, and the width, float64 of ``low``'s shape."""
        counts = state["counts"]
        half = counts.shape[-1] // 2
        edges = torch.arange(-half, half + 1, dtype=torch.float64, device=counts.device)
        if "exponent" in state:
            width = torch.ldexp(torch.ones((), dtype=torch.float64, device=counts.device), state["exponent"])
        else:
            width = _channel_width(state["low"], state["high"]).double()
        return edges, width


class Percentile(_Histogram):
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
        edges, width = self._edges(state)
        below = state["counts"].long().cumsum(-1)
        total = below[..., -1:]
        fraction = (100.0 - self.percentile) / 100.0
        dropped = torch.floor(total.double() * (fraction * (1.0 + 1e-9)) + 1e-9).long()  # 100 - 99.9 is not 0.1
        first = (below <= dropped).sum(-1).clamp(max=edges.numel() - 2)
        last = (below < total - dropped).sum(-1).clamp(max=edges.numel() - 2)
        low, high = (edges[first] * width).float(), (edges[last + 1] * width).float()
        return torch.maximum(low, state["low"]), torch.minimum(high, state["high"])


class MeanSquareError(_Histogram):
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
        edges, width = self._edges(state)
        counts, edges = _occupied(state["counts"], edges * width)
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
        edges, _ = self._edges(state)
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


def _extrema(x: Tensor) -> tuple[Tensor, Tensor]:
    """The least and greatest element, float32 ``()``; NaN if there is one."""
    flat = flat_view(x)
    low, high = (x.amin(), x.amax()) if flat is None else torch.aminmax(flat)
    return low.float(), high.float()


def _sample_extrema(x: Tensor) -> tuple[Tensor, Tensor]:
    """Those of every slice along dimension 0, float32 ``(n,)``; a scalar is one sample."""
    if x.ndim < 2:
        values = x.reshape(-1).float()
        return values, values
    rest = tuple(range(1, x.ndim))
    return x.amin(rest).float(), x.amax(rest).float()


def _channel_extrema(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Those of every slice along ``axis``, float32 ``(C,)``."""
    rest = tuple(d for d in range(x.ndim) if d != axis % x.ndim)
    if not rest:
        return x.float(), x.float()
    return x.amin(rest).float(), x.amax(rest).float()


def _clamped(bounds: tuple[Tensor, Tensor], lower: float | None, upper: float | None) -> tuple[Tensor, Tensor]:
    """The extrema of the clamped tensor, which are the clamped extrema."""
    if lower is None and upper is None:
        return bounds
    return bounds[0].clamp(lower, upper), bounds[1].clamp(lower, upper)


def _exponent(low: Tensor, high: Tensor, exponent: Tensor) -> Tensor:
    """The least exponent, not below ``exponent``, whose bins reach over ``[low, high]``."""
    magnitude = torch.maximum(-low, high)
    _, power = torch.frexp(magnitude)
    needed = power.long() - (_BINS // 2).bit_length() + 1
    return torch.where(torch.isfinite(magnitude) & (magnitude > 0), torch.maximum(needed, exponent), exponent)


def _merge(counts: Tensor, doublings: Tensor) -> Tensor:
    """The counts of bins that are ``2^doublings`` times as wide."""
    half = counts.numel() // 2
    target = (torch.arange(-half, half, device=counts.device) >> doublings.clamp(max=62)) + half
    return torch.zeros_like(counts).index_add_(0, target, counts)


def _occupied(counts: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """The counts, float64, and edges of the bins from the first to the last that is not empty."""
    filled = counts.nonzero()
    if filled.numel() == 0:
        return counts.double(), edges
    first, last = int(filled[0]), int(filled[-1])
    return counts[first : last + 1].double(), edges[first : last + 2]


def _count(counts: Tensor, exponent: Tensor, x: Tensor, lower: float | None, upper: float | None) -> None:
    """Add the elements of ``x`` to the bins of width ``2^exponent``. A product with a power of two is exact."""
    half = counts.numel() // 2
    factor = torch.ldexp(torch.ones((), device=x.device), -exponent)
    flat = flat_view(x)
    for (piece,) in pieces(x.reshape(-1) if flat is None else flat):
        clamped = piece if lower is None and upper is None else piece.clamp(lower, upper)
        index = torch.floor_(clamped.float() * factor).clamp_(-half, half - 1)
        if x.device.type == "cpu" and index.numel() < 2**24:
            counts += torch.histc(index, counts.numel(), -half, half).long()
        else:
            index = index.nan_to_num_(0.0).long() + half
            counts.index_add_(0, index, torch.ones((), dtype=counts.dtype, device=x.device).expand_as(index))


def _count_channels(state: dict[str, Tensor], x: Tensor, axis: int, lower: float | None, upper: float | None) -> None:
    """Replace ``state`` by the extrema and counts of ``x``, channel by channel."""
    low, high = _clamped(_channel_extrema(x, axis), lower, upper)
    state["low"].copy_(low)
    state["high"].copy_(high)
    counts = state["counts"]
    half = counts.shape[1] // 2
    rows = x.movedim(axis, 0).reshape(counts.shape[0], -1).float()
    if lower is not None or upper is not None:
        rows = rows.clamp(lower, upper)
    index = (
        torch.floor(rows / _channel_width(low, high)[:, None]).clamp_(-half, half - 1).nan_to_num_(0.0).long() + half
    )
    ones = torch.ones((), dtype=counts.dtype, device=x.device).expand_as(index)
    counts.zero_().scatter_add_(1, index, ones)


def _channel_width(low: Tensor, high: Tensor) -> Tensor:
    """The width of a channel's bins."""
    width = torch.maximum(-low, high).div(_CHANNEL_BINS // 2)
    return torch.where(width > 0, width, torch.ones_like(width))


ESTIMATOR: dict[str, RangeEstimator] = {
    "minmax": MinMax(),
    "moving_average": MovingAverage(),
    "percentile": Percentile(),
    "mse": MeanSquareError(),
}
"""The estimators by the names that a scheme gives them."""
