"""The only file that changes a graph.

A pass opens an ``Edit`` on the graph module it was given, changes the edit's own copy, and returns ``edit.done()``. The
given module is never touched: nodes are copied, modules and parameters are shared by reference until a pass puts a new
one in their place (see ``clone_module``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxquant.graph.leveled import LeveledModule, is_container

__all__ = ["Edit", "clone_module"]

_FINAL = ("frozen", "integer", "qdq", "decomposed")
"""Levels of a model that is used as it is: it carries nothing along that it does not need."""


def clone_module(old: nn.Module, cls: type[nn.Module] | None = None, /, **changes: Any) -> Any:
    """A new module with ``old``'s attributes, some of them changed, of ``old``'s class or its subclass ``cls``.

    Parameters, buffers, hooks and submodules not named in ``changes`` are shared with ``old``; a change may name any.
    """
    made_of: Any = cls or type(old)
    new = made_of.__new__(made_of)
    new.__dict__.update(old.__dict__)
    for registry in ("_parameters", "_buffers", "_modules"):
        new.__dict__[registry] = old.__dict__[registry].copy()
    for name, value in changes.items():
        for registry in ("_parameters", "_buffers", "_modules"):
            if name in new.__dict__[registry] and not _fits(registry, value):
                del new.__dict__[registry][name]
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter) and name in old._parameters:
            value = nn.Parameter(value, requires_grad=value.is_floating_point())
        setattr(new, name, value)
    return new


def _fits(registry: str, value: Any) -> bool:
    kind = {"_parameters": nn.Parameter, "_buffers": torch.Tensor, "_modules": nn.Module}[registry]
    return value is None or isinstance(value, kind)


class Edit:
    """A private copy of a graph module's graph, with the few ways to change it.

    Args:
        source: the graph module to start from; never touched.
        by: the pass's name, stamped on every node it makes.
    """

    def __init__(self, source: fx.GraphModule, *, by: str) -> None:
        self._source, self._by = source, by
        self.graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        output: Any = self.graph.graph_copy(source.graph, self._copies, return_output_node=True)
        if output is not None:
            value, old = output
            self._copies[old] = self.graph.output(value)
            self._copies[old].meta = dict(old.meta)
        for old, new in self._copies.items():
            new.meta = {**old.meta, "notes": list(old.meta.get("notes", ()))}
        self.attributes: dict[str, Any] = {}
        for node in self.graph.nodes:
            if node.op in ("call_module", "get_attr") and node.target not in self.attributes:
                self.attributes[node.target] = _attribute(source, node.target)
        self._paths: set[str] | None = None

    @property
    def meta(self) -> dict[str, Any]:
        """What is known of the source."""
        return self._source.meta

    @property
    def training(self) -> bool:
        """Whether the source is in training mode."""
        return self._source.training

    @property
    def parameter_dtype(self) -> torch.dtype:
        """The floating dtype of the source's parameters; float32 where it has none."""
        floats = (p.dtype for p in self._source.parameters() if p.is_floating_point())
        return next(floats, torch.float32)

    @property
    def nodes(self) -> list[fx.Node]:
        """A snapshot of the nodes in order, safe to change while walking."""
        return list(self.graph.nodes)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a ``call_module`` node calls; None for other nodes."""
        return self.attributes[str(node.target)] if node.op == "call_module" else None

    def note(self, node: fx.Node, text: str) -> None:
        """Write down, for the diff and the report, what was done or declined at ``node``."""
        notes = node.meta.setdefault("notes", [])
        if text not in notes:
            notes.append(text)
            node.meta["noted_by"] = {**node.meta.get("noted_by", {}), text: self._by}

    def unnote(self, node: fx.Node, passes: Collection[str]) -> None:
        """Take back what ``passes`` have written down at ``node``."""
        notes, by = node.meta.get("notes", ()), node.meta.pop("noted_by", {})
        node.meta["notes"] = [text for text in notes if by.get(text) not in passes]
        left = {text: name for text, name in by.items() if name not in passes}
        if left:
            node.meta["noted_by"] = left

    def absorb(self, node: fx.Node, gone: fx.Node, how: str) -> None:
        """Take ``gone`` out, which ``node`` now does too; ``how`` is ``folded`` or ``merged``. Its users read its input.

        ``gone`` stands right behind ``node``, or right before it.
        """
        node.meta["absorbed"] = [*node.meta.get("absorbed", ()), (gone.name, how)]
        source = gone.args[0]
        assert isinstance(source, fx.Node)
        self.remove(gone, source)

    def set_module(self, node: fx.Node, module: nn.Module) -> None:
        """Put ``module`` where ``node`` calls one."""
        self.attributes[str(node.target)] = module

    def call_module(
        self, node: fx.Node, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Turn ``node`` into a call of ``module`` at ``path``; its users, facts and place stay."""
        self.attributes[path] = module
        node.op, node.target, node.args, node.kwargs = "call_module", path, args, kwargs
        node.meta["by"] = self._by

    def call_function(self, node: fx.Node, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Turn ``node`` into a call of ``function``; its users, facts and place stay."""
        if (node.op, node.target, node.args, node.kwargs) == ("call_function", function, args, kwargs):
            return
        node.op, node.target, node.args, node.kwargs = "call_function", function, args, kwargs
        node.meta["by"] = self._by

    def insert_module(
        self,
        after: fx.Node,
        path: str,
        module: nn.Module,
        *,
        users: Iterable[fx.Node],
        before: fx.Node | None = None,
        **meta: Any,
    ) -> fx.Node:
        """Call ``module`` on ``after``'s value right behind it, or before ``before``; only ``users`` see the result."""
        self.attributes[path] = module
        with self.graph.inserting_after(after) if before is None else self.graph.inserting_before(before):
            node = self.graph.create_node("call_module", path, (after,), {}, name=path.replace(".", "_"))
        node.meta = {"by": self._by, "origin": [after.name], "notes": [], **meta}
        for user in list(users):
            user.replace_input_with(after, node)
        return node

    def insert_function(self, before: fx.Node, function: Any, read: fx.Node, name: str, **meta: Any) -> fx.Node:
        """Call ``function`` on the value of ``read`` right before ``before``, which alone reads the result in its place."""
        with self.graph.inserting_before(before):
            node = self.graph.create_node("call_function", function, (read,), {}, name=name)
        node.meta = {"by": self._by, "origin": [read.name], "notes": [], **meta}
        before.replace_input_with(read, node)
        return node

    def insert_attribute(self, before: fx.Node, path: str, tensor: torch.Tensor, **meta: Any) -> fx.Node:
        """Read the parameter or buffer ``path`` right before ``before``."""
        self.attributes[path] = tensor
        with self.graph.inserting_before(before):
            node = self.graph.create_node("get_attr", path, (), {}, name=path.replace(".", "_"))
        node.meta = {"by": self._by, "origin": [before.name], "notes": [], **meta}
        return node

    def remove(self, node: fx.Node, replacement: fx.Node) -> None:
        """Take ``node`` out; its users read ``replacement`` instead."""
        node.replace_all_uses_with(replacement)
        self.graph.erase_node(node)

    def fold(self, node: fx.Node, constant: fx.Node) -> None:
        """Let ``constant`` stand for ``node``, whose value it has. What only ``node`` needed is taken out with it."""
        behind = self._behind(node)
        node.replace_all_uses_with(constant)
        for step in reversed(behind):
            if not step.users and step.op != "placeholder":
                constant.meta["absorbed"] = [(step.name, "folded"), *constant.meta.get("absorbed", ())]
                self.graph.erase_node(step)

    def put_value(self, node: fx.Node, value: Any) -> None:
        """Take ``node`` out; its users are given ``value``, which is no tensor, in its place."""
        for user in list(node.users):
            user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
            user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)
        self.graph.erase_node(node)

    def redirect(self, users: Iterable[fx.Node], old: fx.Node, new: fx.Node) -> None:
        """Let ``users`` read ``new`` where they read ``old``."""
        for user in list(users):
            user.replace_input_with(old, new)

    @torch.no_grad()
    def constant(self, node: fx.Node) -> Any:
        """The value of a node that is computed from parameters and buffers alone."""
        values: dict[fx.Node, Any] = {}
        for step in self._behind(node):
            args, kwargs = fx.map_arg((step.args, dict(step.kwargs)), values.__getitem__)
            if step.op == "get_attr":
                values[step] = self.attributes[str(step.target)]
            elif step.op == "call_method":
                values[step] = getattr(args[0], str(step.target))(*args[1:], **kwargs)
            else:
                function: Any = self.module(step) if step.op == "call_module" else step.target
                values[step] = function(*args, **kwargs)
        return values[node]

    def is_constant(self, node: fx.Node) -> bool:
        """Whether ``node`` reads no input, no buffer that the graph writes, no mode, and nothing that an island makes.

        What draws random numbers passes for constant here.
        """
        behind = self._behind(node)
        if any(step.meta.get("writes") == "attribute" or "island" in step.meta for step in behind):
            return False
        if any(step.op != "get_attr" and not step.all_input_nodes for step in behind):
            return False  # an input, or a flag of the mode
        writing = [n for n in self.graph.nodes if n.meta.get("writes") == "attribute"]
        written = {step.target for n in writing for step in self._behind(n) if step.op == "get_attr"}
        return not any(step.op == "get_attr" and step.target in written for step in behind)

    def writes_into(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that write into the buffer that ``node`` reads, in order."""
        writing = [n for n in self.graph.nodes if n.meta.get("writes") == "attribute"]
        return [n for n in writing if node in self._behind(n.args[0])]

    def _behind(self, node: fx.Node) -> list[fx.Node]:
        """``node`` and all that it is computed from, in the order of the graph."""
        if not node.all_input_nodes:
            return [node]
        found, waiting = {node}, [node]
        while waiting:
            more = set(waiting.pop().all_input_nodes) - found
            found |= more
            waiting.extend(more)
        return [step for step in self.graph.nodes if step in found]

    def set_args(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> None:
        """Give ``node`` other arguments."""
        node.args = tuple(args)
        if kwargs is not None:
            node.kwargs = kwargs

    def fresh_path(self, wanted: str) -> str:
        """``wanted``, or the first ``wanted_1``, ``wanted_2``, … that no module or parameter of the model has."""
        if self._paths is None:
            self._paths = {name for name, _ in self._source.named_modules(remove_duplicate=False)}
            self._paths.update(name for name, _ in nn.Module.named_parameters(self._source, remove_duplicate=False))
            self._paths.update(name for name, _ in nn.Module.named_buffers(self._source, remove_duplicate=False))
            self._paths.update(self.attributes)
        path, number = wanted, 0
        while path in self._paths:
            number += 1
            path = f"{wanted}_{number}"
        self._paths.add(path)
        return path

    def done(self, *, level: str | None = None, **meta: Any) -> LeveledModule:
        """The changed graph module. Nodes that nothing uses any more are dropped; the level and ``meta`` are set."""
        self._drop_unused()
        named = {node.target for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        attributes = {path: value for path, value in self.attributes.items() if path in named}
        result = LeveledModule(attributes, self.graph, self._source.__class__.__name__)
        if level not in _FINAL and isinstance(self._source, LeveledModule):
            result.put_unused(self._source)
        result.adopt_order(self._source)
        result.meta.update({**self._source.meta, **meta})
        if level is not None:
            result.meta["level"] = level
        if level in _FINAL:
            result.meta["unused"] = {}
        _copy_training_flags(self._source, result)
        return result

    def _drop_unused(self) -> None:
        for node in reversed(self.nodes):
            computed = node.meta.get("constant") and node.meta.get("writes") != "attribute" and node.op != "output"
            if not node.users and (node.op == "get_attr" or computed):
                self.graph.erase_node(node)


def _attribute(root: nn.Module, path: str) -> Any:
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _copy_training_flags(source: nn.Module, result: nn.Module) -> None:
    """Containers are made anew by fx: let each carry the mode of the one it stands for, leaves untouched."""
    result.training = source.training
    modes = {path: module.training for path, module in source.named_modules()}
    for path, module in result.named_modules():
        if is_container(module) and path in modes:
            module.training = modes[path]
        elif is_container(module):
            module.training = source.training
