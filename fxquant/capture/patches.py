"""What is replaced in Python while a model is traced, and put back afterwards.

- ``nn.Module``: calls, attributes read and attributes set;
- functions that make tensors (``torch.arange``): they become nodes, also where their arguments are proxies;
- ``math`` and the builtins ``len``, ``max`` and ``min`` in the modules that define the model: symbolic on proxies;
- functions that the op table names (`kept`), and those marked with ``torch.fx.wrap``;
- ``torch.utils.checkpoint``, which becomes a plain call.
"""

from __future__ import annotations

import builtins
import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.fx import _symbolic_trace

from fxquant.capture.kept import KEPT_WHOLE, kept_functions
from fxquant.capture.proxies import ValueProxy, find_proxy, is_callable, is_instance
from fxquant.capture.tracer_type import Tracing

__all__ = ["ATTENTION", "BATCH_NORM", "attention_in_python", "patched"]

BATCH_NORM = torch.nn.functional.batch_norm
ATTENTION = torch.nn.functional.multi_head_attention_forward
"""Written in Python, of linear maps and a softmax; given a proxy it would hand itself over whole."""

_MAKERS = (
    "arange", "zeros", "ones", "full", "empty", "eye", "linspace", "logspace", "rand", "randn", "randint", "randperm",
    "tensor", "as_tensor", "tril_indices", "triu_indices", "hann_window", "empty_strided",
)  # fmt: skip
_JOINERS = ("stack", "cat", "concat", "hstack", "vstack")
_READERS = ("finfo", "iinfo")
_BUILTINS = ("len", "max", "min")
_TORCH_SPACES = (
    "torch.nn.functional",
    "torch.functional",
    "torch.nn.modules.activation",
    "torch.nn.modules.transformer",
)
_FOREIGN = frozenset(
    {"torch", "builtins", "abc", "typing", "fxquant", "functools", "contextlib", "collections", "enum"}
)
_ABSENT: Any = object()
_TRANSFORMER: Any = torch.nn.modules.transformer
"""Whether a mask is the causal one is a hint there, for kernels that need no mask; the mask itself is applied."""


@contextmanager
def patched(tracer: Tracing) -> Iterator[None]:
    """Inside, Python runs the model on ``tracer``'s proxies."""
    with ExitStack() as stack:
        for owner, name, value in _replacements(tracer):
            stack.enter_context(_replaced(owner, name, value))
        stack.enter_context(_flag_of_fx())
        stack.enter_context(attention_in_full())
        stack.enter_context(kept_functions(tracer))
        yield


@contextmanager
def attention_in_full() -> Iterator[None]:
    """Let torch's attention take its ordinary path, which consists of linear maps, not its fused one for inference."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _flag_of_fx() -> Iterator[None]:
    """Let code that asks ``torch.fx`` whether it is being traced hear yes."""
    space: Any = _symbolic_trace
    if hasattr(space, "_is_fx_tracing_context"):
        with space._is_fx_tracing_context(True):
            yield
        return
    before, space._is_fx_tracing_flag = space._is_fx_tracing_flag, True
    try:
        yield
    finally:
        space._is_fx_tracing_flag = before


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    space = owner if isinstance(owner, dict) else None
    old = space.get(name, _ABSENT) if space is not None else getattr(owner, name)
    _set(owner, name, value)
    try:
        yield
    finally:
        if old is _ABSENT:
            del owner[name]
        else:
            _set(owner, name, old)


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


def _replacements(tracer: Tracing) -> Iterator[tuple[Any, str, Any]]:
    symbolic_int = _symbolic_int(tracer)
    yield from _of_modules(tracer)
    for name in _MAKERS:
        yield torch, name, _node_maker(tracer, getattr(torch, name))
    for name in _JOINERS:
        yield torch, name, _joiner(tracer, getattr(torch, name))
    for name in _READERS:
        yield torch, name, _reader(tracer, getattr(torch, name))
    for name, function in vars(math).items():
        if callable(function):
            yield math, name, _symbolic(tracer, function)
    for space in _user_spaces(tracer.root):
        for name in _BUILTINS:
            if name not in space:
                yield space, name, _symbolic(tracer, getattr(builtins, name))
        for name, value in list(space.items()) if KEPT_WHOLE else ():
            if isinstance(value, FunctionType) and f"{value.__module__}.{value.__qualname__}" in KEPT_WHOLE:
                yield space, name, _wrapped(tracer, value)
        if "isinstance" not in space:
            yield space, "isinstance", is_instance
        if "callable" not in space:
            yield space, "callable", is_callable
        if "int" not in space:
            yield space, "int", symbolic_int
    yield _TRANSFORMER, "_detect_is_causal_mask", lambda mask, is_causal=None, size=None: is_causal is True
    yield torch, "_check_with", _without_proxies(torch._check_with)
    yield torch, "is_tensor", lambda value: is_instance(value, torch.Tensor)
    for (_, name), space in list(_symbolic_trace._wrapped_fns_to_patch.items()):
        if name in space and callable(space[name]):
            yield space, name, _wrapped(tracer, space[name])
    yield from _of_checkpoint(tracer)


def _of_modules(tracer: Tracing) -> Iterator[tuple[Any, str, Any]]:
    call, read, write = nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__

    @functools.wraps(call)
    def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return tracer.call_module(module, functools.partial(call, module), args, kwargs)

    @functools.wraps(read)
    def read_attribute(module: nn.Module, name: str) -> Any:
        return tracer._module_getattr(name, read(module, name), {})

    @functools.wraps(write)
    def write_attribute(module: nn.Module, name: str, value: Any) -> None:
        if not tracer.paused:
            tracer.set_attribute(module, name, value)
        write(module, name, value)

    yield nn.Module, "__call__", call_module
    yield nn.Module, "__getattr__", read_attribute
    yield nn.Module, "__setattr__", write_attribute


def _node_maker(tracer: Tracing, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Any:
        if tracer.paused or (tracer.fake is None and find_proxy((args, kwargs)) is None):
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", function, args, kwargs)

    return make


def _joiner(tracer: Tracing, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of a list of tensors that is one proxy, which not every torch takes for a list."""

    @functools.wraps(function)
    def join(*args: Any, **kwargs: Any) -> Any:
        if args and issubclass(type(args[0]), ValueProxy):
            return tracer.call_torch(function, args, kwargs)
        return function(*args, **kwargs)

    return join


