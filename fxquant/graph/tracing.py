"""The tracer: runs a module's forward on proxies and writes down a graph.

Differences from ``torch.fx.Tracer``:

- proxies carry fake-tensor values, so that Python's questions about shapes get answers (`proxies`, `specialization`);
- a submodule that cannot be traced is called as it is, and becomes an *island*; what was traced of it is taken back;
- functions marked with ``torch.fx.wrap``, attention and checkpointed functions are looked into;
- writes in place are followed through views, by the version counters of the fake tensors.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_leaves

from fxquant.graph.modes import merge_modes, record_of
from fxquant.graph.patches import patched
from fxquant.graph.proxies import ModeFlag, ParameterProxy, Spoilt, Untraceable, ValueProxy, find_proxy
from fxquant.graph.calls import Call
from fxquant.graph.findings import Island, Specialization, expression, is_users, require
from fxquant.graph.values import UNKNOWN, FakeRun, containers_of, differs, unchanged, versions

__all__ = ["ModeAsked", "Tracer", "TrainingFlag", "user_line"]

_COMPOSED = (nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer,
             nn.TransformerDecoder, nn.TransformerDecoderLayer)  # fmt: skip
_NEEDS_DATA = (DataDependentOutputException, DynamicOutputShapeException)


class TrainingFlag(nn.Module):
    """Answers, at run time, whether the model is in training mode: what ``self.training`` was in the user's code."""

    def forward(self) -> bool:
        return self.training


class ModeAsked(Untraceable):
    """Python asked for ``self.training`` while tracing a model that will be trained."""

    def __init__(self) -> None:
        super().__init__(
            "it does something else in training than in eval mode",
            "pass self.training as an argument (F.dropout(x, training=self.training)) instead of branching on it",
        )


