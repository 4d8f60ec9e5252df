"""The signature of a captured graph: from one call of the user's forward to the graph's flat inputs, and back.

A graph takes tensors and numbers, one placeholder each. The user's call may spread them over keywords, dicts, lists and
dataclasses, and leave some out; constants among them (None, flags, strings) were decided at capture and are held to it.
"""

from __future__ import annotations

import enum
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fxquant.capture.proxies import ValueProxy
from fxquant.capture.values import UNKNOWN
from fxquant.errors import InputError, Refusal, SpecializationError

__all__ = ["CallSpec", "put_together", "take_apart"]

_CONSTANTS = (
    bool,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.layout,
    enum.Enum,
    type,
)

Tree = tuple[Any, ...]
"""``("leaf",)``, ``("constant", value)`` or ``(kind, class, [(key, tree), …])``."""


def take_apart(value: Any, name: str, leaf: Callable[[str, Any], Any]) -> tuple[Tree, Any]:
    """The structure of ``value``, and ``value`` with each tensor and number replaced by what ``leaf(name, it)`` gives.

    Raises:
        Refusal: it holds an object of a class that has no known structure.
    """
    is_proxy = issubclass(type(value), ValueProxy)
    if value is UNKNOWN or is_proxy or isinstance(value, torch.Tensor):
        return ("leaf",), leaf(name, value)
    if isinstance(value, _CONSTANTS):
        return ("constant", value), value
    if isinstance(value, (int, float)):
        return ("leaf",), leaf(name, value)
    kind, items = _parts(value)
    made = [(key, take_apart(item, f"{name}_{key}", leaf)) for key, item in items]
    tree = (kind, type(value), [(key, tree) for key, (tree, _) in made])
    return tree, _build(kind, type(value), [(key, item) for key, (_, item) in made])


