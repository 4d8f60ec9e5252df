"""The modules of the decomposed form: integers between them, each op on real numbers inside.

Each integer op has a twin that reads its operands with ``dequantize``, computes the op itself, and writes its result with
``quantize``, in the operators of torch's ``quantized_decomposed`` library:

    integers → dequantize_per_tensor → op → quantize_per_tensor → integers        op(…, dequantize_per_channel(weight), bias)

This is the pattern that PT2E quantization ends in, that Inductor turns into oneDNN's integer kernels, and that ExecuTorch
hands to its backends. Those take ``quant_min`` and ``quant_max`` for the bounds of the stored type, so a narrower range is
a clamp in front; biases are real numbers.
Source: torch/ao/quantization/fx/_decomposed.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.errors import ExportError
from fxquant.nn.qdq import Cast, RealOp, Rounding, Spot, Stored
from fxquant.numerics.scheme import Scheme

__all__ = [
    "Coding",
    "Decode",
    "Decomposed",
    "Encode",
    "Rows",
    "StoredPerChannel",
    "StoredPerTensor",
    "require_operators",
]

_OPERATORS = ("quantize_per_tensor", "dequantize_per_tensor", "dequantize_per_channel")
_REGISTERED_BY = ("torch.ao.quantization.fx._decomposed", "torchao.quantization.pt2e.quantize_pt2e")


def require_operators() -> None:
    """Have the operators registered, by whichever module of torch or torchao does that.

    Raises:
        ExportError: none does.
    """
    for module in _REGISTERED_BY:
        if all(hasattr(torch.ops.quantized_decomposed, name) for name in _OPERATORS):
            return
        try:
            importlib.import_module(module)
        except ImportError:
            continue
    if not all(hasattr(torch.ops.quantized_decomposed, name) for name in _OPERATORS):
        raise ExportError(
            f"torch {torch.__version__} has no operators quantized_decomposed::quantize_per_tensor and its kin, which the "
            'decomposed form is written in.\n  what to do: pip install torchao; or use form="integer".'
        )


@dataclass(frozen=True)
class Coding:
    """How the numbers of one tensor are stored: ``x = (q - zero_point) * scale`` with ``q`` of type ``dtype``.

    ``shift`` is what was added to the integer model's own integers, and to its zero point, to change their sign.
    """

    scale: float
    zero_point: int
    dtype: torch.dtype
    shift: int = 0

    @classmethod
    def of(cls, scale: float, zero_point: int, scheme: Scheme, signed: bool | None) -> Coding:
        """The coding of a per-tensor grid, in integers of the sign that is asked for; of its own where None."""
        unsigned, of_sign = ((torch.uint8, torch.int8), (torch.uint16, torch.int16))[scheme.bits > 8]
        own = cls(scale, zero_point, of_sign if scheme.signed else unsigned)
        return own if signed in (None, scheme.signed) else own.moved()

    def moved(self) -> Coding:
        """The same numbers in integers of the other sign."""
        other = {torch.uint8: torch.int8, torch.uint16: torch.int16}
        other |= {signed: unsigned for unsigned, signed in other.items()}
        dtype = other[self.dtype]
        shift = torch.iinfo(dtype).min - torch.iinfo(self.dtype).min
        return Coding(self.scale, self.zero_point + shift, dtype, self.shift + shift)

    def from_own(self, q: Tensor) -> Tensor:
        """The integer model's integers as they are stored."""
        return (q.to(torch.int32) + self.shift).to(self.dtype)

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and largest integer of the stored type."""
        stored = torch.iinfo(self.dtype)
        return stored.min, stored.max

    def encode(self, x: Tensor) -> Tensor:
        """The integers of ``x``."""
        quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
        return quantize(x, self.scale, self.zero_point, *self.bounds, self.dtype)

    def decode(self, q: Tensor) -> Tensor:
        """What integers stand for."""
        dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
        return dequantize(q, self.scale, self.zero_point, *self.bounds, self.dtype)


class Encode(Rounding):
    """To a grid: where data enters the integer region, and behind each op.

    Args:
        coding: how the integers are stored.
        low, high: the integers that may occur; where they are not the bounds of the stored type, values are clamped to
            what they stand for first.
    """

    def __init__(self, coding: Coding, low: int, high: int) -> None:
        bits = torch.iinfo(coding.dtype).bits
        spot = Spot(coding.scale, coding.zero_point, bits, coding.dtype.is_signed)
        super().__init__(spot, low + coding.shift, high + coding.shift)
        self.coding = coding

    def forward(self, x: Tensor) -> Tensor:
        return self.coding.encode(self.clamped(x if x.dtype == torch.float32 else x.float()))

    def clamped(self, x: Tensor) -> Tensor:
        """As of ``Rounding``; bounds other than 0 are a hardtanh, which XNNPACK takes into the layer before it.

        A bound that is not there is that of the stored type, at which rounding saturates anyway.
        """
        if (self.lower is None and self.upper is None) or (self.lower == 0.0 and self.upper is None):
            return super().clamped(x)
        spot = self.spot
        return F.hardtanh(x, (self.low - spot.zero_point) * spot.scale, (self.high - spot.zero_point) * spot.scale)


class Decode(Cast):
    """From integers to real numbers: where data leaves the integer region."""

    def __init__(self, coding: Coding, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.coding = coding

    def forward(self, q: Tensor) -> Tensor:
        x = self.coding.decode(q)
        return x if self.dtype == torch.float32 else x.to(self.dtype)


class StoredPerChannel(Stored):
    """A weight that is kept as integers with one scale per slice along ``axis``, and read as real numbers.

    Args:
        q: the integers.
        scale: float32, ``()`` or ``(C,)``.
        axis: the channel axis.
        scheme: their grid.
    """

    zero_points: Tensor

    def __init__(self, q: Tensor, scale: Tensor, axis: int, scheme: Scheme) -> None:
        slices = scale.expand(q.shape[axis])
        super().__init__(q, slices, axis, scheme.bits)
        self.low, self.high = scheme.qmin, scheme.qmax
        self.register_buffer("zero_points", torch.zeros(q.shape[axis], dtype=torch.int64, device=q.device))

    def forward(self) -> Tensor:
        dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
        q = self.integers
        return dequantize(q, self.scale, self.zero_points, self.axis, self.low, self.high, q.dtype)


class StoredPerTensor(Stored):
    """A weight that is kept as integers with one scale for all, and read as real numbers.

    Args:
        q: the integers.
        scale: float32, ``()``.
        scheme: their grid.
    """

    def __init__(self, q: Tensor, scale: Tensor, scheme: Scheme) -> None:
        super().__init__(q, scale, 0, scheme.bits)
        self.low, self.high, self.step = scheme.qmin, scheme.qmax, float(scale)

    def forward(self) -> Tensor:
        dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
        return dequantize(self.integers, self.step, 0, self.low, self.high, self.integers.dtype)


class Decomposed(RealOp):
    """An op between integers that computes on real numbers.

    Args:
        operands: the coding of each operand; None for one that is no tensor of integers.
        joins: whether one of its operands is a list of tensors that it joins.
        others: as of ``RealOp``; ``rounding`` writes integers.
    """

    def __init__(self, *others: Any, operands: tuple[Coding | None, ...], joins: bool = False, **named: Any) -> None:
        super().__init__(*others, **named)
        self.operands, self.joins = operands, joins

    def forward(self, *operands: Any, **dynamic: Any) -> Any:
        if isinstance(operands[0], (tuple, list)) and not self.joins:  # a part is taken out; no number changes
            return self.function(*operands, **self.attributes, **dynamic)
        codings = (*self.operands, *(None for _ in operands[len(self.operands) :]))
        reals = [v if c is None else _each(v, c.decode) for v, c in zip(operands, codings, strict=True)]
        y = super().forward(*reals, **dynamic)
        return _each(y, self.rounding) if isinstance(y, (tuple, list)) and self.rounding is not None else y


class Rows(torch.nn.Module):
    """Rows of a table of integers, as they are."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, indices: Tensor, **_: Any) -> Tensor:
        return torch.embedding(self.table, indices)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``change`` made to a tensor, or to each in a tuple or list but those of indices."""
    if isinstance(value, (tuple, list)):
        return type(value)(change(x) if x.dtype not in (torch.int64, torch.bool) else x for x in value)
    return change(value)
