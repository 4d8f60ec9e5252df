"""Proxies that carry a value: what stands for a tensor, a shape or a number while a model is traced.

Everything that can stay symbolic does and becomes a node. Python that needs a concrete answer (``if``, ``len``, ``range``,
an index) asks the tracer, which writes the answer down as a specialization, or gives up on the module if the answer
depends on data.
"""

from __future__ import annotations

import dis
import operator
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch import fx

from fxquant.capture.tracer_type import Tracing
from fxquant.capture.values import UNKNOWN
from fxquant.errors import Refusal

__all__ = [
    "ModeFlag",
    "ParameterProxy",
    "Spoilt",
    "ValueProxy",
    "find_proxy",
    "is_callable",
    "is_instance",
]

_RANK_METHODS = ("dim", "ndimension")
_GRADIENT_FACTS = ("requires_grad", "grad_fn", "is_leaf", "grad")


class ModeFlag(int):
    """The value of ``self.training`` while a model is traced: as an argument it is asked for at run time."""

    tracer: Tracing

    def __bool__(self) -> bool:
        return self.tracer.mode(self)


class ValueProxy(fx.Proxy):
    """A proxy whose value, as far as it is known without data, the tracer keeps."""

    tracer: Tracing  # type: ignore[assignment]
    __getitem__: Any  # fx sets the operators

    @property
    def value(self) -> Any:
        """The fake tensor, number or container that this stands for, or ``UNKNOWN``."""
        return self.tracer.values.get(self.node, UNKNOWN)

    def __getattr__(self, name: str) -> Any:
        value = self.value
        if name in _GRADIENT_FACTS:
            raise Refusal(f"it asks for {name} of a tensor", "let the caller decide whether gradients flow")
        if value is not UNKNOWN:
            with self.tracer.pausing():
                known = hasattr(value, name)
            if not known:
                raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
            if name == "ndim":
                return self.tracer.rank(value)
            if name == "nbytes" and isinstance(
                value, torch.Tensor
            ):  # of the float tensor, whatever it is made of later
                return self.numel() * self.itemsize
            if name == "is_nested":
                self.tracer.uses_ranks = True
                return value.is_nested
        return _AttributeOf(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "_node", "root", "attr"):
            raise Refusal(f"it sets the attribute {name!r} of a tensor", "keep such facts beside the tensor")
        object.__setattr__(self, name, value)

    def __bool__(self) -> bool:
        return self.tracer.concrete(self, bool)

    def __int__(self) -> int:
        return self.tracer.concrete(self, int)

    def __index__(self) -> int:
        return self.tracer.concrete(self, operator.index, asked_at=_place(_calling_frame()))

    def __float__(self) -> float:
        return self.tracer.concrete(self, float)

    def __len__(self) -> int:
        return self.tracer.length(self)

    def __str__(self) -> str:
        return str(self.value)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if isinstance(self.value, (int, float)) else str(self.value)

    def __hash__(self) -> int:
        if isinstance(self.value, (int, float, torch.Size, torch.dtype, torch.device, str)):
            return hash(self.tracer.concrete(self, None))
        return id(self)

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self,) if digits is None else (self, digits), {})

    def __contains__(self, item: Any) -> bool:
        if isinstance(self.value, torch.Tensor) or self.value is UNKNOWN:
            raise Refusal("it asks whether a tensor contains a value", "compute it with torch.isin")
        return any(bool(element == item) for element in self)

    def __setitem__(self, key: Any, value: Any) -> None:
        last = next(iter(reversed(self.tracer.graph.nodes)))
        if last.target is operator.setitem and last.args == (self.node, key, getattr(value, "node", None)):
            return  # y[k] += v, which has assigned already
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __delitem__(self, key: Any) -> None:
        raise Refusal("it deletes an element of a traced container", "build a new container")

    def __iter__(self) -> Iterator[Any]:
        count = _unpacked_into(_calling_frame())
        value = self.value
        if value is UNKNOWN:
            if count is None:
                raise Refusal("it loops over something whose length depends on data", "loop over a fixed number")
            return iter([self[i] for i in range(count)])
        if isinstance(value, torch.Size):
            return iter([self[i] for i in range(self.tracer.rank(value))])
        if isinstance(value, torch.Tensor):
            length = self.tracer.length(self)
            parts = self.tracer.create_proxy("call_method", torch.Tensor.unbind.__name__, (self, 0), {})
            return iter([parts[i] for i in range(length)])
        if isinstance(value, dict):
            return iter(list(value))
        known = len(value) if count is not None else self.tracer.length(self)
        return iter([self[i] for i in range(known)])

    @classmethod
    def __torch_function__(
        cls, orig_method: Any, types: Any, args: tuple[Any, ...] | None = None, kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = args or (), kwargs or {}
        proxy = find_proxy((args, kwargs))
        assert proxy is not None
        proxy.tracer.withdraw(_place(_calling_frame()))
        return proxy.tracer.call_torch(orig_method, args, kwargs)


def _inplace(function: Any) -> Any:
    def operate(self: ValueProxy, other: Any) -> Any:
        if isinstance(self.value, (bool, int, float)):
            return getattr(operator, function.__name__[1:])(self, other)
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return operate


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(ValueProxy, f"__{_name}__", _inplace(getattr(operator, _name)))


class _AttributeOf(ValueProxy):
    """``x.shape`` or the method ``x.view``: a node only once it is used as a value."""

    def __init__(self, root: ValueProxy, attr: str) -> None:
        self.root, self.attr, self.tracer = root, attr, root.tracer
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None or self._node._erased:  # it went with a part of the trace that was taken back
            made = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {})
            object.__setattr__(self, "_node", made.node)
        assert self._node is not None
        return self._node

    @property
    def value(self) -> Any:
        value = self.root.value
        with self.tracer.pausing():
            return UNKNOWN if value is UNKNOWN else getattr(value, self.attr)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.attr in _RANK_METHODS and isinstance(self.root.value, torch.Tensor):
            return self.tracer.rank(self.root.value)
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


