"""Codebooks whose clusters weigh each weight by what moving it would cost the loss.

    C = argmin Σ_k Σ_{w in cluster k} h·(w - C_k)²,     h = mean over batches of (∂L/∂w)²

The diagonal of the Hessian says how much the loss rises with the square of a weight's error; its empirical Fisher
approximation, the mean of squared gradients, needs no second derivatives. A weight still belongs to the nearest number of
the codebook, since its h stands before all of them: only where these numbers lie changes. Source: Choi et al., Towards the
Limit of Network Quantization, 1612.01543, eq. 6 and §3.3; the approximation: their §3.4 has the second moments of Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxquant.errors import CalibrationError, InputError
from fxquant.nn.fake_quantize import FakeQuantize
from fxquant.quantizers.kmeans import KMeansWeight
from fxquant.training.weights import weights_of

__all__ = ["weigh_codebooks"]


def weigh_codebooks(
    prepared: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], torch.Tensor]
) -> nn.Module:
    """Find the codebooks of the rule ``kmeans`` anew, with each weight weighed by its mean squared gradient.

    Call it before training: what the codebooks have learned is lost. Gradients are those of the float network; no ``grad``
    of a parameter, and no buffer of a batch norm, is touched.

    Example:
        >>> training.weigh_codebooks(prepared, batches, lambda model, xy: F.cross_entropy(model(xy[0]), xy[1]))

    Args:
        prepared: what ``prepare`` returned; changed in place, and returned.
        batches: any iterable; small batches tell samples apart better, since a batch's gradient is squared as a whole.
        loss: from the model and a batch to a scalar.

    Raises:
        InputError: no weight has the rule ``kmeans``.
        CalibrationError: there are no batches.
    """
    chosen = {
        name: (part.weight_quantizer, weight)
        for name, part, weight in weights_of(prepared)
        if isinstance(part.weight_quantizer, KMeansWeight)
    }
    if not chosen:
        raise InputError(
            f"no weight of this {type(prepared).__name__} has a codebook.\n"
            "  what to do: prepare it with Scheme.weight(4, per_channel=False, quantizer='kmeans')."
        )
    weights = [weight for _, weight in chosen.values()]
    sums, count = [torch.zeros_like(weight) for weight in weights], 0
    with _as_float(prepared):
        for batch in batches:
            found = torch.autograd.grad(loss(prepared, batch), weights, allow_unused=True)
            for total, gradient in zip(sums, found, strict=True):
                total += 0.0 if gradient is None else gradient.square()
            count += 1
    if not count:
        raise CalibrationError("weigh_codebooks was given no batches.\n  what to do: give some, with their labels.")
    for (quantizer, weight), total in zip(chosen.values(), sums, strict=True):
        quantizer.fit(weight, total / count)
    return prepared


@contextmanager
def _as_float(prepared: nn.Module) -> Iterator[None]:
    """Inside, ``prepared`` is the float model in eval mode; behind it everything is as it was."""
    modes = [(part, part.training) for part in prepared.modules()]
    rounding = [part for part in prepared.modules() if isinstance(part, FakeQuantize) and part.enabled]
    prepared.eval()
    for quantizer in rounding:
        quantizer.enabled = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for quantizer in rounding:
            quantizer.enabled = True
