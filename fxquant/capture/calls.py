"""One call of a module: the arguments that an example stands for, and the signature that they fit."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Call", "as_call", "signature_of"]


@dataclass(frozen=True)
class Call:
    """The arguments of a call, the module whose forward made it, and that module's method it was made in, if any."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    caller: nn.Module | None = None
    method: str | None = None


def as_call(model: nn.Module, example_inputs: Any) -> Call:
    """The call of ``model`` that ``example_inputs`` stands for.

    A tuple or list holds positional arguments; a dict whose keys fit the user's forward holds keyword arguments; anything
    else is the only argument.
    """
    if isinstance(example_inputs, (tuple, list)) and not hasattr(example_inputs, "_fields"):
        return Call(tuple(example_inputs), {})
    if isinstance(example_inputs, Mapping) and not hasattr(example_inputs, "__dataclass_fields__"):
        try:
            signature_of(model).bind(**example_inputs)
            return Call((), dict(example_inputs))
        except TypeError:
            pass
    return Call((example_inputs,), {})


def signature_of(model: nn.Module) -> inspect.Signature:
    """The signature of the user's forward, which a captured graph is called by too; the graph's own takes flat inputs."""
    spec = getattr(model, "meta", {}).get("call")
    if spec is None:
        return inspect.signature(model.forward)
    return inspect.Signature([inspect.Parameter(n, k, default=d) for n, k, d in spec.parameters])
