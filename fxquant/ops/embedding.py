"""Table lookups."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.behaviour import Rescaling
from fxquant.errors import Refusal
from fxquant.nn.integer import IntegerEmbedding
from fxquant.ops.entry import Call, OpEntry
from fxquant.ops.example import Example

__all__ = ["embedding"]


def embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, scale_grad_by_freq: bool = False,
              sparse: bool = False) -> Tensor:  # fmt: skip
    """Rows of ``weight`` by index."""
    return F.embedding(input, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)


def _reason(call: Call) -> Refusal | None:
    renormalizes: Any = getattr(call.module, "max_norm", None) if call.module is not None else call["max_norm"]
    return None if renormalizes is None else Refusal("it renormalizes its table in forward (max_norm)")


def _example() -> Example:
    import torch

    generator = torch.Generator().manual_seed(0)
    table = nn.Embedding(11, 6, padding_idx=2)
    with torch.no_grad():
        table.weight.copy_(torch.randn(11, 6, generator=generator))
    return Example(table.eval(), (torch.randint(0, 11, (3, 5), generator=generator),))


OpEntry(
    name="embedding",
    function=embedding,
    signature="input*, weight*, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False",
    behaviour=Rescaling(inputs=()),
    functions=(F.embedding,),
    modules=(nn.Embedding,),
    parametric=True,
    integer=IntegerEmbedding,
    check=_reason,
    onnx="Gather",
    example=_example,
)
