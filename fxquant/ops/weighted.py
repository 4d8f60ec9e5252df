"""Ops with a weight: convolutions, transposed convolutions, linear layers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.behaviour import Weighted
from fxquant.nn.accumulating import IntegerWeighted, padding_sides
from fxquant.nn.integer import Site
from fxquant.ops.entry import Call, OpEntry
from fxquant.ops.example import example
from fxquant.ops.exported_forms import linear_by_rows

__all__ = ["addmm", "conv1d", "conv2d", "conv3d"]


def _padded(x: Tensor, weight: Tensor, padding: Any, dilation: Any, mode: str) -> Tensor:
    """``x`` padded on every spatial side as a convolution with ``padding_mode=mode`` pads it."""
    sides = padding_sides(padding, weight.shape[2:], dilation)
    return F.pad(x, [amount for side in reversed(sides) for amount in side], mode=mode)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """``F.conv1d`` with ``nn.Conv1d``'s padding modes."""
    if padding_mode != "zeros":
        input, padding = _padded(input, weight, padding, dilation, padding_mode), 0
    return F.conv1d(input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """``F.conv2d`` with ``nn.Conv2d``'s padding modes."""
    if padding_mode != "zeros":
        input, padding = _padded(input, weight, padding, dilation, padding_mode), 0
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """``F.conv3d`` with ``nn.Conv3d``'s padding modes."""
    if padding_mode != "zeros":
        input, padding = _padded(input, weight, padding, dilation, padding_mode), 0
    return F.conv3d(input, weight, bias, stride, padding, dilation, groups)


def addmm(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.addmm(bias, input, weight)``; a weight of ``(in, out)``, and an input of ``(n, in)``."""
    return input @ weight if bias is None else torch.addmm(bias, input, weight)


def _conv_macs(call: Call) -> int:
    weight = call.shape("weight")
    return math.prod(call.shape()) * math.prod(weight[1:])


def _transposed_macs(call: Call) -> int:
    weight = call.shape("weight")
    return math.prod(call.shape("input")) * math.prod(weight[1:])


_CONV = "input*, weight*, bias*=None, stride=1, padding=0, dilation=1, groups=1, padding_mode='zeros'"
_TRANSPOSED = "input*, weight*, bias*=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1"


def integer_conv1d(site: Site) -> IntegerWeighted:
    return IntegerWeighted(site, channel_axis=-2, weight_axis=0)


def integer_conv2d(site: Site) -> IntegerWeighted:
    return IntegerWeighted(site, channel_axis=-3, weight_axis=0)


def integer_conv3d(site: Site) -> IntegerWeighted:
    return IntegerWeighted(site, channel_axis=-4, weight_axis=0)


def integer_conv_transpose1d(site: Site) -> IntegerWeighted:
    return IntegerWeighted(site, channel_axis=-2, weight_axis=1)


def integer_conv_transpose2d(site: Site) -> IntegerWeighted:
    return IntegerWeighted(site, channel_axis=-3, weight_axis=1)


def integer_conv_transpose3d(site: Site) -> IntegerWeighted:
    return IntegerWeighted(site, channel_axis=-4, weight_axis=1)


def integer_linear(site: Site) -> IntegerWeighted:
    return IntegerWeighted(site, channel_axis=-1, weight_axis=0)


def integer_addmm(site: Site) -> IntegerWeighted:
    return IntegerWeighted(site, channel_axis=-1, weight_axis=1)


class _Addmm(nn.Module):
    """A layer of GPT-2: its weight is ``(in, out)``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 7)), nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


