"""Values without computing: shapes, dtypes and devices of a run on fake tensors, and a run that leaves no trace.

A fake tensor (``torch._subclasses``) has a shape, strides, a dtype and a device, and no memory. What cannot be known
without data (``.item()``, the number of boxes that survive) is `UNKNOWN`, never a guess.
"""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only

__all__ = ["UNKNOWN", "FakeRun", "containers_of", "differs", "put_back", "refill", "unchanged", "versions"]


class _Unknown:
    def __repr__(self) -> str:
        return "UNKNOWN"


_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque)
_REGISTRIES = frozenset(nn.Module().__dict__)
"""What torch itself keeps on every module."""

UNKNOWN: Any = _Unknown()
"""The value of what depends on data, or on something that does."""


class FakeRun:
    """Runs functions on fake tensors. Parameters and other real tensors may be mixed in; they are never written."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def of(self, tree: Any) -> Any:
        """``tree`` with every tensor replaced by a fake one."""
        return tree_map_only(torch.Tensor, self._mode.from_tensor, tree)

    def __call__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What ``function`` gives; raises what it raises, and torch's errors for values that depend on data."""
        with warnings.catch_warnings(), self._mode, torch.no_grad(), _quiet():
            return function(*args, **kwargs)

    def resized(self, tree: Any, change: Callable[[torch.Size], tuple[int, ...]]) -> Any:
        """``tree`` with its tensors given other sizes."""
        with self._mode:
            return tree_map_only(
                torch.Tensor, lambda t: torch.empty(change(t.shape), dtype=t.dtype, device=t.device), tree
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Failures are answers here: torch need not log them."""
    warnings.simplefilter("ignore")
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def versions(tree: Any) -> list[tuple[torch.Tensor, int]]:
    """Every tensor of ``tree`` with its version, which counts the writes into its memory."""
    found = []
    for value in tree_flatten(tree)[0]:
        if isinstance(value, torch.Tensor) and not value.is_inference():
            found.append((value, value._version))
    return found


@contextmanager
def unchanged(model: nn.Module, *, data: bool = True, but: type[nn.Module] | tuple[()] = ()) -> Iterator[None]:
    """Inside, ``model`` may run; afterwards every module's attributes, mode, buffers and plain tensors are what they were.

    Args:
        model: the module; its submodules are included.
        data: put the numbers in tensors back too; not needed where only fake tensors flow. Parameters are left out.
        but: a class of modules that keep what has changed in them, their mode aside.
    """
    before = [(part, *_state(part)) for part in model.modules() if not isinstance(part, but)]
    modes = [(part, part.training) for part in model.modules() if isinstance(part, but)]
    numbers = {t: t.detach().clone() for part, *_ in before for t in _tensors_of(part)} if data else {}
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for part, attributes, registries, containers in before:
            part.__dict__.clear()
            part.__dict__.update(attributes)
            for name, entries in registries.items():
                registry = part.__dict__[name]
                registry.clear()
                registry.update(entries)
            put_back(containers)
        with torch.no_grad():
            for tensor, old in numbers.items():
                if tensor.shape != old.shape:
                    tensor.data = old
                elif tensor.is_meta or not torch.equal(tensor, old):
                    tensor.copy_(old)


def _state(part: nn.Module) -> tuple[dict[str, Any], dict[str, Any], list[tuple[Any, Any]]]:
    attributes = dict(part.__dict__)
    registries = {name: dict(attributes[name]) for name in ("_parameters", "_buffers", "_modules")}
    return attributes, registries, containers_of(part)


def containers_of(part: nn.Module) -> list[tuple[Any, Any]]:
    """The lists, dicts, sets and queues among a module's own attributes, each with a copy of what it holds."""
    return [
        (value, value.copy())
        for name, value in part.__dict__.items()
        if type(value) in _CONTAINERS and name not in _REGISTRIES
    ]


def _tensors_of(part: nn.Module) -> Iterator[torch.Tensor]:
    """A module's own buffers, and the tensors in its plain attributes."""
    yield from part.buffers(recurse=False)
    for name, value in part.__dict__.items():
        if name not in _REGISTRIES:
            held = [value] if isinstance(value, torch.Tensor) else tree_flatten(value)[0] if _holds(value) else ()
            yield from (t for t in held if isinstance(t, torch.Tensor) and not isinstance(t, nn.Parameter))


def _holds(value: Any) -> bool:
    return type(value) in (list, tuple, dict, OrderedDict)


def differs(container: Any, items: Any) -> bool:
    """Whether a container no longer holds the very objects it did."""
    if len(container) != len(items):
        return True
    if isinstance(items, dict):
        pairs = zip(container.items(), items.items(), strict=True)
        return any(a[0] != b[0] or a[1] is not b[1] for a, b in pairs)
    if isinstance(items, set):
        return bool(container != items)
    return any(a is not b for a, b in zip(container, items, strict=True))


def put_back(before: Iterable[tuple[Any, Any]]) -> None:
    """Let each container hold the items beside it again."""
    for container, items in before:
        refill(container, items)


def refill(container: Any, items: Any) -> None:
    """Let a container hold ``items`` again."""
    if not differs(container, items):
        return
    container.clear()
    container.update(items) if isinstance(items, (dict, set)) else container.extend(items)
