"""What the real model did on the example, for the parts that symbolic values cannot reach.

One run of the model as it is, without gradients, notes each call of a submodule: with what shapes, by whom, and inside
which method. From it the parts of an island get their example inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from fxquant.capture.calls import Call
from fxquant.capture.findings import is_users
from fxquant.capture.hooks import HOOKS
from fxquant.capture.patches import attention_in_full
from fxquant.capture.values import FakeRun, unchanged
from fxquant.errors import InputError

__all__ = ["EagerRecorder", "describe_value"]

_OF_CONTAINERS = ("__len__", "__getitem__", "__iter__")


class EagerRecorder:
    """Every call of a submodule, and of a submodule's own methods, in one run of ``model``.

    Attributes:
        calls, methods: those calls, by the submodule, and by it and the method's name.
        reads: which modules' code read a submodule's tensors, by the submodule and the tensor's name.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], fake: FakeRun) -> None:
        self.calls: dict[nn.Module, list[Call]] = {}
        self.methods: dict[tuple[nn.Module, str], list[Call]] = {}
        self.reads: dict[nn.Module, dict[str, set[nn.Module]]] = {}
        self._fake = fake
        self._running: list[tuple[nn.Module, FrameType | None, str | None]] = []
        self._modules = set(model.modules())
        try:
            self._run(model, args, kwargs, hooks=False)
        except Exception:  # a forward may need what its hooks do
            try:
                self._run(model, args, kwargs, hooks=True)
            except Exception as error:
                raise _does_not_run(error, args, kwargs, model) from error

    def _run(self, model: nn.Module, args: Any, kwargs: Any, *, hooks: bool) -> None:
        self.calls.clear()
        self.methods.clear()
        self.reads.clear()
        run = (
            _in_eval_mode(model, hooks=hooks),
            unchanged(model),
            self._watching(),
            attention_in_full(),
            torch.no_grad(),
        )
        with ExitStack() as stack:
            for context in run:
                stack.enter_context(context)
            model(*_copied(args), **_copied(kwargs))

    @contextmanager
    def _watching(self) -> Iterator[None]:
        original, attribute, profile = nn.Module.__call__, nn.Module.__getattr__, sys.getprofile()

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls.setdefault(module, []).append(self._call(args, kwargs))
            self._running.append((module, None, None))
            try:
                return original(module, *args, **kwargs)
            finally:
                self._running.pop()

        def read(module: nn.Module, name: str) -> Any:
            value = attribute(module, name)
            if self._running and isinstance(value, torch.Tensor) and is_users(sys._getframe(1).f_code.co_filename):
                self.reads.setdefault(module, {}).setdefault(name, set()).add(self._running[-1][0])
            return value

        nn.Module.__call__ = call  # type: ignore[method-assign]
        nn.Module.__getattr__ = read  # type: ignore[method-assign]
        sys.setprofile(self._notice)
        try:
            yield
        finally:
            sys.setprofile(profile)
            nn.Module.__call__ = original  # type: ignore[method-assign]
            nn.Module.__getattr__ = attribute  # type: ignore[method-assign]

    def _call(self, args: Any, kwargs: Any) -> Call:
        args, kwargs = self._fake.of((args, kwargs))
        caller, _, method = self._running[-1] if self._running else (None, None, None)
        return Call(args, kwargs, caller, method)

    def _notice(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_name in _OF_CONTAINERS:
            self._notice_container(frame)
        elif event == "call" and is_users(frame.f_code.co_filename):
            owner, name = frame.f_locals.get("self"), frame.f_code.co_name
            if not isinstance(owner, nn.Module) or owner not in self._modules or name.startswith("__"):
                return
            if name in ("forward", "_wrapped_call_impl", "_call_impl") or not self._running:
                return
            running, _, method = self._running[-1]
            if getattr(getattr(type(owner), name, None), "__code__", None) is frame.f_code:
                self.methods.setdefault((owner, name), []).append(self._method_call(frame))
                if owner is running and method is None:
                    self._running.append((running, frame, name))
        elif event == "return" and self._running and self._running[-1][1] is frame:
            self._running.pop()

    def _notice_container(self, frame: FrameType) -> None:
        """A user's code that counts, indexes or goes through the layers of a ``Sequential``, which a graph has not."""
        owner, caller = frame.f_locals.get("self"), frame.f_back
        if isinstance(owner, nn.Sequential) and owner in self._modules and self._running and caller is not None:
            running, _, method = self._running[-1]
            if running is not owner and is_users(caller.f_code.co_filename):
                call = Call((), {}, running, method)
                self.methods.setdefault((owner, frame.f_code.co_name), []).append(call)

    def _method_call(self, frame: FrameType) -> Call:
        code = frame.f_code
        count = code.co_argcount + code.co_kwonlyargcount
        given = {name: frame.f_locals[name] for name in code.co_varnames[1:count] if name in frame.f_locals}
        caller, _, method = self._running[-1]
        return Call((), self._fake.of(given), caller, method)


@contextmanager
def _in_eval_mode(model: nn.Module, *, hooks: bool) -> Iterator[None]:
    """Inside, ``model`` is in eval mode, and its hooks, which may keep what they see, are off unless asked for."""
    found = [(part, kind, getattr(part, kind)) for part in model.modules() for kind in HOOKS if getattr(part, kind)]
    modes = {part: part.training for part in model.modules()}
    for part, kind, given in [] if hooks else found:
        part.__dict__[kind] = type(given)()
    for part in modes:
        part.__dict__["training"] = False
    try:
        yield
    finally:
        for part, kind, given in found:
            part.__dict__[kind] = given
        for part, mode in modes.items():
            part.__dict__["training"] = mode


def _copied(value: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.clone, value)


def _does_not_run(error: Exception, args: Any, kwargs: Any, model: nn.Module) -> InputError:
    line, trace = None, error.__traceback__
    while trace is not None:
        if is_users(trace.tb_frame.f_code.co_filename):
            line = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    shapes = ", ".join([*map(describe_value, args), *(f"{k}={describe_value(v)}" for k, v in kwargs.items())])
    device = next((p.device for p in model.parameters()), "none")
    return InputError(
        f"the model does not run on example_inputs ({shapes}): "
        f"{str(error).splitlines()[0] if str(error) else type(error).__name__}\n"
        f"  where: {line or 'the call itself'}\n"
        "  what to do: give the inputs that the model's forward takes, with their usual shape and dtype, on the device "
        f"of its parameters ({device})."
    )


def describe_value(value: Any) -> str:
    """A tensor as ``float32[2, 3] on cpu``; anything else by its type."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return type(value).__name__
