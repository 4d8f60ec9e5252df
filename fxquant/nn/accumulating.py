"""The integer forms that accumulate: weighted ops, products of matrices, sums and products of tensors.

A weighted op computes

    acc = Σ (q_x - z_x) · q_w + q_b                exact integers
    q_y = clamp(round(acc · M) + z_y, lo, hi)      M = s_x · s_w / s_y as an integer and a shift

(Jacob et al., 1712.05877, eq. 4–7; M has 24 or 31 significant bits, see ``numerics.requantize``). Products and sums are
carried in float32 where no partial sum can reach 2**24, by the weights that there are, and in float64 otherwise: an integer
below 2**24, or 2**53, is exact in any order of addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.behaviour import Weighted
from fxquant.nn.fake_quantize import Grid
from fxquant.nn.integer import IntegerOp, Multipliers, Site
from fxquant.numerics.affine import quantize
from fxquant.numerics.requantize import combine, common_multipliers, requantize

__all__ = [
    "IntegerMatmul",
    "IntegerProduct",
    "IntegerSum",
    "IntegerWeighted",
    "channels_first",
    "padding_sides",
    "weight_rows",
]


class IntegerWeighted(IntegerOp):
    """Convolutions and linear layers: int8 weights, an int32 bias, one requantization."""

    parameters_kept = ("weight", "bias")
    multiplies = "weights"
    holds_weights = True
    weight: Tensor
    bias: Tensor
    multiplier: Tensor
    shift: Tensor
    output_scale: Tensor
    in_float32: Tensor

    def __init__(self, site: Site, *, channel_axis: int, weight_axis: int) -> None:
        super().__init__(site)
        grid, x_grid = site.weight, site.first()
        assert grid is not None
        self.channel_axis, self.weight_scheme = channel_axis, grid.scheme
        weight = site.parameters["weight"].detach().float()
        axis = weight_axis if grid.scale.ndim else None
        q_weight = quantize(weight, grid.scale, grid.zero_point, grid.qmin, grid.qmax, axis=axis)
        self.register_buffer("weight", q_weight.to(grid.dtype))
        groups = int(self.attributes.get("groups", 1)) if weight_axis == 1 else 1
        scale = x_grid.scale.double() * (grid.scale.repeat(groups) if grid.scale.ndim else grid.scale).double()
        bias = site.parameters.get("bias")
        self.register_buffer("bias", None if bias is None else self._quantized_bias(bias, scale))
        self._set_number("in_float32", torch.tensor(self._largest(x_grid, weight_axis) < 2**24))
        if site.output is not None:
            self._set_multiplier(scale / site.output.scale.double())
        else:
            self.register_buffer("output_scale", scale.float())
            self.clamp, self.real_dtype = site.clamp, site.parameters["weight"].dtype

    @property
    def behaviour(self) -> Weighted:
        """The op's: which axis of the weight its output channels are, and where its tensors have them."""
        found = getattr(self.entry, "behaviour", None)
        assert isinstance(found, Weighted)
        return found

    def requantized_by(self) -> Multipliers | None:
        """A channel of zeros needs no multiplier; None where the accumulator leaves as a float."""
        if self.output_dtype is None:
            return None
        needed = (weight_rows(self) != 0).any(1)
        return Multipliers(self.multiplier, needed, "runs by the reference, which gives the zero point there")

    @staticmethod
    def _quantized_bias(bias: Tensor, scale: Tensor) -> Tensor:
        q = torch.round(bias.detach().double() / scale)
        assert bool((q.abs() < 2**31).all()), "freeze raises the scales of weights whose bias would not fit"
        return q.to(torch.int32)

    def _largest(self, x_grid: Grid, weight_axis: int) -> float:
        """No partial sum can exceed this: the largest input times the sum of weight magnitudes that can meet it."""
        reach = max(x_grid.qmax - int(x_grid.zero_point), int(x_grid.zero_point) - x_grid.qmin)
        magnitudes = self.weight.double().abs().transpose(0, weight_axis).flatten(1).sum(1)
        groups = self.attributes.get("groups", 1) if weight_axis == 1 else 1
        return float(reach * magnitudes.max() * groups)

    def forward(self, x: Tensor, *operands: Any, **dynamic: Any) -> Tensor:
        exact = x.device.type == "cpu" and bool(self.numbers["in_float32"])
        dtype = torch.float32 if exact else torch.float64
        d = self.centred(x, dtype=dtype)
        acc = self.entry.function(d, self.weight.to(dtype), None, **self.attributes, **dynamic).to(torch.int64)
        if self.bias is not None:
            acc = acc + self._per_channel(self.bias, acc.ndim)
        if self.output_dtype is None:
            y = (acc.double() * self._per_channel(self.output_scale.double(), acc.ndim)).to(self.real_dtype)
            return y if self.clamp == (None, None) else torch.clamp(y, *self.clamp)
        axis = self.channel_axis if self.multiplier.ndim else None
        return self.emit(requantize(acc, self.multiplier, self.shift, axis=axis, rounding=self.rounding))

    def _per_channel(self, values: Tensor, ndim: int) -> Tensor:
        if values.ndim == 0:
            return values
        shape = [1] * ndim
        shape[self.channel_axis] = -1
        return values.reshape(shape)


