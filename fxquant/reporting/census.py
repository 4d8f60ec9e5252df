"""Counting a graph: which nodes compute on integers, and how much of the work and of the weights that is.

MACs (multiply-accumulates) are counted by the op table's formulas and need the shapes that ``example_inputs`` give;
what islands multiply in their own code is float and counted by a run. A graph counts once, however often it is called.
Weights are the parameters of two or more dimensions: biases and the vectors of normalizations are not counted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fxquant.behaviour import FloatOnly, Measuring
from fxquant.capture.islands import graphs_of
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.integer import Dequantize, IntegerOp, Quantize
from fxquant.nn.modules import QuantEmbedding, QuantInput, QuantOp, QuantParametric, QuantWeighted, QuantWeightedOp
from fxquant.ops.calls import FLOAT, behaviour_of
from fxquant.ops.entry import Call, OpEntry

__all__ = [
    "Share",
    "absolute",
    "is_float_op",
    "is_integer",
    "macs_of",
    "macs_share",
    "module_at",
    "nodes_of",
    "short",
    "state_of",
    "uncounted",
    "weights_share",
]

_COMPUTES_INTEGERS = (QuantOp, QuantParametric, QuantWeighted, IntegerOp)
_BORDERS = (QuantInput, Quantize, Dequantize)
_NUMBERS = {"bool": False, "int": 1, "float": 1.0, "NoneType": None}


@dataclass(frozen=True)
class Share:
    """How much of a total is in integers.

    Attributes:
        integer, total: what was counted.
        unknown: ops that could not be counted.
        unknown_islands: islands whose own code could not be counted.
    """

    integer: int
    total: int
    unknown: int = 0
    unknown_islands: int = 0

    @property
    def fraction(self) -> float:
        """Between 0 and 1; 1 where there is nothing to count."""
        return self.integer / self.total if self.total else 1.0

    def __str__(self) -> str:
        percent = 100 * self.fraction
        shown = f"{min(percent, 99.9):.1f}" if percent < 100 else "100"
        return f"{shown} % ({short(self.integer)} of {short(self.total)})"


def uncounted(macs: Share | None) -> list[str]:
    """What a share of MACs does not know, in words."""
    words = []
    if macs and macs.unknown:
        words.append(f"{macs.unknown} {'op' if macs.unknown == 1 else 'ops'} could not be counted")
    if macs and macs.unknown_islands:
        words.append(f"unknown inside {macs.unknown_islands} {'island' if macs.unknown_islands == 1 else 'islands'}")
    return words


def short(count: int) -> str:
    """``1.81 G``, ``11.7 M``, ``640``: three digits and a unit."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return str(count)


def nodes_of(module: nn.Module) -> Iterator[tuple[LeveledModule, fx.Node]]:
    """Every node of every graph of a model, each with its graph."""
    for graph in graphs_of(module).values():
        for node in graph.graph.nodes:
            yield graph, node


def absolute(graph: LeveledModule, path: str) -> str:
    """A path inside ``graph`` as one of the whole model."""
    prefix = graph.meta.get("path", "")
    return f"{prefix}.{path}" if prefix and path else prefix or path


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
    if "island" in node.meta:
        return "float"
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
    if "island" in node.meta:
        return True
    dtype = node.meta.get("dtype")
    return not isinstance(dtype, torch.dtype) or dtype.is_floating_point


def macs_of(node: fx.Node, part: nn.Module | None) -> int | None:
    """Multiply-accumulates of one node: 0 for an op that has none, None where they cannot be known.

    Ops of the table have a formula; for others, torch's flop counter watches a run on tensors without data. Of islands
    nothing is known here.
    """
    entry: OpEntry | None = node.meta.get("entry")
    if "island" in node.meta:
        return None
    if entry is FLOAT and is_float_op(node, part):
        counted = _counted_macs(node, part)
        return counted or _macs_by_weights(node, part, counted)
    if entry is None or entry.macs is None:
        return 0
    named = {name: value for name, value in node.kwargs.items() if name in entry.operand_names}
    call = Call(entry, {**dict(zip(entry.operand_names, node.args, strict=False)), **named}, node, part)
    try:
        return entry.macs(call)
    except (KeyError, TypeError):  # a node without a recorded shape
        return None


def _counted_macs(node: fx.Node, part: nn.Module | None) -> int | None:
    if any(n.meta.get("shape") is None and n.meta.get("dtype") not in _NUMBERS for n in node.all_input_nodes):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), _stand_in)
    try:
        with FlopCounterMode(display=False) as counter, torch.enable_grad():
            if node.op == "call_method":
                result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                run: Any = node.target if part is None else _without_data(part)
                result = run(*args, **kwargs)
    except Exception:  # any code of the user's may run here, and not all of it runs without data
        return None
    macs = int(counter.get_total_flops()) // 2
    is_as_seen = not isinstance(result, Tensor) or tuple(result.shape) == node.meta.get("shape")
    return macs if is_as_seen or not macs else None


