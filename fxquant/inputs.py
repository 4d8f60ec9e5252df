"""Inputs of a model: what one call takes, what a batch of a loader gives it, and a description that can be saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxquant.errors import InputError

__all__ = ["arguments_of", "as_example", "describe_inputs", "make_inputs", "move_to"]


def as_example(example_inputs: Any) -> tuple[Any, ...]:
    """The arguments of one call: a tuple stays, a list becomes one, anything else is the only argument."""
    return tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)


def _input_names(model: nn.Module) -> list[str]:
    if isinstance(model, fx.GraphModule):
        return [str(node.target) for node in model.graph.nodes if node.op == "placeholder"]
    import inspect

    return [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD
            and p.default is p.empty]  # fmt: skip


def arguments_of(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a batch gives to the model: its leading parts, as many as the model has inputs.

    A dict whose keys name all of the model's inputs is taken by name; any other dict is one input.

    Raises:
        InputError: the batch has fewer parts than the model has inputs.
    """
    names = _input_names(model)
    if isinstance(batch, dict):
        if names and set(names) <= set(batch):
            return (), {name: batch[name] for name in names}
        return (batch,), {}
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}
    if len(batch) < len(names):
        raise InputError(
            f"a batch has {len(batch)} parts, and the model takes {len(names)} inputs ({', '.join(names)})."
        )
    return tuple(batch[: max(len(names), 1)]), {}


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


def describe_inputs(example: tuple[Any, ...]) -> Any:
    """``example`` as plain data: tensors as ``{"shape": …, "dtype": …}``; None where it holds something else."""
    try:
        return [_describe(value) for value in example]
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


def make_inputs(description: Any, device: torch.device) -> tuple[Any, ...] | None:
    """Zeros of the described shapes and dtypes: enough to record shapes again."""
    return None if description is None else tuple(_make(value, device) for value in description)


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
