"""Inputs made of nothing but a model's batch norms: data for calibration where there is none.

Every batch norm remembers the mean μ and the deviation σ of what entered it in training. Inputs x are looked for, by
gradient descent from normal noise on, whose activations have them again; m and s are those of the batch, per channel:

    min over x of  Σ_norms  mean over channels of  ((m - μ) / σ)² + (s / σ - 1)²

(Cai et al., ZeroQ, 2001.00281, §3.1, eq. 3, each term in units of σ, so that no norm outweighs the others.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from tqdm import tqdm

from fxquant.capture.values import unchanged
from fxquant.errors import InputError
from fxquant.inputs import arguments_of

__all__ = ["synthesize"]

_RATE = 0.1


def synthesize(
    model: nn.Module,
    example_inputs: Any,
    *,
    batches: int = 4,
    steps: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> list[Any]:
    """Batches for ``calibrate`` and ``recover`` where there are no data, from the statistics of a model's batch norms.

    Example:
        >>> made = synthesize(model, images)  # one batch, for its form and shapes
        >>> fxquant.calibrate(prepared, made)

    Args:
        model: the float model, with its batch norms; not touched.
        example_inputs: one batch, for its form and shapes; what is not a tensor of real numbers stays as it is.
        batches: how many to make, each for itself.
        steps: of Adam for each.
        seed: of the noise to begin with.
        progress: show a progress bar.

    Returns:
        Batches of the form of ``example_inputs``.

    Raises:
        InputError: the model has no batch norm with statistics, or none that the input reaches; or no input is of real
            numbers.

    Source: Cai et al., ZeroQ, 2001.00281, §3.1.
    """
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    norms = [part for part in norms if isinstance(part.running_mean, Tensor) and isinstance(part.running_var, Tensor)]
    if not norms:
        raise InputError(
            "synthesize reads what a model's data were like off its batch norms, and this "
            f"{type(model).__name__} has none with statistics.\n"
            "  what to do: calibrate on a few hundred real samples, without labels."
        )
    leaves, form = tree_flatten(example_inputs)
    if not any(_is_real(leaf) for leaf in leaves):
        raise InputError(
            "synthesize was given example_inputs without a tensor of real numbers: there is nothing to make."
        )
    generator, made = torch.Generator().manual_seed(seed), []
    with unchanged(model), tqdm(total=batches * steps, desc="synthesize", disable=not progress or None) as bar:
        model.eval()
        for _ in range(batches):
            made.append(tree_unflatten(_made(model, norms, leaves, form, steps, generator, bar), form))
    return made


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _made(
    model: nn.Module, norms: list[Any], leaves: list[Any], form: Any, steps: int, generator: torch.Generator, bar: Any
) -> list[Any]:
    """The leaves of one batch."""
    values = [
        torch.randn(leaf.shape, generator=generator).to(leaf).requires_grad_() if _is_real(leaf) else leaf
        for leaf in leaves
    ]
    free = [value for value in values if _is_real(value)]
    optimizer = torch.optim.Adam(free, lr=_RATE)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        with torch.enable_grad(), _watched(norms) as lost:
            args, kwargs = arguments_of(model, tree_unflatten(values, form))
            model(*args, **kwargs)
            if not lost:
                raise InputError("synthesize: none of the model's batch norms is reached by these inputs.")
            gradients = torch.autograd.grad(torch.stack(lost).sum(), free, allow_unused=True)
        for value, gradient in zip(free, gradients, strict=True):
            value.grad = gradient
        optimizer.step()
        slower.step()
        bar.update(1)
    return [value.detach() if _is_real(value) else value for value in values]


@contextmanager
def _watched(norms: list[Any]) -> Iterator[list[Tensor]]:
    """Inside, a list that gets what each batch norm's input is off its statistics by."""
    lost: list[Tensor] = []

    def keep(part: Any, args: tuple[Any, ...]) -> None:
        x = args[0]
        rows = x.movedim(1, 0).flatten(1)
        deviation = (part.running_var + part.eps).sqrt()
        off = (rows.mean(1) - part.running_mean) / deviation
        spread = (rows.var(1, unbiased=False) + part.eps).sqrt() / deviation - 1
        lost.append((off.square() + spread.square()).mean())

    hooks = [part.register_forward_pre_hook(keep) for part in norms]
    try:
        yield lost
    finally:
        for hook in hooks:
            hook.remove()
