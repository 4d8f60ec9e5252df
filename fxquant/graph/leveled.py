"""A ``torch.fx.GraphModule`` that knows its level and keeps the facts of its nodes through copying and pickling.

fx pickles a graph module as source code and traces that again, which drops ``node.meta`` and may reorder nodes. Here the
nodes themselves are written, so that a model read from disk prints the same diff as the one that was saved.

What is known of a node stands in ``node.meta``, written by capture and the passes: ``module_path``, where in the
user's model it was called; ``source``, that call's ``file:line``; ``shape`` and ``dtype`` where an example was run;
``notes``, what passes declined to do and why; ``absorbed``, the names of nodes that this one does too now, each with
``folded`` or ``merged``; ``by``, the pass that made it; ``origin``, the user's nodes it stands for.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxquant.errors import LevelError, SpecializationError
from fxquant.graph.transforms import inside_transform, lent_buffers, without_aliases

__all__ = ["LEVELS", "Container", "ISLAND_MARK", "RUNNER", "LeveledModule", "is_container"]

ISLAND_MARK = "_fxquant_island"
"""The attribute that tells of a module that it could not be traced, and why."""

RUNNER = "_fxquant_runner"
"""The attribute that runs the calls of a graph some other way, or declines; see ``kernels.runner``."""

LEVELS = ("captured", "canonical", "prepared", "frozen", "integer", "qdq", "decomposed")

_NOT_CALLED = (
    "this part of a model is no module any more that is called: its ops stand in the graph of the whole model.\n"
    "  what to do: call the whole model; put hooks on the layers in it, which the graph calls; take features out of a "
    "model (IntermediateLayerGetter, create_feature_extractor) before fxquant.prepare."
)

_NAMESPACES = (torch, torch.nn.functional, torch.Tensor, operator, math, torch.linalg, torch.special)


class Holder(nn.Module):
    """Asks a module of a graph what stands there when another is put in its place (``replaced_by``)."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self._settled(name, value))

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, self._settled(name, module))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, but that a tensor has one name, the first; what several modules share is loaded into all of them."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for names in self._shared():
            present = [f"{prefix}{name}" for name in names if f"{prefix}{name}" in state]
            for key in present[1:]:
                del state[key]
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for names in self._shared():
            keys = [f"{prefix}{name}" for name in names]
            given = next((state_dict[key] for key in keys if key in state_dict), None)
            if given is not None:
                for key in keys:
                    state_dict.setdefault(key, given)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _shared(self) -> list[list[str]]:
        """The names of each tensor that has more than one."""
        found: dict[int, list[str]] = {}
        for named in (
            nn.Module.named_parameters,
            nn.Module.named_buffers,
        ):  # with the aliases that a graph's own leave out
            for name, tensor in named(self, remove_duplicate=False):
                found.setdefault(id(tensor), []).append(name)
        return [names for names in found.values() if len(names) > 1]

    def _settled(self, name: str, value: Any) -> Any:
        old = self.__dict__.get("_modules", {}).get(name)
        if old is None or value is old or not hasattr(type(old), "replaced_by"):
            return value
        return old.replaced_by(value, name)


