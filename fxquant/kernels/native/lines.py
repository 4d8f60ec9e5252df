"""What the native builder of an integer form asks of the lowering, and what builders share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import fx

from fxquant.kernels.native.library import Library, Step
from fxquant.kernels.native.operations import Operation, Pointwise
from fxquant.nn.integer import IntegerOp

__all__ = ["Lines", "operand_zero_point", "tabulated", "tensors_of"]


class Lines(Protocol):
    """What a form asks of the lowering."""

    library: Library
    """That will compute it."""

    def operands(self, nodes: Sequence[Any]) -> list[int]:
        """The lines of nodes."""

    def is_signed(self, node: Any) -> bool:
        """Whether a node's bytes are held 128 higher."""

    def gives(self, node: fx.Node, dtype: torch.dtype | None) -> None:
        """Say what a node's bytes are."""


def operand_zero_point(lines: Lines, node: fx.Node, part: Any, index: int) -> int:
    """Of an operand, as held."""
    return int(part.offset[index]) + 128 * lines.is_signed(node.args[index])


def tensors_of(node: fx.Node) -> list[fx.Node]:
    """The operands that are nodes."""
    return [a for a in node.args if isinstance(a, fx.Node)]


def tabulated(lines: Lines, node: fx.Node, part: IntegerOp, *, least: int = -128, most: int = 255) -> Operation:
    """A function of one tensor's numbers, asked for all 256; those beyond ``least`` and ``most`` as these."""
    (source,) = tensors_of(node)
    signed = lines.is_signed(source)
    lines.gives(node, part.output_dtype)
    every = (torch.arange(256, dtype=torch.int32) - 128 * signed).clamp(least, most)
    found = part(*(every.to(torch.int8 if signed else torch.uint8) if a is source else a for a in node.args))
    table = (found.to(torch.int32) + 128 * (part.output_dtype == torch.int8)).to(torch.uint8).contiguous()

    def write(step: Step) -> None:
        step.out.table = table.data_ptr()

    return Pointwise(lines.operands([source]), "table", write, (table,))
