"""Everything without weights: torch's own operators on quantized tensors, or float32 between two exact conversions.

Integers of a byte are exact in float32, and so is what a form says that they stand for up to one rounding. A function
evaluated there and quantized once differs from the reference only where a result lies within about 1e-6 steps of half way
between two integers. A table is compared with the reference's, entry by entry, when it is built.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.kernels.forms import Form, convert
from fxquant.kernels.operators import unary_operator
from fxquant.kernels.place import Place, Step, clamped, zero_point_held
from fxquant.nn.integer import Quantize
from fxquant.ops.behaviour import ChannelAffine

__all__ = [
    "FLOAT32",
    "dequantize_step",
    "evaluate_step",
    "linear_map_step",
    "matmul_step",
    "passing_step",
    "product_step",
    "quantize_step",
    "sum_step",
    "table_step",
]

FLOAT32 = "float32 inside"
ATEN = "quantized"


def _quantized(place: Place, function: Callable[..., Tensor], given: Form, scale: float | None = None) -> Any:
    """``function``, whose real result is rounded to the grid of the result; ``scale`` is its unit where not the grid's."""
    unit, zero_point = given.scale if scale is None else scale, given.zero_point

    def run(*args: Any, **kwargs: Any) -> Tensor:
        y = torch.quantize_per_tensor(function(*args, **kwargs), unit, zero_point, torch.quint8)
        return y if unit == given.scale else convert(y, given, False)

    return clamped(place.part, given, run)


def quantize_step(place: Place) -> Step | None:
    """Where data enters: rounding, in the order of memory that convolutions read."""
    part: Quantize = place.part
    if part.scheme.storage_dtype not in (torch.uint8, torch.int8):
        return None
    shift = 128 * part.scheme.signed
    form = Form(float(part.scale), int(part.zero_point) + shift)
    low, high = (float((q + shift - form.zero_point) * form.scale) for q in (part.scheme.qmin, part.scheme.qmax))
    whole = part.scheme.bits == 8 and not part.scheme.narrow_range

    def run(x: Tensor) -> Tensor:
        x = x.float()
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        q = torch.quantize_per_tensor(x, form.scale, form.zero_point, torch.quint8)
        return q if whole else torch.clamp(q, low, high)

    return Step(run, form, ATEN)


def dequantize_step(place: Place) -> Step | None:
    """Where data leaves, in the order of memory that the user's code expects."""
    source = place.node.args[0]
    found = place.integers(source)
    if found is None or found.scale is None:
        return None
    form = Form(float(place.part.scale), int(place.part.zero_point) + 128 * found.signed)
    dtype = place.part.dtype

    def run(q: Tensor) -> Tensor:
        return q.dequantize().contiguous().to(dtype)

    assert isinstance(source, fx.Node)
    return Step(run, None, ATEN, {source: form})


def table_step(place: Place) -> Step | None:
    """A function of one number, if it gives the reference's table for every integer: torch's own, or in float32."""
    part, taken, given = place.part, place.input_form(0), place.output_form()
    if taken is None or given is None:
        return None
    run = _quantized(place, lambda q: part.entry.function(q.dequantize(), **part.attributes), given)
    operator = unary_operator(getattr(part.entry, "quantized_as", ""))
    own = clamped(part, given, lambda q: operator(q, *given)) if operator is not None else None
    for way, kernel in ((own, ATEN), (run, FLOAT32)):
        if way is not None and torch.equal(_tabulated(place, way, taken), part.table):
            return Step(way, given, kernel, _takes(place, taken))
    return None


def _tabulated(place: Place, run: Callable[..., Tensor], taken: Form) -> Tensor:
    """What ``run`` makes of every integer that the reference's table has an entry for."""
    part, source = place.part, place.node.args[0]
    assert isinstance(source, fx.Node)
    first = int(part.first) + 128 * place.known[source].signed
    every = torch.arange(first, first + len(part.table), dtype=torch.uint8, device="cpu")
    return convert(run(convert(every, taken, False)), None, part.output_dtype == torch.int8)


