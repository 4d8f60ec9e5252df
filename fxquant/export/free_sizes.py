"""Which sizes a file may leave free: a file cannot refuse an input, so it must be right for all that its shapes allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.capture.values import unchanged
from fxquant.errors import SpecializationError
from fxquant.export.signature import FlatModel

__all__ = ["contradicted_size", "fixed_sizes", "is_fixed", "refused_axes"]

_OTHER_LENGTHS: tuple[Callable[[int], int], ...] = (lambda n: max(1, n // 2), lambda n: 2 * n, lambda n: n + 1)
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


def contradicted_size(model: FlatModel, tensors: Sequence[Tensor]) -> str | None:
    """An answer held for given that does not hold at twice or half the example's length or image size."""
    for factor in (2.0, 0.5):
        resized = [_resized(x, tensors[0], factor) for x in tensors]
        try:
            with torch.no_grad(), suppress(*_REFUSALS):
                model(*resized)
        except SpecializationError as error:
            return next(line.strip() for line in str(error).splitlines() if "captured:" in line)
    return None


def _resized(x: Tensor, first: Tensor, factor: float) -> Tensor:
    """Zeros like ``x`` with other lengths: the last two axes of images, and every axis as long as the first input's."""
    shape = list(x.shape)
    if x.ndim >= 4 and first.ndim >= 4:
        shape[-2:] = [max(1, int(size * factor)) for size in shape[-2:]]
    elif first.ndim in (2, 3):
        shape[1:] = [max(1, int(size * factor)) if size == first.shape[1] else size for size in shape[1:]]
    return x.new_zeros(shape)


def fixed_sizes(
    model: FlatModel, tensors: Sequence[Tensor], program: torch.export.ExportedProgram, asked: str
) -> list[str]:
    """What there is to say of sizes that ``program`` fixes although ``model`` takes others: a loop over them was unrolled.

    Args:
        model: what was exported.
        tensors: its inputs in the example.
        program: what torch.export made of it.
        asked: which sizes were to be free, as of ``trace``.
    """
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    held = [values[str(name)] for name in program.graph_signature.user_inputs]
    notes: list[str] = []
    for position, (x, value) in enumerate(zip(tensors, held, strict=True)):
        for axis in range(1, x.ndim if asked == "sizes" else 1):
            size = value.shape[axis]
            if is_fixed(size) and int(size) > 1 and _takes_other(model, tensors, position, axis):
                name = model.signature.input_names[position]
                notes.append(
                    f"axis {axis} of {name} is {size} in the file, the example's, although the model takes others: "
                    "torch.export unrolled a loop over it"
                )
    return notes


def is_fixed(size: Any) -> bool:
    """Whether a size of an exported program is a number; torch.export also writes those as symbols with one value."""
    return isinstance(size, int) or bool(size.node.expr.is_number)


def _takes_other(model: FlatModel, tensors: Sequence[Tensor], position: int, axis: int) -> bool:
    """Whether the model runs with one more along ``axis`` of one input, or of all that are as long there."""
    size = tensors[position].shape[axis]

    def longer(x: Tensor) -> Tensor:
        return torch.cat([x, x.narrow(axis, 0, 1)], axis)

    alike = [i for i, x in enumerate(tensors) if x.ndim > axis and x.shape[axis] == size]
    for changed in ([position], alike):
        try:
            with torch.no_grad(), unchanged(model):
                model(*(longer(x) if i in changed else x.clone() for i, x in enumerate(tensors)))
        except (SpecializationError, *_REFUSALS):
            continue
        return True
    return False


def refused_axes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
    """Those of an image's last two axes that ``model`` takes neither half as long, nor twice, nor longer by one.

    Axes are counted from the end.

    torch.export would find that out too: from the sizes of every tensor inside, as expressions in the sizes of the image,
    which for a network of windows (MaxViT) takes hours.
    """
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if not tensors or tensors[0].ndim < 4:
        return set()

    def takes(axes: tuple[int, ...], length: Callable[[int], int]) -> bool:
        def resized(x: Tensor) -> Tensor:
            for axis in axes if x.ndim >= 4 else ():
                n = length(x.shape[axis])
                x = x.index_select(axis, torch.arange(n, device=x.device) * x.shape[axis] // n)
            return x.clone()

        own_args, own_kwargs = pytree.tree_map_only(Tensor, resized, (args, kwargs))
        try:
            with torch.no_grad():
                model(*own_args, **own_kwargs)
        except SpecializationError:  # the graph's own condition, which is told, not the model's refusal
            return True
        except _REFUSALS:
            return False
        return True

    def is_free(*axes: int) -> bool:
        return any(takes(axes, length) for length in _OTHER_LENGTHS)

    return set() if is_free(-2, -1) else {axis for axis in (-2, -1) if not is_free(axis)}
