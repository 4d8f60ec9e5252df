"""Binary activations: the sign of each number; and the thresholds that a batch norm before them comes to.

    â = sign(a),   ∂â/∂a = 1 where |a| ≤ 1, else 0                     sign(0) = 1

Put it behind a batch norm or a hardtanh; behind a ReLU every sign is 1, which is refused. Behind a layer and its batch norm
the sign needs no multiplication: with an integer accumulator n of scale s,

    sign(γ·(s·n - μ) / σ + β) = 1  where  n ≥ T (γ > 0),   n ≤ T (γ < 0),   β ≥ 0 (γ = 0)

which ``thresholds`` computes. The integer kernels round tensors to the nearest number and compare with none, so that this
rule is simulated. Source: Hubara et al., Binarized Neural Networks, 1602.02830, eq. 1 and 4; thresholds: Umuroglu et al.,
FINN, 1612.07119, §4.2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.errors import InputError, Refusal
from fxquant.nn.fake_quantize import FakeQuantize
from fxquant.numerics.scheme import Scheme
from fxquant.quantizers.registry import register
from fxquant.quantizers.straight_through import replaced

__all__ = ["SignTensor", "Thresholds", "thresholds"]


class SignTensor(FakeQuantize):
    """The quantizer of a tensor: -1 and 1 of a signed 2-bit grid of scale 1, whatever passes."""

    keeps_bits = "it has two numbers"

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme, fixed_grid=(1.0, 0))

    def rounded(
        self, x: Tensor, lower: float | None = None, upper: float | None = None, inplace: bool = False
    ) -> Tensor:
        if (lower is not None and lower >= 0) or (upper is not None and upper < 0):
            raise InputError(
                f"binary activations behind a clamp to [{lower}, {upper}]: all of them have one sign.\n"
                "  what to do: take the ReLU out, or write nn.Hardtanh in its place; the batch norm stays before it."
            )
        value = torch.where(x.detach() < 0, -1.0, 1.0)
        return replaced(x, value, (x.detach().abs() <= 1.0).float())


@dataclass(frozen=True)
class Thresholds:
    """What an accumulator is compared with, channel by channel.

    Attributes:
        level: int64 ``(C,)``.
        rises: bool ``(C,)``: the sign is 1 from ``level`` on; otherwise up to ``level``.
    """

    level: Tensor
    rises: Tensor

    def sign(self, accumulator: Tensor, axis: int = 1) -> Tensor:
        """-1 or 1 for each integer, channels along ``axis``; int8."""
        shape = [1] * accumulator.ndim
        shape[axis] = -1
        level, rises = self.level.reshape(shape), self.rises.reshape(shape)
        positive = torch.where(rises, accumulator >= level, accumulator <= level)
        return torch.where(positive, 1, -1).to(torch.int8)


_FAR = 2**62


@torch.no_grad()
def thresholds(scale: Tensor, gain: Tensor, offset: Tensor) -> Thresholds:
    """The thresholds of ``sign(gain · scale · n + offset)`` over integers n.

    Example:
        >>> found = thresholds(torch.tensor(0.5), torch.tensor([2.0, -2.0]), torch.tensor([-3.0, -3.0]))
        >>> found.level.tolist(), found.rises.tolist()
        ([3, -3], [True, False])

    Args:
        scale: positive: what one of the accumulator stands for, ``()`` or ``(C,)``.
        gain: γ / σ of each channel, ``(C,)``, of any sign.
        offset: β + (b - μ)·γ / σ, ``(C,)``; b the layer's bias.
    """
    slope, offset = gain.double() * scale.double(), offset.double()
    flat = slope == 0
    edge = -offset / torch.where(flat, torch.ones_like(slope), slope)
    level = torch.where(slope > 0, edge.ceil(), edge.floor()).clamp(-_FAR, _FAR)
    always = torch.where(offset >= 0, -_FAR, _FAR).to(level.dtype)
    return Thresholds(torch.where(flat, always, level).to(torch.int64), (slope > 0) | flat)


def _refuses(scheme: Scheme, kind: str) -> Refusal | None:
    fits = scheme.bits == 2 and scheme.signed
    return None if fits else Refusal("its two numbers are -1 and 1 of a signed 2-bit grid: set bits=2, signed=True")


register(
    "sign",
    tensor=SignTensor,
    refuses=_refuses,
    simulates=Refusal("it compares with a threshold, and integer kernels round tensors to the nearest number"),
)
