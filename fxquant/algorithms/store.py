"""The values of a graph's nodes, one for each batch, in memory up to a limit and in a temporary folder beyond it."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map_only

__all__ = ["Store"]


class Store:
    """Keeps ``value[node, batch]`` until the node is dropped.

    Args:
        memory: bytes of tensors that may be held in memory; what comes later is mapped from files, which the system reads
            and writes as it sees fit.
    """

    def __init__(self, memory: float) -> None:
        self.memory, self.held = memory, 0
        self._values: dict[fx.Node, dict[int, Any]] = {}
        self._constants: dict[fx.Node, Any] = {}
        self._files: dict[fx.Node, list[Path]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._values.clear()
        self._files.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._values or node in self._constants

    def get(self, node: fx.Node, batch: int) -> Any:
        """The value of ``node`` in ``batch``."""
        return self._constants[node] if node in self._constants else self._values[node][batch]

    def put_constant(self, node: fx.Node, value: Any) -> None:
        """Keep what ``node`` is in every batch, such as a parameter; it takes no memory of its own."""
        self._constants[node] = value

    def put(self, node: fx.Node, batch: int, value: Any) -> None:
        """Keep ``value``; its tensors may be replaced by copies that lie in files."""
        size = _size(value)
        if self.held + size > self.memory:
            value = tree_map_only(Tensor, lambda tensor: self._on_disk(node, tensor), value)
        else:
            self.held += size
        self._values.setdefault(node, {})[batch] = value

    def drop(self, node: fx.Node) -> None:
        """Forget ``node``."""
        for value in self._values.pop(node, {}).values():
            self.held -= 0 if node in self._files else _size(value)
        for path in self._files.pop(node, ()):
            path.unlink(missing_ok=True)
        self.held = max(self.held, 0)

    def _on_disk(self, node: fx.Node, tensor: Tensor) -> Tensor:
        if not tensor.numel() or tensor.device.type != "cpu":
            return tensor
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="fxquant-", ignore_cleanup_errors=True)
        path = Path(self._folder.name) / str(self._count)
        self._count += 1
        mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        self._files.setdefault(node, []).append(path)
        return mapped.reshape(tensor.shape).copy_(tensor)


def _size(value: Any) -> int:
    tensors = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors)
