"""What a network of the zoo is: its name, the built case with its inputs, and how it is called."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One network by name: ``kind`` groups the rows of a family, ``ci`` marks the small set."""

    family: str
    kind: str
    model: str
    ci: bool = False


@dataclass
class Case:
    """A network in eval mode with its inputs.

    Attributes:
        model: the network.
        inputs: ``inputs(batch, size)`` makes positional arguments (a tuple) or keyword arguments (a dict).
        size: of the example; an image side, a (frames, side) pair, or a length.
        other_size: a second size to try; the network itself may refuse it.
        targets: ``targets(inputs)`` are the further positional arguments that training needs, if any.
        note: what was built otherwise than by default.
    """

    model: nn.Module
    inputs: Callable[[int, Any], Inputs]
    size: Any
    other_size: Any = None
    targets: Callable[[Inputs], tuple[Any, ...]] | None = None
    note: list[str] = field(default_factory=list)


class TooLargeError(Exception):
    """The network has more parameters than the run allows."""


def call(model: nn.Module, inputs: Inputs, more: tuple[Any, ...] = ()) -> Any:
    """Run ``model`` on keyword or positional ``inputs``."""
    return model(*more, **inputs) if isinstance(inputs, dict) else model(*inputs, *more)


def leaves(value: Any, path: str = "", seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value inside ``value`` (containers, model outputs, caches) with the way there."""
    if isinstance(value, Tensor) or value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        yield path, value
    elif id(value) not in seen:
        seen = seen | {id(value)}
        kind = type(value).__name__
        if hasattr(value, "items"):
            parts = [(str(key), item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set)):
            parts = [(str(index), item) for index, item in enumerate(value)]
        else:
            parts = list(vars(value).items()) if hasattr(value, "__dict__") else []
        yield f"{path}<{kind}>", len(parts)
        for name, item in parts:
            yield from leaves(item, f"{path}.{name}", seen)


def runs(make: Callable[[], nn.Module], inputs: Inputs) -> bool:
    """Whether the network runs on inputs of these shapes, tried without data on the meta device."""
    try:
        with torch.device("meta"), torch.no_grad():
            call(make().eval(), tuple(value.to("meta") for value in inputs))
    except Exception:
        return False
    return True


def refuse_large(make: Callable[[], nn.Module], largest: float) -> None:
    if largest == math.inf:
        return
    with torch.device("meta"):
        size = sum(parameter.numel() * parameter.element_size() for parameter in make().parameters())
    if size > largest:
        raise TooLargeError(f"{size / 2**30:.1f} GiB of parameters")