OpEntry(
    name="conv1d",
    function=conv1d,
    signature=_CONV,
    behaviour=Weighted(),
    functions=(F.conv1d, torch.conv1d),
    modules=(nn.Conv1d,),
    parametric=True,
    integer=integer_conv1d,
    fresh=True,
    macs=_conv_macs,
    onnx="Conv",
    example=example(nn.Conv1d(6, 9, 3, stride=2, padding=2, dilation=2, groups=3, padding_mode="reflect"), (2, 6, 17)),
)
OpEntry(
    name="conv2d",
    function=conv2d,
    signature=_CONV,
    behaviour=Weighted(),
    functions=(F.conv2d, torch.conv2d),
    modules=(nn.Conv2d,),
    parametric=True,
    integer=integer_conv2d,
    fresh=True,
    macs=_conv_macs,
    onnx="Conv",
    example=example(nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2), (2, 6, 11, 9)),
)
OpEntry(
    name="conv3d",
    function=conv3d,
    signature=_CONV,
    behaviour=Weighted(),
    functions=(F.conv3d, torch.conv3d),
    modules=(nn.Conv3d,),
    parametric=True,
    integer=integer_conv3d,
    fresh=True,
    macs=_conv_macs,
    onnx="Conv",
    example=example(nn.Conv3d(4, 6, (2, 3, 3), stride=(1, 2, 1), padding=(1, 0, 1), groups=2), (2, 4, 5, 7, 6)),
)
OpEntry(
    name="conv_transpose1d",
    function=F.conv_transpose1d,
    signature=_TRANSPOSED,
    behaviour=Weighted(out_axis=1),
    functions=(torch.conv_transpose1d,),
    modules=(nn.ConvTranspose1d,),
    parametric=True,
    integer=integer_conv_transpose1d,
    fresh=True,
    macs=_transposed_macs,
    onnx="ConvTranspose",
    example=example(nn.ConvTranspose1d(4, 6, 3, stride=3, padding=1, output_padding=2, groups=2), (2, 4, 9)),
)
OpEntry(
    name="conv_transpose2d",
    function=F.conv_transpose2d,
    signature=_TRANSPOSED,
    behaviour=Weighted(out_axis=1),
    functions=(torch.conv_transpose2d,),
    modules=(nn.ConvTranspose2d,),
    parametric=True,
    integer=integer_conv_transpose2d,
    fresh=True,
    macs=_transposed_macs,
    onnx="ConvTranspose",
    example=example(
        nn.ConvTranspose2d(6, 8, (3, 4), stride=2, padding=1, output_padding=1, groups=2, dilation=(2, 1)), (2, 6, 5, 6)
    ),
)
OpEntry(
    name="conv_transpose3d",
    function=F.conv_transpose3d,
    signature=_TRANSPOSED,
    behaviour=Weighted(out_axis=1),
    functions=(torch.conv_transpose3d,),
    modules=(nn.ConvTranspose3d,),
    parametric=True,
    integer=integer_conv_transpose3d,
    fresh=True,
    macs=_transposed_macs,
    onnx="ConvTranspose",
    example=example(nn.ConvTranspose3d(4, 4, 2, stride=(2, 1, 2), padding=(1, 0, 0), bias=False), (2, 4, 3, 4, 3)),
)
OpEntry(
    name="linear",
    function=F.linear,
    signature="input*, weight*, bias*=None",
    behaviour=Weighted(channels_last=True),
    modules=(nn.Linear,),
    parametric=True,
    integer=integer_linear,
    fresh=True,
    macs=lambda call: math.prod(call.shape()) * call.shape("weight")[1],
    onnx="Gemm",
    exported_as=linear_by_rows,
    example=example(nn.Linear(12, 7), (3, 5, 12)),
)
OpEntry(
    name="addmm",
    function=addmm,
    signature="input*, weight*, bias*",
    behaviour=Weighted(channels_last=True, out_axis=1),
    functions=(torch.addmm,),
    order=("bias", "input", "weight"),
    integer=integer_addmm,
    fresh=True,
    macs=lambda call: math.prod(call.shape()) * call.shape("weight")[0],
    onnx="Gemm",
    example=example(_Addmm(), (5, 12)),
)
