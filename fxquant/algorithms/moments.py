"""Second moments of a layer's quantized inputs and its float targets, over a sample of its output positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxquant.algorithms.columns import Matrices
from fxquant.algorithms.engine import Layer

__all__ = ["Moments", "moments_of", "positions_of"]

POSITIONS = 96
"""Output positions of an image that are looked at, on average: neighbours say much the same."""
_AT_ONCE = 1 << 24
"""Numbers of the inputs' matrix that are made at a time."""
_HELD_OUT = 4
"""One of so many positions is held out: the last ones of each batch, which are other images."""


@dataclass(frozen=True)
class Moments:
    """Averages over output positions, float64; G groups, R rows and K columns of the weight.

    Attributes:
        inputs: ``(G, K, K)``, the mean of x·xᵀ; of x less its mean where the op has a bias.
        crossed: ``(G, R, K)``, the mean of t·xᵀ, likewise.
        input_mean, target_mean: ``(G, K)`` and ``(G, R)``.
        count: of positions.
        images: of samples of the batches.
        halves: the same of most positions, and of the others; None where there are too few.
    """

    inputs: Tensor
    crossed: Tensor
    input_mean: Tensor
    target_mean: Tensor
    count: int
    images: int
    halves: tuple[Moments, Moments] | None = None


class _Sums:
    """Sums of x·xᵀ, t·xᵀ, x and t, less what the first batch has on average."""

    def __init__(self, first_x: Tensor, first_t: Tensor) -> None:
        self.first_x, self.first_t = first_x, first_t
        groups, width = first_x.shape
        self.inputs, self.crossed = first_x.new_zeros(groups, width, width), first_x.new_zeros(*first_t.shape, width)
        self.x, self.t, self.count = torch.zeros_like(first_x), torch.zeros_like(first_t), 0

    def add(self, x: Tensor, t: Tensor) -> None:
        """One batch, float32, of which the first one's means are off already."""
        self.inputs += (x @ x.mT).double()
        self.crossed += (t @ x.mT).double()
        self.x += x.double().sum(-1)
        self.t += t.double().sum(-1)
        self.count += x.shape[-1]

    def joined(self, other: _Sums) -> _Sums:
        """Those of both."""
        found = _Sums(self.first_x, self.first_t)
        for name in ("inputs", "crossed", "x", "t", "count"):
            setattr(found, name, getattr(self, name) + getattr(other, name))
        return found

    def moments(self, images: int, centred: bool) -> Moments:
        """The averages, in the memory of the sums, which are used up: matrices of wide layers are large."""
        mean_x, mean_t, first_x = self.x / self.count, self.t / self.count, self.first_x
        inputs, crossed = self.inputs.div_(self.count), self.crossed.div_(self.count)
        if centred:
            inputs -= mean_x[:, :, None] * mean_x[:, None, :]
            crossed -= mean_t[:, :, None] * mean_x[:, None, :]
        else:  # the mean of (t + b)(x + a)ᵀ from that of t·xᵀ
            whole = (mean_x + first_x)[:, None, :]
            inputs += (mean_x[:, :, None] * first_x[:, None, :]).add_(first_x[:, :, None] * whole)
            crossed += (mean_t[:, :, None] * first_x[:, None, :]).add_(self.first_t[:, :, None] * whole)
        return Moments(inputs, crossed, mean_x + first_x, mean_t + self.first_t, self.count, images)


def moments_of(
    layer: Layer, matrices: Matrices, generator: torch.Generator, *, positions: int = POSITIONS
) -> Moments | None:
    """The moments of ``layer``, whose targets make up for what a shortcut lacks; None where no batch has a position.

    Sums are taken of float32 numbers less the mean of the first batch, and added up in float64.
    """
    sums: tuple[_Sums, _Sums] | None = None
    images = 0
    for x, target, share in positions_of(layer, matrices, generator, positions):
        if sums is None:
            first = x.double().mean(-1), target.double().mean(-1)
            sums = _Sums(*first), _Sums(*first)
        x, target = x - sums[0].first_x.to(x.dtype)[..., None], target - sums[0].first_t.to(x.dtype)[..., None]
        most = x.shape[-1] - x.shape[-1] // _HELD_OUT
        sums[0].add(x[..., :most], target[..., :most])
        if most < x.shape[-1]:
            sums[1].add(x[..., most:], target[..., most:])
        images += share
    if sums is None:
        return None
    centred = layer.bias is not None
    found = sums[0].joined(sums[1]).moments(images, centred)
    if not sums[1].count:
        return found
    return replace(found, halves=(sums[0].moments(images, centred), sums[1].moments(images, centred)))


def positions_of(
    layer: Layer, matrices: Matrices, generator: torch.Generator, positions: int
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Inputs ``(G, K, P)`` and targets ``(G, R, P)`` at a sample of positions, part by part, and how many new images."""
    width = layer.weight.numel() // matrices.rows(layer.weight).shape[1]
    for sample in layer.samples():
        x, target = sample.quantized_input.float(), sample.target.float()
        if sample.lacking is not None:
            target = target + sample.lacking.float()
        if not x.numel() or not target.numel():
            continue
        alone = x.ndim == 1 or (not matrices.channels_last and x.ndim < len(matrices.shape))
        images = 1 if alone else x.shape[0]
        target = matrices.per_position(target)
        at = torch.arange(target.shape[-1])
        each = -(-positions * images // target.shape[0])
        if each < len(at):
            at = torch.randperm(len(at), generator=generator)[:each].sort().values
        at = at.to(x.device)
        several = max(1, _AT_ONCE // (width * len(at)))
        pieces = (x,) if alone or matrices.channels_last else x.split(several)
        for piece, part in zip(pieces, target[..., at].split(several), strict=True):
            columns = matrices.columns(piece, at)
            yield _joined(columns), _joined(part), images
            images = 0


def _joined(each: Tensor) -> Tensor:
    """``(N, G, C, P)`` as ``(G, C, N·P)``."""
    return each.movedim(0, -2).flatten(-2)
