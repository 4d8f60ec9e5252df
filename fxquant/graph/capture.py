"""Capturing a model: from an ``nn.Module`` as its author wrote it to a graph, by symbolic tracing.

Differences from ``torch.fx.symbolic_trace``:

- every node knows the module path and the source line it came from;
- ``x += y`` and its kin stay in-place operations instead of turning silently into ``x = x + y``;
- parameters and buffers used directly in ``forward`` stay parameters and buffers of the graph, so that they train, load
  and move with it, and arithmetic on them is not frozen into constants;
- ``training=self.training`` stays a question asked at run time;
- the model is copied first, and never touched.
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map_only

from fxquant.errors import CaptureError, InputError
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.text import node_text

__all__ = ["TrainingFlag", "capture", "record_shapes"]

_SKIPPED_FRAMES = (os.path.join(os.path.dirname(torch.__file__), ""), os.path.join(os.path.dirname(__file__), ""), "<")


class TrainingFlag(nn.Module):
    """Answers, at run time, whether the model is in training mode: what ``self.training`` was in the user's code."""

    def forward(self) -> bool:
        return self.training


class _Flag(int):
    """The value of ``self.training`` while a model is traced: works as a bool, and is recognized as an argument."""


class _Proxy(fx.Proxy):
    """A proxy on which augmented assignment is what it is on a tensor: an operation in place."""


class _AttributeProxy(_Proxy):
    """A parameter or buffer whose shape and dtype are known while tracing."""

    value: torch.Tensor

    shape = property(lambda self: self.value.shape)
    ndim = property(lambda self: self.value.ndim)
    dtype = property(lambda self: self.value.dtype)
    device = property(lambda self: self.value.device)
    requires_grad = property(lambda self: self.value.requires_grad)

    def size(self, dim: int | None = None) -> Any:
        return self.value.size() if dim is None else self.value.size(dim)

    def dim(self) -> int:
        return self.value.dim()

    def numel(self) -> int:
        return self.value.numel()

    def __len__(self) -> int:
        return len(self.value)


def _install_inplace_operators() -> None:
    import operator

    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
        function = getattr(operator, name)

        def inplace(self: _Proxy, other: Any, function: Callable[..., Any] = function) -> Any:
            return self.tracer.create_proxy("call_function", function, (self, other), {})

        setattr(_Proxy, f"__{name}__", inplace)


_install_inplace_operators()


class Tracer(fx.Tracer):
    """fx's tracer with facts on every node. Modules of torch are leaves; a user's modules are looked into.

    Args:
        proxy_buffers: keep buffers symbolic; switched off for models whose Python needs their values.
    """

    def __init__(self, *, proxy_buffers: bool) -> None:
        super().__init__()
        self._proxy_buffers = proxy_buffers
        self._attribute_paths: dict[int, str] = {}
        self.flag: fx.Node | None = None
        self.failed_in = ""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._attribute_paths = {id(p): name for name, p in root.named_parameters()}
        if self._proxy_buffers:
            self._attribute_paths.update((id(b), name) for name, b in root.named_buffers())
        return super().trace(root, concrete_args)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        path = self._attribute_paths.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if path is None:
            return attr_val
        if path not in parameter_proxy_cache:
            proxy = _AttributeProxy(self.create_node("get_attr", path, (), {}), self)
            proxy.value = attr_val
            parameter_proxy_cache[path] = proxy
        return parameter_proxy_cache[path]

    _module_getattr = getattr

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, _Flag):
            return _flag_node(self)
        if isinstance(a, _AttributeProxy):
            return a.node
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or self.path_of_module(m)
            raise

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        node.meta["module_path"] = self.scope.module_path
        node.meta["source"] = _user_line()
        node.meta.pop("nn_module_stack", None)
        return node


def _flag_node(tracer: Tracer) -> fx.Node:
    if tracer.flag is None:
        last_input = [node for node in tracer.graph.nodes if node.op == "placeholder"][-1]
        with tracer.graph.inserting_after(last_input):
            tracer.flag = tracer.create_node("call_module", "training_flag", (), {})
    return tracer.flag


