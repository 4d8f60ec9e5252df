"""What a node gives on fake tensors while a model is traced: its arguments, and modules run for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from fxquant.capture.values import UNKNOWN, differs, unchanged

__all__ = ["contains_unknown", "in_eval_mode", "run_as_it_is", "value_of"]


def value_of(arg: Any, values: dict[fx.Node, Any]) -> Any:
    """A node's argument with nodes replaced by their values, in plain containers."""
    if isinstance(arg, fx.Node):
        return values.get(arg, UNKNOWN)
    if isinstance(arg, slice):
        return slice(*(value_of(part, values) for part in (arg.start, arg.stop, arg.step)))
    if isinstance(arg, tuple):
        items = [value_of(item, values) for item in arg]
        return type(arg)(*items) if hasattr(arg, "_fields") else tuple(items)
    if isinstance(arg, list):
        return [value_of(item, values) for item in arg]
    if isinstance(arg, dict):
        return {key: value_of(item, values) for key, item in arg.items()}
    return arg


def contains_unknown(value: Any) -> bool:
    """Whether some part of ``value`` is not known."""
    if isinstance(value, (list, tuple)):
        return any(contains_unknown(item) for item in value)
    if isinstance(value, dict):
        return any(contains_unknown(item) for item in value.values())
    if isinstance(value, slice):
        return any(part is UNKNOWN for part in (value.start, value.stop, value.step))
    return value is UNKNOWN


def in_eval_mode(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a layer gives in eval mode: of the same shape, and without statistics being taken."""
    before, module.training = module.training, False
    try:
        return module.forward(*args, **kwargs)
    finally:
        module.training = before


def run_as_it_is(module: nn.Module, changed: dict[nn.Module, list[Any]], *args: Any, **kwargs: Any) -> Any:
    """Run a module's own code; the paths of the lists and dicts it is given and changes are put into ``changed``."""
    before = list(containers_in((args, kwargs)))
    try:
        with unchanged(module):
            for part in module.modules():
                part.__dict__["training"] = int(part.training) != 0
            return module.forward(*args, **kwargs)
    finally:
        changed[module] = [path for path, container, items in before if differs(container, items)]


def containers_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Every list and dict inside ``value`` by its path, with a copy of what it holds."""
    if type(value) in (list, dict):
        yield path, value, value.copy()
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from containers_in(item, (*path, i))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from containers_in(item, (*path, key))
