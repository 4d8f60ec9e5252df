"""Functions of one number, tabulated over every integer of the input's grid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from fxquant.errors import ExportError, Refusal
from fxquant.kernels.native.lines import Lines, tabulated
from fxquant.kernels.native.operations import Operation
from fxquant.kernels.operators import unary_operator
from fxquant.kernels.place import Place, Step, clamped
from fxquant.kernels.quantized import ATEN, FLOAT32, in_float32, rounded, taken_by
from fxquant.kernels.storage import Storage, convert
from fxquant.nn.form import Computation, Form, RealForm, TorchKernel, register_form
from fxquant.nn.integer import IntegerTable
from fxquant.numerics.affine import dequantize, quantize

__all__ = ["table_step"]


def _computation(part: IntegerTable, input_scale: float) -> Computation:
    """The op's function, provided that this is what was tabulated."""
    q = torch.arange(len(part.table), device=part.table.device) + int(part.first)
    x = dequantize(q, torch.tensor(input_scale, device=q.device), part.offset[0])
    low, high = int(part.low), int(part.high)
    found = quantize(part.entry.function(x, **part.attributes), part.scale.float(), part.zero_point, low, high)
    if bool(((found - part.table.to(found.dtype)).abs() > 1).any()):
        raise ExportError(
            f"the table of op {part.entry.name!r} does not hold the values of its function "
            f"{getattr(part.entry.function, '__name__', part.entry.function)!r}, which is what would be written.\n"
            "  what to do: give the table's function to the op, or build the table in a form of its own and register that "
            "in fxquant.forms."
        )
    return Computation()


def table_step(place: Place) -> Step:
    """A function of one number, if it gives the reference's table for every integer: torch's own, or in float32."""
    part, taken, given = place.part, place.input_form(0), place.output_form()
    run = rounded(place, lambda q: part.entry.function(q.dequantize(), **part.attributes), given)
    operator = unary_operator(getattr(part.entry, "quantized_as", ""))
    own = clamped(part, given, lambda q: operator(q, *given)) if operator is not None else None
    for way, kernel in ((own, ATEN), (run, FLOAT32)):
        if way is not None and torch.equal(_tabulated(place, way, taken), part.table):
            return Step(way, given, kernel, taken_by(place, taken))
    raise Refusal("torch's function gives other integers than its table holds")


def _tabulated(place: Place, run: Callable[..., Tensor], taken: Storage) -> Tensor:
    """What ``run`` makes of every integer that the reference's table has an entry for."""
    part, source = place.part, place.node.args[0]
    assert isinstance(source, fx.Node)
    first = int(part.first) + 128 * place.known[source].signed
    every = torch.arange(first, first + len(part.table), dtype=torch.uint8, device="cpu")
    return convert(run(convert(every, taken, False)), None, part.output_dtype == torch.int8)


def _native(lines: Lines, node: fx.Node, part: IntegerTable) -> Operation:
    return tabulated(lines, node, part, least=int(part.first), most=int(part.first) + len(part.table) - 1)


register_form(
    Form(
        arithmetic=IntegerTable,
        real=RealForm(_computation, ("table", "first")),
        torch=TorchKernel(table_step, in_float32),
        native=_native,
        operators=Refusal("the standard has no operator for a table; it stays between Quantize and Dequantize"),
    )
)
