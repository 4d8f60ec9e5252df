"""What quantization-aware training adds to a training loop: batch norm statistics held still, or taken anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fxquant.errors import CalibrationError
from fxquant.graph.leveled import LeveledModule
from fxquant.inputs import arguments_of, move_to

__all__ = ["freeze_batchnorm", "reestimate_batchnorm"]


def freeze_batchnorm(prepared: nn.Module, frozen: bool = True) -> nn.Module:
    """Hold the statistics of every quantized batch norm still, in training mode too; γ and β go on training.

    For the last part of training, so that it sees the numbers that will be deployed (Krishnamoorthi, 1806.08342, §3.2).
    """
    for part in prepared.modules():
        if hasattr(part, "statistics_frozen"):
            part.statistics_frozen = frozen  # type: ignore[assignment]
    return prepared


@torch.no_grad()
def reestimate_batchnorm(
    prepared: LeveledModule,
    loader: Iterable[Any],
    *,
    batches: int = 100,
    forward: Callable[[LeveledModule, Any], Any] | None = None,
) -> LeveledModule:
    """Take the running statistics anew, as the mean over ``batches`` batches with quantizers on.

    Quantized weights drift from the averages that training kept; do this before converting, at 4 bits and below above
    all (Nagel et al., 2203.11086, §4.2). Ranges and weights stay as they are.

    Raises:
        CalibrationError: the loader is empty; then, and where a batch fails, nothing has changed.
    """
    norms = [part for part in prepared.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    saved = [(n.training, n.momentum, {k: b.clone() for k, b in n.named_buffers(recurse=False)}) for n in norms]
    modes = {part: part.training for part in prepared.modules()}
    prepared.eval()
    count, complete = 0, False
    for norm in norms:
        norm.reset_running_stats()
        norm.training, norm.momentum = True, None
    try:
        for _, batch in zip(range(batches), loader, strict=False):
            args, kwargs = arguments_of(prepared, move_to(prepared, batch)) if forward is None else ((), {})
            prepared(*args, **kwargs) if forward is None else forward(prepared, batch)
            count += 1
        complete = count > 0
    finally:
        for norm, (_, momentum, buffers) in zip(norms, saved, strict=True):
            norm.momentum = momentum
            if not complete:
                for name, value in buffers.items():
                    getattr(norm, name).copy_(value)
        for part, mode in modes.items():
            part.training = mode
    if not count:
        raise CalibrationError("reestimate_batchnorm was given an empty loader; the statistics are as they were.")
    return prepared
