"""Ops that normalize."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.behaviour import ChannelAffine, Rescaling
from fxquant.errors import Refusal
from fxquant.nn.integer import IntegerEvaluate, Site
from fxquant.ops.entry import Call, OpEntry
from fxquant.ops.example import example

__all__ = ["channel_affine", "channel_affine_of"]


def channel_affine(input: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """y = gain·x + offset per channel (axis 1): what batch normalization is in eval mode."""
    shape = [1, -1] + [1] * (input.ndim - 2)
    return input * gain.reshape(shape) + offset.reshape(shape)


def channel_affine_of(module: Any) -> tuple[Tensor, Tensor]:
    """Gain and offset of ``module``, a batch norm, in eval mode, in float64.

    k = γ / sqrt(σ² + ε),  c = β − μ·k, with the module's own ε; γ = 1 and β = 0 where it has none.
    """
    mean, variance = module.running_mean, module.running_var
    assert isinstance(mean, Tensor) and isinstance(variance, Tensor)
    gain = torch.rsqrt(variance.detach().double() + float(module.eps))
    if module.weight is not None:
        gain = gain * module.weight.detach().double()
    offset = -mean.detach().double() * gain
    if module.bias is not None:
        offset = offset + module.bias.detach().double()
    return gain, offset


def integer_batch_norm(site: Site) -> IntegerEvaluate:
    """The affine map itself: gain and offset are the site's parameters, and nothing else is needed."""
    return IntegerEvaluate(replace(site, attributes={}), function=channel_affine)


def _batch_norm_reason(call: Call) -> Refusal | None:
    if call.module is None:
        return Refusal("batch_norm is called as a function; fxquant quantizes the modules nn.BatchNorm1d/2d/3d")
    if call.module.running_mean is None:
        return Refusal("it normalizes with the statistics of each batch (track_running_stats=False)")
    return None


OpEntry(
    name="batch_norm",
    function=F.batch_norm,
    signature="input*, running_mean*, running_var*, weight*=None, bias*=None, training=False, momentum=0.1, eps=1e-05",
    behaviour=ChannelAffine(),
    functions=(torch.batch_norm,),
    modules=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    parametric=True,
    integer=integer_batch_norm,
    fresh=True,
    check=_batch_norm_reason,
    onnx="BatchNormalization",
    example=example(nn.BatchNorm2d(5, eps=1e-2, momentum=0.3), (3, 5, 4, 6)),
)
OpEntry(
    name="layer_norm",
    function=F.layer_norm,
    signature="input*, normalized_shape, weight*=None, bias*=None, eps=1e-05",
    behaviour=Rescaling(inputs=("input",)),
    functions=(torch.layer_norm,),
    modules=(nn.LayerNorm,),
    parametric=True,
    integer=IntegerEvaluate,
    native="layer norm",
    fresh=True,
    onnx="LayerNormalization",
    example=example(nn.LayerNorm((4, 6), eps=1e-2), (3, 5, 4, 6)),
)
