"""Winograd's convolutions in whole numbers: whether they are exact, their steps, what they read (source/winograd.h).

Windows of 3 x 3 with stride 1 give 2 x 2 or 4 x 4 pixels of the result at a time, with 2.25 or 4 times fewer products. What
is multiplied fits into words of 16 bits, always. Sums of 32 bits wrap, and leave a result exact that has at most 30 bits
(2 x 2: sums are 4 times the result) or 26 (4 x 4: 576 = 2^6 · 9 times, and 9 has an inverse modulo 2^32). What weights
of each channel can reach with bytes proves it, or the layer is computed directly.
Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.kernels.native.layout import Image
from fxquant.kernels.native.library import KINDS, Library, Step, TensorView
from fxquant.kernels.native.operations import Operation
from fxquant.kernels.native.weighted import Weighted
from fxquant.kernels.native.weights import words_weight
from fxquant.kernels.native.winograd_rules import DIRECT, RULES, forced, tiles_of

__all__ = ["Winograd", "WinogradInput", "is_exact", "steps_of", "transformed"]

_TRANSFORMS = {
    2: [[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]],
    4: [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 12]],
}
"""Of weights, by the pixels of a tile: the paper's G twice, and 24 times but for its last row, which is taken 12 times."""
_BITS = {2: 29, 4: 25}
"""A result y is exact where -2^bits <= y < 2^bits."""


_CHUNK = 24
"""Tiles that share what is read of weights, about: as many as leave a thread's words and sums in its second cache."""
_FEW = 16
"""With fewer tiles for each thread, threads share the transformed pixels and each has channels of its own."""
_SHARE = 12
"""Tiles by 64 channels that each thread should have at least; more threads than that were never measured."""


def is_exact(layer: Weighted, tile: int) -> bool:
    """Whether a layer may be computed by these tiles: of 3 x 3, stride 1, and its sums have few enough bits."""
    return layer.window is not None and layer.reach < 2 ** _BITS[tile]


def tile_of(layer: Weighted, y: Sequence[int], threads: int) -> int:
    """The pixels of a tile for a result of ``(n, h, w, c)``, or ``DIRECT``."""
    if (asked := forced()) is not None:
        return asked if asked != DIRECT and is_exact(layer, asked) else DIRECT
    n, h, w, channels = y
    for rule in RULES.get(layer.library.name, ()):
        if rule.holds(layer.depth, y) and is_exact(layer, rule.tile):
            enough = tiles_of(rule.tile, n, h, w) * _columns(channels) >= _SHARE * threads
            return rule.tile if enough else DIRECT
    return DIRECT


def transformed(weight: Tensor, tile: int, library: Library) -> Tensor:
    """Weights ``(channels, depth, 3, 3)`` in the transformed positions, as the kernels read them."""
    way = torch.tensor(_TRANSFORMS[tile], dtype=torch.float64)
    # In float64 every number is whole and exact.
    positions = weight.flatten(2).double() @ torch.kron(way, way).t()
    return words_weight(positions.to(torch.int16).transpose(1, 2), library)


def steps_of(layer: Weighted, images: Sequence[Image]) -> tuple[list[Operation], int]:
    """What computes a layer with these operands and result, and the bytes of scratch memory that it needs."""
    n, h, w, _ = images[-1].sizes
    threads = torch.get_num_threads()
    tile = tile_of(layer, images[-1].sizes, threads)
    if tile == DIRECT:
        return [layer], 0
    tiles, columns = tiles_of(tile, n, h, w), _columns(layer.channels)
    apart = threads > 1 and tiles < _FEW * threads
    chunk = _chunk(tiles, columns, threads) if apart else _chunk(tiles, 1, threads)
    positions, row = (tile + 2) ** 2, -(-layer.depth // 32) * 64
    words, sums = (positions * (count * size + 64) for count, size in ((tiles if apart else chunk, row), (chunk, 256)))
    slot = sums if apart else words + sums
    operation = Winograd(layer.operands, layer, tile, chunk, apart, slot)
    steps: list[Operation] = [WinogradInput([layer.operands[0]], operation)] if apart else []
    return [*steps, operation], slot * threads + words * apart


def _columns(channels: int) -> int:
    return -(-channels // 64)


def _chunk(tiles: int, columns: int, threads: int) -> int:
    """Tiles of a unit, so that units are of about one size and as many for each thread, columns of channels being apart."""
    chunks = max(1, round(tiles / _CHUNK))
    while chunks * columns % threads and chunks < tiles:
        chunks += 1
    return -(-tiles // chunks)


@dataclass(eq=False)
class Winograd(Operation):
    """A layer by tiles.

    Attributes:
        layer: what to compute.
        tile: pixels of a tile in each direction.
        chunk: tiles of a unit, at most.
        apart: whether a step before transforms the pixels.
        slot: bytes of scratch memory of a thread.
    """

    layer: Weighted
    tile: int
    chunk: int
    apart: bool
    slot: int

    @property
    def writes_floats(self) -> bool:
        return self.layer.to_float

    @property
    def weight(self) -> Tensor:
        """The transformed weights, made when they are first asked for and kept."""
        kept = self.layer.transformed
        if self.tile not in kept:
            assert self.layer.window is not None
            kept[self.tile] = transformed(self.layer.window, self.tile, self.layer.library)
        return kept[self.tile]

    def fill(self, step: Step, views: Sequence[TensorView]) -> Any:
        weight = self.weight
        self.fill_geometry(step)
        step.kind, step.outer, step.blocks = KINDS["winograd"], int(self.apart), -(-self.layer.channels // 16)
        step.weight, step.bias, step.slot = weight.data_ptr(), self.layer.bias.data_ptr(), self.slot
        chunks = -(-tiles_of(self.tile, step.y.n, step.y.h, step.y.w) // self.chunk)
        step.units = chunks * (_columns(self.layer.channels) if self.apart else 1)
        self.layer.fill_end(step)
        return weight

    def fill_geometry(self, step: Step) -> None:
        """Write where pixels are read."""
        step.window.padding[:] = self.layer.geometry.padding
        step.taps, step.depth, step.border = (self.tile + 2) ** 2, self.layer.depth, self.layer.border.data_ptr()


@dataclass(eq=False)
class WinogradInput(Operation):
    """The pixels of a layer, transformed."""

    layer: Winograd

    def fill(self, step: Step, views: Sequence[TensorView]) -> None:
        self.layer.fill_geometry(step)
        step.kind = KINDS["winograd input"]
        tiles = tiles_of(self.layer.tile, step.y.n, step.y.h, step.y.w)
        step.units = min(tiles, 32)
