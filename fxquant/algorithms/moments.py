"""Second moments of a layer's quantized inputs and its float targets, over a sample of its output positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.algorithms.columns import Matrices
from fxquant.algorithms.engine import Layer

__all__ = ["Moments", "moments_of", "positions_of"]

POSITIONS = 96
"""Output positions of an image that are looked at, on average: neighbours say much the same."""
_AT_ONCE = 1 << 24
"""Numbers of the inputs' matrix that are made at a time."""


@dataclass(frozen=True)
class Moments:
    """Averages over output positions, float64; G groups, R rows and K columns of the weight.

    Attributes:
        inputs: ``(G, K, K)``, the mean of x·xᵀ; of x less its mean where the op has a bias.
        crossed: ``(G, R, K)``, the mean of t·xᵀ, likewise.
        input_mean, target_mean: ``(G, K)`` and ``(G, R)``.
        count: of positions.
        images: of samples of the batches.
    """

    inputs: Tensor
    crossed: Tensor
    input_mean: Tensor
    target_mean: Tensor
    count: int
    images: int


def moments_of(
    layer: Layer, matrices: Matrices, generator: torch.Generator, *, positions: int = POSITIONS
) -> Moments | None:
    """The moments of ``layer``, whose targets make up for what a shortcut lacks; None where no batch has a position.

    Sums are taken of float32 numbers less the mean of the first batch, and added up in float64.
    """
    groups, rows, width = matrices.rows(layer.weight).shape
    zero = torch.zeros((), dtype=torch.float64, device=layer.weight.device)
    inputs, crossed = zero.new_zeros(groups, width, width), zero.new_zeros(groups, rows, width)
    first_x, first_t = zero.new_zeros(groups, width), zero.new_zeros(groups, rows)
    sum_x, sum_t, count, images = torch.zeros_like(first_x), torch.zeros_like(first_t), 0, 0
    for x, target, share in positions_of(layer, matrices, generator, positions):
        if not count:
            first_x, first_t = x.double().mean(-1), target.double().mean(-1)
        x, target = x - first_x.to(x.dtype)[..., None], target - first_t.to(x.dtype)[..., None]
        inputs += (x @ x.mT).double()
        crossed += (target @ x.mT).double()
        sum_x += x.double().sum(-1)
        sum_t += target.double().sum(-1)
        count, images = count + x.shape[-1], images + share
    if not count:
        return None
    mean_x, mean_t = sum_x / count, sum_t / count
    inputs, crossed = inputs / count, crossed / count
    if layer.bias is not None:
        inputs -= mean_x[:, :, None] * mean_x[:, None, :]
        crossed -= mean_t[:, :, None] * mean_x[:, None, :]
    else:  # the mean of (t + b)(x + a)ᵀ from that of t·xᵀ
        inputs += mean_x[:, :, None] * first_x[:, None, :] + first_x[:, :, None] * (mean_x + first_x)[:, None, :]
        crossed += mean_t[:, :, None] * first_x[:, None, :] + first_t[:, :, None] * (mean_x + first_x)[:, None, :]
    return Moments(inputs, crossed, mean_x + first_x, mean_t + first_t, count, images)


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
