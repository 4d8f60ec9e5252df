"""Batch norms folded before weights are rounded, in every pass of training (*whitepaper* mode).

With the running statistics μ, σ² and those of the batch, μ_B, σ_B², and the weight W_f = γ / sqrt(σ² + ε) · W:

    training       y = r · conv(x, FQ(W_f)) + β + γ · (b - μ_B) / sqrt(σ_B² + ε),    r = sqrt((σ² + ε) / (σ_B² + ε))
    frozen, eval   y = conv(x, FQ(W_f)) + β + γ · (b - μ) / sqrt(σ² + ε)             which is what ships

A first convolution with the float weight gives μ_B and σ_B, which have gradients, and moves μ and σ. So weights are rounded
on a grid that does not shake with each batch. A convolution is linear, so that the first line is

    y = BN(conv(x, W) + b) + r · conv(x, FQ(W_f) - W_f)

which is computed: where nothing is rounded it is the float network, bit for bit, gradients included.
Source: Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, 1806.08342, §3.2.2, fig. 8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Folding", "batch_variance", "folded_forward", "folded_parameters", "per_output_channel"]


class Folding(nn.Module):
    """Mixin of modules with a weight and a bias, into which a batch norm behind them can be folded."""

    @property
    def folded_norm(self) -> Any:
        """The batch norm that is folded in every pass; None where there is none."""
        return self.__dict__.get("_folded_norm")

    def fold(self, norm: Any) -> None:
        """Fold ``norm`` in every pass; it hands on what comes in. Neither registers the other: both have their names."""
        self.__dict__["_folded_norm"], norm.__dict__["_folded_into"] = norm, self

    def rounded_parameters(self) -> tuple[Tensor, Tensor | None]:
        """The weight that the quantizer is given, and the bias: with the running statistics of what is folded in them."""
        part: Any = self
        return (part.weight, part.bias) if self.folded_norm is None else folded_parameters(self, self.folded_norm)


def per_output_channel(values: Tensor, weight: Tensor, *, out_axis: int, groups: int) -> Tensor:
    """``values`` ``(out_channels,)`` shaped to multiply ``weight`` of a convolution, transposed or not, by channel."""
    if out_axis == 0:
        return values.reshape(-1, *[1] * (weight.ndim - 1))
    by_group = values.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    return by_group.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))


def folded_parameters(part: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a weighted module with a batch norm's running statistics in them, with gradients.

    Returns:
        W_f of the weight's shape and dtype; the bias ``(out_channels,)``, float32 or wider. Computed in that width.
    """
    deviation = torch.sqrt(norm.running_var.to(_wide(part.weight)) + float(norm.eps))
    gain = 1 / deviation if norm.weight is None else norm.weight / deviation
    shift = -norm.running_mean if part.bias is None else part.bias - norm.running_mean
    offset = shift * gain if norm.bias is None else shift * gain + norm.bias
    out_axis, groups = int(getattr(part, "transposed", False)), int(getattr(part, "groups", 1))
    factor = per_output_channel(gain, part.weight, out_axis=out_axis, groups=groups)
    return (part.weight * factor).to(part.weight.dtype), offset


def folded_forward(part: Any, norm: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What ``norm`` makes of what ``part`` makes of ``x``, with W_f rounded by the quantizer of ``part``."""
    if not getattr(part.weight_quantizer, "enabled", True):
        plain: Tensor = norm.normalized(part.weighted(x, part.weight, part.bias, *args, **kwargs))
        return plain
    if not norm.training or norm.statistics_frozen:
        weight, bias = folded_parameters(part, norm)
        rounded = part.weight_quantizer(weight)
        folded: Tensor = part.weighted(x, rounded, part.shipped(bias).to(weight.dtype), *args, **kwargs)
        return folded
    y = part.weighted(x, part.weight, part.bias, *args, **kwargs)
    normalized: Tensor = norm.normalized(y)  # the running statistics have moved
    weight, _ = folded_parameters(part, norm)
    error = part.weighted(x, part.weight_quantizer(weight) - weight, None, *args, **kwargs)
    of_batch = batch_variance(y, _group_of(norm)) + float(norm.eps)
    ratio = torch.sqrt((norm.running_var + float(norm.eps)) / of_batch)
    return normalized + error * ratio.to(error.dtype).reshape(1, -1, *[1] * (error.ndim - 2))


def batch_variance(y: Tensor, group: Any = None) -> Tensor:
    """The biased variance of each channel (axis 1), ``(C,)``, at least float32, differentiable.

    Args:
        y: ``(N, C, ...)``.
        group: the processes over whose batches it is taken together; None for this one alone. As in ``SyncBatchNorm``, the
            gradient is then that of the sum of all processes' losses.
    """
    y = y.to(_wide(y))
    others = [i for i in range(y.ndim) if i != 1]
    variance, mean = torch.var_mean(y, others, correction=0)
    if group is None:
        return variance
    from torch.distributed.nn.functional import all_reduce

    count = torch.full_like(mean, float(y.numel() // y.shape[1]))
    total, summed = all_reduce(torch.stack([count, count * mean]), group=group)
    spread: Tensor = all_reduce(count * (variance + (mean - summed / total).square()), group=group)
    return spread / total


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _group_of(norm: Any) -> Any:
    """The processes that a ``SyncBatchNorm`` synchronizes; None where it is one process, or another batch norm."""
    distributed = torch.distributed
    if not isinstance(norm, nn.SyncBatchNorm) or not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = norm.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None