def _user_line() -> str | None:
    """``file:line`` of the innermost frame that is neither torch's nor ours."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not capture.__code__:
        name = frame.f_code.co_filename
        if not name.startswith(_SKIPPED_FRAMES):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return None


@contextmanager
def _training_flags(model: nn.Module) -> Iterator[None]:
    """While tracing, ``self.training`` of every module of ``model`` is a recognizable flag."""
    before = {module: module.training for module in model.modules()}
    for module, training in before.items():
        module.__dict__["training"] = _Flag(training)
    try:
        yield
    finally:
        for module, training in before.items():
            module.__dict__["training"] = bool(training)


def capture(model: nn.Module, *, for_training: bool = True) -> LeveledModule:
    """Trace a copy of ``model`` into a graph at level *captured*.

    Args:
        model: any eager module.
        for_training: trace in the mode that the model is in; otherwise in eval mode.

    A model that is itself one of torch's layers becomes the only child of a container, named after its class.

    Raises:
        InputError: ``model`` is not an eager ``nn.Module`` (scripted, exported, already quantized, a class, a function).
        CaptureError: tracing failed; the message names the module, the line and the cause.
    """
    _check_model(model)
    owned = copy.deepcopy(model)
    if not for_training:
        owned.eval()
    if type(model).__module__.startswith("torch.nn") and not isinstance(model, nn.Sequential):
        owned = nn.Sequential(OrderedDict([(type(model).__name__.lower(), owned)])).train(owned.training)
    failure: Exception | None = None
    for proxy_buffers in (True, False):
        tracer = Tracer(proxy_buffers=proxy_buffers)
        try:
            with _training_flags(owned):
                graph = tracer.trace(owned)
            return _finish(owned, graph, type(model).__name__)
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise _explain(failure, tracer, model) from failure


def _finish(owned: nn.Module, graph: fx.Graph, name: str) -> LeveledModule:
    owned.add_module("training_flag", TrainingFlag().train(owned.training))
    module = LeveledModule(owned, graph, name)
    for path, part in module.named_modules():
        if type(part) is nn.Module:
            part.training = owned.get_submodule(path).training
    module.meta["level"] = "captured"
    return module


def _check_model(model: Any) -> None:
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise InputError(
            f"prepare was given the class {model.__name__}, not a model: call it first, {model.__name__}(...)."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"{type(model).__name__} is a TorchScript module: its Python is gone and cannot be rewritten. "
            "Give fxquant the nn.Module it was scripted from."
        )
    if not isinstance(model, nn.Module):
        raise InputError(f"prepare takes an nn.Module, not {type(model).__name__}.")
    if isinstance(model, LeveledModule):
        raise InputError(f"this model is already {model.level}: prepare takes the float model it was made from.")
    for path, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.qat", "torch.ao.nn.intrinsic")):
            raise InputError(
                f"{path or 'the model'} is already quantized by torch.ao ({type(module).__name__}): give the float model."
            )


def _explain(error: Exception, tracer: Tracer, model: nn.Module) -> CaptureError:
    path, line = tracer.failed_in, None
    trace = error.__traceback__
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(_SKIPPED_FRAMES):
            line = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    where = f"module {path!r}" if path else f"the top module ({type(model).__name__})"
    return CaptureError(
        f"{type(model).__name__} could not be traced.\n"
        f"  where: {where}, {line or inspect.getsourcefile(type(model)) or 'source unknown'}\n"
        f"  cause: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}\n"
        "  what to do: make that line independent of tensor values (shapes may stay symbolic), or move it into a function "
        "marked with torch.fx.wrap, which then stays in float."
    )


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph once and writes each value's shape and dtype on its node."""

    at: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.at = n
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            n.meta["shape"], n.meta["dtype"] = tuple(value.shape), value.dtype
        else:
            n.meta["dtype"] = type(value).__name__
        return value


def record_shapes(module: LeveledModule, example_inputs: tuple[Any, ...]) -> None:
    """Run ``module`` once in eval mode, without gradients, and note every value's shape and dtype.

    Buffers that a forward pass changes and the mode of every module are put back.

    Raises:
        InputError: the example does not fit the model; the message names the node that refused it.
    """
    modes = {part: part.training for part in module.modules()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    recorder = _ShapeRecorder(module, garbage_collect_values=True)
    recorder.extra_traceback = False
    module.eval()
    taken = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
    try:
        if len(example_inputs) > len(taken) and not any(name.startswith("*") for name in taken):
            raise TypeError(f"forward takes {len(taken)} ({', '.join(taken)}) and {len(example_inputs)} were given")
        with torch.no_grad():
            recorder.run(*tree_map_only(torch.Tensor, torch.clone, example_inputs))
    except Exception as error:
        shapes = ", ".join(_describe(value) for value in example_inputs)
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        at = recorder.at
        where = "the call itself" if at is None else f"{node_text(at)}, {at.meta.get('source') or 'source unknown'}"
        raise InputError(
            f"the model does not run on example_inputs ({shapes}): {cause}\n"
            f"  where: {where}\n"
            "  what to do: give the inputs that the model's forward takes, with their usual shape and dtype, on the device "
            f"of its parameters ({next((p.device for p in module.parameters()), 'none')})."
        ) from error
    finally:
        for part, mode in modes.items():
            part.training = mode
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return type(value).__name__
