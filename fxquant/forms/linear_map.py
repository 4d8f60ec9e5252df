"""Linear maps that torch's own function computes: averages, sums, interpolations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fxquant.errors import Refusal
from fxquant.kernels.native.lines import Lines, operand_zero_point
from fxquant.kernels.native.operations import Average, Operation, pool_of
from fxquant.kernels.native.weights import held
from fxquant.kernels.place import Place, Step
from fxquant.kernels.quantized import FLOAT32, in_float32, rounded, taken_by
from fxquant.kernels.storage import Storage
from fxquant.nn.form import Form, RealForm, TorchKernel, own_function, register_form
from fxquant.nn.integer import IntegerLinearMap

__all__ = ["linear_map_step"]


_AVERAGES = (
    "average",
    "average over lines",
    "adaptive average",
    "adaptive average over lines",
    "adaptive average over volumes",
    "mean",
)
_AVERAGES_ONLY = "only averages over images, lines and whole volumes are written natively"


def linear_map_step(place: Place) -> Step:
    """An average or an interpolation, of the integers themselves: a mean of few has ties, which float scales would break."""
    part, told, given = place.part, place.input_form(0), place.output_form()
    taken = Storage(1.0, told.zero_point)

    def mapped(q: Tensor, **dynamic: Any) -> Tensor:
        return part.entry.function(q.dequantize(), **part.attributes, **dynamic)

    return Step(rounded(place, mapped, given, 1.0 / float(part.ratio)), given, FLOAT32, taken_by(place, taken))


def _linear_map(lines: Lines, node: fx.Node, part: IntegerLinearMap) -> Operation:
    entry: Any = part.entry
    (form, dims), attributes = pool_of(entry.native), dict(part.attributes)
    if node.kwargs or len(node.args) != 1:
        raise Refusal(_AVERAGES_ONLY)
    if attributes.get("divisor_override") is not None:
        raise Refusal("it divides by a number of its own")
    lines.gives(node, part.output_dtype)
    zero_point, least, most = held(part)
    zero_points = operand_zero_point(lines, node, part, 0), zero_point
    ratio = float(part.ratio)
    operands, bounds = lines.operands(node.args), (least, most)
    return Average(operands, entry.function, attributes, dims, form, ratio, zero_points, bounds)


def _not_native(lines: Lines, node: fx.Node, part: IntegerLinearMap) -> Operation:
    raise Refusal(_AVERAGES_ONLY)


register_form(
    Form(
        arithmetic=IntegerLinearMap,
        real=RealForm(own_function, ("ratio",)),
        torch=TorchKernel(linear_map_step, in_float32),
        native=_not_native,
        native_ops=dict.fromkeys(_AVERAGES, _linear_map),
        operators=Refusal("the standard has no average of integers; it stays between Quantize and Dequantize"),
    )
)
