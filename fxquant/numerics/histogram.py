"""Extrema and histograms of what passes, folded batch by batch; the estimators of ``ranges`` read ranges off them.

The histogram's bins are ``[i, i + 1) · 2^k``. As the width is a power of two and the grid is aligned at zero, a range
that grows merges neighbouring bins exactly, so that the counts depend on the data alone and not on their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

import torch
from torch import Tensor

from fxquant.numerics.memory import flat_view, pieces
from fxquant.numerics.scheme import Scheme

__all__ = ["Histogram", "MinMax", "channel_extrema", "clamped", "occupied", "sample_extrema"]

_BINS = 4096
"""Bins of a tensor, half of them for each sign: a one-sided range spans 1024 to 2048 of them."""

_CHANNEL_BINS = 256
"""Bins of a channel of a weight."""

_LEAST_EXPONENT = -126


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
        low, high = clamped(_extrema(x) if axis is None else channel_extrema(x, axis), lower, upper)
        state["low"].copy_(torch.minimum(state["low"], low))
        state["high"].copy_(torch.maximum(state["high"], high))

    @torch.no_grad()
    def merge(self, state: dict[str, Tensor], other: Mapping[str, Tensor]) -> None:
        """Fold what was found from nothing on other data into ``state``, exactly as if ``state`` had seen that data."""
        state["low"].copy_(torch.minimum(state["low"], other["low"]))
        state["high"].copy_(torch.maximum(state["high"], other["high"]))

    def range(self, state: dict[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
        return state["low"], state["high"]


class Histogram(MinMax):
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

    @torch.no_grad()
    def merge(self, state: dict[str, Tensor], other: Mapping[str, Tensor]) -> None:
        """As of ``MinMax``; of one range: channels are seen whole."""
        super().merge(state, other)
        exponent = torch.maximum(state["exponent"], other["exponent"])
        counts, more = (_merge(each["counts"], exponent - each["exponent"]) for each in (state, other))
        state["counts"].copy_(counts + more)
        state["exponent"].copy_(exponent)

    def edges_of(self, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The bins' edges ``(bins + 1,)`` in units of their width, and the width, float64 of ``low``'s shape."""
        counts = state["counts"]
        half = counts.shape[-1] // 2
        edges = torch.arange(-half, half + 1, dtype=torch.float64, device=counts.device)
        if "exponent" in state:
            width = torch.ldexp(torch.ones((), dtype=torch.float64, device=counts.device), state["exponent"])
        else:
            width = _channel_width(state["low"], state["high"]).double()
        return edges, width


def _extrema(x: Tensor) -> tuple[Tensor, Tensor]:
    """The least and greatest element, float32 ``()``; NaN if there is one."""
    flat = flat_view(x)
    low, high = (x.amin(), x.amax()) if flat is None else torch.aminmax(flat)
    return low.float(), high.float()


def sample_extrema(x: Tensor) -> tuple[Tensor, Tensor]:
    """Those of every slice along dimension 0, float32 ``(n,)``; a scalar is one sample."""
    if x.ndim < 2:
        values = x.reshape(-1).float()
        return values, values
    rest = tuple(range(1, x.ndim))
    return x.amin(rest).float(), x.amax(rest).float()


def channel_extrema(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Those of every slice along ``axis``, float32 ``(C,)``."""
    rest = tuple(d for d in range(x.ndim) if d != axis % x.ndim)
    if not rest:
        return x.float(), x.float()
    return x.amin(rest).float(), x.amax(rest).float()


def clamped(bounds: tuple[Tensor, Tensor], lower: float | None, upper: float | None) -> tuple[Tensor, Tensor]:
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


def occupied(counts: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
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
    low, high = clamped(channel_extrema(x, axis), lower, upper)
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
