"""Following writes in place while a model is traced.

Fake tensors share storages as real ones do, and count writes in their versions. After a write, memory may only be read
under the name it was written by, or one made since: then ``canonicalize`` can write out of place and change nothing.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fxquant.capture.proxies import UntraceableError, ValueProxy
from fxquant.capture.values import versions

__all__ = ["Memory"]

Names = dict[int, set[fx.Node]]


class Memory:
    """Which nodes may read memory that was written in place, by storage."""

    def __init__(self) -> None:
        self._names: Names = {}
        self._attributes: set[int] = set()
        self._inputs: set[int] = set()
        self._kept: list[torch.Tensor] = []

    def of_input(self, tensor: torch.Tensor) -> None:
        """``tensor`` is what the model is given."""
        self._inputs.add(self._key(tensor))

    def of_attribute(self, tensor: torch.Tensor) -> None:
        """``tensor`` is a parameter or buffer."""
        self._attributes.add(self._key(tensor))

    def state(self) -> Names:
        """What to give to `restore` when a part of the trace is taken back."""
        return {key: set(nodes) for key, nodes in self._names.items()}

    def restore(self, state: Names) -> None:
        """Forget what was written since ``state``."""
        self._names = state

    def _key(self, tensor: torch.Tensor) -> int:
        """Names a storage for as long as the trace lasts: kept, lest its address be given away again."""
        self._kept.append(tensor)
        return _storage(tensor)

    def note_writes(self, node: fx.Node, target: torch.Tensor | None, written: list[torch.Tensor]) -> None:
        """``node``, whose first argument is ``target``, has written into ``written``.

        Raises:
            UntraceableError: it wrote into something else than its first argument.
        """
        if not written:
            return
        if target is None or any(_storage(tensor) != _storage(target) for tensor in written):
            raise UntraceableError(f"{node.target} writes into one of its arguments", "return the result instead")
        key = self._key(target)
        if node.target is operator.setitem and self._names.get(key, set()) & set(node.all_input_nodes[-1:]):
            self._names[key] = set()  # y[k] += v: what was written through y[k] is written into y again
        self._names.setdefault(key, set()).update((node.all_input_nodes[0], node))
        node.meta["writes"] = "attribute" if key in self._attributes else "input" if key in self._inputs else "value"

    def note_names(self, node: fx.Node, value: Any) -> None:
        """``value``, made by ``node`` just now, may share memory that was written before: it sees what was written."""
        if self._names:
            for tensor, _ in versions(value):
                if (names := self._names.get(_storage(tensor))) is not None:
                    names.add(node)

    def refuse_stale(self, target: Any, args: Any, kwargs: Any) -> None:
        """Refuse to read memory under a name that it had before it was written under another."""
        if not self._names:
            return
        proxies = [a for a in tree_leaves((args, kwargs)) if issubclass(type(a), ValueProxy)]
        for proxy in proxies:
            value = proxy.value
            names = self._names.get(_storage(value)) if isinstance(value, torch.Tensor) else None
            if names is None or proxy.node in names:
                continue
            if target is operator.setitem and proxy is proxies[0] and proxies[-1].node in names:
                continue
            raise UntraceableError(
                f"{proxy.node.name} is read after its memory was written in place under another name",
                "write out of place, as y = f(x) instead of an in-place call",
            )


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
