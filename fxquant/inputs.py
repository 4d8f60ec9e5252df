"""Inputs of a model: what one call takes, what a batch of a loader gives it, and a description that can be saved."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxquant.errors import InputError

__all__ = ["arguments_of", "describe_inputs", "make_inputs", "move_to"]


def _input_names(model: nn.Module) -> tuple[list[str], list[str], int | None]:
    """The names of a call's arguments, those that every call gives, and how many of the latter may come by position.

    The parts of ``*args`` have no names; None where any number of them is taken.
    """
    spec = _spec(model)
    if spec is not None:
        return _captured_names(spec)
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p.name for p in named if p.default is p.empty]
    is_open = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return [p.name for p in named], needed, None if is_open else len(needed)


def _takes_any_names(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return _spec(model) is None and any(p.kind is p.VAR_KEYWORD for p in parameters)


def _captured_names(spec: Any) -> tuple[list[str], list[str], int]:
    names: list[str] = []
    needed: list[str] = []
    count = 0
    for name, kind, _ in spec.parameters:
        tree = spec.trees.get(name, ("constant", None))
        inside = [key for key, _ in tree[2]] if tree[0] in ("items", "dict") else []
        if kind is inspect.Parameter.VAR_POSITIONAL:
            count += len(inside)
            continue
        own = inside if kind is inspect.Parameter.VAR_KEYWORD else [name]
        names += own
        if name in spec.given:
            needed += own
            count += len(own)
    return names, needed, count


def _spec(model: nn.Module) -> Any:
    """How a captured graph is called; None for any other module."""
    return getattr(model, "meta", {}).get("call")


def arguments_of(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a batch gives to the model: its leading parts, as many as the model has inputs.

    A dict that has all of the model's inputs among its keys is taken by name; any other dict is one input.

    Raises:
        InputError: the batch has fewer parts than the model has inputs.
    """
    names, needed, count = _input_names(model)
    if isinstance(batch, Mapping):
        if names and set(needed) <= set(batch) and (needed or set(batch) & set(names)):
            taken = needed if _spec(model) is not None else [name for name in names if name in batch]
            return (), {name: batch[name] for name in taken}
        if not names and _takes_any_names(model):
            return (), dict(batch)
        return (batch,), {}
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}
    if len(batch) < (len(needed) if count is None else count):
        named = f" ({', '.join(needed)})" if needed else ""
        raise InputError(f"a batch has {len(batch)} parts, and the model takes {count or len(needed)} inputs{named}.")
    return tuple(batch if count is None else batch[: max(count, 1)]), {}


def move_to(model: nn.Module, batch: Any) -> Any:
    """``batch`` with its tensors on the device of the model's parameters."""
    tensors = [*model.parameters(), *model.buffers()]
    if not tensors:
        return batch
    return _map(batch, lambda t: t.to(tensors[0].device, non_blocking=True))


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: _map(v, function) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_map(v, function) for v in value) if not hasattr(value, "_fields") else value
    return value


def describe_inputs(call: Any) -> Any:
    """The arguments of a call as plain data: tensors as ``{"shape": …, "dtype": …}``; None where it holds something else."""
    if call is None:
        return None
    try:
        return _describe(call.kwargs) if call.kwargs else [_describe(value) for value in call.args]
    except TypeError:
        return None


def _describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"dict": {str(k): _describe(v) for k, v in value.items()}}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return {type(value).__name__: [_describe(v) for v in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(type(value).__name__)


def make_inputs(description: Any, device: torch.device) -> Any:
    """Zeros of the described shapes and dtypes: enough to capture a model again."""
    if description is None:
        return None
    return _make(description, device) if isinstance(description, dict) else tuple(_make(v, device) for v in description)


def _make(value: dict[str, Any], device: torch.device) -> Any:
    if "shape" in value:
        return torch.zeros(value["shape"], dtype=getattr(torch, value["dtype"]), device=device)
    if "dict" in value:
        return {k: _make(v, device) for k, v in value["dict"].items()}
    if "value" in value:
        return value["value"]
    ((kind, items),) = value.items()
    made = [_make(v, device) for v in items]
    return tuple(made) if kind == "tuple" else made
