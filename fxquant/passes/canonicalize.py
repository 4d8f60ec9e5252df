"""canonicalize: one spelling for each op, no operation in place, one entry on every compute node."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxquant.behaviour import Measuring, Passing, Weighted
from fxquant.capture.measuring import is_arithmetic, is_measurement, reads_numbers
from fxquant.capture.tracing import TrainingFlag
from fxquant.errors import CaptureError, Refusal
from fxquant.graph.edit import Edit, clone_module
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.pattern import nodes_in
from fxquant.nn.modules import quant_class_of
from fxquant.ops.calls import FLOAT, recognize
from fxquant.ops.entry import Call, OpEntry
from fxquant.ops.measuring import MEASURING
from fxquant.ops.table import is_inplace
from fxquant.passes.choose_regions import quantized_operands
from fxquant.passes.facts import Canonical

__all__ = ["canonicalize", "written"]

_CONTAINERS = ("dict", "list", "tuple")


def canonicalize(module: LeveledModule) -> LeveledModule:
    """Give every compute node its op entry and its canonical form.

    Methods, operators and modules without state become calls of the op's function; a module with state stays a module
    where it is called once, and becomes a call with its parameters as arguments where it is called more often.
    Operations in place become ordinary ones, and what was read after them reads their result.

    Before:
        x = input
        relu_ = .relu_(x)
        iadd = iadd(relu_, x)
        size = .size(iadd, 0)
        view = .view(iadd, size, -1)
        return view

    After:
        x = input
        relu_ = relu(x)
        iadd = add(relu_, relu_)
        size = .size(iadd, 0)
        view = view(iadd, shape=(size, -1))
        return view

    Law:
        Outputs are the captured graph's, bit for bit.
    """
    edit = Edit(module, by="canonicalize")
    _Canonicalizer(edit).run()
    return edit.done(level="canonical")


class _Canonicalizer:
    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self.follows_memory = edit.meta.get("follows_memory", False)
        self.order = {node: i for i, node in enumerate(edit.nodes)}
        self.calls: dict[Any, int] = {}
        for node in edit.nodes:
            if node.op == "call_module":
                self.calls[node.target] = self.calls.get(node.target, 0) + 1
        self.seen: set[Any] = set()

    def run(self) -> None:
        for node in self.edit.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._mark_source(node)
            elif node.op != "output":
                self._visit(node)

    def _mark_source(self, node: fx.Node) -> None:
        dtype = node.meta.get("dtype")
        node.meta["is_tensor"] = not isinstance(dtype, str) or dtype == "NoneType"
        node.meta["is_container"] = dtype in _CONTAINERS
        node.meta["constant"] = node.op == "get_attr"
        value = self.edit.attributes.get(str(node.target)) if node.op == "get_attr" else None
        if isinstance(value, torch.Tensor):
            node.meta["shape"], node.meta["dtype"] = tuple(value.shape), value.dtype

    def _visit(self, node: fx.Node) -> None:
        operands = [n for n in nodes_in((node.args, node.kwargs)) if _is_data(n)]
        node.meta.update(is_tensor=True, constant=bool(operands) and all(n.meta["constant"] for n in operands))
        module = self.edit.module(node)
        counts = not operands and callable(node.target) and is_arithmetic(node.target)
        if "island" in node.meta:
            self._keep_float(node, f"it runs as it is: {node.meta['island'].cause}")
        elif counts or isinstance(module, TrainingFlag) or is_measurement(node.op, node.target, node.args):
            self._measure(node)
        elif reads_numbers(node.op, node.target):
            self._keep_float(node, "it takes numbers out of a tensor")
            node.meta["is_tensor"] = False
        elif node.target is operator.getitem and operands and _holds_several(operands[0]):
            self._keep_float(node, f"it is one part of {operands[0].name}")
            node.meta["part_of"] = operands[0].name
        else:
            self._recognize(node, module)

    def _measure(self, node: fx.Node) -> None:
        node.meta.update(is_tensor=False, entry=MEASURING)

    def _recognize(self, node: fx.Node, module: nn.Module | None) -> None:
        if node.meta.get("writes") == "attribute":
            self._keep_float(node, "it writes into a buffer")
            return
        found = recognize(node, module)
        if isinstance(found, Call) and found.module is None and isinstance(found.entry.behaviour, Weighted):
            found = self._with_settled_weight(node, found)
        if isinstance(found, Call) and isinstance(found.entry.behaviour, Measuring):
            found = Refusal(f"it reads the attribute {node.args[1]!r}")  # a tensor, as x.real or x.T
        if isinstance(found, Call):
            found = self._refusal(node, found) or found
        if isinstance(found, Call):
            self._rewrite(node, found, module)
            return
        self._keep_float(node, found.why)
        if node.meta.get("writes"):
            self._write_a_copy(node)

    def _with_settled_weight(self, node: fx.Node, call: Call) -> Call:
        """For inference, a weight computed from parameters alone (a part of ``in_proj_weight``) is a parameter itself."""
        weight = call.operand("weight")
        settles = not self.edit.meta.get("settings", {}).get("qat", True)
        if weight is None or weight.op == "get_attr" or not settles or not self.edit.is_constant(weight):
            return call
        path = self.edit.fresh_path(f"{node.name}_weight")
        tensor = nn.Parameter(self.edit.constant(weight).detach().clone(), requires_grad=False)
        made = self.edit.insert_attribute(
            node, path, tensor, is_tensor=True, constant=True, shape=tuple(tensor.shape), dtype=tensor.dtype
        )
        return replace(call, arguments={**call.arguments, "weight": made})

    def _write_a_copy(self, node: fx.Node) -> None:
        """An operation in place that the table does not know writes into a copy, which later readers read."""
        target, name = node.args[0], getattr(node.target, "__name__", str(node.target))
        if getattr(node.target, "__module__", "") == "_operator":
            name = f"__{name}__"
        if hasattr(torch.Tensor, name):
            self.edit.call_function(node, written, (name, *node.args), dict(node.kwargs))
            self._out_of_place(node, target)

    def _refusal(self, node: fx.Node, call: Call) -> Refusal | None:
        dtype = node.meta.get("dtype")
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            return Refusal(f"it computes {str(dtype).removeprefix('torch.')} values")
        if dtype in ("int", "float", "bool", "Size"):
            return Refusal("it computes a number")
        if node.meta["constant"] and not isinstance(call.entry.behaviour, Passing):
            return Refusal("it is computed from parameters alone")
        if call.entry.integer is None and not call.entry.drops:
            return Refusal(f"the entry of {call.entry.name} has no integer form")
        if call.module is not None and (names := _unnamed_state(call.entry, call.module)):
            held = ", ".join(names)
            return Refusal(f"its module holds {held}, which the entry of {call.entry.name} does not name as a tensor")
        if (whole := _whole_numbers(call)) is not None:
            Canonical(node).reads_counts = True
            return whole
        if isinstance(call.entry.behaviour, Weighted) and call.module is None:
            if any(n.op != "get_attr" for n in nodes_in(call.arguments.get("weight"))):
                return Refusal("its weight is computed in forward")
            if not all(n.meta["constant"] for n in nodes_in(call.arguments.get("bias"))):
                return Refusal("its bias is computed from its input")
        return None

    def _keep_float(self, node: fx.Node, reason: str) -> None:
        dtype = node.meta.get("dtype")
        node.meta.update(entry=FLOAT, reason=reason, is_container=dtype in _CONTAINERS)
        if dtype in ("int", "float", "bool"):
            node.meta["is_tensor"] = False

    def _rewrite(self, node: fx.Node, call: Call, module: nn.Module | None) -> None:
        entry = call.entry
        inplace = is_inplace(entry, node, module)
        arguments = {name: value for name, value in call.arguments.items() if name != "inplace"}
        node.meta["entry"] = entry
        node.meta["is_tuple"] = entry.returns == "tuple"
        if inplace:
            self._out_of_place(node, node.args[0])
        if module is not None and entry.parametric:
            self._settle_module(node, call, module)
            return
        if module is not None:
            node.meta["was_module"] = type(module)
        args, kwargs = entry.arrange(arguments)
        self.edit.call_function(node, entry.function, args, kwargs)

    def _settle_module(self, node: fx.Node, call: Call, module: nn.Module) -> None:
        """A module called once stays; each further call gets the same parameters under its own node.

        A module that has no fake-quant class, as one of a user's own, becomes a call with its parameters too.
        """
        if self.calls[node.target] == 1 and quant_class_of(module) is not None:
            return
        path, entry = str(node.target), call.entry
        held = [name for name in entry.operand_names[1:] if isinstance(getattr(module, name, None), torch.Tensor)]
        if "running_mean" in held or not held:
            if path in self.seen:
                fresh = self.edit.fresh_path(path)
                self.edit.call_module(node, fresh, clone_module(module), node.args, {})
            self.seen.add(path)
            return
        arguments = dict(call.arguments)
        for name in held:
            tensor = getattr(module, name)
            arguments[name] = self.edit.insert_attribute(
                node,
                f"{path}.{name}",
                tensor,
                is_tensor=True,
                constant=True,
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
            )
        node.meta["was_module"] = type(module)
        ordered = {p.name: arguments[p.name] for p in entry.parameters if p.name in arguments}
        self.edit.call_function(node, entry.function, *entry.arrange(ordered))

    def _out_of_place(self, node: fx.Node, target: Any) -> None:
        """Let whatever reads ``target`` after ``node`` read ``node`` instead."""
        if not isinstance(target, fx.Node):
            return
        if not self.follows_memory:
            self._refuse_aliases(node, target)
        later = [user for user in target.users if self.order.get(user, -1) > self.order[node]]
        self.edit.redirect(later, target, node)

    def _refuse_aliases(self, node: fx.Node, target: fx.Node) -> None:
        root = target
        while _is_view(root) and isinstance(root.args[0], fx.Node):
            root = root.args[0]
        for alias in _views_of(root):
            late = [user for user in alias.users if self.order.get(user, -1) > self.order[node]]
            if alias is not target and late:
                raise CaptureError(
                    f"{node.name} writes in place into {target.name}, a view of memory that {late[0].name} reads later "
                    f"through {alias.name} ({node.meta.get('source')}).\n"
                    "  what to do: write it out of place, as y = f(x) instead of an in-place call."
                )


def _whole_numbers(call: Call) -> Refusal | None:
    """Why an operand that would be quantized is not: counts, lengths, positions and indices are not rounded.

    A mask as a factor or a term is 0 and 1, which every grid of its own has; joined to other values it would take theirs.
    """
    behaviour = call.entry.behaviour
    joins = isinstance(behaviour, Passing) and behaviour.joins
    for node in quantized_operands(call):
        dtype = node.meta.get("dtype")
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point and (joins or dtype is not torch.bool):
            kind = str(dtype).removeprefix("torch.")
            return Refusal(f"it reads {kind} values ({node.name}), which are not rounded")
    return None


def written(method: str, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A copy of ``value`` into which ``method`` has written."""
    copied = value.clone()
    getattr(copied, method)(*args, **kwargs)
    return copied


