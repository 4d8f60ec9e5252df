"""How far a runtime may be from the exact integers: as far as one more rounding of every tensor would bring it.

Runtimes requantize in arithmetic of their own, skip a rounding before a sum, or round to the other neighbour where a
result lies half way: each changes integers by one step here and there, and what that amounts to at the outputs depends on
the network. It is measured: the integer model runs once with a step added to or taken from one integer in twelve of each
rounded tensor, which is noise of 1/12 of a squared step, as rounding itself is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.capture.calls import Call
from fxquant.capture.values import unchanged
from fxquant.export.agreement import GOOD_SQNR, together
from fxquant.export.signature import tensors_of
from fxquant.kernels.runner import by_reference
from fxquant.nn.form import moves
from fxquant.nn.integer import IntegerOp

__all__ = ["exact_outputs", "least_sqnr"]

_SHARE = 1 / 12


@torch.no_grad()
def exact_outputs(int8: nn.Module, call: Call) -> list[Tensor]:
    """The tensors that the exact reference gives; what forward writes to its buffers is put back."""
    with unchanged(int8, but=IntegerOp), by_reference(int8):
        return tensors_of(int8(*call.args, **call.kwargs))


def least_sqnr(int8: nn.Module, call: Call, exact: Sequence[Tensor]) -> float:
    """Decibels to which a runtime has to agree with ``exact``: ``GOOD_SQNR``, or less if one more rounding leaves less."""
    generator = torch.Generator().manual_seed(0)

    def disturb(part: Any, _: Any, y: Tensor) -> Tensor:
        chance = torch.rand(y.shape, generator=generator).to(y.device)
        step = (chance < _SHARE / 2).to(torch.int32) - (chance > 1 - _SHARE / 2).to(torch.int32)
        return torch.clamp(y.to(torch.int32) + step, part.low, part.high).to(y.dtype)

    parts = [part for part in int8.modules() if isinstance(part, IntegerOp) and not moves(part)]
    hooks = [part.register_forward_hook(disturb) for part in parts if part.output_dtype is not None]
    try:
        return min(GOOD_SQNR, together(exact_outputs(int8, call), exact))
    finally:
        for hook in hooks:
            hook.remove()
