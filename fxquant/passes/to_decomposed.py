"""to_decomposed: from integer ops to ops on real numbers that read and write integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.behaviour import Passing
from fxquant.graph.edit import Edit
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.pattern import nodes_in
from fxquant.nn.decomposed import (
    Coding,
    Decode,
    Decomposed,
    Encode,
    Rows,
    StoredPerChannel,
    StoredPerTensor,
    require_operators,
)
from fxquant.nn.form import Computation, HeldIntegers, computation_of, form_of
from fxquant.nn.integer import IntegerOp
from fxquant.passes.facts import Converted

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

    Raises:
        ExportError: what a form computes on real numbers is not known, so that its parameters would be lost.
    """
    require_operators()
    edit = Edit(module, by="to_decomposed")
    codings: Codings = {}
    for node in edit.nodes:
        part: Any = edit.module(node)
        if Converted(node).integer_constant:
            constant, coding = _constant(edit, node, signed)
            codings[constant] = coding
        elif isinstance(part, IntegerOp) or form_of(part) is not None:
            read = tuple(next((codings[n] for n in nodes_in(arg) if n in codings), None) for arg in node.args)
            made = computation_of(part, 1.0 if not read or read[0] is None else read[0].scale)
            if made.border == "leave":
                assert read[0] is not None
                edit.set_module(node, Decode(read[0], made.dtype or torch.float32))
                continue
            if part.scheme is not None:
                codings[node] = Coding.of(float(part.scale), int(part.zero_point), part.scheme, signed)
            edit.set_module(node, _written(part, made, read, codings.get(node), signed))
    return edit.done(level="decomposed")


def _constant(edit: Edit, node: fx.Node, signed: bool | None) -> tuple[fx.Node, Coding]:
    """A constant made of integers, of the sign that is asked for."""
    (scale, zero_point), q = Converted(node).grid, edit.attributes[str(node.target)]
    own = Coding(scale, zero_point, q.dtype)
    if signed is None or q.dtype.is_signed == signed or q.dtype.itemsize > 1:
        return node, own
    coding = own.moved()
    path = edit.fresh_path(f"{str(node.target).replace('.', '_')}_moved")
    made = edit.insert_attribute(node, path, coding.from_own(q), is_tensor=True)
    edit.remove(node, made)
    return made, coding


def _written(
    part: Any, made: Computation, read: tuple[Coding | None, ...], coding: Coding | None, signed: bool | None
) -> nn.Module:
    """What reads and writes integers as ``part`` does, and computes on real numbers."""
    if made.border:
        assert coding is not None
        return Encode(coding, part.scheme.qmin, part.scheme.qmax)
    if made.rows is not None:
        assert coding is not None
        return Rows(coding.from_own(made.rows))
    function = made.function or part.entry.function
    parameters = {name: _stored(value, signed) for name, value in made.parameters.items()}
    rounding = None if coding is None else Encode(coding, int(part.low), int(part.high))
    behaviour = part.entry.behaviour
    joins = isinstance(behaviour, Passing) and behaviour.joins
    return Decomposed(
        function, part.attributes, parameters, rounding, made.bounds, made.dtype, operands=read, joins=joins
    )


def _stored(
    value: HeldIntegers | Tensor | None, signed: bool | None
) -> StoredPerChannel | StoredPerTensor | Tensor | None:
    """A weight as stored integers; a bias, and anything else, as real numbers.

    Of Inductor's patterns all have one scale per channel; XNNPACK takes one for all where an op has to have that.
    """
    if not isinstance(value, HeldIntegers):
        return value
    if value.scheme is None:
        return (value.q.double() * value.scale).float()
    if signed and value.scale.ndim == 0:
        return StoredPerTensor(value.q, value.scale, value.scheme)
    return StoredPerChannel(value.q, value.scale, value.axis, value.scheme)
