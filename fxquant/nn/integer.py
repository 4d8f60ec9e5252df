"""The integer twins of the fake-quant modules: integers in, integers out, in plain ATen.

Unary functions are a table with one entry per input integer. Averages and interpolations are linear in the integers:
they are summed in float64, which is exact, and rounded once. Softmax, layer norm and their kin read integers and write
integers, and evaluate in float64 between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxquant.errors import LevelError
from fxquant.nn.fake_quantize import Grid
from fxquant.nn.leaf import Leaf
from fxquant.nn.modules import Described
from fxquant.numerics.affine import dequantize, quantize
from fxquant.numerics.requantize import SIGNIFICANT_BITS, quantize_multiplier
from fxquant.numerics.scheme import Scheme

__all__ = [
    "Dequantize",
    "IntegerEmbedding",
    "IntegerEvaluate",
    "IntegerLinearMap",
    "IntegerOp",
    "IntegerPass",
    "IntegerTable",
    "Multipliers",
    "Quantize",
    "Site",
    "multiplies",
]


@dataclass(frozen=True)
class Site:
    """What an integer form is built from: one frozen op, with the grids around it.

    Args:
        entry: the op.
        attributes: its non-tensor arguments that are known now, by name.
        inputs: the grid of each operand in order; None for an operand that is not quantized.
        output: the grid of the result; None where it leaves the graph as a float.
        clamp: real bounds merged into the op, None where open.
        parameters: constant tensors by name, as real numbers.
        weight: the weight's grid, for a weighted op; its scale is per channel or per tensor.
        scalars: operands that are plain numbers, by position.
        rounding: how accumulators are requantized, see ``numerics.requantize``.
    """

    entry: Described
    attributes: dict[str, Any]
    inputs: tuple[Grid | None, ...]
    output: Grid | None
    clamp: tuple[float | None, float | None] = (None, None)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    weight: Grid | None = None
    scalars: dict[int, float] = field(default_factory=dict)
    rounding: str = "single"

    def first(self) -> Grid:
        """The grid of the first operand."""
        grid = self.inputs[0]
        assert grid is not None, f"{self.entry.name}: its first operand is not quantized"
        return grid


class Quantize(Leaf):
    """From real numbers to integers: where data enters the integer region."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.scheme = grid.scheme
        self.register_buffer("scale", grid.scale.clone())
        self.register_buffer("zero_point", grid.zero_point.clone())

    def forward(self, x: Tensor) -> Tensor:
        q = quantize(x.float(), self.scale, self.zero_point, self.scheme.qmin, self.scheme.qmax)
        return q.to(self.scheme.storage_dtype)

    def extra_repr(self) -> str:
        return f"{self.scheme}, scale {self.scale.item():.4g}, zero point {int(self.zero_point)}"