def padding_sides(padding: Any, kernel: Sequence[int], dilation: Any) -> list[tuple[int, int]]:
    """A convolution's padding, in numbers or as ``"same"`` or ``"valid"``, before and behind each axis."""
    if padding == "same":
        gaps = [dilation] * len(kernel) if isinstance(dilation, int) else list(dilation)
        totals = [gap * (size - 1) for gap, size in zip(gaps, kernel, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    sizes = 0 if padding == "valid" else padding
    return [(int(size), int(size)) for size in ([sizes] * len(kernel) if isinstance(sizes, int) else sizes)]


def channels_first(part: IntegerWeighted) -> Tensor:
    """A layer's integer weights with output channels as axis 0."""
    axis = part.behaviour.out_axis
    return part.weight.transpose(0, axis).contiguous() if axis else part.weight


def weight_rows(part: IntegerWeighted) -> Tensor:
    """All weights that an output channel adds up, one channel a row."""
    groups = int(part.attributes.get("groups", 1))
    if part.behaviour.out_axis and groups > 1:
        each = part.weight.unflatten(0, (groups, -1)).transpose(1, 2)
        return each.flatten(0, 1).flatten(1)
    return channels_first(part).flatten(1)


class IntegerSum(IntegerOp):
    """A weighted sum of tensors and numbers, with one rounding: add, sub, and a per-tensor affine map."""

    parameters_kept = ()
    multipliers: Tensor
    shift: Tensor

    def __init__(self, site: Site, *, signs: tuple[float, ...] = (1.0, 1.0)) -> None:
        super().__init__(site)
        assert site.output is not None
        out = site.output.scale.double()
        terms = [sign * g.scale.double() / out for sign, g in zip(signs, site.inputs, strict=True) if g is not None]
        constant = sum((signs[i] * value for i, value in site.scalars.items()), 0.0)
        multipliers, shift = common_multipliers(torch.stack([*terms, constant / out]))
        self.register_buffer("multipliers", multipliers)
        self.register_buffer("shift", shift)

    def requantized_by(self) -> Multipliers:
        """Those of the operands; the last one is a constant's, which mostly vanishes."""
        terms = self.multipliers[:-1]
        return Multipliers(terms, torch.ones_like(terms, dtype=torch.bool), "that operand adds nothing")

    def forward(self, *operands: Any, **_: Any) -> Tensor:
        integers = [self.centred(q, i) for i, q in enumerate(operands) if isinstance(q, Tensor)]
        one = torch.ones((), dtype=torch.int64, device=integers[0].device)
        return self.emit(combine([*integers, one], self.multipliers, self.shift, rounding=self.rounding))


class IntegerProduct(IntegerOp):
    """A product of two tensors, or of a tensor and a number."""

    parameters_kept = ()
    multiplier: Tensor
    shift: Tensor
    sign: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        assert site.output is not None
        scale = 1.0 / site.output.scale.double()
        for grid in site.inputs:
            scale = scale if grid is None else scale * grid.scale.double()
        for value in site.scalars.values():
            scale = scale * value
        self.register_buffer("sign", torch.sign(scale).to(torch.int64))
        self._set_multiplier(scale.abs())

    def requantized_by(self) -> Multipliers:
        """A product with 0 needs none."""
        return Multipliers(self.multiplier, self.sign != 0, "its result is the zero point")

    def forward(self, *operands: Any) -> Tensor:
        factors = [self.centred(q, i) for i, q in enumerate(operands) if isinstance(q, Tensor)]
        acc = factors[0] * self.sign
        for factor in factors[1:]:
            acc = acc * factor
        return self.emit(requantize(acc, self.multiplier, self.shift, rounding=self.rounding))


class IntegerMatmul(IntegerOp):
    """A product of two quantized matrices, accumulated exactly."""

    parameters_kept = ()
    multiplies = "tensors"
    multiplier: Tensor
    shift: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        a, b = site.inputs[:2]
        assert a is not None and b is not None and site.output is not None
        self._set_multiplier(a.scale.double() * b.scale.double() / site.output.scale.double())

    def forward(self, a: Tensor, b: Tensor, **dynamic: Any) -> Tensor:
        left, right = self.centred(a, 0, torch.float64), self.centred(b, 1, torch.float64)
        acc = self.entry.function(left, right, **self.attributes, **dynamic).to(torch.int64)
        return self.emit(requantize(acc, self.multiplier, self.shift, rounding=self.rounding))
