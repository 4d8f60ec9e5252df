"""Ops that drop values while training and do nothing in eval mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.behaviour import Passing
from fxquant.errors import Refusal
from fxquant.ops.entry import Call, OpEntry
from fxquant.ops.example import Example, example

__all__ = ["drop_path", "stochastic_depth"]


def stochastic_depth(input: Tensor, p: float, mode: str, training: bool = True) -> Tensor:
    """Drop whole rows (``mode="row"``) or the whole batch with probability ``p`` while training (1603.09382)."""
    if not training or p == 0.0:
        return input
    kept = 1.0 - p
    shape = [input.shape[0] if mode == "row" else 1] + [1] * (input.ndim - 1)
    noise = torch.empty(shape, dtype=input.dtype, device=input.device).bernoulli_(kept)
    return input * (noise.div_(kept) if kept > 0.0 else noise)


def drop_path(input: Tensor, drop_prob: float = 0.0, training: bool = False, scale_by_keep: bool = True) -> Tensor:
    """timm's stochastic depth: drop whole samples with probability ``drop_prob`` while training (1603.09382)."""
    if drop_prob == 0.0 or not training:
        return input
    kept = 1 - drop_prob
    mask = input.new_empty((input.shape[0],) + (1,) * (input.ndim - 1)).bernoulli_(kept)
    if kept > 0.0 and scale_by_keep:
        mask.div_(kept)
    return input * mask


torch.fx.wrap("drop_path")


class _DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, 0.3, self.training)


def _stochastic_depth_example() -> Example:
    from torchvision.ops import StochasticDepth

    return example(StochasticDepth(0.3, "row"), (2, 3, 4), behind_op=True)()


def _dropout_reason(call: Call) -> Refusal | None:
    always = call.module is None and call["training"] is True
    return Refusal("it drops values in eval mode too") if always else None


OpEntry(
    name="dropout",
    function=F.dropout,
    signature="input*, p=0.5, training=True, inplace=False",
    behaviour=Passing(),
    modules=(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    parametric=True,
    integer=None,
    drops=True,
    check=_dropout_reason,
    onnx="Identity",
    example=example(nn.Dropout(p=0.3), (2, 3, 4), behind_op=True),
)
OpEntry(
    name="stochastic_depth",
    function=stochastic_depth,
    signature="input*, p, mode, training=True",
    behaviour=Passing(),
    named_functions=("torchvision.ops.stochastic_depth.stochastic_depth",),
    integer=None,
    drops=True,
    check=_dropout_reason,
    onnx="Identity",
    example=_stochastic_depth_example,
)
OpEntry(
    name="drop_path",
    function=drop_path,
    signature="input*, drop_prob=0.0, training=False, scale_by_keep=True",
    behaviour=Passing(),
    named_functions=("timm.layers.drop.drop_path", f"{__name__}.drop_path"),
    integer=None,
    drops=True,
    check=_dropout_reason,
    onnx="Identity",
    example=example(_DropPath(), (2, 3, 4), behind_op=True),
)
