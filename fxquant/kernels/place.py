"""What the choice of a kernel reads, a node with what is known of its inputs, and what it answers, a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import Refusal
from fxquant.kernels.operators import Engine, Operators
from fxquant.kernels.storage import Storage
from fxquant.nn.integer import IntegerOp

__all__ = ["HELD", "Held", "Known", "Place", "Step", "clamped", "zero_point_held"]

HELD = "held"
"""The key in ``node.meta`` of an input that another part of a model computes, with what its bytes are (``Held``)."""


@dataclass(frozen=True)
class Held:
    """What is known of bytes that another part of a model computes.

    Attributes:
        scale: what one integer step is worth; None where it is no tensor of bytes.
        signed: it is made of signed bytes.
    """

    scale: float | None
    signed: bool


@dataclass(frozen=True)
class Known:
    """What is known of a value of the graph.

    Attributes:
        sample: the value in the first run.
        scale: what one integer step of it is worth; None where it holds no integers, or that is not known.
        signed: it is made of signed bytes.
        form: its storage; None for plain tensors and everything that is no tensor of integers.
    """

    sample: Any
    scale: float | None = None
    signed: bool = False
    form: Storage | None = None


@dataclass(frozen=True)
class Step:
    """How a node is computed.

    Attributes:
        run: takes the node's arguments.
        gives: the form of its result.
        kernel: what computes it, for reports.
        takes: the form that each argument must have; plain where none is named.
        packed: weights in torch's own form, which a tracer wants to be shown.
    """

    run: Callable[..., Any]
    gives: Storage | None
    kernel: str
    takes: dict[fx.Node, Storage | None] = field(default_factory=dict)
    packed: Any = None


@dataclass(frozen=True)
class Place:
    """A node that calls an integer form, for which a kernel is wanted.

    Attributes:
        part: the integer form, whose buffers say what is to be computed.
        node: the node.
        known: what is known of every value before it.
        operators: what torch has.
        packs: packed weights that were made before, and are used again.
    """

    part: Any
    node: fx.Node
    known: dict[fx.Node, Known]
    operators: Operators
    packs: dict[Any, Any] = field(default_factory=dict)

    def pack(self, kind: str, engine: Engine, weight: Tensor, bias: Tensor, *geometry: Any) -> Any:
        """The layer's weights, packed; those that were packed before where there are any."""
        key = (self.part, engine.name, repr(geometry))
        if key not in self.packs:
            self.packs[key] = self.operators.pack(kind, engine, weight, bias, *geometry)
        return self.packs[key]

    def holds_bytes(self, value: Any) -> bool:
        """Whether an argument is one tensor of bytes whose scale is known."""
        return isinstance(value, fx.Node) and value in self.known and self.known[value].scale is not None

    def integers(self, value: Any) -> Known:
        """What is known of an argument that is one tensor of bytes.

        Raises:
            Refusal: it is none.
        """
        if not self.holds_bytes(value):
            raise Refusal(f"its operand {value} is no tensor of bytes")
        return self.known[value]

    def input_form(self, index: int) -> Storage:
        """The form in which operand ``index`` tells what its numbers stand for.

        Raises:
            Refusal: it holds no bytes.
        """
        found = self.integers(self.node.args[index])
        assert found.scale is not None
        return Storage(found.scale, int(self.part.offset[index]) + 128 * found.signed)

    def output_form(self) -> Storage:
        """The form in which the result tells what its numbers stand for.

        Raises:
            Refusal: it is wider than a byte.
        """
        part: IntegerOp = self.part
        if part.output_dtype not in (torch.uint8, torch.int8):
            raise Refusal(f"its result is {part.output_dtype}")
        return Storage(float(part.scale), zero_point_held(part))


def zero_point_held(part: Any) -> int:
    """The zero point of a result as it is held: signed integers are 128 higher."""
    return int(part.zero_point) + 128 * (part.output_dtype == torch.int8)


def clamped(part: Any, form: Storage, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``run`` with its result clamped as the integer form says, where a byte's own bounds do not do that."""
    shift = 128 * (part.output_dtype == torch.int8)
    low, high = int(part.low) + shift, int(part.high) + shift
    if low <= 0 and high >= 255:
        return run
    real = ((low - form.zero_point) * form.scale, (high - form.zero_point) * form.scale)

    def bounded(*args: Any, **kwargs: Any) -> Tensor:
        return torch.clamp(run(*args, **kwargs), *real)

    return bounded
