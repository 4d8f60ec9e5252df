"""Activations on a logarithmic grid of sixteenths of an octave, which holds the most weighted entropy.

    levels   0 and v_i = 2^((f + i·d) / 16),  i = 0 … 2^b - 2;    x becomes v_i where |16·log2 x - (f + i·d)| ≤ d / 2
    f, d     argmax  -Σ v_i · P_i · log P_i,  P_i the share of numbers that become v_i;  f whole, d even, at most 32

What lies below the first level's region, or is negative, is 0; what lies above the last level is that level. f and d are
found when ``calibrate`` ends, or on the first batch that is trained on, and stay. ∂x̂/∂x = 1 from the first region on to the
last level, else 0. Products of such numbers with weights are no multiples of one scale: this rule is simulated.
Source: Park et al., Weighted-Entropy-Based Quantization for Deep Neural Networks, CVPR 2017, §3.3 (LogQuant, LQ-ReLU).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.errors import Refusal
from fxquant.nn.fake_quantize import FakeQuantize
from fxquant.numerics.scheme import Scheme
from fxquant.quantizers.registry import register
from fxquant.quantizers.straight_through import replaced

__all__ = ["LogEntropyTensor"]

_PER_OCTAVE = 16
_LOWEST = -24 * _PER_OCTAVE
_BINS = 48 * _PER_OCTAVE
"""Numbers from 2^-24 to 2^24 are told apart; smaller ones count as zero, larger ones as the largest."""
_HALF_STEPS = range(1, 17)


class LogEntropyTensor(FakeQuantize):
    """The quantizer of a tensor that is not negative.

    Buffers:
        range_counts: float32, ``(768,)``: how many numbers were seen in each sixteenth of an octave from 2^-24 on.
        first, stride: float32, ``()``: f and d.
    """

    range_counts: Tensor
    first: Tensor
    stride: Tensor

    def __init__(self, scheme: Scheme, **fixed: Any) -> None:
        super().__init__(scheme, **fixed)
        self.register_buffer("range_counts", torch.zeros(_BINS))
        self._state_names.append("counts")
        self.register_buffer("first", torch.zeros(()))
        self.register_buffer("stride", torch.ones(()))

    def follows_now(self) -> bool:
        """Only until there is a range, which stays."""
        return super().follows_now() and not self.delayed and not self._ready and not self.ready

    def rounded(
        self, x: Tensor, lower: float | None = None, upper: float | None = None, inplace: bool = False
    ) -> Tensor:
        given = x.detach().float()
        bounded = given.clamp(lower, upper) if lower is not None or upper is not None else given
        places = _sixteenths(bounded)
        last = self.first + self.stride * (2**self.scheme.bits - 2)
        level = torch.round((places - self.first) / self.stride).clamp(max=2**self.scheme.bits - 2)
        y = torch.where(
            level >= 0, torch.exp2((self.first + level * self.stride) / _PER_OCTAVE), torch.zeros_like(given)
        )
        return replaced(x, y, ((level >= 0) & (places <= last) & (bounded == given)).float())

    @torch.no_grad()
    def observe(self, x: Tensor, *, lower: float | None = None, upper: float | None = None) -> None:
        if x.is_floating_point() and x.numel():
            given = x.detach().float()
            places = _sixteenths(given.clamp(lower, upper) if lower is not None or upper is not None else given)
            bins = (places.floor() - _LOWEST).clamp(max=_BINS - 1)
            self.range_counts.add_(torch.bincount(bins[bins >= 0].long(), minlength=_BINS))
        super().observe(x, lower=lower, upper=upper)

    @torch.no_grad()
    def update_scale(self) -> None:
        """Compute scale and zero point as any quantizer's, and f and d from the counts."""
        super().update_scale()
        if self.ready and bool(self.range_counts.any()):
            first, stride = _most_entropy(self.range_counts.double(), 2**self.scheme.bits - 1)
            self.first.fill_(first)
            self.stride.fill_(stride)

    def reset(self) -> None:
        super().reset()
        self.range_counts.zero_()


def _sixteenths(x: Tensor) -> Tensor:
    """16·log2 x; -inf of what is not positive."""
    return torch.log2(x.clamp(min=0.0)) * _PER_OCTAVE


def _most_entropy(counts: Tensor, levels: int) -> tuple[int, int]:
    """f and d of the most weighted entropy, for so many levels beside zero. Values count relative to the largest seen."""
    seen = counts.nonzero().flatten()
    top = int(seen[-1]) + 1
    before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    share = before / max(1.0, float(counts.sum()))
    best = (float("-inf"), 0, 1)
    for half in _HALF_STEPS:
        first = torch.arange(int(seen[0]) - (levels - 1) * 2 * half, top + 1, device=counts.device)
        centers = first[:, None] + 2 * half * torch.arange(levels, device=counts.device)
        edges = torch.cat([centers - half, torch.full_like(first, _BINS)[:, None]], 1).clamp(0, _BINS)
        p = share[edges[:, 1:]] - share[edges[:, :-1]]
        value = torch.exp2((centers.double() - top) / _PER_OCTAVE)
        entropy = -(value * torch.special.xlogy(p, p)).sum(1)
        at = int(entropy.argmax())
        if float(entropy[at]) > best[0]:
            best = (float(entropy[at]), int(first[at]) + _LOWEST, 2 * half)
    return best[1], best[2]


def _refuses(scheme: Scheme, kind: str) -> Refusal | None:
    if scheme.signed or scheme.symmetric:
        return Refusal("its tensors are not negative: set signed=False, symmetric=False")
    return Refusal("it has 8 bits at most: set bits to 8 or fewer") if scheme.bits > 8 else None


register(
    "log_entropy",
    tensor=LogEntropyTensor,
    estimator="minmax",
    refuses=_refuses,
    simulates=Refusal("its levels are powers of two with fractions, no multiples of one scale"),
)
