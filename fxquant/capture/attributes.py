"""Attributes of a module while it is traced: parameters and buffers are read as nodes, and nothing may be changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx, nn

from fxquant.capture.guards import Guards
from fxquant.capture.memory import Memory
from fxquant.capture.proxies import ParameterProxy, ValueProxy, find_proxy
from fxquant.errors import Refusal

__all__ = ["Attributes"]


class Attributes(Guards):
    """The part of the tracer that reads and guards attributes.

    Attributes:
        constants: tensors that forward uses and no attribute holds, by the names that the graph has for them.
        hooked: a layer with hooks was called, which may put tensors where forward finds them.
    """

    memory: Memory
    hooked: bool
    values: dict[fx.Node, Any]
    pausing: Callable[[], AbstractContextManager[None]]
    constants: dict[str, torch.Tensor]
    _paths: dict[int, str]
    _parameters: dict[str, ValueProxy]

    def collect(self, root: nn.Module) -> None:
        """Learn the names of all tensors that ``root`` holds."""
        self.constants, self._paths, self._parameters, self.tensor_attrs = {}, {}, {}, {}
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            self._paths[id(tensor)] = name
        for prefix, module in root.named_modules():
            for name, value in module.__dict__.items():
                if isinstance(value, torch.Tensor):
                    self.tensor_attrs[value] = f"{prefix}.{name}" if prefix else name

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """A parameter, buffer or attribute by its path; any other tensor is kept as a constant of the graph."""
        path = self._paths.get(id(tensor)) or self.tensor_attrs.get(tensor)
        if path is None:
            path = next((name for name, kept in self.constants.items() if kept is tensor), None)
        if path is None and self.hooked:
            raise Refusal("it reads a tensor that a hook may have put there", "return what the hook keeps")
        if path is None:
            path = f"_tensor_constant{len(self.constants)}"
            self.constants[path] = tensor
        return self._parameter(path, tensor).node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if self.paused or not isinstance(attr_val, torch.Tensor):
            return attr_val
        path = self._paths.get(id(attr_val))
        return attr_val if path is None else self._parameter(path, attr_val)

    _module_getattr = getattr

    def _parameter(self, path: str, tensor: torch.Tensor) -> ValueProxy:
        if path not in self._parameters:
            proxy = ParameterProxy(self.create_node("get_attr", path, (), {}), self)
            with self.pausing():
                self.values[proxy.node] = tensor if self.fake is None else self.fake.of(tensor)
            self.memory.of_attribute(self.values[proxy.node])
            self._parameters[path] = proxy
        return self._parameters[path]

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Refuse that forward changes an attribute: a graph has no place to keep it."""
        missing = object()
        old = _stored(module, name, missing)
        if find_proxy(value) is None and (old is value or (type(old) is type(value) and _equal(old, value))):
            return
        raise Refusal(
            f"its forward changes {type(module).__name__}.{name}", "return the value, or write into a buffer in place"
        )


def _stored(module: nn.Module, name: str, missing: Any) -> Any:
    """``module``'s attribute as it is stored, without asking its ``__getattr__``."""
    for place in (module.__dict__, *(module.__dict__[r] for r in ("_parameters", "_buffers", "_modules"))):
        if name in place:
            return place[name]
    return getattr(type(module), name, missing)


def _equal(a: Any, b: Any) -> bool:
    try:
        return isinstance(a, torch.Tensor) is False and bool(a == b)
    except Exception:
        return False
