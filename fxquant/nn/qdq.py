"""The modules of the QDQ form: real numbers between them, rounded where the integer model has integers.

Each integer op has a twin here that computes the op itself on real numbers and sends the result once to its grid and
back; weights and biases are stored as the integers they are. This is what formats of other runtimes write down as a pair
of quantize and dequantize operators (*QDQ*), and what those runtimes turn into integer kernels of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.numerics.library import (
    dequantize_op,
    dequantize_per_axis_op,
    quantize_op,
    stored_bits,
    stored_bounds,
)
from fxquant.numerics.scheme import Scheme

__all__ = ["Cast", "RealOp", "Lookup", "Rounding", "Spot", "Stored", "Unpack"]


@dataclass(frozen=True)
class Spot:
    """Where integers of one tensor lie on the real line, in plain numbers: ``x = (q - zero_point) * scale``."""

    scale: float
    zero_point: int
    bits: int
    signed: bool

    @classmethod
    def of(cls, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Spot:
        """The spot of a per-tensor grid."""
        return cls(float(scale), int(zero_point), stored_bits(scheme.bits), scheme.signed)

    def integers(self, x: Tensor) -> Tensor:
        """``x`` as stored integers."""
        return quantize_op(x, self.scale, self.zero_point, self.bits, self.signed)

    def reals(self, q: Tensor) -> Tensor:
        """What stored integers stand for."""
        return dequantize_op(q, self.scale, self.zero_point, self.bits, self.signed)


class Rounding(nn.Module):
    """To a grid and back.

    Args:
        spot: the grid as it is stored.
        low, high: the integers that may occur; where they are not the stored type's own bounds, values are clamped to
            what they stand for first, so that a runtime saturates where the integer model does.
    """

    def __init__(self, spot: Spot, low: int, high: int) -> None:
        super().__init__()
        self.spot, self.low, self.high = spot, low, high
        least, most = stored_bounds(spot.bits, spot.signed)
        self.lower = None if low <= least else (low - spot.zero_point) * spot.scale
        self.upper = None if high >= most else (high - spot.zero_point) * spot.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.spot.reals(self.spot.integers(self.clamped(x.float())))

    def clamped(self, x: Tensor) -> Tensor:
        """``x`` within the real numbers that the grid has."""
        if self.lower == 0.0 and self.upper is None:
            return torch.relu(x)
        return x if self.lower is None and self.upper is None else torch.clamp(x, self.lower, self.upper)

    def extra_repr(self) -> str:
        return f"{self.low}…{self.high}, scale {self.spot.scale:.4g}, zero point {self.spot.zero_point}"


class Stored(nn.Module):
    """A weight or bias that is kept as integers: ``(…)`` int8, int16 or int32, and read as real numbers.

    Args:
        q: the integers.
        scale: float32, ``()`` or ``(C,)`` for one per slice along ``axis``.
        axis: the channel axis.
        bits: the width they need.
    """

    integers: Tensor
    scale: Tensor

    def __init__(self, q: Tensor, scale: Tensor, axis: int, bits: int) -> None:
        super().__init__()
        self.axis, self.bits = axis, bits
        self.register_buffer("integers", q.clone())
        self.register_buffer("scale", scale.float().clone())

    def forward(self) -> Tensor:
        return dequantize_per_axis_op(self.integers, self.scale, self.axis, self.bits)

    def extra_repr(self) -> str:
        return f"{tuple(self.integers.shape)}, {self.bits} bits"


class RealOp(nn.Module):
    """An op between real numbers, with the integer model's parameters and rounding.

    Args:
        function: the op; parameters and attributes are given by name.
        attributes: its arguments that are known.
        parameters: its constant tensors by name: as ``Stored`` integers, as they are, or None.
        rounding: where the result is rounded to; None where it stays real.
        clamp: bounds of a result that stays real, None where open.
        dtype: of a result that stays real; as computed where None.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        attributes: dict[str, Any],
        parameters: dict[str, Stored | Tensor | None],
        rounding: Rounding | None,
        clamp: tuple[float | None, float | None] = (None, None),
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.function, self.attributes, self.clamp, self.rounding, self.dtype = (
            function,
            attributes,
            clamp,
            rounding,
            dtype,
        )
        self.parameter_names = tuple(parameters)
        for name, value in parameters.items():
            if isinstance(value, nn.Module):
                self.add_module(f"parameter_{name}", value)
            else:
                self.register_buffer(f"parameter_{name}", value)

    def forward(self, *operands: Any, **dynamic: Any) -> Any:
        y = self.function(*operands, **self._parameters_now(), **self.attributes, **dynamic)
        if self.rounding is not None and isinstance(y, Tensor):
            return self.rounding(y)
        y = y if self.clamp == (None, None) else torch.clamp(y, *self.clamp)
        return y if self.dtype is None or self.dtype == y.dtype else y.to(self.dtype)

    def _parameters_now(self) -> dict[str, Tensor | None]:
        held = {name: getattr(self, f"parameter_{name}") for name in self.parameter_names}
        return {name: value() if isinstance(value, Stored) else value for name, value in held.items()}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.attributes.items())


class Lookup(nn.Module):
    """Rows of a table of integers, read as real numbers."""

    table: Tensor

    def __init__(self, table: Tensor, spot: Spot) -> None:
        super().__init__()
        self.spot = spot
        self.register_buffer("table", table.clone())

    def forward(self, indices: Tensor, **_: Any) -> Tensor:
        return self.spot.reals(F.embedding(indices, self.table))


class Unpack(nn.Module):
    """A constant tensor of integers, read as real numbers: one operator for 8 bits, arithmetic for wider ones."""

    def __init__(self, scale: float, zero_point: int) -> None:
        super().__init__()
        self.scale, self.zero_point = scale, zero_point

    def forward(self, q: Tensor) -> Tensor:
        if q.dtype in (torch.int8, torch.uint8):
            return Spot(self.scale, self.zero_point, 8, q.dtype == torch.int8).reals(q)
        return (q.float() - self.zero_point) * self.scale


class Cast(nn.Module):
    """To the floating dtype that the model computes in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)
