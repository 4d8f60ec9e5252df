"""Mid-rise weights: levels at the odd multiples of half a step, none at zero; the step is learned as in LSQ.

    v = w / s,   r = floor(v) + ½ clamped to ±(2^(bits-1) - ½),   ŵ = s · r
    ∂ŵ/∂w = 1 where |v| ≤ 2^(bits-1), else 0;   ∂ŵ/∂s = r - v inside, r beyond

At 2 bits the levels ±½, ±1½ have a fifth less squared error on normal weights than -2 … 1 (0.119 against 0.149). A weight
is an odd integer times s / 2: integers of one bit more. Source: the grid that EWGS (2104.00903), DoReFa (1606.06160) and
SAWB (1807.06964) imply; gradients as of Esser et al., 1902.08153.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.errors import Refusal
from fxquant.nn.grid import Grid
from fxquant.numerics.affine import broadcast, smallest_scale
from fxquant.numerics.scheme import Scheme
from fxquant.quantizers.learned import LearnedWeight
from fxquant.quantizers.registry import register

__all__ = ["MidriseWeight"]

_MOST_BITS = 6
_CANDIDATES = 64


def _levels(weight: Tensor, step: Tensor, half: float) -> Tensor:
    return (torch.floor(weight / step) + 0.5).clamp(0.5 - half, half - 0.5)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, step: Tensor, half: float, gain: float) -> Tensor:
        """``step`` in a shape that broadcasts to ``x``; ``half``: how many levels each sign has."""
        return (_levels(x.float(), step, half) * step).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, step, ctx.half, ctx.gain = inputs
        ctx.save_for_backward(x, step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, step = ctx.saved_tensors
        v, r, g = x.float() / step, _levels(x.float(), step, ctx.half), gradient.float()
        inside = v.abs() <= ctx.half
        to_step = (g * torch.where(inside, r - v, r)).sum_to_size(step.shape) * ctx.gain
        return torch.where(inside, g, 0.0).to(x.dtype), to_step, None, None


class MidriseWeight(LearnedWeight):
    """The quantizer of a weight; ``step`` is s, and the property ``scale`` s / 2, of which the integers are multiples."""

    takes_estimator = False

    @property
    def per_sign(self) -> float:
        """How many levels each sign has."""
        return float(2 ** (self.scheme.bits - 1))

    def encode(self, scale: Tensor) -> Tensor:
        return 2 * scale

    def decode(self, step: Tensor) -> Tensor:
        return (step.abs() / 2).clamp(min=smallest_scale())

    def _rounded(self, x: Tensor, scale: Tensor, *_: Any) -> Tensor:
        step = 2 * broadcast(scale, x.ndim, self.axis)
        result: Tensor = _Rounded.apply(x, step, self.per_sign, self.gain(x))
        return result

    @torch.no_grad()
    def read_range(self, weight: Tensor) -> None:
        """Start from the step with the least squared error, of 64 between a 64th of the range and all of it."""
        rest = tuple(d for d in range(weight.ndim) if d != self.axis)
        x = weight.detach().float()
        largest = x.abs().amax() if self.axis is None else x.abs().amax(rest, keepdim=True)
        widest = (largest / (self.per_sign - 0.5)).clamp(min=2 * smallest_scale())
        steps = [widest * (i + 1) / _CANDIDATES for i in range(_CANDIDATES)]
        errors = [(_levels(x, s, self.per_sign) * s - x).square() for s in steps]
        sums = torch.stack([e.sum() if self.axis is None else e.sum(rest) for e in errors])
        chosen = (sums.argmin(0) + 1) / _CANDIDATES
        self.take_grid(chosen * widest.reshape(self.step.shape) / 2, torch.zeros_like(self.step))

    @property
    def grid(self) -> Grid:
        per_channel = self.scheme.per_channel
        wide = Scheme.weight(self.scheme.bits + 1, per_channel=per_channel, quantizer=self.scheme.quantizer)
        return Grid(self.scale.clone(), torch.zeros_like(self.zero_point), wide)


def _refuses(scheme: Scheme, kind: str) -> Refusal | None:
    if scheme.bits > _MOST_BITS:
        return Refusal(
            f"its odd integers take one bit more, and kernels {_MOST_BITS + 1} at most: set bits to {_MOST_BITS} or fewer"
        )
    return None if scheme.narrow_range else Refusal("its grid is even around zero: set narrow_range=True")


register("midrise", weight=MidriseWeight, refuses=_refuses)
