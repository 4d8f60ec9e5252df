"""Entropy calibration: the range after which the rounded histogram diverges least from the whole one (TensorRT).

For each number i of bins of |x| kept, of n:

    P = counts[:i], with all that lies beyond added to the last        what clipping leaves
    Q = counts[:i], each of L equal parts spread evenly over its non-empty bins      what L levels can tell apart
    D(i) = Σ P log (P / Q)

Bin 0 is given the count of bin 1, so that zeros (what a ReLU makes) do not decide. The last of the least D is taken.

ONNX Runtime's calibrator of the same name rescales its histogram of 128 bins to the data's range, so that with 128 levels
each bin is a level of its own, Q = P but for the tail, and nearly always the whole range wins. Here |x| has up to 2048 bins,
1024 at least; their widths are powers of two and never depend on the batches' order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import SchemeError
from fxquant.numerics.histogram import Histogram
from fxquant.numerics.scheme import Scheme

__all__ = ["KullbackLeibler", "least_divergence"]

_FIRST = 128
"""The fewest bins that are kept."""
_SAME = 1e-12
"""Divergences that differ by less are the same but for rounding errors."""


class KullbackLeibler(Histogram):
    """TensorRT's entropy calibration, for one range; of affine schemes both ends are cut at the same magnitude.

    Source: Migacz, "8-bit inference with TensorRT", GTC 2017; NVIDIA TensorRT, pytorch-quantization ``calib/histogram.py``.
    """

    @torch.no_grad()
    def range(self, state: dict[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
        low, high = state["low"], state["high"]
        if low.ndim:
            raise SchemeError(
                "estimator='kl' finds one range, not one for each channel. Choose mse or lp:P for weights."
            )
        counts = state["counts"].cpu()
        if not int(counts.sum()):
            return low, high
        half = counts.numel() // 2
        magnitudes = counts[half:].double() + counts[:half].flip(0).double()
        kept = least_divergence(magnitudes[: int(magnitudes.nonzero()[-1]) + 1], _levels(low, high, scheme))
        _, width = self.edges_of(state)
        limit = (kept * width).float()
        return torch.maximum(low, -limit), torch.minimum(high, limit)


def least_divergence(counts: Tensor, levels: int) -> int:
    """How many of the bins of |x| to keep.

    Args:
        counts: float64 ``(n,)``, the last one positive.
        levels: how many of the grid's levels |x| has; n is returned where there are no more bins.
    """
    counts = counts.clone()
    if len(counts) > 1:
        counts[0] = counts[1]
    size = len(counts)
    if size <= max(_FIRST, levels):
        return size
    kept = torch.arange(max(_FIRST, levels), size + 1)
    sums, filled, entropies = (_sums_before(t) for t in (counts, (counts > 0).double(), torch.xlogy(counts, counts)))
    ends = -(-torch.arange(levels + 1) * kept[:, None] // levels)  # bin i is of level i · L // kept
    level, bins = sums[ends].diff(dim=1), filled[ends].diff(dim=1)
    means = level / bins.clamp(min=1)
    last, beyond = counts[kept - 1], sums[-1] - sums[kept]
    own = entropies[kept] - torch.xlogy(last, last) + torch.xlogy(last + beyond, last + beyond)
    level[:, -1] += beyond
    crossed = torch.xlogy(level, means.where(bins > 0, torch.ones_like(means))).sum(1)
    divergence = (own - crossed) / sums[-1] - sums[-1].log() + sums[kept].log()
    impossible = ((last == 0) & (beyond > 0)) | (sums[kept] == 0)
    divergence = divergence.masked_fill(impossible, torch.inf)
    return int(kept[divergence <= divergence.min() + _SAME][-1])


def _sums_before(values: Tensor) -> Tensor:
    """The sums of the first 0, 1, 2 … of ``values``."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def _levels(low: Tensor, high: Tensor, scheme: Scheme) -> int:
    """How many of the grid's levels lie on the longer side of zero."""
    levels = 1 << scheme.bits
    if scheme.symmetric:
        return levels // 2 if scheme.signed or bool(low < 0) else levels
    larger, smaller = float(torch.maximum(-low, high)), max(float(torch.minimum(-low, high)), 0.0)
    return round(levels * larger / (larger + smaller)) if larger > 0 else levels
