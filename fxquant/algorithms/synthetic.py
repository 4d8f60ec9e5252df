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
from torch.autograd.graph import allow_mutation_on_saved_tensors
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
        InputError: the model has no batch norm with statistics, or none that the input reaches with gradients, or one with
            NaN; no input is of real numbers; or a number is below 1.

    Source: Cai et al., ZeroQ, 2001.00281, §3.1.
    """
    if steps < 1 or batches < 1:
        raise InputError(f"steps={steps!r} and batches={batches!r} are at least 1.")
    norms = _norms_of(model)
    leaves, form = tree_flatten(example_inputs)
    if not any(_is_real(leaf) for leaf in leaves):
        raise InputError(
            "synthesize was given example_inputs without a tensor of real numbers: there is nothing to make."
        )
    generator, made = torch.Generator().manual_seed(seed), []
    with (
        torch.inference_mode(False),
        unchanged(model),
        tqdm(total=batches * steps, desc="synthesize", disable=not progress or None) as bar,
    ):
        model.eval()
        for _ in range(batches):
            made.append(tree_unflatten(_made(model, norms, leaves, form, steps, generator, bar), form))
    return made


def _norms_of(model: nn.Module) -> list[Any]:
    """The batch norms that remember statistics; raises where there is none, or where these are no numbers."""
    norms: list[Any] = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    norms = [part for part in norms if isinstance(part.running_mean, Tensor) and isinstance(part.running_var, Tensor)]
    if not norms:
        raise InputError(
            "synthesize reads what a model's data were like off its batch norms, and this "
            f"{type(model).__name__} has none with statistics.\n"
            "  what to do: give the float model, not what prepare made of it, which has them folded; or calibrate on a few "
            "hundred real samples, without labels."
        )
    wrong = [part for part in norms if not bool(torch.isfinite(part.running_mean + part.running_var).all())]
    if wrong:
        raise InputError(f"{len(wrong)} of the model's {len(norms)} batch norms remember NaN or infinity.")
    return norms


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _made(
    model: nn.Module, norms: list[Any], leaves: list[Any], form: Any, steps: int, generator: torch.Generator, bar: Any
) -> list[Any]:
    """The leaves of one batch."""
    values = [
        torch.randn(leaf.shape, generator=generator).to(leaf.device).requires_grad_() if _is_real(leaf) else leaf
        for leaf in leaves
    ]
    free = [value for value in values if _is_real(value)]
    optimizer = torch.optim.Adam(free, lr=_RATE)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        with torch.enable_grad(), allow_mutation_on_saved_tensors(), _watched(norms) as lost:
            given = [_copy(value, leaf) for value, leaf in zip(values, leaves, strict=True)]
            args, kwargs = arguments_of(model, tree_unflatten(given, form))
            model(*args, **kwargs)
            if not any(loss.requires_grad for loss in lost):
                raise InputError(
                    "synthesize: none of the model's batch norms is reached by these inputs"
                    f"{', at least not with gradients (torch.no_grad, detach, or indices on the way)' if lost else ''}."
                )
            gradients = torch.autograd.grad(torch.stack(lost).sum(), free, allow_unused=True)
        for value, gradient in zip(free, gradients, strict=True):
            value.grad = gradient
        optimizer.step()
        slower.step()
        bar.update(1)
    return [
        _copy(value.detach(), leaf) if _is_real(value) else value for value, leaf in zip(values, leaves, strict=True)
    ]


def _copy(value: Any, leaf: Any) -> Any:
    """``value`` in the dtype of ``leaf``, for a model that may write into it."""
    return value.to(leaf.dtype, copy=True) if isinstance(value, Tensor) else value


@contextmanager
def _watched(norms: list[Any]) -> Iterator[list[Tensor]]:
    """Inside, a list that gets what each batch norm's input is off its statistics by."""
    lost: list[Tensor] = []

    def keep(part: Any, args: tuple[Any, ...]) -> None:
        x = args[0].float()
        rows = x.movedim(1, 0).flatten(1)
        deviation = (part.running_var.float() + part.eps).sqrt()
        off = (rows.mean(1) - part.running_mean.float()) / deviation
        spread = (rows.var(1, unbiased=False) + part.eps).sqrt() / deviation - 1
        lost.append((off.square() + spread.square()).mean())

    hooks = [part.register_forward_pre_hook(keep) for part in norms]
    try:
        yield lost
    finally:
        for hook in hooks:
            hook.remove()