class Dequantize(Leaf):
    """From integers to real numbers: where data leaves the integer region."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("scale", grid.scale.clone())
        self.register_buffer("zero_point", grid.zero_point.clone())

    def forward(self, q: Tensor) -> Tensor:
        return dequantize(q, self.scale, self.zero_point).to(self.dtype)

    def extra_repr(self) -> str:
        return f"scale {self.scale.item():.4g}, zero point {int(self.zero_point)}"


@dataclass(frozen=True)
class Multipliers:
    """What a form requantizes by.

    Args:
        values: the multipliers, before their shift.
        needed: which of them must not vanish, of the same shape.
        without: what becomes of the result where one does, in words for the user.
    """

    values: Tensor
    needed: Tensor
    without: str


class IntegerOp(Leaf):
    """The root of the integer forms: input zero points, the output grid with merged clamps, and the rounding rule.

    ``scheme``, ``scale`` and ``zero_point`` say what the integers of the result stand for; ``scale`` is kept for reports.
    Buffers of one element that steer the code are kept as plain numbers too (``numbers``), which a tracer can follow.

    What audits and reports ask of a form stands on its class, and a subclass has it too: what it sums products with
    (``multiplies``: its own ``"weights"``, as ``IntegerWeighted`` holds them, or other ``"tensors"``), whether ``weight``
    are parameters of the model (``holds_weights``), and whether it evaluates a function in float64 (``in_float64``).

    Raises:
        LevelError: the op has constant tensors that the form would not keep (``parameters_kept``; None keeps all).
    """

    parameters_kept: ClassVar[tuple[str, ...] | None] = None
    multiplies: ClassVar[str] = ""
    holds_weights: ClassVar[bool] = False
    in_float64: ClassVar[bool] = False
    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor
    offset: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__()
        if self.parameters_kept is not None and (lost := set(site.parameters) - set(self.parameters_kept)):
            names = ", ".join(sorted(lost))
            raise LevelError(
                f"the integer form {type(self).__name__} of op {site.entry.name!r} would lose its {names}.\n"
                "  what to do: give the op's entry a form that keeps constant tensors, as IntegerEvaluate does."
            )
        self.entry, self.rounding = site.entry, site.rounding
        self.attributes, self.numbers = dict(site.attributes), dict[str, int]()
        zero_points = [torch.zeros((), dtype=torch.int32) if g is None else g.zero_point for g in site.inputs]
        self.register_buffer("offset", torch.stack(zero_points) if zero_points else torch.zeros(0, dtype=torch.int32))
        self.output_dtype: torch.dtype | None = None
        self.scheme: Scheme | None = None
        if site.output is not None:
            self._set_output(site.output, site.clamp)

    def _set_output(self, grid: Grid, clamp: tuple[float | None, float | None]) -> None:
        self.output_dtype, self.scheme = grid.dtype, grid.scheme
        bounds = [grid.qmin, grid.qmax]
        for i, bound in enumerate(clamp):
            if bound is not None:
                real = torch.full_like(grid.scale, bound)
                bounds[i] = int(quantize(real, grid.scale, grid.zero_point, grid.qmin, grid.qmax))
        self.register_buffer("scale", grid.scale.clone())
        self.register_buffer("zero_point", grid.zero_point.clone())
        self.register_buffer("low", torch.tensor(bounds[0], dtype=torch.int32))
        self.register_buffer("high", torch.tensor(bounds[1], dtype=torch.int32))

    def _set_number(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value)
        self.numbers[name] = int(value)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.numbers = {name: int(getattr(self, name)) for name in self.numbers}

    def _set_multiplier(self, multiplier: Tensor) -> None:
        q, shift = quantize_multiplier(multiplier.double(), SIGNIFICANT_BITS[self.rounding])
        self.register_buffer("multiplier", q)
        self.register_buffer("shift", shift)

    def requantized_by(self) -> Multipliers | None:
        """What it requantizes by, for audits; None where it does not."""
        values = self._buffers.get("multiplier")
        return (
            None
            if values is None
            else Multipliers(values, torch.ones_like(values, dtype=torch.bool), "its result is the zero point")
        )

    def emit(self, rounded: Tensor) -> Tensor:
        """Add the zero point, clamp, and store; ``rounded`` holds whole numbers in any dtype."""
        assert self.output_dtype is not None
        return torch.clamp(rounded + self.zero_point, self.low, self.high).to(self.output_dtype)

    def centred(self, q: Tensor, index: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
        """Operand ``index`` minus its zero point: what it is worth in units of its scale."""
        if q.is_floating_point():
            raise LevelError(
                f"the integer form of {self.entry.name} takes the integers that its graph hands it, and was given real "
                f"numbers ({q.dtype}).\n  what to do: call the model that it is part of, or a module that the model's "
                "own code calls."
            )
        return q.to(dtype) - self.offset[index]

    def _get_name(self) -> str:
        return f"Int{self.entry.title}"

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.attributes.items())


def multiplies(part: Any) -> str:
    """What a module sums products of integers with: ``weights`` of its own, other ``tensors``, or nothing."""
    return part.multiplies if isinstance(part, IntegerOp) else ""


class IntegerTable(IntegerOp):
    """A function of one number, tabulated over every integer of the input grid."""

    parameters_kept = ()
    table: Tensor
    first: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        assert site.output is not None
        grid, out = site.first(), site.output
        q = torch.arange(grid.qmin, grid.qmax + 1, device=grid.scale.device)
        x = dequantize(q, grid.scale.float(), grid.zero_point)
        y = self.entry.function(x, **self.attributes)
        if site.clamp != (None, None):
            y = torch.clamp(y, *site.clamp)
        table = quantize(y, out.scale.float(), out.zero_point, out.qmin, out.qmax).to(out.dtype)
        self.register_buffer("table", table)
        self.register_buffer("first", torch.tensor(grid.qmin, dtype=torch.int32))

    def forward(self, q: Tensor) -> Tensor:
        return self.table[(q.to(torch.int32) - self.first).to(torch.int64)]


class IntegerPass(IntegerOp):
    """Values pass through: the float function, on the integers themselves.

    Args:
        site: the op.
        carried: compute in float32, for functions that torch lacks for small integers; they only move values.
        fill: name of the attribute that holds a real number to be written into the result (the value of a padding).
    """

    parameters_kept = ()
    filling: Tensor

    def __init__(self, site: Site, *, carried: bool = False, fill: str | None = None) -> None:
        super().__init__(site)
        self.carried = carried
        self.fill = fill
        grid = next((g for g in site.inputs if g is not None), None)
        assert grid is not None
        if fill is not None:
            real = torch.full_like(grid.scale, float(self.attributes.get(fill) or 0.0))
            q = quantize(real, grid.scale, grid.zero_point, grid.qmin, grid.qmax)
            self._set_number("filling", q.to(torch.int32))

    def forward(self, *operands: Any, **dynamic: Any) -> Any:
        attributes = {**self.attributes, **dynamic}
        if self.fill is not None and attributes.get("mode", "constant") == "constant":
            attributes[self.fill] = self.numbers["filling"]
        if not self.carried:
            return self.entry.function(*operands, **attributes)
        dtype = operands[0].dtype
        return self.entry.function(operands[0].float(), *operands[1:], **attributes).to(dtype)


class IntegerLinearMap(IntegerOp):
    """A linear map that torch's own function computes: averages, sums, interpolations; float64 sums, one rounding."""

    parameters_kept = ()
    ratio: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        assert site.output is not None
        self.register_buffer("ratio", site.first().scale.double() / site.output.scale.double())

    def forward(self, q: Tensor, **dynamic: Any) -> Tensor:
        y = self.entry.function(self.centred(q, dtype=torch.float64), **self.attributes, **dynamic)
        return self.emit(torch.round(y * self.ratio))


