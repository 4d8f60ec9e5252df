"""Which sizes a file may leave free: a file cannot refuse an input, so it must be right for all that its shapes allow."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from fxquant.errors import SpecializationError
from fxquant.export.signature import FlatModel

__all__ = ["contradicted_size"]


def contradicted_size(model: FlatModel, tensors: Sequence[Tensor]) -> str | None:
    """An answer held for given that does not hold at twice or half the example's length or image size."""
    for factor in (2.0, 0.5):
        resized = [_resized(x, tensors[0], factor) for x in tensors]
        try:
            with torch.no_grad(), suppress(RuntimeError, ValueError, TypeError, IndexError, AssertionError):
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
