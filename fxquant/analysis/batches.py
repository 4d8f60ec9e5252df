"""Running batches through a model to measure it, in a way that leaves nothing behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxquant.calibration import activation_quantizers
from fxquant.capture.values import unchanged
from fxquant.errors import CalibrationError, InputError
from fxquant.inputs import arguments_of, move_to
from fxquant.nn.fake_quantize import FakeQuantize

__all__ = ["Forward", "batches_of", "left_alone", "reals", "require_ranges", "run_batch", "same_randomness"]

Forward = Callable[[Any, Any], Any]
"""How to run one batch: ``forward(model, batch)``."""


def batches_of(data: Any, batches: int | None, verb: str) -> list[Any]:
    """The batches of ``data``: an iterable of them as for ``calibrate``, or one batch that is a tensor or a dict.

    Raises:
        InputError: there is none; ``verb`` is who asks.
    """
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        raise InputError(f"{verb}: batches={batches!r}: give how many to use, 1 or more, or None for all.")
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise InputError(f"{verb} takes an iterable of batches, or one tensor; it was given a {type(data).__name__}.")
    kept = list(itertools.islice(data, batches))
    if not kept:
        raise InputError(
            f"{verb} was given no data. Check that the data set is not empty and that a generator was not used up before."
        )
    return kept


def run_batch(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    """What ``model`` gives for ``batch``.

    Raises:
        InputError: the batch holds NaN or infinity.
    """
    batch = move_to(model, batch)
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            raise InputError("a batch holds NaN or infinity, of which no error can be measured. Check the data.")
    if forward is not None:
        return forward(model, batch)
    args, kwargs = arguments_of(model, batch)
    return model(*args, **kwargs)


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` runs in eval mode without gradients; afterwards it and its quantizers' switches are as before."""
    quantizers = [part for part in model.modules() if isinstance(part, FakeQuantize)]
    enabled = [(part, part.enabled, part.observing) for part in quantizers]
    with unchanged(model), same_randomness(), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for part, on, observing in enabled:
                part.enabled, part.observing = on, observing


@contextmanager
def same_randomness() -> Iterator[None]:
    """Inside, torch draws random numbers from where it stands now; afterwards it stands there again."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def reals(tree: Any) -> list[Tensor]:
    """The tensors of real numbers in a model's output, or among an op's results."""
    return [
        leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()
    ]


def require_ranges(prepared: nn.Module, verb: str) -> None:
    """Raise where a quantizer of ``prepared`` has no range yet.

    Raises:
        CalibrationError: names some of them.
    """
    missing = [name for name, quantizer in activation_quantizers(prepared).items() if not quantizer.ready]
    if missing:
        raise CalibrationError(
            f"{len(missing)} of the model's quantizers have no range yet: {', '.join(missing[:4])}.\n"
            f"  what to do: run fxquant.calibrate(prepared, loader) before {verb}."
        )
