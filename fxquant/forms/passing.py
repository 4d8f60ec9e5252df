"""Values that move: views, joins and pools of maxima, on the integers themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import Refusal
from fxquant.kernels.native.lines import Lines
from fxquant.kernels.native.operations import Concatenation, Maximum, Operation, pool_of
from fxquant.kernels.operators import Operators
from fxquant.kernels.place import Place, Step
from fxquant.kernels.quantized import ATEN, REFERENCE
from fxquant.nn.form import Form, RealForm, TorchKernel, own_function, register_form
from fxquant.nn.integer import IntegerPass

__all__ = ["passing_step"]


def passing_step(place: Place) -> Step:
    """Values that move: torch's own function on quantized tensors, where its entry says that there is one."""
    part = place.part
    if not part.entry.quantized:
        raise Refusal("torch's function for it takes no quantized tensors")
    given = place.output_form()
    nodes = [node for node in place.node.all_input_nodes if place.holds_bytes(node)]
    held = next((place.known[node].form for node in nodes if place.known[node].form is not None), None)
    form = held or given
    if not nodes:
        raise Refusal("no operand is a tensor of bytes")

    def run(*operands: Any, **dynamic: Any) -> Any:
        return part.entry.function(*map(_one_layout, operands), **part.attributes, **dynamic)

    return Step(run, form, ATEN, dict.fromkeys(nodes, form))


def _one_layout(value: Any) -> Any:
    """``value``; an image or volume that lies as channels last does has its strides, also along axes of one element.

    There a stride moves nothing, and may be anything. torch 2.14's nearest interpolation and maxima of quint8 ask the memory
    for the layout of what they take, and the strides for that of what they give.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if not isinstance(value, Tensor) or value.ndim not in formats or value.shape[1] < 2:
        return value
    if not value.is_contiguous(memory_format=formats[value.ndim]):
        return value
    strides, step = [1], value.shape[1]
    for size in reversed(value.shape[2:]):
        strides.insert(1, step)
        step *= size
    strides.insert(0, step)
    return value if value.stride() == tuple(strides) else value.as_strided(value.shape, strides)


def _maximum(lines: Lines, node: fx.Node, part: IntegerPass) -> Operation:
    if len(node.args) != 1 or node.kwargs:
        raise Refusal("its arguments are computed in the graph")
    entry: Any = part.entry
    return Maximum(lines.operands(node.args), entry.function, dict(part.attributes), pool_of(entry.native)[1])


def _concatenation(lines: Lines, node: fx.Node, part: IntegerPass) -> Operation:
    (tensors,) = node.args
    if not isinstance(tensors, (list, tuple)) or len({lines.is_signed(t) for t in tensors}) != 1:
        raise Refusal("its tensors are not held alike")
    entry: Any = part.entry
    return Concatenation(lines.operands(tensors), int(part.attributes.get("dim", 0)), entry.native == "stack")


def _expected(part: IntegerPass, operators: Operators) -> str:
    return ATEN if getattr(part.entry, "quantized", False) else REFERENCE


register_form(
    Form(
        arithmetic=IntegerPass,
        real=RealForm(own_function, ("filling",)),
        torch=TorchKernel(passing_step, _expected),
        native=Refusal("torch moves the bytes: a view, or a copy made when a plan is"),
        native_ops={
            "maximum": _maximum,
            "maximum over lines": _maximum,
            "maximum over volumes": _maximum,
            "concatenation": _concatenation,
            "stack": _concatenation,
        },
        moves=True,
        operators=Refusal("the op's own operator moves integers as it moves floats"),
    )
)
