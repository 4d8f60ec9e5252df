"""Random weights that carry a signal from the input to the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from zoo_cases import Inputs, call

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def randomize(model: nn.Module, sample: Inputs) -> nn.Module:
    """Give ``model`` weights that carry a signal to the output and norms that a wrong rewrite would betray.

    The same as ``quantizers_off.randomize`` for any norm (a module that is called one), any number of dimensions and any
    inputs: convolution weights ~ N(0, 2/fan_in), norm weights ± U(0.5, 1.5), norm biases N(0.5, 0.1), other constant
    parameters random; BatchNorm statistics are measured on ``sample`` layer by layer and disturbed.
    """
    for norm in (module for module in model.modules() if _is_norm(module)):
        signs = torch.randint(0, 2, norm.weight.shape) * 2.0 - 1.0
        norm.weight.copy_(signs * (0.5 + torch.rand(norm.weight.shape)))
        if isinstance(getattr(norm, "bias", None), Tensor):
            norm.bias.normal_(0.5, 0.1)
    for convolution in (module for module in model.modules() if isinstance(module, _CONVOLUTIONS)):
        convolution.weight.normal_(0, (2 / max(convolution.weight[0].numel(), 1)) ** 0.5)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and parameter.min() == parameter.max():
            size = parameter[0].numel() if parameter.ndim else 1
            parameter.normal_(0, size**-0.5 if size > 1 else 0.1)
    norms = [module for module in model.modules() if isinstance(getattr(module, "running_mean", None), Tensor)]
    hooks = [norm.register_forward_pre_hook(_set_statistics) for norm in norms]
    model.eval()
    try:
        if norms:
            call(model, sample)
    finally:
        for hook in hooks:
            hook.remove()
    return model


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower() or isinstance(module, _BATCH_NORM)
    return named and isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 1


def _set_statistics(norm: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: take the statistics of the input, bounded where a channel hardly varies, and disturb them."""
    x = args[0]
    if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[1] != norm.running_mean.numel():
        return
    variance, mean = torch.var_mean(x.float(), [dim for dim in range(x.ndim) if dim != 1], correction=0)
    variance = variance.clamp(min=max(float(variance.mean()) / 10, 1e-6))
    norm.running_mean.copy_(mean + 0.1 * torch.randn(mean.shape) * variance.sqrt())
    norm.running_var.copy_(variance * (0.5 + torch.rand(variance.shape)))