class Container(Holder):
    """Holds a graph's modules where a module of the user's stood, and has that module's attributes and methods."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the ops of this part stand in the graph, which runs them itself."""
        raise LevelError(_NOT_CALLED)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: it would never be called."""
        raise LevelError(_NOT_CALLED)

    register_forward_pre_hook = register_full_backward_hook = register_full_backward_pre_hook = register_forward_hook

    def __getattr__(self, name: str) -> Any:
        return _answer(self, name, super().__getattr__)


def _answer(part: nn.Module, name: str, own: Callable[[str], Any]) -> Any:
    """An attribute of ``part``, or of the class that it stands for."""
    try:
        return own(name)
    except AttributeError:
        stands_for = part.__dict__.get("stands_for_class")
        found = inspect.getattr_static(stands_for, name, None) if stands_for is not None else None
        if found is None:
            raise
        return found.__get__(part, stands_for) if hasattr(found, "__get__") else found


def is_container(part: nn.Module) -> bool:
    """Whether ``part`` was made to hold others: by fx, or by us."""
    return type(part) in (nn.Module, Container)


class LeveledModule(Holder, fx.GraphModule):
    """What every pass takes and gives: a graph, its modules, and the level whose laws it obeys.

    Attributes:
        level: one of ``LEVELS``.
        settings: what the graph was made with (recipe, mode, input shapes); plain data that is saved with the model.
    """

    def __init__(self, root: nn.Module | dict[str, Any], graph: fx.Graph, class_name: str = "LeveledModule") -> None:
        super().__init__(root, graph, class_name)
        self.meta.update(getattr(root, "meta", {}) if isinstance(root, nn.Module) else {})
        if isinstance(root, nn.Module):
            self.adopt_order(root)

    def adopt_order(self, source: nn.Module) -> None:
        """Order parameters and submodules as in ``source``, so that an optimizer's state still loads; new ones come last.

        fx makes containers anew and fills them in the order of use.
        """
        containers = dict(source.named_modules(remove_duplicate=False))
        for path, part in self.named_modules():
            if path in containers and (part is self or is_container(part)):
                for registry in ("_modules", "_parameters", "_buffers"):
                    given, own = list(containers[path].__dict__[registry]), part.__dict__[registry]
                    names = [n for n in given if n in own] + [n for n in own if n not in given]
                    part.__dict__[registry] = {name: own[name] for name in names}
                part._non_persistent_buffers_set.update(
                    containers[path]._non_persistent_buffers_set & set(part._buffers)
                )
                if isinstance(source, LeveledModule):
                    _take_attributes(part, containers[path])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on a call as the user's forward takes it."""
        spec = self.meta.get("call")
        if spec is None:
            return super().__call__(*args, **kwargs) if kwargs else self._run(args)
        if self.training and spec.asks_mode:
            raise SpecializationError(
                f"this model was captured in eval mode, and its code does something else in training mode "
                f"({spec.asks_mode}).\n"
                "  what to do: call .eval() on it, or prepare with qat=True to train it."
            )
        return spec.restore(self._run(spec.bind(args, kwargs)))

    def _run(self, inputs: Sequence[Any]) -> Any:
        """The graph's result, by the program that a runner holds for such inputs, if there is one."""
        if inside_transform():
            with lent_buffers(self):
                return super().__call__(*inputs)
        runner = self.__dict__.get(RUNNER)
        if runner is not None and not self._forward_hooks and not self._forward_pre_hooks:
            taken, result = runner(self, inputs)
            if taken:
                return result
        return super().__call__(*inputs)

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        """As torch's, but that a quantizer has one name also where duplicates are asked for; see ``graph.transforms``."""
        return without_aliases(self, super().named_parameters(prefix, recurse, remove_duplicate), prefix)

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        """As ``named_parameters``."""
        return without_aliases(self, super().named_buffers(prefix, recurse, remove_duplicate), prefix)

    def train(self, mode: bool = True) -> Any:
        """As torch's; the quantizers follow the mode of the graph and not that of the part they stand in."""
        super().train(mode)
        for part in self.modules():
            if getattr(part, "follows_graph", False):
                part.training = mode
        return self

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the graph takes ``num_items_in_batch``: Hugging Face's ``Trainer`` asks before it passes it.

        It does where the example had it; else the trainer divides losses itself.
        """
        spec = self.meta.get("call")
        return spec is not None and spec.takes("num_items_in_batch")

    def _forget(self) -> None:
        if RUNNER in self.__dict__:
            self.__dict__[RUNNER].forget()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def recompile(self) -> Any:
        """Make the graph's code anew after it was changed."""
        self._forget()
        return super().recompile()

    def __getattr__(self, name: str) -> Any:
        return _answer(self, name, super().__getattr__)

    def keep_unused(self, owner: nn.Module) -> None:
        """Keep what the graph does not use, and second names of what it uses, so that a float checkpoint still loads.

        Only for training: a model for inference carries nothing along that it does not need.
        """
        used = {str(node.target) for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        names = {id(part): path for path, part in owner.named_modules(remove_duplicate=False) if path in used}
        own = {path for path, _ in self.named_modules(remove_duplicate=False)}
        kept = self.meta.setdefault("unused", {})
        for path, part in owner.named_modules(remove_duplicate=False):
            if path in own or any(path.startswith(f"{p}.") for p in (*used, *kept)):
                continue
            holds = any(True for _ in (*part.parameters(), *part.buffers()))
            if holds and (id(part) in names or not _leads_to(path, used)):
                self._put(path, part)
                kept[path] = names.get(id(part))

    def _put(self, path: str, part: nn.Module) -> None:
        *above, name = path.split(".")
        place: nn.Module = self
        for step in above:
            if place._modules.get(step) is None:
                place._modules[step] = nn.Module()
            place = place.get_submodule(step)
        place._modules[name] = part

    def put_unused(self, source: LeveledModule) -> None:
        """Take over from ``source`` what neither graph uses; a second name follows what now has the first."""
        kept = source.meta.get("unused") or {}
        own = dict(self.named_modules(remove_duplicate=False))
        for path, first in kept.items():
            part = own.get(first) if first is not None else source.get_submodule(path)
            if part is not None and path not in own:
                self._put(path, part)

    def stand_for(self, owner: nn.Module) -> None:
        """Take over the plain attributes of the module that this is the graph of, for code that reads them."""
        self.__dict__["stands_for_class"] = type(owner)
        for path, part in self.named_modules():
            if part is self or is_container(part):
                _take_attributes(part, owner.get_submodule(path))
        plain = {id(v) for part in owner.modules() for v in part.__dict__.values() if isinstance(v, torch.Tensor)}
        kept = {id(b) for part in owner.modules() for n, b in part._buffers.items() if n not in _fleeting(part)}
        for part in self.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and (id(buffer) in plain or id(buffer) not in kept):
                    part._non_persistent_buffers_set.add(name)

    @property
    def level(self) -> str:
        return self.meta.get("level", "captured")

    @property
    def settings(self) -> dict[str, Any]:
        return self.meta.setdefault("settings", {})

    def __deepcopy__(self, memo: Any) -> LeveledModule:
        twin: LeveledModule = LeveledModule.__new__(LeveledModule)
        memo[id(self)] = twin  # before its parts are copied, which may hold it: hooks, methods of islands
        nn.Module.__init__(twin)
        twin.__class__.__name__ = self.__class__.__name__
        for name, value in self.__dict__.items():
            if name != "_graph":
                twin.__dict__[name] = copy.deepcopy(value, memo)
        twin.graph = copy.deepcopy(self.graph, memo)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        state = {k: v for k, v in self.__dict__.items() if k not in ("_graph", "_tracer_cls", "_tracer_extras")}
        return _rebuild, (self.__class__.__name__, state, [_record(node) for node in self.graph.nodes])


def _fleeting(part: nn.Module) -> set[str]:
    return part._non_persistent_buffers_set


def _take_attributes(part: nn.Module, given: nn.Module) -> None:
    """Let ``part`` have the plain attributes of ``given`` that it has none of, and its class's methods."""
    if is_container(part):
        part.__class__ = Container
        part.__dict__.setdefault("stands_for_class", given.__dict__.get("stands_for_class", type(given)))
    for name, value in given.__dict__.items():
        registries = (part.__dict__, part._modules, part._parameters, part._buffers)
        taken = (
            name in (ISLAND_MARK, RUNNER)
            or hasattr(type(part), name)
            or any(name in registry for registry in registries)
        )
        if not taken and not isinstance(value, (nn.Module, torch.Tensor)):
            part.__dict__[name] = value


def _leads_to(path: str, used: set[str]) -> bool:
    """Whether ``path`` is a container of something used, or of parameters that are."""
    return any(target.startswith(f"{path}.") for target in used)


class _Reference:
    """Stands for a node inside pickled arguments."""

    def __init__(self, name: str) -> None:
        self.name = name


def _record(node: fx.Node) -> tuple[Any, ...]:
    by_name: Any = lambda n: _Reference(n.name)  # noqa: E731
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), by_name)
    target = node.target if isinstance(node.target, str) else _function_path(node.target)
    meta = {k: v for k, v in node.meta.items() if k not in ("nn_module_stack", "stack_trace", "val")}
    return node.name, node.op, target, args, kwargs, meta


