"""Paths of modules, told briefly."""

from __future__ import annotations

__all__ = ["elide", "near"]


def elide(path: str, width: int) -> str:
    """A module path in at most ``width`` characters: its last parts, and its first one where two of them fit beside it.

    >>> elide("features.denseblock3.denselayer24.conv2", 30)
    'features…denselayer24.conv2'
    >>> elide("features.denseblock3.denselayer24.conv2", 24)
    '…denselayer24.conv2'
    """
    if len(path) <= width:
        return path
    first, *rest = path.split(".")
    tails = [".".join(rest[start:]) for start in range(1, len(rest))]
    candidates = [f"{first}…{tail}" for tail in tails[:-1]] + [f"…{tail}" for tail in tails]
    for shorter in candidates:
        if len(shorter) <= width:
            return shorter
    return "…" + path[len(path) - max(width - 1, 1) :]


def near(path: str, seen_from: str) -> str:
    """``.conv2`` for what is in the same block as ``seen_from``, the whole path for what is elsewhere.

    >>> near("layer1.0.conv2", seen_from="layer1.0.bn2")
    '.conv2'
    """
    block = seen_from.rpartition(".")[0]
    return path.removeprefix(block) if block and path.rpartition(".")[0] == block else path
