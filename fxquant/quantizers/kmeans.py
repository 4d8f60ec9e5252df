"""Weights from a codebook of 2^b numbers, shared by the layer: k-means, then the numbers themselves are trained.

    C = argmin Σ_k Σ_{w in cluster k} (w - C_k)²,   ŵ = C_k for w in cluster k,   ∂L/∂C_k = Σ_{w in cluster k} ∂L/∂ŵ

Centroids begin evenly between the least and the largest weight, which keeps some among the few large weights, and Lloyd's
iteration runs until nothing changes, when the weight is first seen. Clusters stay what they are from then on: the weight has
no gradient, and an optimizer leaves it alone (``DistributedDataParallel`` wants ``find_unused_parameters=True``). The
numbers are no multiples of one scale, so that no integer kernel computes with them: this rule is simulated.
Source: Han et al., Deep Compression, 1510.00149, §3, eq. 2 and 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import Refusal
from fxquant.numerics.affine import smallest_scale
from fxquant.numerics.scheme import Scheme
from fxquant.quantizers.learned import LearnedWeight
from fxquant.quantizers.registry import register

__all__ = ["KMeansWeight"]

_MOST_ROUNDS = 300


class KMeansWeight(LearnedWeight):
    """The quantizer of a weight.

    Parameters:
        step: the codebook, float32, ``(2**bits,)``.

    Buffers:
        centers: where k-means has put it, ascending; a weight belongs to the nearest of them.
    """

    centers: Tensor
    keeps_bits = "its codebook has as many numbers as it was made with"

    def make_grid(self, shape: tuple[int, ...]) -> None:
        super().make_grid(())
        self.step = nn.Parameter(torch.zeros(2**self.scheme.bits))
        self.register_buffer("centers", torch.zeros(2**self.scheme.bits))

    @torch.no_grad()
    def _scale(self) -> Tensor:
        largest = (self.step / self._share()).abs().amax() / self.scheme.qmax
        return torch.where(self.known > 0, largest.clamp(min=smallest_scale()), torch.zeros_like(largest))

    scale: Any = property(_scale)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.enabled and not self._ready:
            self.refresh(x)
        if not self.active:
            return x
        book = self.step / self._share()
        return book[_clusters(x.detach().float(), self.centers / self._share())].to(x.dtype)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Find the clusters of ``weight``, unless there are some already."""
        if not self.ready:
            self.fit(weight)

    @torch.no_grad()
    def fit(self, weight: Tensor, importance: Tensor | None = None) -> None:
        """Find the clusters of ``weight`` anew, and put the codebook at their centers.

        Args:
            weight: any shape.
            importance: of the same shape, not negative: h of each number in Σ h·(w - C)², which is then made least from
                the centers of the plain sum on; see ``training.weigh_codebooks``.
        """
        x = weight.detach().flatten().double()
        centers = _lloyd(x, _even(x, 2**self.scheme.bits), torch.ones_like(x))
        if importance is not None:
            centers = _lloyd(x, centers, importance.detach().flatten().double())
        self.centers.copy_(centers)
        self.step.copy_(self.centers)
        self.known.fill_(1.0)
        self._ready = True


def _clusters(x: Tensor, centers: Tensor) -> Tensor:
    """The nearest center of each number, of ascending ones."""
    return torch.bucketize(x, (centers[1:] + centers[:-1]) / 2)


def _even(x: Tensor, count: int) -> Tensor:
    low, high = x.aminmax()
    return low + (high - low) * torch.linspace(0, 1, count, dtype=x.dtype, device=x.device)


def _lloyd(x: Tensor, centers: Tensor, share: Tensor) -> Tensor:
    """The centers of clusters, ascending, that Lloyd's iteration over numbers of these shares finds from ``centers`` on.

    A cluster that loses all its numbers, or whose numbers count for nothing, stays where it was.
    """
    for _ in range(_MOST_ROUNDS):
        of = _clusters(x, centers)
        total = torch.zeros_like(centers).index_add_(0, of, x * share)
        shares = torch.zeros_like(centers).index_add_(0, of, share)
        counts = shares > 0
        moved = torch.where(counts, total / torch.where(counts, shares, 1.0), centers).sort().values
        if torch.equal(moved, centers):
            break
        centers = moved
    return centers


def _refuses(scheme: Scheme, kind: str) -> Refusal | None:
    if scheme.bits > 8:
        return Refusal("its codebook has 256 numbers at most: set bits to 8 or fewer")
    return Refusal("its codebook is the layer's: set per_channel=False") if scheme.per_channel else None


register(
    "kmeans",
    weight=KMeansWeight,
    refuses=_refuses,
    simulates=Refusal("its numbers are no multiples of one scale"),
)