class IntegerEvaluate(IntegerOp):
    """Integers in, integers out, and the function itself evaluated in float64 between.

    Args:
        site: the op; its parameters become buffers and are passed by name.
        function: the function to evaluate, the entry's own where None.
    """

    in_float64 = True
    input_scale: Tensor
    output_scale: Tensor

    def __init__(self, site: Site, *, function: Callable[..., Any] | None = None) -> None:
        super().__init__(site)
        assert site.output is not None
        self.function = function
        self.parameter_names = tuple(site.parameters)
        for name, value in site.parameters.items():
            self.register_buffer(f"parameter_{name}", value.detach().double())
        scales = [torch.zeros(()) if g is None else g.scale for g in site.inputs]
        self.register_buffer("input_scale", torch.stack([s.double() for s in scales]))
        self.register_buffer("output_scale", site.output.scale.double().clone())
        self.quantized_inputs = tuple(g is not None for g in site.inputs)
        self.may_fail = bool(getattr(site.entry, "sensitive", None))  # 0 / 0 on the grid counts as 0

    def forward(self, *operands: Any, **dynamic: Any) -> Tensor:
        real = [self._real(value, i) for i, value in enumerate(operands)]
        named = {name: getattr(self, f"parameter_{name}") for name in self.parameter_names}
        function = self.function or self.entry.function
        y = function(*real, **named, **self.attributes, **dynamic)
        steps = torch.round(y / self.output_scale)
        return self.emit(torch.nan_to_num(steps) if self.may_fail else steps)

    def _real(self, value: Any, index: int) -> Any:
        if not isinstance(value, Tensor) or index >= len(self.quantized_inputs) or not self.quantized_inputs[index]:
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        return self.centred(value, index, torch.float64) * self.input_scale[index]


class IntegerEmbedding(IntegerOp):
    """A table of integer rows, within the bounds of a merged clamp; looking one up is all there is to do."""

    holds_weights = True
    parameters_kept = ("weight",)
    weight: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        assert site.output is not None
        out = site.output
        q = quantize(site.parameters["weight"].detach().float(), out.scale, out.zero_point, out.qmin, out.qmax)
        self.register_buffer("weight", torch.clamp(q, self.low, self.high).to(out.dtype))

    def forward(self, indices: Tensor, **_: Any) -> Tensor:
        return self.weight[indices]
