"""Biases on the grid that they ship on, s_b = s_x · s_w with zero point 0, and the weight scales that let them fit.

Where a bias would not fit into 31 bits on it, the channel's weight scale is raised until it does: such a channel has
weights near zero, and lives by its bias. Source: Jacob et al., 1712.05877, §2.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fit_bias", "rounded_bias"]

_LARGEST_BIAS = 2.0**30


@torch.no_grad()
def fit_bias(bias: Tensor, x_scale: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The weight scales, raised where the bias needs it, and the bias, a whole multiple of each channel's s_x · s_w.

    Args:
        bias: ``(channels,)``.
        x_scale: the scale of the weighted op's input, ``()``.
        scale: the weight's, ``()`` or one per output channel, or per output channel of a group.

    Returns:
        Both float64, the scales such that float32 holds them.
    """
    bias, x_scale, scale = bias.detach().double(), x_scale.to(bias.device).double(), scale.to(bias.device).double()
    needed = bias.abs() / (_LARGEST_BIAS * x_scale)
    groups = 1 if scale.ndim == 0 else bias.numel() // scale.numel()
    scale = torch.maximum(scale, needed.max() if scale.ndim == 0 else needed.reshape(groups, -1).amax(0))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale)).float().double()
    step = x_scale * (scale.repeat(groups) if scale.ndim else scale)
    return scale, torch.round(bias / step) * step


def rounded_bias(bias: Tensor, x_scale: Tensor, scale: Tensor) -> Tensor:
    """``bias`` as it ships, in its own dtype, with a gradient as if it were not rounded; arguments as of ``fit_bias``."""
    rounded = fit_bias(bias, x_scale, scale)[1].to(bias.dtype)
    return rounded + (bias - bias.detach()) if bias.requires_grad else rounded
