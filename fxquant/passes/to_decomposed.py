"""to_decomposed: from integer ops to ops on real numbers that read and write integers."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxquant.graph.edit import Edit
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.pattern import nodes_in
from fxquant.nn.accumulating import IntegerWeighted
from fxquant.nn.decomposed import Coding, Decode, Decomposed, Encode, Rows, StoredPerChannel, require_operators
from fxquant.nn.integer import Dequantize, IntegerEmbedding, IntegerEvaluate, IntegerOp, Quantize
from fxquant.ops.behaviour import Passing, Weighted
from fxquant.ops.entry import OpEntry
from fxquant.passes.to_exchange import real_scales

__all__ = ["to_decomposed"]

Codings = dict[fx.Node, Coding]


def to_decomposed(module: LeveledModule, *, signed: bool | None = None) -> LeveledModule:
    """Replace each integer op by ``dequantize``, the op on real numbers, and ``quantize``.

    Args:
        module: an integer graph.
        signed: store tensors as signed (or unsigned) integers, moved by half their range where they are of the other kind;
            None to leave them. The numbers they stand for are the same.

    Before:
        x = input
        x_quantizer = Quantize[x_quantizer](x)
        conv = IntConv2d[conv](x_quantizer)
        fc = IntLinear[fc](conv)
        return fc

    After:
        x = input
        x_quantizer = Encode[x_quantizer](x)
        conv = Decomposed[conv](x_quantizer)
        fc = Decomposed[fc](conv)
        return fc

    Law:
        Outputs are the frozen graph's, up to float32 rounding.
    """
    require_operators()
    edit = Edit(module, by="to_decomposed")
    codings: Codings = {}
    for node in edit.nodes:
        part = edit.module(node)
        if node.meta.get("integer_constant"):
            constant, coding = _constant(edit, node, signed)
            codings[constant] = coding
        elif isinstance(part, Dequantize):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            edit.set_module(node, Decode(codings[source], part.dtype))
        elif isinstance(part, (Quantize, IntegerOp)):
            if part.scheme is not None:
                codings[node] = Coding.of(float(part.scale), int(part.zero_point), part.scheme, signed)
            edit.set_module(node, _twin(part, node, codings))
    return edit.done(level="decomposed")


def _constant(edit: Edit, node: fx.Node, signed: bool | None) -> tuple[fx.Node, Coding]:
    """A constant made of integers, of the sign that is asked for."""
    (scale, zero_point), q = node.meta["grid"], edit.attributes[str(node.target)]
    own = Coding(scale, zero_point, q.dtype)
    if signed is None or q.dtype.is_signed == signed or q.dtype.itemsize > 1:
        return node, own
    coding = own.moved()
    path = edit.fresh_path(f"{str(node.target).replace('.', '_')}_moved")
    made = edit.insert_attribute(node, path, coding.from_own(q), is_tensor=True)
    edit.remove(node, made)
    return made, coding


def _twin(part: Quantize | IntegerOp, node: fx.Node, codings: Codings) -> nn.Module:
    """What reads and writes integers as ``part`` does, and computes on real numbers."""
    if isinstance(part, Quantize):
        return Encode(codings[node], part.scheme.qmin, part.scheme.qmax)
    assert isinstance(part.entry, OpEntry)
    if isinstance(part, IntegerEmbedding):
        return Rows(codings[node].from_own(part.weight))
    read = tuple(next((codings[n] for n in nodes_in(arg) if n in codings), None) for arg in node.args)
    behaviour = part.entry.behaviour
    function, parameters, leaves = part.entry.function, dict[str, Any](), part.scheme is None
    if isinstance(part, IntegerWeighted):
        assert read[0] is not None and isinstance(behaviour, Weighted)
        weight, bias = real_scales(part, read[0].scale)
        parameters["weight"] = StoredPerChannel(part.weight, weight, behaviour.out_axis, part.weight_scheme)
        parameters["bias"] = None if part.bias is None else (part.bias.double() * bias).float()
    elif isinstance(part, IntegerEvaluate):
        function = part.function or function
        parameters = {name: getattr(part, f"parameter_{name}").float() for name in part.parameter_names}
    clamp, dtype = (
        (part.clamp, part.real_dtype) if isinstance(part, IntegerWeighted) and leaves else ((None, None), None)
    )
    rounding = None if leaves else Encode(codings[node], int(part.low), int(part.high))
    joins = isinstance(behaviour, Passing) and behaviour.joins
    return Decomposed(function, part.attributes, parameters, rounding, clamp, dtype, operands=read, joins=joins)
