"""The integers that one tensor is made of, and the real numbers that they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.numerics.scheme import Scheme

__all__ = ["Grid"]


@dataclass(frozen=True)
class Grid:
    """The integers a tensor is made of: ``x = (q - zero_point) * scale`` with ``qmin <= q <= qmax``."""

    scale: Tensor
    zero_point: Tensor
    scheme: Scheme

    @property
    def qmin(self) -> int:
        return self.scheme.qmin

    @property
    def qmax(self) -> int:
        return self.scheme.qmax

    @property
    def dtype(self) -> torch.dtype:
        return self.scheme.storage_dtype
