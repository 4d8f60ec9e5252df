"""to_qdq: from integer ops back to ops between real numbers, rounded where the integer model has integers.

Everything comes from the integer graph itself; the forms say what they compute on real numbers (``nn.form``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.behaviour import Passing
from fxquant.graph.edit import Edit
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.form import Computation, HeldIntegers, computation_of, form_of
from fxquant.nn.integer import IntegerOp
from fxquant.nn.qdq import Cast, Lookup, RealOp, Rounding, Spot, Stored, Unpack
from fxquant.ops.calls import recognize
from fxquant.ops.entry import Call
from fxquant.passes.facts import Converted

__all__ = ["to_qdq"]


def to_qdq(module: LeveledModule, *, integer_biases: bool = True) -> LeveledModule:
    """Replace each integer op by the op on real numbers with a rounding behind it.

    Args:
        module: an integer graph.
        integer_biases: keep biases as 32-bit integers; as the real numbers that those stand for otherwise.

    Before:
        x = input
        x_quantizer = Quantize[x_quantizer](x)
        conv = IntConv2d[conv](x_quantizer)
        fc = IntLinear[fc](conv)
        return fc

    After:
        x = input
        x_quantizer = Rounding[x_quantizer](x)
        conv = RealOp[conv](x_quantizer)
        fc = RealOp[fc](conv)
        return fc

    Law:
        Outputs are the frozen graph's, up to float32 rounding.

    Raises:
        ExportError: what a form computes on real numbers is not known, so that its parameters would be lost.
    """
    edit = Edit(module, by="to_qdq")
    scales: dict[fx.Node | None, float] = {}
    for node in edit.nodes:
        part: Any = edit.module(node)
        if Converted(node).integer_constant:
            unpacked = _unpack(edit, node)
            scales[unpacked] = Converted(node).grid[0]
        elif isinstance(part, IntegerOp) or form_of(part) is not None:
            scale = part._buffers.get("scale")
            source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
            made = computation_of(part, scales.get(source, 1.0))
            if made.border == "leave":
                _leave(edit, node, made.dtype)
                continue
            edit.set_module(node, _written(part, made, integer_biases))
            scales[node] = 1.0 if scale is None else float(scale)
        elif node.op in ("call_function", "call_method"):
            _spell(edit, node)
    return edit.done(level="qdq")


def _spell(edit: Edit, node: fx.Node) -> None:
    """A move of real numbers that the exporter takes in another spelling only."""
    call = recognize(node, None)
    if isinstance(call, Call) and call.entry.exported_as is not None and isinstance(call.entry.behaviour, Passing):
        args, kwargs = call.entry.arrange(call.arguments)
        edit.call_function(node, call.entry.exported_as, args, kwargs)


def _unpack(edit: Edit, node: fx.Node) -> fx.Node:
    """Read a constant's integers as real numbers."""
    path = edit.fresh_path(f"{str(node.target).replace('.', '_')}_real")
    scale, zero_point = Converted(node).grid
    return edit.insert_module(node, path, Unpack(scale, zero_point), users=list(node.users), is_tensor=True)


def _leave(edit: Edit, node: fx.Node, dtype: torch.dtype | None) -> None:
    """Values are real already; models in half precision get them in their own dtype."""
    if dtype in (None, torch.float32):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        edit.remove(node, source)
    else:
        assert dtype is not None
        edit.set_module(node, Cast(dtype))


def _written(part: Any, made: Computation, integer_biases: bool) -> nn.Module:
    """What computes on real numbers what ``part`` computes on integers."""
    spot = None if part.scheme is None else Spot.of(part.scale, part.zero_point, part.scheme)
    if made.border:
        assert spot is not None
        return Rounding(spot, part.scheme.qmin, part.scheme.qmax)
    if made.rows is not None:
        assert spot is not None
        return Lookup(made.rows, spot)
    function = made.function or part.entry.exported_as or part.entry.function
    parameters = {name: _stored(value, integer_biases) for name, value in made.parameters.items()}
    rounding = None if spot is None else Rounding(spot, int(part.low), int(part.high))
    return RealOp(function, part.attributes, parameters, rounding, made.bounds, made.dtype)


def _stored(value: HeldIntegers | Tensor | None, integer_biases: bool) -> Stored | Tensor | None:
    """A parameter as stored integers, or as it is."""
    if not isinstance(value, HeldIntegers):
        return value
    stored = Stored(value.q, value.scale, value.axis, 32 if value.scheme is None else value.scheme.bits)
    return stored if integer_biases or value.scheme is not None else stored().detach()
