"""Values that move: views, joins and pools of maxima, on the integers themselves."""

from __future__ import annotations

from typing import Any

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
    """``value``; an image of 1 × 1, whose strides fit both layouts, with those of channels last.

    torch 2.14's nearest interpolation of quint8 takes such an image for channels last, and its result for contiguous.
    """
    if isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] > 1 and value.shape[2:].numel() == 1:
        channels = value.shape[1]
        return value.contiguous().as_strided(value.shape, (channels, 1, channels, channels))
    return value


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