def _macs_by_weights(node: fx.Node, part: nn.Module | None, otherwise: int | None) -> int | None:
    """What the counter does not know, by its weights: each output channel's once per result (bilinear, deformable ops)."""
    held = [tuple(p.shape) for p in part.parameters(recurse=False)] if part is not None else []
    held += [n.meta["shape"] for n in node.all_input_nodes if n.op == "get_attr" and "shape" in n.meta]
    made = node.meta.get("shape")
    for weight in held:
        if len(weight) >= 3 and made is not None and weight[0] in made:
            return math.prod(made) * math.prod(weight[1:])
    return otherwise


def _stand_in(node: fx.Node) -> Any:
    """A tensor without data in the place of a node; in that of a number, which is not recorded, one of its kind."""
    shape, dtype = node.meta.get("shape"), node.meta.get("dtype")
    if shape is None:
        return _NUMBERS[str(dtype)]
    return torch.empty(shape, dtype=dtype, device="meta")


def _without_data(module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose parameters have shapes and no data; gradients on, so that it takes no shortcut."""
    copies: dict[int, Any] = {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
    for parameter in module.parameters():
        copies[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.is_floating_point())
    return copy.deepcopy(module, copies)


def macs_share(module: nn.Module, own: dict[str, int | None]) -> Share | None:
    """The MACs in integers; None where no shapes were recorded. What cannot be counted is left out and told of.

    Args:
        module: any model with graphs.
        own: what each island multiplies in its own code, see ``own_macs``.
    """
    integer, unknown, is_known = 0, 0, False
    total = sum(macs or 0 for macs in own.values())
    for graph, node in nodes_of(module):
        part = module_at(graph, node)
        macs = macs_of(node, part)
        is_known |= node.op != "get_attr" and node.meta.get("shape") is not None
        unknown += macs is None and "island" not in node.meta
        total += macs or 0
        integer += (macs or 0) if is_integer(node, part) else 0
    return Share(integer, total, unknown, sum(macs is None for macs in own.values())) if is_known else None


def weights_share(module: nn.Module) -> Share:
    """The elements of all weights, shared ones counted once, and how many of them are integers or will be."""
    integer: dict[str, Tensor] = {
        path: weight for graph, node in nodes_of(module) for path, weight in _integer_weights(graph, node)
    }
    counts: dict[int, int] = {id(weight): weight.numel() for weight in integer.values()}
    total_integer = sum(counts.values())
    for path, parameter in _parameters(module, ""):
        if parameter.ndim >= 2 and path not in integer:
            counts[id(parameter)] = parameter.numel()
    return Share(total_integer, sum(counts.values()))


def _parameters(part: nn.Module, path: str) -> Iterator[tuple[str, Tensor]]:
    """Every parameter with its path in the user's model; not those that a graph only keeps and does not use."""
    path = part.meta.get("path", path) if isinstance(part, LeveledModule) else path
    prefix = f"{path}." if path else ""
    unused = {prefix + name for name in part.meta.get("unused", ())} if isinstance(part, LeveledModule) else set()
    for name, own in part.named_parameters(recurse=False):
        yield prefix + name, own
    for name, child in part.named_children():
        for inner, held in _parameters(child, prefix + name):
            if not any(inner.startswith(f"{skipped}.") for skipped in unused):
                yield inner, held


def _integer_weights(graph: LeveledModule, node: fx.Node) -> Iterator[tuple[str, Tensor]]:
    part: Any = module_at(graph, node)
    if isinstance(part, (QuantWeighted, QuantEmbedding)) or getattr(part, "holds_weights", False):
        yield absolute(graph, f"{node.target}.weight"), part.weight
    elif isinstance(part, QuantWeightedOp):
        yield from _held(graph, node.args[1:2])
    elif isinstance(part, QuantInput):
        yield from (held for held in _held(graph, node.args[:1]) if held[1].ndim >= 2)
    elif node.meta.get("integer_constant"):
        yield from (held for held in _held(graph, (node,)) if held[1].ndim >= 2)


def _held(graph: LeveledModule, values: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters that ``values`` read, by path."""
    for value in values:
        if isinstance(value, fx.Node) and value.op == "get_attr":
            path, _, name = str(value.target).rpartition(".")
            yield absolute(graph, str(value.target)), getattr(graph.get_submodule(path), name)