def _unnamed_state(entry: OpEntry, module: nn.Module) -> list[str]:
    """The parameters and buffers that a call of the op would not be given; layers with a fake-quant class keep theirs."""
    if quant_class_of(module) is not None:
        return []
    named = set(entry.operand_names) if entry.parametric else set()
    tensors = (*module.named_parameters(), *module.named_buffers())
    return [name for name, _ in tensors if name not in named]


def _holds_several(node: fx.Node) -> bool:
    """Whether ``node`` gives a tuple, list or dict; a float op whose result was not seen is taken to, if indexed."""
    if isinstance(node.meta.get("dtype"), torch.dtype):
        return False
    return bool(node.meta.get("is_container")) or node.meta.get("entry") is FLOAT


def _is_data(node: fx.Node) -> bool:
    return bool(node.meta.get("is_tensor") or node.meta.get("is_container"))


def _is_view(node: fx.Node) -> bool:
    entry: OpEntry | None = node.meta.get("entry")
    return entry is not None and entry.views and "reason" not in node.meta


def _views_of(root: fx.Node) -> list[fx.Node]:
    found, todo = [], [root]
    while todo:
        node = todo.pop()
        found.append(node)
        todo.extend(user for user in node.users if _is_view(user) and user.args and user.args[0] is node)
    return found
