"""Values without computing: shapes, dtypes and devices of a run on fake tensors, and a run that leaves no trace.

A fake tensor (``torch._subclasses``) has a shape, strides, a dtype and a device, and no memory. What cannot be known
without data (``.item()``, the number of boxes that survive) is `UNKNOWN`, never a guess.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only

__all__ = ["UNKNOWN", "FakeRun", "containers_of", "differs", "unchanged", "versions"]


class _Unknown:
    def __repr__(self) -> str:
        return "UNKNOWN"


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
def unchanged(model: nn.Module, *, data: bool = True) -> Iterator[None]:
    """Inside, ``model`` may run; afterwards every module's attributes, mode and buffers are what they were.

    Args:
        model: the module; its submodules are included.
        data: put the numbers in buffers back too; not needed where only fake tensors flow.
    """
    before = [(part, *_state(part)) for part in model.modules()]
    numbers = {buffer: buffer.clone() for buffer in model.buffers()} if data else {}
    try:
        yield
    finally:
        for part, attributes, registries, containers in before:
            part.__dict__.clear()
            part.__dict__.update(attributes)
            for name, entries in registries.items():
                registry = part.__dict__[name]
                registry.clear()
                registry.update(entries)
            for container, items in containers:
                _refill(container, items)
        with torch.no_grad():
            for buffer, old in numbers.items():
                if not torch.equal(buffer, old) or buffer.is_meta:
                    buffer.copy_(old)


def _state(part: nn.Module) -> tuple[dict[str, Any], dict[str, Any], list[tuple[Any, Any]]]:
    attributes = dict(part.__dict__)
    registries = {name: dict(attributes[name]) for name in ("_parameters", "_buffers", "_modules")}
    return attributes, registries, containers_of(part)


def containers_of(part: nn.Module) -> list[tuple[Any, Any]]:
    """The lists and dicts among a module's own attributes, each with a copy of what it holds."""
    return [
        (value, value.copy())
        for name, value in part.__dict__.items()
        if type(value) in (list, dict) and not name.startswith("_")
    ]


def differs(container: Any, items: Any) -> bool:
    """Whether a list or dict no longer holds the very objects it did."""
    if len(container) != len(items):
        return True
    pairs = zip(container.items(), items.items(), strict=True) if isinstance(items, dict) else None
    if pairs is not None:
        return any(a[0] != b[0] or a[1] is not b[1] for a, b in pairs)
    return any(a is not b for a, b in zip(container, items, strict=True))


def _refill(container: Any, items: Any) -> None:
    if not differs(container, items):
        return
    container.clear()
    container.update(items) if isinstance(items, dict) else container.extend(items)