def _function_path(function: Any) -> tuple[str, str]:
    if isinstance(function, torch._ops.OpOverloadPacket):
        return "torch.ops." + function._qualified_op_name.split("::")[0], function.__name__
    for space in _NAMESPACES:
        name = getattr(function, "__name__", "")
        if getattr(space, name, None) is function:
            return (space.__module__ + ".Tensor", name) if space is torch.Tensor else (space.__name__, name)
    return function.__module__, function.__qualname__


def _function(path: tuple[str, str]) -> Any:
    module, name = path
    if module.endswith(".Tensor"):
        return getattr(torch.Tensor, name)
    if module.startswith("torch.ops."):
        return getattr(getattr(torch.ops, module.removeprefix("torch.ops.")), name)
    found: Any = __import__("builtins") if module == "_operator_builtin" else importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _rebuild(class_name: str, state: dict[str, Any], records: list[tuple[Any, ...]]) -> LeveledModule:
    graph, nodes = fx.Graph(), dict[str, fx.Node]()

    def resolve(value: Any) -> Any:
        if isinstance(value, _Reference):
            return nodes[value.name]
        if isinstance(value, dict):
            return {k: resolve(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(resolve(value.start), resolve(value.stop), resolve(value.step))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(resolve(v) for v in value))
        return type(value)(resolve(v) for v in value) if isinstance(value, (list, tuple)) else value

    for name, op, target, args, kwargs, meta in records:
        target = _function(target) if isinstance(target, tuple) else target
        node = graph.create_node(op, target, tuple(resolve(a) for a in args), resolve(dict(kwargs)), name)
        node.meta = meta
        nodes[name] = node
    module = LeveledModule.__new__(LeveledModule)
    nn.Module.__init__(module)
    module.__dict__.update(state)
    module.__class__.__name__ = class_name
    module.__dict__["_tracer_cls"], module.__dict__["_tracer_extras"] = None, {}
    module.graph = graph
    return module