def _takes(place: Place, *forms: Form | None) -> dict[fx.Node, Form | None]:
    """The form of each operand that is a node."""
    pairs = zip(place.node.args, forms, strict=False)
    return {node: form for node, form in pairs if isinstance(node, fx.Node) and form is not None}


def _terms(place: Place) -> list[tuple[int, Form]] | None:
    """Position and form of every operand that is a tensor; None where one of them holds no bytes, or one comes twice."""
    found = []
    for index, value in enumerate(place.node.args):
        form = place.input_form(index)
        if form is not None:
            found.append((index, form))
        elif isinstance(value, fx.Node):
            return None
    return found or None


def sum_step(place: Place) -> Step | None:
    """A weighted sum: torch's addition where the weights are 1 and the shapes equal, else in float32."""
    part, terms, given = place.part, _terms(place), place.output_form()
    if terms is None or given is None or len(part.multipliers) != len(terms) + 1 or _repeats(place):
        return None
    reals = torch.ldexp(part.multipliers.double(), part.shift - 31) * given.scale
    gains = [float(real) / form.scale for real, (_, form) in zip(reals, terms, strict=False)]
    constant = float(reals[-1])
    takes = _takes(place, *(place.input_form(i) for i in range(len(place.node.args))))
    plain = len(terms) == 2 and constant == 0.0 and all(abs(gain - 1) < 1e-6 for gain in gains)
    if plain and _same_shapes(place):
        return Step(_binary(place, place.operators.add, given), given, ATEN, takes)
    positions = [index for index, _ in terms]

    def total(*operands: Any) -> Tensor:
        y = operands[positions[0]].dequantize() * gains[0]
        for index, gain in zip(positions[1:], gains[1:], strict=True):
            y = torch.add(y, operands[index].dequantize(), alpha=gain)
        return y + constant if constant else y

    return Step(_quantized(place, lambda *operands, **_: total(*operands), given), given, FLOAT32, takes)


def _repeats(place: Place) -> bool:
    nodes = [value for value in place.node.args if isinstance(value, fx.Node)]
    return len(set(nodes)) != len(nodes) and len({place.input_form(i) for i in range(len(nodes))}) > 1


def _same_shapes(place: Place) -> bool:
    return len({place.known[node].sample.shape for node in place.node.args if isinstance(node, fx.Node)}) == 1


def _binary(place: Place, operator: Callable[..., Tensor], given: Form) -> Callable[..., Tensor]:
    scale, zero_point = given
    return clamped(place.part, given, lambda a, b, **_: operator(a, b, scale, zero_point))


def product_step(place: Place) -> Step | None:
    """A product: torch's own where shapes are equal, else in float32."""
    part, terms, given = place.part, _terms(place), place.output_form()
    if terms is None or given is None or _repeats(place):
        return None
    gain = float(torch.ldexp(part.multiplier.double(), part.shift - 31)) * float(part.sign) * given.scale
    for _, form in terms:
        gain /= form.scale
    takes = _takes(place, *(place.input_form(i) for i in range(len(place.node.args))))
    positions = [index for index, _ in terms]
    if len(terms) == 2 and abs(gain - 1) < 1e-6:
        if _same_shapes(place):
            return Step(_binary(place, place.operators.mul, given), given, ATEN, takes)
        run = _quantized(place, lambda a, b: a.dequantize() * b.dequantize(), given)
        return Step(run, given, FLOAT32, takes)

    def product(*operands: Any) -> Tensor:
        y = operands[positions[0]].dequantize() * gain
        for index in positions[1:]:
            y = y * operands[index].dequantize()
        return y

    return Step(_quantized(place, product, given), given, FLOAT32, takes)