class Tracer(fx.Tracer):
    """Traces one module, with facts on every node.

    Args:
        fake: runs values along; None traces without values.
        leaves: modules that are called as they are, and why. Grows with every submodule that cannot be traced.
        for_training: keep ``self.training`` a question; otherwise it is answered, and the answer recorded.
        prefix: the module's path in the model, for messages.
    """

    def __init__(self, fake: FakeRun | None, leaves: dict[nn.Module, Island], *, for_training: bool, prefix: str) -> None:
        super().__init__()
        self.fake, self.leaves, self.for_training, self.prefix = fake, leaves, for_training, prefix
        self.values: dict[fx.Node, Any] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.flag: fx.Node | None = None
        self.asked_mode: str | None = None
        self.calls: dict[fx.Node, dict[nn.Module, list[Call]]] = {}
        self._running: list[tuple[nn.Module, dict[nn.Module, list[Call]]]] = []
        self.changed: dict[nn.Module, list[Any]] = {}
        self.uses_ranks = False
        self.paused = False
        self.hooked = False
        self._override: bool | None = None
        self._created: list[fx.Node] = []
        self._checked: set[tuple[fx.Node, bool]] = set()
        self._names: dict[int, set[fx.Node]] = {}
        self._parameters: dict[str, ValueProxy] = {}
        self._paths: dict[int, str] = {}
        self._owned: set[int] = set()
        self._inputs: set[int] = set()
        self._kept: list[torch.Tensor] = []
        self._starts_with_grad, self._starts_with_autocast = True, False

    # ---- the whole trace

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        raise NotImplementedError("use run")

    def run(self, root: nn.Module, function: Callable[..., Any], inputs: Callable[[Tracer], Any]) -> tuple[fx.Graph, Any]:
        """Trace ``function(*args, **kwargs)``, which runs code of ``root``.

        ``inputs`` makes the arguments, with placeholders in them. Returns the graph, without an output node, and what
        the function returned.
        """
        self.root, self.graph = root, fx.Graph()
        self.tensor_attrs: dict[Any, str] = {}
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self._collect(root)
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

    def _collect(self, root: nn.Module) -> None:
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            self._paths[id(tensor)] = name
        for prefix, module in root.named_modules():
            for name, value in module.__dict__.items():
                if isinstance(value, torch.Tensor):
                    self.tensor_attrs[value] = f"{prefix}.{name}" if prefix else name

    def place(self, name: str, value: Any, default: Any = ()) -> ValueProxy:
        """A placeholder whose value is ``value``."""
        proxy = self.create_proxy("placeholder", name, default, {}, name=name)
        if value is not UNKNOWN:
            self.values[proxy.node] = value
        if isinstance(value, torch.Tensor):
            self._inputs.add(self._key(value))
        return proxy

    # ---- nodes and their values

    def proxy(self, node: fx.Node) -> ValueProxy:
        return ValueProxy(node, self)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.is_grad_enabled() is not self._starts_with_grad:
            raise Untraceable(
                "it switches gradients on or off for a part of its forward", "let the caller switch gradients"
            )
        if _autocast() != self._starts_with_autocast:
            raise Untraceable("it opens an autocast block", "open autocast around the whole model")
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
            return self._tensor(a)
        return super().create_arg(a)

    def _tensor(self, tensor: torch.Tensor) -> fx.Node:
        """A parameter, buffer or attribute by its path; any other tensor is kept as a constant of the graph."""
        path = self._paths.get(id(tensor)) or self.tensor_attrs.get(tensor)
        if path is None:
            path = next((name for name, kept in self.constants.items() if kept is tensor), None)
        if path is None and self.hooked:
            raise Untraceable("it reads a tensor that a hook may have put there", "return what the hook keeps")
        if path is None:
            path = f"_tensor_constant{len(self.constants)}"
            self.constants[path] = tensor
        return self._parameter(path, tensor).node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        self._refuse_stale(target, args, kwargs)
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if kind == "placeholder" or self.fake is None:
            return proxy
        try:
            value = self._evaluate(proxy.node)
        except Exception:
            self._erase_since(len(self._created) - 1)
            raise
        if value is not UNKNOWN:
            self.values[proxy.node] = value
        if value is None and target is operator.getitem:
            self._erase_since(len(self._created) - 1)
            return None
        return self._open(proxy, value) if kind == "call_module" else proxy

    def _evaluate(self, node: fx.Node) -> Any:
        args, kwargs = self._value_of(node.args), self._value_of(dict(node.kwargs))
        if _contains_unknown(args) or _contains_unknown(kwargs):
            return UNKNOWN
        function, module = node.target, None
        if node.op == "call_method":
            function, args = getattr(args[0], str(node.target)), args[1:]
        elif node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            function = functools.partial(_evaluated, module)
            if module in self.leaves:
                function = functools.partial(_as_it_is, module, self.changed)
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
            self._note_writes(node, [t for t, version in before if t._version != version])
            self._note_names(node, value)
        return value

    def _value_of(self, arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return self.values.get(arg, UNKNOWN)
        if isinstance(arg, slice):
            return slice(self._value_of(arg.start), self._value_of(arg.stop), self._value_of(arg.step))
        if isinstance(arg, tuple):
            items = [self._value_of(item) for item in arg]
            return type(arg)(*items) if hasattr(arg, "_fields") else tuple(items)
        if isinstance(arg, list):
            return [self._value_of(item) for item in arg]
        if isinstance(arg, dict):
            return {key: self._value_of(item) for key, item in arg.items()}
        return arg

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

    def _erase_since(self, mark: int) -> None:
        while len(self._created) > mark:
            node = self._created.pop()
            self.values.pop(node, None)
            self.calls.pop(node, None)
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

    # ---- memory

    def _key(self, tensor: torch.Tensor) -> int:
        """Names a tensor's memory for as long as the trace lasts: kept, lest its address be given away again."""
        self._kept.append(tensor)
        return _memory(tensor)

    def _note_writes(self, node: fx.Node, written: list[torch.Tensor]) -> None:
        if not written:
            return
        target = node.args[0] if node.args else None
        value = self.values.get(target) if isinstance(target, fx.Node) else None
        if any(t is not value for t in written if not _same_memory(t, value)) or value is None:
            raise Untraceable(f"{node.target} writes into one of its arguments", "return the result instead")
        key = self._key(value)
        if node.target is operator.setitem and self._names.get(key, set()) & set(node.all_input_nodes[-1:]):
            self._names[key] = set()  # y[k] += v: what was written through y[k] is written into y again
        self._names[key] = {*self._names.get(key, ()), target, node}  # type: ignore[arg-type]
        node.meta["writes"] = "attribute" if key in self._owned else "input" if key in self._inputs else "value"

    def _note_names(self, node: fx.Node, value: Any) -> None:
        if not self._names:
            return
        for tensor, _ in versions(value):
            names = self._names.get(_memory(tensor))
            if names is not None:
                names.add(node)

    def _refuse_stale(self, target: Any, args: Any, kwargs: Any) -> None:
        """Refuse to read memory under a name that it had before it was written under another."""
        if not self._names or self.paused:
            return
        proxies = [a for a in tree_leaves((args, kwargs)) if issubclass(type(a), ValueProxy)]
        for proxy in proxies:
            value = proxy.value
            names = self._names.get(_memory(value)) if isinstance(value, torch.Tensor) else None
            if names is None or proxy.node in names:
                continue
            if target is operator.setitem and proxy is proxies[0] and proxies[-1].node in names:
                continue
            raise Untraceable(
                f"{proxy.node.name} is read after its memory was written in place under another name",
                "write out of place, as y = f(x) instead of an in-place call",
            )

    # ---- questions that Python asks

    def mode(self, flag: ModeFlag) -> bool:
        """The answer to ``if self.training``."""
        if self.paused:
            return int(flag) != 0
        if not self.for_training:
            self.asked_mode = self.asked_mode or f"{self._here() or 'the top module'}, {user_line()}"
            return int(flag) != 0
        if self._override is None:
            raise ModeAsked
        return self._override

    def rank(self, value: Any) -> int:
        """A number of dimensions: concrete, and checked where inputs enter."""
        self.uses_ranks = True
        return len(value) if isinstance(value, torch.Size) else value.dim()

    def length(self, proxy: ValueProxy) -> int:
        """``len(x)``, written down as a specialization."""
        value = proxy.value
        if value is UNKNOWN:
            raise Untraceable("it needs a length that depends on data", "keep the number of elements fixed")
        if isinstance(value, torch.Size):
            return self.rank(value)
        if isinstance(value, torch.Tensor):
            asked = self.create_proxy("call_method", "size", (proxy, 0), {})
        else:
            asked = self.create_proxy("call_function", len, (proxy,), {})
        return self.concrete(asked, int)

    def concrete(self, proxy: ValueProxy, kind: Any) -> Any:
        """The value of a number or shape, written down as a specialization.

        Raises:
            Untraceable: it depends on data.
        """
        value = proxy.value
        if value is UNKNOWN or isinstance(value, torch.Tensor):
            what = "the truth of" if kind is bool else "a number from"
            if self.fake is None:
                raise Untraceable(
                    f"Python needs {what} {expression(proxy.node)}", "give example_inputs, from which shapes are known"
                )
            raise Untraceable(
                f"Python needs {what} {expression(proxy.node)}, which depends on data",
                "compute with tensors (torch.where) instead of branching on values",
            )
        answer = value if kind is None else kind(value)
        if kind is bool and isinstance(value, (torch.Size, list, tuple, dict)):
            return answer
        if not self.paused:
            self._check(proxy.node, answer, exact=kind is not bool)
        return answer

    def _check(self, node: fx.Node, answer: Any, *, exact: bool) -> None:
        if (node, exact) in self._checked:
            return
        self._checked.add((node, exact))
        text, path, source = f"{expression(node)} is {answer}", self._here(), user_line()
        check = self.create_node("call_function", require, (node, answer, text, path, source), {})
        check.meta["specialization"] = Specialization(path, text, source, exact)

    def _here(self) -> str:
        return ".".join(part for part in (self.prefix, self.scope.module_path) if part)

    # ---- attributes

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
            self._owned.add(self._key(self.values[proxy.node]))
            self._parameters[path] = proxy
        return self._parameters[path]

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Refuse that forward changes an attribute: a graph has no place to keep it."""
        missing = object()
        old = getattr_quietly(module, name, missing)
        if find_proxy(value) is None and (old is value or (type(old) is type(value) and _equal(old, value))):
            return
        raise Untraceable(
            f"its forward changes {type(module).__name__}.{name}", "return the value, or write into a buffer in place"
        )

    def flag_node(self) -> fx.Node:
        """The node that answers ``self.training`` at run time."""
        if self.flag is None:
            inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
            with self.graph.inserting_after(inputs[-1]) if inputs else self.graph.inserting_before():
                self.flag = self.create_node("call_module", "training_flag", (), {})
            self.values[self.flag] = int(self.root.training) != 0
        return self.flag

    # ---- calls

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Sequential):
            return False
        if isinstance(m, _COMPOSED):
            return self.fake is None
        return type(m).__module__.startswith(("torch.nn", "torch.ao.nn"))

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.paused:
            return self._watch(m, forward, args, kwargs)
        if m not in self.submodule_paths and isinstance(m, (nn.Sequential, nn.ModuleList)):
            return forward(*args, **kwargs)  # a slice of layers, made in forward
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            self.hooked = self.hooked or bool(m._forward_hooks or m._forward_pre_hooks)
            with self._inside(m, path):
                return self.create_proxy("call_module", path, args, kwargs)
        if m in self.leaves:
            return self._as_leaf(m, path, args, kwargs)
        mark, names, before = len(self._created), {k: set(v) for k, v in self._names.items()}, containers_of(m)
        known, given = set(self.leaves), [(container, items) for _, container, items in _containers((args, kwargs))]
        try:
            _refuse_hooks(m)
            with self._inside(m, path):
                result = self._by_mode(m, forward, args, kwargs, mark)
            self._refuse_changed(m, before)
            return result
        except Exception as error:
            self._erase_since(mark)
            self._names = names
            _put_back([*before, *given])
            for part in set(self.leaves) - known:  # to be tried again, with what they are given in a real run
                del self.leaves[part]
            self.leaves[m] = Island.of(error, self._absolute(path))
            return self._as_leaf(m, path, args, kwargs)

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
            given = _at((args, kwargs), container)
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
        except ModeAsked:
            self._erase_since(mark)
            self._override = True
            record = record_of(forward(*args, **kwargs), self._created[mark:])
            self._erase_since(mark)
            self._override = False
            result = forward(*args, **kwargs)
            if not merge_modes(self, record, record_of(result, self._created[mark:]), self._created[mark:]):
                raise ModeAsked from None
            return result
        finally:
            self._override = before

    def _refuse_changed(self, m: nn.Module, before: list[tuple[Any, Any]]) -> None:
        if any(differs(container, items) for container, items in before):
            _put_back(before)
            raise Untraceable(
                f"its forward changes a list or dict that {type(m).__name__} keeps", "build a new one in each call"
            )

    def call_torch(self, function: Any, args: Any, kwargs: Any) -> Any:
        """A torch function that was given a proxy."""
        if function is torch.nn.functional.multi_head_attention_forward and self.fake is not None:
            with _as_plain_function():
                return function(*args, **kwargs)
        name = getattr(function, "__name__", str(function))
        if torch.overrides.is_tensor_method_or_property(function):
            if name == "__get__":
                return getattr(args[0], function.__self__.__name__)
            return self.create_proxy("call_method", name, args, kwargs)
        return self.create_proxy("call_function", function, args, kwargs, name=self.graph._target_to_str(name))

    def call_wrapped(self, function: Any, args: Any, kwargs: Any) -> Any:
        """A function marked with ``torch.fx.wrap``: looked into if that works."""
        if self.paused or find_proxy((args, kwargs)) is None:
            return function(*args, **kwargs)
        mark, names = len(self._created), {k: set(v) for k, v in self._names.items()}
        if self.fake is not None:
            try:
                return function(*args, **kwargs)
            except Exception:
                self._erase_since(mark)
                self._names = names
        return self.create_proxy("call_function", function, args, kwargs)


def getattr_quietly(module: nn.Module, name: str, missing: Any) -> Any:
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


def _put_back(before: list[tuple[Any, Any]]) -> None:
    for container, items in before:
        if differs(container, items):
            container.clear()
            container.update(items) if isinstance(items, dict) else container.extend(items)


def _evaluated(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a layer gives in eval mode: of the same shape, and without statistics being taken."""
    before, module.training = module.training, False
    try:
        return module.forward(*args, **kwargs)
    finally:
        module.training = before


def _as_it_is(module: nn.Module, changed: dict[nn.Module, list[Any]], *args: Any, **kwargs: Any) -> Any:
    """Run a module's own code; which of the lists and dicts that it is given it changes is noted in ``changed``."""
    before = list(_containers((args, kwargs)))
    try:
        with unchanged(module):
            for part in module.modules():
                part.__dict__["training"] = int(part.training) != 0
            return module.forward(*args, **kwargs)
    finally:
        changed[module] = [path for path, container, items in before if differs(container, items)]


def _containers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Every list and dict inside ``value`` by its path, with a copy of what it holds."""
    if type(value) in (list, dict):
        yield path, value, value.copy()
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _containers(item, (*path, i))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _containers(item, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _refuse_hooks(m: nn.Module) -> None:
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        hooks = [hook for hook in getattr(m, kind).values() if kind.startswith("_backward") or not _keeps_nothing(hook)]
        if hooks:
            names = ", ".join(getattr(hook, "__name__", type(hook).__name__) for hook in hooks)
            raise Untraceable(f"it has hooks ({names}), which run as they are", "remove the hooks before prepare")


def _keeps_nothing(hook: Any) -> bool:
    """Whether a hook is a function with nothing at hand to keep what it sees in: then it is traced like forward."""
    if not isinstance(hook, FunctionType):
        return False
    held = [cell.cell_contents for cell in hook.__closure__ or ()]
    held += [hook.__globals__.get(name) for name in hook.__code__.co_names]
    return not any(isinstance(value, (list, dict, set, torch.Tensor, nn.Module)) for value in held)


@contextmanager
def _as_plain_function() -> Iterator[None]:
    """Let ``multi_head_attention_forward`` run its Python on proxies instead of handing itself over whole."""
    space: Any = torch.nn.functional
    asked = space.has_torch_function
    space.has_torch_function = lambda tensors: False
    try:
        yield
    finally:
        space.has_torch_function = asked


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


def _contains_unknown(value: Any) -> bool:
    if value is UNKNOWN:
        return True
    if isinstance(value, (list, tuple)):
        return any(_contains_unknown(item) for item in value)
    if isinstance(value, dict):
        return any(_contains_unknown(item) for item in value.values())
    if isinstance(value, slice):
        return any(part is UNKNOWN for part in (value.start, value.stop, value.step))
    return False


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _same_memory(a: torch.Tensor, b: Any) -> bool:
    return isinstance(b, torch.Tensor) and _memory(a) == _memory(b)


def user_line() -> str | None:
    """``file:line`` of the innermost frame that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if is_users(name):
            return f"{name}:{frame.f_lineno}"
        if frame.f_code is Tracer.run.__code__:
            return None
        frame = frame.f_back  # type: ignore[assignment]
    return None

