"""Zero-copy views of an integer tensor: plain bytes or quint8.

A graph's integers are plain ``uint8`` or ``int8`` tensors. torch's int8 operators want ``quint8`` tensors that carry a
scale and a zero point. Both are the same bytes, so a tensor changes its storage by sharing its memory. What an operator is
told need not be what the numbers stand for: a convolution that is told zero point 0 and has the true one in its bias
computes the same sums and takes a faster way.
Signed integers are held 128 higher, with a zero point 128 higher.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Storage", "convert"]

_SET = torch.ops.aten.set_.source_Tensor_storage_offset


class Storage(NamedTuple):
    """A ``quint8`` tensor with this scale and zero point."""

    scale: float
    zero_point: int


def convert(value: Any, form: Storage | None, signed: bool) -> Any:
    """``value``, a tensor or a tuple or list of them, in ``form``; None is the plain one, int8 where ``signed``."""
    if isinstance(value, (tuple, list)):
        return type(value)(convert(item, form, signed) for item in value)
    if form is None:
        plain = _share(value, torch.empty(0, dtype=torch.uint8, device="cpu"))
        return torch.bitwise_xor(plain, 128).view(torch.int8) if signed else plain
    if not value.is_quantized and signed:
        value = torch.bitwise_xor(value, -128).view(torch.uint8)
    scale, zero_point = form
    empty = torch._empty_affine_quantized((0,), scale=scale, zero_point=zero_point, dtype=torch.quint8, device="cpu")
    return _share(value, empty)


def _share(source: Tensor, empty: Tensor) -> Tensor:
    """``empty`` with the memory, shape and strides of ``source``, another view of the same bytes."""
    if torch._C._is_tracing():  # TorchScript knows no storages
        return _SET(empty, source.as_strided((1,), (1,)), source.storage_offset(), source.shape, source.stride())
    return empty.set_(source.untyped_storage(), source.storage_offset(), source.shape, source.stride())
