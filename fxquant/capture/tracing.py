"""The tracer: runs a module's forward on proxies and writes down a graph.

Differences from ``torch.fx.Tracer``:

- proxies carry fake-tensor values, so that what Python asks about shapes gets an answer (`proxies`, `guards`);
- a submodule that cannot be traced is called as it is, and becomes an *island*; what was traced of it is taken back;
- functions marked with ``torch.fx.wrap``, attention and checkpointed functions are looked into;
- writes in place are followed through views, by the version counters of the fake tensors.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from fxquant.capture.calls import Call
from fxquant.capture.evaluation import containers_in, contains_unknown, in_eval_mode, run_as_it_is, value_of
from fxquant.capture.findings import Island, user_line
from fxquant.capture.functions import Functions
from fxquant.capture.guards import ModeAskedError
from fxquant.capture.hooks import refuse_hooks
from fxquant.capture.kept import KEPT_CLASSES
from fxquant.capture.memory import Memory, shares_memory
from fxquant.capture.models import COMPOSED
from fxquant.capture.modes import merge_modes, record_of
from fxquant.capture.patches import patched
from fxquant.capture.plain_norms import counting_nodes
from fxquant.capture.proxies import ModeFlag, Spoilt, ValueProxy
from fxquant.capture.values import UNKNOWN, FakeRun, containers_of, differs, put_back, versions
from fxquant.errors import Refusal

__all__ = ["Tracer", "TrainingFlag"]

_NEEDS_DATA = (DataDependentOutputException, DynamicOutputShapeException)


class TrainingFlag(nn.Module):
    """Answers, at run time, whether the model is in training mode: what ``self.training`` was in the user's code."""

    def forward(self) -> bool:
        return self.training