def matmul_step(place: Place) -> Step | None:
    """A product of two matrices of integers, exact in float32 while its sums stay below 2^24."""
    part, given = place.part, place.output_form()
    forms = place.input_form(0), place.input_form(1)
    if given is None or forms[0] is None or forms[1] is None or _repeats(place):
        return None
    whole = [Form(1.0, form.zero_point) for form in forms if form is not None]
    unit = float(torch.ldexp(part.multiplier.double(), part.shift - 31))
    if unit <= 0:
        return None

    def product(a: Tensor, b: Tensor, **dynamic: Any) -> Tensor:
        return part.entry.function(a.dequantize(), b.dequantize(), **part.attributes, **dynamic)

    return Step(_quantized(place, product, given, 1.0 / unit), given, FLOAT32, _takes(place, *whole))


def linear_map_step(place: Place) -> Step | None:
    """An average or an interpolation, of the integers themselves: a mean of few has ties, which float scales would break."""
    part, told, given = place.part, place.input_form(0), place.output_form()
    if told is None or given is None:
        return None
    taken = Form(1.0, told.zero_point)

    def mapped(q: Tensor, **dynamic: Any) -> Tensor:
        return part.entry.function(q.dequantize(), **part.attributes, **dynamic)

    return Step(_quantized(place, mapped, given, 1.0 / float(part.ratio)), given, FLOAT32, _takes(place, taken))


def evaluate_step(place: Place) -> Step | None:
    """A function evaluated between integers: float32 where the reference takes float64."""
    part, given = place.part, place.output_form()
    count = len(part.quantized_inputs)
    operands = place.node.args
    forms = [place.input_form(i) if i < count and part.quantized_inputs[i] else None for i in range(len(operands))]
    wanted = [isinstance(v, fx.Node) and i < count and part.quantized_inputs[i] for i, v in enumerate(operands)]
    if given is None or _repeats(place) or any(want and form is None for want, form in zip(wanted, forms, strict=True)):
        return None
    named = {name: getattr(part, f"parameter_{name}").float() for name in part.parameter_names}
    affine, first = place.operators.affine, place.integers(operands[0])
    if affine is not None and isinstance(part.entry.behaviour, ChannelAffine) and first and first.sample.ndim == 4:
        return Step(_channel_affine(place, affine, given, **named), given, ATEN, _takes(place, *forms))
    function = part.function or part.entry.function

    def evaluated(*values: Any, **dynamic: Any) -> Tensor:
        real = [_real(value, want) for value, want in zip(values, wanted, strict=True)]
        return function(*real, **named, **part.attributes, **dynamic)

    return Step(_quantized(place, evaluated, given), given, FLOAT32, _takes(place, *forms))


def _channel_affine(place: Place, operator: Any, given: Form, gain: Tensor, offset: Tensor) -> Callable[..., Tensor]:
    """torch's batch norm of integers, whose mean is 0 and variance 1."""
    mean, variance, (scale, zero_point) = torch.zeros_like(gain), torch.ones_like(gain), given
    run = partial(_normed, operator, (gain, offset, mean, variance, 0.0, scale, zero_point))
    return clamped(place.part, given, run)


def _normed(operator: Any, numbers: tuple[Any, ...], q: Tensor, **_: Any) -> Tensor:
    y: Tensor = operator(q, *numbers)
    return y


def _real(value: Any, quantized: bool) -> Any:
    if quantized:
        return value.dequantize()
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def passing_step(place: Place) -> Step | None:
    """Values that move: torch's own function on quantized tensors, where its entry says that there is one."""
    part = place.part
    if not part.entry.quantized or part.output_dtype not in (torch.uint8, torch.int8):
        return None
    nodes = [node for node in place.node.all_input_nodes if place.integers(node) is not None]
    held = next((place.known[node].form for node in nodes if place.known[node].form is not None), None)
    form = held or Form(float(part.scale), zero_point_held(part))
    if not nodes:
        return None

    def run(*operands: Any, **dynamic: Any) -> Any:
        return part.entry.function(*operands, **part.attributes, **dynamic)

    return Step(run, form, ATEN, dict.fromkeys(nodes, form))
