"""What stays one node of a graph although it is written in Python: functions and module classes that the op table names.

While a model is traced, such a function's own code is replaced, and put back afterwards. So it is recognized however the
model reaches it: imported under another name, kept in a dict, as a static method, or from inside a closure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any

import torch
from torch import nn

from fxquant.capture.proxies import find_proxy
from fxquant.capture.tracer_type import Tracing
from fxquant.errors import Refusal

__all__ = ["KEPT_CLASSES", "KEPT_WHOLE", "keep", "kept_functions", "seen_when_called"]

KEPT_CLASSES: set[type[nn.Module]] = set()
"""Classes whose modules are called as they are; subclasses are not."""

KEPT_WHOLE: set[str] = set()
"""Functions of packages that need not be installed, as ``module.name``."""

_FUNCTIONS: dict[FunctionType, None] = {}
_SEEN = (
    *(FunctionType, BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType),
    *(torch._ops.OpOverload, torch._ops.OpOverloadPacket),
)


def seen_when_called(function: Any) -> bool:
    """Whether a tracer sees calls of ``function``: not those of classes, partial or scripted functions, bound methods."""
    return isinstance(function, _SEEN)


def keep(
    functions: tuple[Callable[..., Any], ...], classes: tuple[type[nn.Module], ...], names: tuple[str, ...]
) -> None:
    """Let calls of ``functions``, of functions with these ``names`` and of modules of ``classes`` be one node each.

    Functions of torch that hand themselves to a tracer do so; those of fxquant are no spelling of a user's.
    """
    KEPT_CLASSES.update(classes)
    KEPT_WHOLE.update(names)
    for function in functions:
        if isinstance(function, FunctionType) and not (function.__module__ or "").startswith(("torch.", "fxquant.")):
            _FUNCTIONS[function] = None


def _shell(*args: Any, _call: Callable[..., Any], **kwargs: Any) -> Any:
    return _call(*args, **kwargs)


@contextmanager
def kept_functions(tracer: Tracing) -> Iterator[None]:
    """Inside, a call of a kept function on proxies is a node."""
    before = [(f, f.__code__, f.__defaults__, f.__kwdefaults__) for f in _FUNCTIONS]
    try:
        for function in _FUNCTIONS:
            call = _call(tracer, function)
            function.__code__ = _shell.__code__.replace(co_freevars=function.__code__.co_freevars)
            function.__defaults__, function.__kwdefaults__ = None, {"_call": call}
        yield
    finally:
        for function, code, defaults, keywords in before:
            function.__code__, function.__defaults__, function.__kwdefaults__ = code, defaults, keywords


def _call(tracer: Tracing, function: FunctionType) -> Callable[..., Any]:
    itself: Any = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    itself.__kwdefaults__ = function.__kwdefaults__

    def call(*args: Any, **kwargs: Any) -> Any:
        if tracer.paused or find_proxy((args, kwargs)) is None:
            return itself(*args, **kwargs)
        if any(isinstance(value, nn.Module) for value in (*args, *kwargs.values())):
            raise Refusal(
                f"it gives a module to {function.__qualname__}, which is an op of the table and takes tensors and numbers",
                "enter a function that takes the module's tensors, or the module's class",
            )
        return tracer.create_proxy("call_function", function, args, kwargs)

    return call
