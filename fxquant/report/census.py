"""Counting a graph: which nodes compute on integers, and how much of the work and of the weights that is.

MACs (multiply-accumulates) are counted by the op table's formulas and need the shapes that ``example_inputs`` give.
Weights are the parameters of two or more dimensions: biases and the vectors of normalizations are not counted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fxquant.graph.leveled import LeveledModule
from fxquant.nn.accumulating import IntegerWeighted
from fxquant.nn.integer import Dequantize, IntegerEmbedding, IntegerOp, Quantize
from fxquant.nn.modules import QuantEmbedding, QuantInput, QuantOp, QuantParametric, QuantWeighted, QuantWeightedOp
from fxquant.ops.behaviour import FloatOnly, Measuring
from fxquant.ops.calls import FLOAT, behaviour_of
from fxquant.ops.entry import Call, OpEntry

__all__ = [
    "Share",
    "is_float_op",
    "is_integer",
    "macs_of",
    "macs_share",
    "module_at",
    "short",
    "state_of",
    "weights_share",
]

_COMPUTES_INTEGERS = (QuantOp, QuantParametric, QuantWeighted, IntegerOp)
_BORDERS = (QuantInput, Quantize, Dequantize)


@dataclass(frozen=True)
class Share:
    """How much of a total is in integers, and how many float ops could not be counted."""

    integer: int
    total: int
    unknown: int = 0

    @property
    def fraction(self) -> float:
        """Between 0 and 1; 1 where there is nothing to count."""
        return self.integer / self.total if self.total else 1.0

    def __str__(self) -> str:
        percent = 100 * self.fraction
        shown = f"{min(percent, 99.9):.1f}" if percent < 100 else "100"
        return f"{shown} % ({short(self.integer)} of {short(self.total)})"


def short(count: int) -> str:
    """``1.81 G``, ``11.7 M``, ``640``: three digits and a unit."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return str(count)


def module_at(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that ``node`` calls, if it calls one."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def state_of(node: fx.Node, part: nn.Module | None) -> str:
    """integer, border (quantize, dequantize), float, shape (reads shapes), input, parameter or output."""
    if node.op in ("placeholder", "get_attr", "output"):
        return {"placeholder": "input", "get_attr": "parameter", "output": "output"}[node.op]
    if isinstance(part, _COMPUTES_INTEGERS):
        return "integer"
    if isinstance(part, _BORDERS):
        return "border"
    dtype = node.meta.get("dtype")
    is_number = isinstance(dtype, str) and dtype not in ("tuple", "list", "dict")
    reads_shape = is_number or isinstance(behaviour_of(node), Measuring) or not node.meta.get("is_tensor", True)
    return "shape" if reads_shape or node.meta.get("part_of") else "float"


def is_integer(node: fx.Node, part: nn.Module | None) -> bool:
    """Whether ``node`` computes on integers, or will once the model is converted."""
    return state_of(node, part) == "integer"


def is_float_op(node: fx.Node, part: nn.Module | None) -> bool:
    """Whether ``node`` does arithmetic in float: ops that only pass float values on, or make numbers, do not count."""
    if state_of(node, part) != "float" or not isinstance(behaviour_of(node), FloatOnly):
        return False
    dtype = node.meta.get("dtype")
    return not isinstance(dtype, torch.dtype) or dtype.is_floating_point


def macs_of(node: fx.Node, part: nn.Module | None) -> int | None:
    """Multiply-accumulates of one node: 0 for an op that has none, None where they cannot be known.

    Ops of the table have a formula; for others, torch's flop counter watches a run on tensors without data.
    """
    entry: OpEntry | None = node.meta.get("entry")
    if entry is FLOAT and is_float_op(node, part):
        return _counted_macs(node, part)
    if entry is None or entry.macs is None:
        return 0
    named = {name: value for name, value in node.kwargs.items() if name in entry.operand_names}
    call = Call(entry, {**dict(zip(entry.operand_names, node.args, strict=False)), **named}, node, part)
    try:
        return entry.macs(call)
    except (KeyError, TypeError):  # a node without a recorded shape
        return None


def _counted_macs(node: fx.Node, part: nn.Module | None) -> int | None:
    if any(n.meta.get("shape") is None and n.meta.get("dtype") != "bool" for n in node.all_input_nodes):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), _stand_in)
    try:
        with FlopCounterMode(display=False) as counter, torch.enable_grad():
            if node.op == "call_method":
                getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                (node.target if part is None else _without_data(part))(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # any code of the user's may run here, and not all of it runs without data
        return None
    return int(counter.get_total_flops()) // 2


def _stand_in(node: fx.Node) -> Any:
    """A tensor without data in the place of a node; False for a flag, such as whether the model is training."""
    shape = node.meta.get("shape")
    return False if shape is None else torch.empty(shape, dtype=node.meta.get("dtype"), device="meta")


def _without_data(module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose parameters have shapes and no data; gradients on, so that it takes no shortcut."""
    copies: dict[int, Any] = {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
    for parameter in module.parameters():
        copies[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.is_floating_point())
    return copy.deepcopy(module, copies)


def macs_share(module: LeveledModule) -> Share | None:
    """The MACs in integers; None where shapes were not recorded. What cannot be counted is left out and told of."""
    integer = total = unknown = 0
    for node in module.graph.nodes:
        part = module_at(module, node)
        macs = macs_of(node, part)
        if macs is None and (node.meta.get("shape") is None or node.meta["entry"] is not FLOAT):
            return None
        unknown += macs is None
        total += macs or 0
        integer += (macs or 0) if is_integer(node, part) else 0
    return Share(integer, total, unknown)


def weights_share(module: LeveledModule) -> Share:
    """The elements of all weights, shared ones counted once, and how many of them are integers or will be."""
    integer = {id(w): w.numel() for node in module.graph.nodes for w in _integer_weights(module, node)}
    every = {id(p): p.numel() for p in module.parameters() if p.ndim >= 2} | integer
    return Share(sum(integer.values()), sum(every.values()))


def _integer_weights(module: LeveledModule, node: fx.Node) -> Iterator[Tensor]:
    part: Any = module_at(module, node)
    if isinstance(part, (QuantWeighted, QuantEmbedding, IntegerWeighted, IntegerEmbedding)):
        yield part.weight
    elif isinstance(part, QuantWeightedOp):
        yield from _held(module, node.args[1:2])
    elif isinstance(part, QuantInput):
        yield from (tensor for tensor in _held(module, node.args[:1]) if tensor.ndim >= 2)
    elif node.meta.get("integer_constant"):
        yield from (tensor for tensor in _held(module, (node,)) if tensor.ndim >= 2)


def _held(module: LeveledModule, values: Any) -> Iterator[Tensor]:
    """The parameters that ``values`` read."""
    for value in values:
        if isinstance(value, fx.Node) and value.op == "get_attr":
            path, _, name = str(value.target).rpartition(".")
            yield getattr(module.get_submodule(path), name)
