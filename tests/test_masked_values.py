"""Scores that a mask has put far away, and that go elsewhere than straight into a softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from comparisons import decibels
from torch import Tensor, nn

import fxquant
from fxquant.nn.fake_quantize import FakeQuantize

Weigh = Callable[[Tensor, Tensor], Tensor]
"""From scores and ``allowed`` (bool, true where to look) to weights of the values."""


class Attention(nn.Module):
    """Attention of one head whose weights are ``weigh``'s."""

    def __init__(self, weigh: Weigh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weigh, self.qkv, self.out = weigh, nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return self.out(self.weigh(q @ k.transpose(-2, -1) / math.sqrt(32), allowed) @ v)


def largest(scores: Tensor, allowed: Tensor) -> Tensor:
    return scores.softmax(-1) * (scores.masked_fill(~allowed, -1e4) * 0.5).amax(-1, keepdim=True)


def without_largest(scores: Tensor, allowed: Tensor) -> Tensor:
    masked = scores.masked_fill(~allowed, -1e4)
    return (masked - masked.max(-1, keepdim=True).values).softmax(-1)


WEIGHS: dict[str, Weigh] = {
    "sigmoid, by the length": lambda s, a: torch.sigmoid(s.masked_fill(~a, -1e4) - math.log(s.shape[-1])),
    "where": lambda s, a: torch.sigmoid(torch.where(a, s, torch.tensor(-1e9)) - 2.5),
    "where, a tensor like it": lambda s, a: torch.sigmoid(torch.where(a, s, torch.full_like(s, -1e9)) - 2.5),
    "where, a number": lambda s, a: torch.sigmoid(torch.where(a, s, -1e9) - 2.5),
    "infinity": lambda s, a: torch.sigmoid(s.masked_fill(~a, -math.inf) * 2 - 2.5),
    "finfo": lambda s, a: torch.sigmoid(s.masked_fill(~a, torch.finfo(s.dtype).min) / 1.5 - 2.5),
    "scatter": lambda s, a: torch.sigmoid(s.masked_scatter(~a, torch.full((s.numel(),), -1e9)) - 2.5),
    "capped": lambda s, a: (5 * torch.tanh(s.masked_fill(~a, -1e4) / 5)).softmax(-1),
    "elu": lambda s, a: (F.elu(s.masked_fill(~a, -1e4) * 0.5) + 1) / s.shape[-1],
    "silu": lambda s, a: F.silu(s.masked_fill(~a, -1e4) * 0.5) / s.shape[-1],
    "squared relu": lambda s, a: torch.relu(s.masked_fill(~a, -1e4) + 0.5) ** 2 / s.shape[-1],
    "clamp": lambda s, a: (s.masked_fill(~a, -1e4) * 0.5).clamp(min=0) / s.shape[-1],
    "hardsigmoid": lambda s, a: F.hardsigmoid(s.masked_fill(~a, -1e4) * 2) / s.shape[-1],
    "the largest": largest,
    "without the largest": without_largest,
    "two masks": lambda s, a: ((s.masked_fill(~a, -1e4) - 1) * 0.5).masked_fill(~a, 0) * 0.1,
}


@pytest.mark.parametrize("name", WEIGHS)
def test_values_that_a_mask_put_far_away_set_no_scale(name):
    model = Attention(WEIGHS[name]).eval()
    batches = [torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    prepared = fxquant.calibrate(fxquant.prepare(model, batches[0], verify=True), batches, progress=False)
    scales = [float(part.scale.max()) for part in prepared.modules() if isinstance(part, FakeQuantize)]
    assert max(scales) < 1.0, "a masked value has set a scale"
    with torch.no_grad():
        assert decibels(model(batches[0]), fxquant.convert(prepared)(batches[0])) > 30.0


def test_values_that_a_mask_sets_to_zero_are_rounded_as_others():
    """What is near the others harms no grid."""
    model = Attention(lambda s, a: torch.sigmoid(s.masked_fill(~a, 0.0) - 1.5)).eval()
    prepared = fxquant.prepare(model, torch.randn(2, 16, 32))
    assert not [n for n in prepared.graph.nodes if "far from the others" in n.meta.get("reason", "")]