class ParameterProxy(ValueProxy):
    """A parameter or buffer: its shape and dtype are plain numbers, for the model has no other."""

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "ndim", "dtype", "device", "requires_grad", "is_cuda", "layout"):
            return getattr(self.value, name)
        if name in ("size", "dim", "numel", "element_size", "is_floating_point", "is_complex", "nelement"):
            return getattr(self.value, name)
        return ValueProxy.__getattr__(self, name)

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self.value))])


def is_instance(value: Any, kinds: Any) -> bool:
    """``isinstance`` as the user's code means it: a proxy is what it stands for."""
    if not issubclass(type(value), ValueProxy):
        return isinstance(value, kinds)
    known = value.value
    if known is UNKNOWN:
        return isinstance(value, kinds)
    return isinstance(known, kinds)


def is_callable(value: Any) -> bool:
    """``callable`` as the user's code means it: a size or a tensor is none, though its proxy is."""
    if not issubclass(type(value), ValueProxy):
        return callable(value)
    if value.value is UNKNOWN:
        return isinstance(value, _AttributeOf)  # perhaps a method; what an op computes is never a function
    return callable(value.value)


class Spoilt:
    """What an island left in a list that it was given: not known here, and not to be read."""

    def __getattr__(self, name: str) -> Any:
        raise Refusal("it reads a list that a submodule has changed", "return what is new instead")


def find_proxy(tree: Any) -> ValueProxy | None:
    """The first proxy in ``tree``, through containers and dataclasses."""
    if isinstance(tree, fx.Proxy):
        return tree  # type: ignore[return-value]
    if isinstance(tree, dict):
        tree = list(tree.values())
    elif isinstance(tree, slice):
        tree = (tree.start, tree.stop, tree.step)
    elif hasattr(tree, "__dataclass_fields__") and not isinstance(tree, type):
        tree = [getattr(tree, name) for name in tree.__dataclass_fields__]
    if isinstance(tree, (list, tuple, set)):
        return next((found for item in tree if (found := find_proxy(item)) is not None), None)
    return None


def _calling_frame() -> Any:
    import sys

    return sys._getframe(2)


def _place(frame: Any) -> tuple[int, int]:
    """The very instruction that a frame executes."""
    return id(frame), frame.f_lasti


@lru_cache(maxsize=1024)
def _unpacks(code: CodeType) -> dict[int, int]:
    return {i.offset: i.argval for i in dis.get_instructions(code) if i.opname == "UNPACK_SEQUENCE"}


def _unpacked_into(frame: Any) -> int | None:
    """How many names the statement ``a, b = x`` at ``frame`` unpacks into; None for any other iteration."""
    return _unpacks(frame.f_code).get(frame.f_lasti)