def _reader(tracer: Tracing, function: Callable[..., Any]) -> Callable[..., Any]:
    def read(*args: Any) -> Any:
        return function(*(tracer.concrete(a, None) if issubclass(type(a), ValueProxy) else a for a in args))

    return read


def _without_proxies(check: Callable[..., Any]) -> Callable[..., Any]:
    """``torch._check`` of a condition on sizes, which has to hold for the example and is no part of the graph."""

    def checked(error: Any, condition: Any, message: Any) -> None:
        known = condition.value if issubclass(type(condition), ValueProxy) else condition
        if isinstance(known, (bool, torch.SymBool)):
            check(error, known, message)

    return checked


def _symbolic(tracer: Tracing, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of numbers, kept in the graph where one of them is a proxy."""

    @functools.wraps(function)
    def compute(*args: Any, **kwargs: Any) -> Any:
        if tracer.paused or find_proxy((args, kwargs)) is None:
            return function(*args, **kwargs)
        if function is len and (not issubclass(type(args[0]), ValueProxy) or tracer.fake is None):
            return function(*args)
        if function is len:
            return _length(tracer, args[0])
        if kwargs or any(isinstance(a, torch.Tensor) for a in args):
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", function, args, kwargs)

    return compute


def _symbolic_int(tracer: Tracing) -> type:
    """``int`` as a type and a function; of a number that is a proxy it makes a node."""

    class Meta(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            known = args[0].value if args and issubclass(type(args[0]), ValueProxy) else None
            if not tracer.paused and isinstance(known, (int, float)):
                return tracer.create_proxy("call_function", int, args, kwargs)
            return int(*args, **kwargs)

        def __instancecheck__(cls, value: Any) -> bool:
            return is_instance(value, int)

        def __subclasscheck__(cls, kind: Any) -> bool:
            return issubclass(kind, int)

        def __eq__(cls, other: Any) -> bool:
            return other is int or other is cls

        def __hash__(cls) -> int:
            return hash(int)

    return Meta("int", (int,), {})


def _length(tracer: Tracing, proxy: ValueProxy) -> Any:
    """``len(x)`` that may stay symbolic: the first size of a tensor."""
    if type(proxy).__name__ != "ParameterProxy" and isinstance(proxy.value, torch.Tensor):
        return tracer.create_proxy("call_method", "size", (proxy, 0), {})
    return len(proxy)


def _wrapped(tracer: Tracing, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return tracer.call_wrapped(function, args, kwargs)

    return call


def _of_checkpoint(tracer: Tracing) -> Iterator[tuple[Any, str, Any]]:
    space = torch.utils.checkpoint
    reentrant, stepwise = space.CheckpointFunction, space._checkpoint_without_reentrant_generator

    class PlainCall:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            if tracer.paused:
                return reentrant.apply(function, preserve, *args)
            return function(*args)

    def plain(*args: Any, **kwargs: Any) -> Any:
        if tracer.paused:
            return stepwise(*args, **kwargs)
        return iter((None, None))

    yield space, "CheckpointFunction", PlainCall
    yield space, "_checkpoint_without_reentrant_generator", plain


def _user_spaces(root: nn.Module) -> list[dict[str, Any]]:
    """The namespaces of the packages that define the classes of ``root``'s modules."""
    packages = {cls.__module__.split(".")[0] for module in root.modules() for cls in type(module).__mro__} - _FOREIGN
    return [
        space.__dict__
        for name, space in list(sys.modules.items())
        if isinstance(space, ModuleType) and (name.split(".")[0] in packages or name in _TORCH_SPACES)
    ]


@contextmanager
def attention_in_python() -> Iterator[None]:
    """Let ``multi_head_attention_forward`` run its Python on proxies instead of handing itself over whole."""
    space: Any = torch.nn.functional
    asked = space.has_torch_function
    space.has_torch_function = lambda tensors: False
    try:
        yield
    finally:
        space.has_torch_function = asked
