"""Following writes in place while a model is traced.

Fake tensors share storages as real ones do, and count writes in their versions. After a write, memory may only be read
under a name of the tensor it was written by, or one made since: then ``canonicalize`` can write out of place and change
nothing. Names of one tensor are its node and the writes into it, which return it.

Where a view needs a fitting layout and there is none, what would give a view copies. Layouts of results are those of torch's
formulas for fake tensors, which its kernels do not always keep (a batch norm of a transposed tensor): whether a write into
such a copy shows in its source is not known, and the source may not be read any more.

What depends on data has no fake tensor: there an op is known to write by its spelling, and views by theirs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from fxquant.capture.proxies import ValueProxy
from fxquant.capture.values import UNKNOWN, versions
from fxquant.errors import Refusal

__all__ = ["Memory", "shares_memory"]

Names = dict[Any, set[fx.Node]]
"""By storage; by the node that first gave a tensor, where its storage is not known."""

_WRITERS = {"setitem", *(n for n in vars(operator) if n[0] == "i" and f"__{n[1:]}__" in vars(operator))}
"""``setitem``, and the operators in place by their names in ``operator``: ``iadd``, ``imul`` …"""


def overwrites(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether ``node``, a call of ``module`` where that is not None, writes into its first argument, by its spelling."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.kwargs.get("inplace") is True:
        return True
    name = _spelling(node)
    return name.strip("_") in _WRITERS or (name.endswith("_") and not name.endswith("__"))


def _spelling(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", "")


class Memory:
    """Which nodes may read memory that was written in place, by storage."""

    def __init__(self) -> None:
        self._names: Names = {}
        self._tensors: dict[fx.Node, fx.Node] = {}
        """For a write in place the node that first gave the tensor written into."""
        self._attributes: set[int] = set()
        self._inputs: set[int] = set()
        self._kept: list[torch.Tensor] = []
        self._copied: dict[int, int] = {}
        """By the storage of what may be a copy or a view that of its source."""
        self._bases: dict[fx.Node, fx.Node] = {}
        """For a node whose value is not known the first one whose memory it may share."""

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
            Refusal: it wrote into something else than its first argument.
        """
        if not written:
            return
        if target is None or any(_storage(tensor) != _storage(target) for tensor in written):
            raise Refusal(f"{node.target} writes into one of its arguments", "return the result instead")
        key = self._key(target)
        self._name_anew(key, node)
        node.meta["writes"] = "attribute" if key in self._attributes else "input" if key in self._inputs else "value"
        source = self._copied.get(key)
        while source is not None:
            self._names[source] = set()
            source = self._copied.get(source)

    def note_copy(self, node: fx.Node, module: nn.Module | None, source: Any, value: Any) -> None:
        """``node`` has made ``value`` of ``source``: remember it where a real layout may make a view of it."""
        if not isinstance(source, torch.Tensor) or not isinstance(value, torch.Tensor) or source.dtype != value.dtype:
            return
        key, own = self._key(source), self._key(value)
        if key == own or key in self._inputs or key in self._attributes:
            return
        if isinstance(module, _HANDS_ON) if module is not None else _returns_its_own(_spelling(node)):
            self._copied[own] = key

    def _name_anew(self, key: Any, node: fx.Node) -> None:
        """``node`` has just written into its first argument: the names of that tensor are all that may be read."""
        first = self._first(node.all_input_nodes[0])
        self._tensors[node] = first
        self._names[key] = {first, *(other for other, own in self._tensors.items() if own is first)}

    def note_unseen(self, node: fx.Node, module: nn.Module | None, operand: Any) -> Any:
        """``node`` reads what is not known, and gives it; ``operand`` is the value of its first argument, or UNKNOWN.

        Returns:
            What it gives, where that is known: the tensor that it wrote into.
        """
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return UNKNOWN
        if overwrites(node, module):
            if isinstance(operand, torch.Tensor):
                self.note_writes(node, operand, [operand])
                return operand
            base = self._bases.setdefault(node, self._bases.get(source, source))
            self._name_anew(base, node)
            node.meta["writes"] = "value"
        elif operand is UNKNOWN and _may_be_view(node, source, module):
            base = self._bases.setdefault(node, self._bases.get(source, source))
            if source in self._names.get(base, ()):
                self._names[base].add(node)
        return UNKNOWN

    @contextmanager
    def assigned_back(self, target: Any) -> Iterator[None]:
        """Inside, what was written through ``x[k]`` is assigned to ``x[k]``: names that were right remain so."""
        key = self._key(target)
        names = set(self._names.get(key, ()))
        yield
        self._names.setdefault(key, set()).update(names)

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
            is_known = isinstance(value, torch.Tensor)
            key = _storage(value) if is_known else self._bases.get(proxy.node, proxy.node)
            names = self._names.get(key)
            if names is None or proxy.node in names:
                continue
            if target is operator.setitem and proxy is proxies[0] and self._is_written_back(args, names):
                continue
            raise Refusal(
                f"{proxy.node.name} is read after its memory was written in place under another name",
                "write out of place, as y = f(x) instead of an in-place call",
            )

    def _first(self, node: fx.Node) -> fx.Node:
        return self._tensors.get(node, node)

    def _is_written_back(self, args: Any, names: set[fx.Node]) -> bool:
        """``y[k] += v``: what was written through ``y[k]`` is written into ``y``, at the same place."""
        base, key, value = args
        if not issubclass(type(value), ValueProxy) or value.node not in names:
            return False
        part = self._first(value.node)
        whole = part.args[0] if part.target is operator.getitem else None
        return (
            isinstance(whole, fx.Node)
            and self._first(whole) is self._first(base.node)
            and repr(part.args[1]) == repr(map_aggregate(key, _node_of))
        )


_HANDS_ON = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
"""Modules that give their input itself or a view of it; dropout does so in eval mode."""


def _may_be_view(node: fx.Node, source: fx.Node, module: nn.Module | None) -> bool:
    """Whether ``node`` may share the memory of ``source``: as torch's schemas say, and where there is none.

    Other modules are taken to make new tensors, and parts of what a module returns to be tensors of their own. Schemas say
    nothing of functions that give their input itself where there is nothing to do.
    """
    if isinstance(module, _HANDS_ON) or "dropout" in _spelling(node) or _spelling(node) == "type_as":
        return True
    if node.op == "call_module" or (source.op == "call_module" and node.target is operator.getitem):
        return node.op != "call_module" and not isinstance(node.args[1], (int, str))
    return not hasattr(torch.ops.aten, _spelling(node)) or _returns_its_own(_spelling(node))


def _returns_its_own(name: str) -> bool:
    """Whether torch's schemas say that what ``name`` gives may be memory that it was given; False where there are none."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    returned = [r.alias_info for overload in packet.overloads() for r in getattr(packet, overload)._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def shares_memory(part: Any, whole: torch.Tensor, key: Any, values: dict[fx.Node, Any]) -> bool:
    """Whether ``part``, which ``whole[key]`` gave, is a view of it: indices in lists and tensors, and masks, select copies.

    Args:
        part: its value; anything else than a tensor where that depends on data.
        values: those of nodes in ``key``.
    """
    if isinstance(part, torch.Tensor):
        return _storage(part) == _storage(whole)
    keys = key if isinstance(key, tuple) else (key,)
    given = [values.get(k) if isinstance(k, fx.Node) else k for k in keys]
    return not any(isinstance(k, (list, torch.Tensor)) for k in given)


def _node_of(value: Any) -> Any:
    return value.node if issubclass(type(value), ValueProxy) else value


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
