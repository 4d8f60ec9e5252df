"""For which layers and sizes Winograd's tiles are taken, by instruction set: what was measured, as data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["DIRECT", "RULES", "Rule", "forced", "may_take", "taken", "tiles_of"]

DIRECT = 0
"""No tiles: the convolution as it is defined."""


@dataclass(frozen=True)
class Rule:
    """Sizes for which tiles were faster wherever they were measured.

    Attributes:
        tile: pixels of a tile in each direction.
        depth, channels: of the input and of the result, at least.
        tiles: of all images, at least.
        pairs: of such channels, at most: transformed weights are 8 times as large as weights, or 3.6, and leave the cache.
        waste: pixels that tiles cover, over those that there are, at most.
    """

    tile: int
    depth: int
    channels: int
    tiles: int
    pairs: int
    waste: float

    def holds(self, depth: int, y: Sequence[int]) -> bool:
        """Whether a layer of so many channels with a result of ``(n, h, w, c)`` has such sizes."""
        n, h, w, channels = y
        tiles = tiles_of(self.tile, n, h, w)
        enough = tiles >= self.tiles and tiles * self.tile**2 <= self.waste * n * h * w
        return enough and self.takes(depth, channels)

    def takes(self, depth: int, channels: int) -> bool:
        """Whether it holds for a layer of so many channels at some size."""
        return depth >= self.depth and channels >= self.channels and depth * channels <= self.pairs


RULES: dict[str, tuple[Rule, ...]] = {
    "avx2": (
        Rule(4, depth=16, channels=16, tiles=16, pairs=256 * 256, waste=1.6),
        Rule(4, depth=16, channels=16, tiles=32, pairs=512 * 512, waste=1.6),
        Rule(2, depth=16, channels=16, tiles=49, pairs=256 * 256, waste=1.2),
    ),
    # Products of words run at half the rate of bytes', so less is won, and nothing where weights come from far away.
    "avx512_vnni": (
        Rule(4, depth=96, channels=32, tiles=49, pairs=128 * 192, waste=1.1),
        Rule(4, depth=64, channels=64, tiles=196, pairs=256 * 256, waste=1.1),
    ),
}
"""By instruction set, the first that holds, as benchmarks/winograd.py measures them on one thread with weights beyond the
second cache. A set that is not here was not measured, and computes directly."""


_forced: int | None = None


@contextmanager
def taken(tile: int) -> Iterator[None]:
    """Inside, plans take these tiles, or ``DIRECT``, wherever they are exact: for tests and measurements."""
    global _forced
    before, _forced = _forced, tile
    try:
        yield
    finally:
        _forced = before


def forced() -> int | None:
    """What ``taken`` says; None outside."""
    return _forced


def may_take(name: str, depth: int, channels: int) -> bool:
    """Whether plans for the set ``name`` may take tiles for a layer of so many channels."""
    return _forced is not None or any(rule.takes(depth, channels) for rule in RULES.get(name, ()))


def tiles_of(tile: int, n: int, h: int, w: int) -> int:
    """How many tiles cover the result of n images."""
    return n * -(-h // tile) * -(-w // tile)