class Tracer(Functions):
    """Traces one module, with facts on every node.

    Args:
        fake: runs values along; None traces without values.
        leaves: modules that are called as they are, and why. Grows with every submodule that cannot be traced.
        for_training: leave ``self.training`` open; otherwise it is answered, and the answer recorded.
        prefix: the module's path in the model, for messages.
    """

    def __init__(
        self, fake: FakeRun | None, leaves: dict[nn.Module, Island], *, for_training: bool, prefix: str
    ) -> None:
        super().__init__()
        self.fake, self.leaves, self.for_training, self.prefix = fake, leaves, for_training, prefix
        self.values: dict[fx.Node, Any] = {}
        self.flag: fx.Node | None = None
        self.asked_mode: str | None = None
        self.calls: dict[fx.Node, dict[nn.Module, list[Call]]] = {}
        self._running: list[tuple[nn.Module, dict[nn.Module, list[Call]]]] = []
        self.plain: dict[str, nn.Module] = {}
        self.changed: dict[nn.Module, list[Any]] = {}
        self.uses_ranks = False
        self.paused = False
        self.hooked = False
        self._override: bool | None = None
        self._created: list[fx.Node] = []
        self._places: dict[fx.Node, tuple[int, int]] = {}
        self._checked: set[tuple[fx.Node, bool]] = set()
        self.memory = Memory()
        self._starts_with_grad, self._starts_with_autocast = True, _autocast()

    # ---- the whole trace

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        raise NotImplementedError("use run")

    def run(
        self, root: nn.Module, function: Callable[..., Any], inputs: Callable[[Tracer], Any]
    ) -> tuple[fx.Graph, Any]:
        """Trace ``function(*args, **kwargs)``, which runs code of ``root``.

        ``inputs`` makes the arguments, with placeholders in them. Returns the graph, without an output node, and what
        the function returned.
        """
        self.root, self.graph = root, fx.Graph()
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self.collect(root)
        self._starts_with_grad, self._starts_with_autocast = torch.is_grad_enabled(), _autocast()
        flagged = [m for m, path in self.submodule_paths.items() if m is root or not self.is_leaf_module(m, path)]
        for module in flagged:
            self._flag_mode(module)
        before = containers_of(root)
        try:
            with patched(self):
                args, kwargs = inputs(self)
                result = self._by_mode(root, function, args, kwargs, len(self._created))
                self._refuse_changed(root, before)
        finally:
            for module in flagged:
                module.__dict__["training"] = int(module.__dict__["training"]) != 0
        return self.graph, result

    def _flag_mode(self, module: nn.Module) -> None:
        flag = ModeFlag(module.training)
        flag.tracer = self
        module.__dict__["training"] = flag

    def place(self, name: str, value: Any, default: Any = ()) -> ValueProxy:
        """A placeholder whose value is ``value``."""
        proxy = self.create_proxy("placeholder", name, default, {}, name=name)
        if value is not UNKNOWN:
            self.values[proxy.node] = value
        if isinstance(value, torch.Tensor):
            self.memory.of_input(value)
        return proxy

    # ---- nodes and their values

    def proxy(self, node: fx.Node) -> ValueProxy:
        return ValueProxy(node, self)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.is_grad_enabled() is not self._starts_with_grad:
            raise Refusal(
                "it switches gradients on or off for a part of its forward", "let the caller switch gradients"
            )
        if _autocast() != self._starts_with_autocast:
            raise Refusal("it opens an autocast block", "open autocast around the whole model")
        node = super().create_node(kind, *args, **kwargs)
        node.meta["module_path"] = self.scope.module_path
        node.meta["source"] = user_line()
        node.meta.pop("nn_module_stack", None)
        self._created.append(node)
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, ModeFlag):
            return self.flag_node()
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, torch.Tensor):
            return self.node_of(a)
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        if not self.paused:
            self.memory.refuse_stale(target, args, kwargs)
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if kind == "placeholder" or self.fake is None:
            return proxy
        try:
            value = self._evaluate(proxy.node)
        except Exception:
            self.erase_since(len(self._created) - 1)
            raise
        if value is UNKNOWN:
            value = self._unseen(proxy.node)
        if value is not UNKNOWN:
            self.values[proxy.node] = value
        self._write_back(proxy.node)
        if value is None and target is operator.getitem:
            self.erase_since(len(self._created) - 1)
            return None
        return self._open(proxy, value) if kind == "call_module" else proxy

    def _unseen(self, node: fx.Node) -> Any:  # follows what a node writes whose value is not known
        module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        first = node.args[0] if node.args else None
        operand = self.values.get(first, UNKNOWN) if isinstance(first, fx.Node) else UNKNOWN
        return self.memory.note_unseen(node, module if module not in self.leaves else None, operand)

    def _evaluate(self, node: fx.Node) -> Any:
        args, kwargs = value_of(node.args, self.values), value_of(dict(node.kwargs), self.values)
        if contains_unknown(args) or contains_unknown(kwargs):
            return UNKNOWN
        function: Any = node.target
        module = None
        if node.op == "call_method":
            function, args = getattr(args[0], str(node.target)), args[1:]
        elif node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            function = functools.partial(in_eval_mode, module)
            if module in self.leaves:
                function = functools.partial(run_as_it_is, module, self.changed)
                self.calls[node] = {}
                self._running.append((module, self.calls[node]))
        before = versions((args, kwargs, getattr(function, "__self__", None)))
        try:
            with self.pausing():
                assert self.fake is not None
                try:
                    value = self.fake(function, args, kwargs)
                finally:
                    self._running.clear()
        except _NEEDS_DATA:
            return UNKNOWN
        except NotImplementedError:
            return UNKNOWN
        except Exception:
            if module is not None and module in self.leaves:
                return UNKNOWN
            raise
        with self.pausing():
            first = self.values.get(node.all_input_nodes[0]) if node.args and node.all_input_nodes else None
            target = first if isinstance(first, torch.Tensor) else None
            self.memory.note_writes(node, target, [t for t, version in before if t._version != version])
            self.memory.note_copy(node, module, target, value)
            self.memory.note_names(node, value)
        return value

    def _write_back(self, node: fx.Node) -> None:
        """What was written through ``x[k]`` is assigned to ``x[k]``: no change, but now the graph tells of it."""
        view = node.args[0] if node.meta.get("writes") == "value" and node.target is not operator.setitem else None
        if isinstance(view, fx.Node) and view.target is operator.getitem and isinstance(view.args[0], fx.Node):
            whole, key = view.args
            value, proxy = self.values.get(view.args[0]), cast(Any, self.proxy)
            if isinstance(value, torch.Tensor) and shares_memory(self.values.get(view), value, key, self.values):
                again = (proxy(whole), fx.map_arg(key, proxy), proxy(node))
                with self.memory.assigned_back(value):
                    self.create_proxy("call_function", operator.setitem, again, {})

    def _open(self, proxy: ValueProxy, value: Any) -> Any:
        """A module's structured result as the container it is, with proxies of its parts."""
        if type(value) in (list, tuple):
            return type(value)(self._part(proxy, i, item) for i, item in enumerate(value))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._part(proxy, i, item) for i, item in enumerate(value)))
        if isinstance(value, dict):
            parts = {key: self._part(proxy, key, item) for key, item in value.items()}
            if hasattr(value, "__dataclass_fields__"):
                return type(value)(**parts)
            return type(value)(parts) if type(value) is not dict else parts
        return proxy

    def _part(self, proxy: ValueProxy, key: Any, value: Any) -> Any:
        if value is None or isinstance(value, (bool, str)):
            return value
        part = self.create_proxy("call_function", operator.getitem, (proxy, key), {})
        return self._open(part, value)

    # ---- taking back

    def erase_since(self, mark: int) -> None:
        """Take back every node made since there were ``mark``."""
        while len(self._created) > mark:
            node = self._created.pop()
            self.values.pop(node, None)
            self.calls.pop(node, None)
            self.plain.pop(str(node.target), None)
            if node.op == "get_attr":
                self._parameters.pop(str(node.target), None)
            if node is self.flag:
                self.flag = None
            self._checked = {pair for pair in self._checked if pair[0] is not node}
            node.graph.erase_node(node)
            node.graph._graph_namespace._used_names.discard(node.name)  # so that the next one has its name

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Inside, code runs as itself: nothing is traced."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    # ---- calls

    def flag_node(self) -> fx.Node:
        """The node that answers ``self.training`` at run time."""
        if self.flag is None:
            inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
            with self.graph.inserting_after(inputs[-1]) if inputs else self.graph.inserting_before():
                self.flag = self.create_node("call_module", "training_flag", (), {})
            self.values[self.flag] = int(self.root.training) != 0
        return self.flag

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in KEPT_CLASSES:
            return True
        if isinstance(m, nn.Sequential):
            return False
        if isinstance(m, COMPOSED):
            return self.fake is None
        return type(m).__module__.startswith(("torch.nn", "torch.ao.nn"))

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.paused:
            return self._watch(m, forward, args, kwargs)
        if m not in (self.submodule_paths or {}) and isinstance(m, (nn.Sequential, nn.ModuleList)):
            return forward(*args, **kwargs)  # a slice of layers, made in forward
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path) and not self._computes_from_sizes(m, args, kwargs):
            self.hooked = self.hooked or bool(m._forward_hooks or m._forward_pre_hooks)
            with self._inside(m, path):
                return self.create_proxy("call_module", path, args, kwargs)
        if m in self.leaves:
            return self._as_leaf(m, path, args, kwargs)
        mark, names, before = len(self._created), self.memory.state(), containers_of(m)
        known, given = set(self.leaves), [(container, items) for _, container, items in containers_in((args, kwargs))]
        try:
            refuse_hooks(m)
            with self._inside(m, path):
                result = self._by_mode(m, forward, args, kwargs, mark)
            self._refuse_changed(m, before)
            return result
        except Exception as error:
            self.erase_since(mark)
            self.memory.restore(names)
            put_back([*before, *given])
            for part in set(self.leaves) - known:  # to be tried again, with what they are given in a real run
                del self.leaves[part]
            self.leaves[m] = Island.of(error, self._absolute(path))
            return self._as_leaf(m, path, args, kwargs)

    def _computes_from_sizes(self, m: nn.Module, args: Any, kwargs: Any) -> bool:
        """Whether a transposed convolution is to find its ``output_padding`` from the size that it is to give."""
        given = (*args[1:2], kwargs.get("output_size"))
        asked = self.fake is not None and hasattr(m, "output_padding") and any(size is not None for size in given)
        return asked and not m._forward_hooks and not m._forward_pre_hooks

    def _watch(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Note the calls that an island makes while its own code runs on fake tensors."""
        if not self._running:
            return forward(*args, **kwargs)
        caller, calls = self._running[-1]
        calls.setdefault(m, []).append(Call(args, kwargs, caller))
        self._running.append((m, calls))
        try:
            return forward(*args, **kwargs)
        finally:
            self._running.pop()

    def _absolute(self, path: str) -> str:
        return f"{self.prefix}.{path}" if self.prefix else path

    def _as_leaf(self, m: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        with self._inside(m, path):
            result = self.create_proxy("call_module", path, args, kwargs)
        for container in self.changed.pop(m, ()):
            given: Any = functools.reduce(operator.getitem, container, (args, kwargs))
            for key in list(given) if isinstance(given, dict) else range(len(given)):
                given[key] = Spoilt()
        return result

    @contextmanager
    def _inside(self, m: nn.Module, path: str) -> Iterator[None]:
        before = self.scope.module_path, self.scope.module_type
        self.scope.module_path, self.scope.module_type = path, type(m)
        try:
            yield
        finally:
            self.scope.module_path, self.scope.module_type = before

    def _by_mode(self, m: nn.Module, forward: Any, args: Any, kwargs: Any, mark: int) -> Any:
        """Trace ``forward``; where it asks for the mode, trace it in both and merge what differs only by the mode."""
        before, self._override = self._override, None
        mark = len(self._created)
        try:
            return forward(*args, **kwargs)
        except ModeAskedError:
            self.erase_since(mark)
            self._override = True
            result = forward(*args, **kwargs)
            made = self._created[mark:]
            counting = counting_nodes(made, set(self.plain))
            record = record_of(result, [node for node in made if node not in counting])
            self.erase_since(mark)
            self._override = False
            result = forward(*args, **kwargs)
            if not merge_modes(self, record, record_of(result, self._created[mark:]), self._created[mark:]):
                raise ModeAskedError from None
            return result
        finally:
            self._override = before

    def _refuse_changed(self, m: nn.Module, before: list[tuple[Any, Any]]) -> None:
        if any(differs(container, items) for container, items in before):
            put_back(before)
            raise Refusal(
                f"its forward changes a list or dict that {type(m).__name__} keeps", "build a new one in each call"
            )


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