def _parts(value: Any) -> tuple[str, list[tuple[Any, Any]]]:
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        fields = value.__dataclass_fields__
        return "fields", [(name, getattr(value, name)) for name in fields if not _left_out(value, name)]
    if type(value) in (list, tuple, torch.Size):
        return "items", list(enumerate(value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "named", list(zip(value._fields, value, strict=True))
    if isinstance(value, Mapping):
        return "dict", list(value.items())
    if isinstance(value, tuple):
        return "items", list(enumerate(value))
    raise Refusal(
        f"it takes or returns a {type(value).__name__}, whose parts are not known",
        "use tensors, numbers, lists, tuples, dicts or dataclasses at the borders of a module",
    )


def _left_out(value: Any, name: str) -> bool:
    """Whether a field of a ``ModelOutput`` is absent: None, and not among its keys."""
    return isinstance(value, Mapping) and getattr(value, name) is None


def _build(kind: str, cls: Any, items: list[tuple[Any, Any]]) -> Any:
    if kind == "fields":
        return cls(**dict(items))
    if kind == "dict":
        return dict(items) if cls is dict or not issubclass(cls, OrderedDict) else cls(items)
    values = [item for _, item in items]
    if kind == "named":
        return cls(*values)
    return values if cls is list else tuple(values)


def put_together(tree: Tree, leaves: list[Any]) -> Any:
    """The inverse of ``take_apart``; takes leaves off the front of ``leaves``."""
    if tree[0] == "leaf":
        return leaves.pop(0)
    if tree[0] == "constant":
        return tree[1]
    return _build(tree[0], tree[1], [(key, put_together(item, leaves)) for key, item in tree[2]])


class CallSpec:
    """How a call of the user's forward becomes a call of the graph.

    Args:
        parameters: forward's parameters.
        trees: the structure of each argument, by parameter, in order.
        given: the parameters that the example gave, or that have no default.
        output: the structure of the result, where the graph returns a flat tuple.
    """

    def __init__(self, parameters: list[inspect.Parameter], trees: dict[str, Tree], given: list[str]) -> None:
        self.parameters = [(p.name, p.kind, p.default) for p in parameters]
        self.trees = trees
        self.given = given
        self.ranks: list[int | None] | None = None
        self.output: Tree | None = None
        self.asks_mode: str | None = None
        simple = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        self.is_plain = simple and all(tree == ("leaf",) for tree in trees.values())

    def __deepcopy__(self, memo: Any) -> CallSpec:
        return self

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The graph's inputs for a call ``model(*args, **kwargs)``.

        Raises:
            TypeError: the call does not fit the signature of forward.
            SpecializationError: an argument contradicts what was decided at capture.
        """
        if self.is_plain and not kwargs and len(args) == len(self.parameters):
            flat = list(args)
        else:
            signature = inspect.Signature([inspect.Parameter(n, k, default=d) for n, k, d in self.parameters])
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            flat = []
            for name, tree in self.trees.items():
                _flatten(bound.arguments[name], tree, name, flat)
        if self.ranks is not None:
            self._check_ranks(flat)
        return flat

    def takes(self, name: str) -> bool:
        """Whether the example had an argument ``name``, in ``**kwargs`` or of its own."""
        inside = (tree[2] for tree in self.trees.values() if tree[0] == "dict")
        return name in self.trees or any(name == key for items in inside for key, _ in items)

    def _check_ranks(self, flat: list[Any]) -> None:
        assert self.ranks is not None
        for value, rank in zip(flat, self.ranks, strict=True):
            if rank is not None and isinstance(value, torch.Tensor) and value.is_nested:
                raise SpecializationError(
                    "the model was captured with a dense tensor where a nested one is given now.\n"
                    "  what to do: give a dense tensor, padded, with a mask."
                )
            if rank is not None and isinstance(value, torch.Tensor) and value.dim() != rank:
                raise SpecializationError(
                    f"an input of shape {list(value.shape)} has {value.dim()} dimensions; the model was captured with "
                    f"{rank}, and its code asks for that number.\n"
                    f"  what to do: give {rank} dimensions, or prepare with example_inputs of this shape."
                )

    def restore(self, value: Any) -> Any:
        """The user's own output structure from the graph's output."""
        return value if self.output is None else put_together(self.output, list(value))


def _flatten(value: Any, tree: Tree, name: str, flat: list[Any]) -> None:
    if tree[0] == "leaf":
        if value is None:
            raise _contradiction(name, "a value", "None")
        flat.append(value)
    elif tree[0] == "constant":
        if isinstance(tree[1], dict) and isinstance(value, dict) and set(value) != set(tree[1]):
            raise _other_keys(name, list(tree[1]), list(value))
        if not (value is tree[1] or (type(value) is type(tree[1]) and value == tree[1])):
            raise _contradiction(name, repr(tree[1]), _short(value))
    else:
        _, cls, items = tree
        try:
            found = dict(_parts(value)[1])
        except Refusal:
            raise _contradiction(name, f"a {cls.__name__}", _short(value)) from None
        if set(found) != {key for key, _ in items}:
            raise _other_keys(name, [key for key, _ in items], list(found))
        for key, item in items:
            _flatten(found[key], item, f"{name}[{key!r}]", flat)


def _other_keys(name: str, captured: list[Any], given: list[Any]) -> SpecializationError:
    """What a dict, or the ``**kwargs`` of a call, has too much or too little."""
    more = [key for key in given if key not in captured]
    less = [key for key in captured if key not in given]
    said = [f"with {', '.join(map(repr, less))}, which is missing now"] if less else []
    said += [f"without {', '.join(map(repr, more))}, which is given now"] if more else []
    return SpecializationError(
        f"the model was captured {' and '.join(said)}, in {name}: its code may do something else then.\n"
        "  what to do: prepare with example_inputs that have what calls will have"
        + (f" (example_inputs={{…, {more[0]!r}: a value of its kind}})" if more else "")
        + (", or leave it out of the call." if more else ", or give it.")
    )


def _contradiction(name: str, captured: str, given: str) -> SpecializationError:
    if captured == "None":  # what was left out, most often
        return SpecializationError(
            f"the model was captured with {name} = None, and now it is {given}: its code may do something else then.\n"
            f"  what to do: prepare with example_inputs that include {name}, or leave it out of the call."
        )
    return SpecializationError(
        f"the model was captured with {name} = {captured}, and now it is {given}.\n"
        "  what to do: prepare with example_inputs that include this argument as you will give it."
    )


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return repr(value) if isinstance(value, _CONSTANTS) else f"a {type(value).__name__}"


def bind_example(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """The arguments of one call of ``function``, defaults included.

    Raises:
        InputError: they do not fit.
    """
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"example_inputs do not fit the signature of the model's forward: {error}.\n"
            "  what to do: give a tuple of positional arguments, or a dict of keyword arguments."
        ) from None
    bound.apply_defaults()
    return bound
