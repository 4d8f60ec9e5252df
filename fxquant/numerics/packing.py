"""Integers in files, in as many bits as they need: ternary weights in two, 4-bit weights in four.

Each number less the least one is written with its lowest bit first, one behind the other, eight bits a byte; the last byte
is filled up with zeros. What the numbers are decides, not a scheme, so that packing loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["packed", "unpacked"]

_WORTH_IT = 64
"""Tensors of fewer numbers stay as they are."""


def packed(value: Any) -> Any:
    """``value``; where it holds int8 or uint8 numbers that need fewer than 8 bits, a dict of plain data for ``unpacked``."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int8, torch.uint8) or value.numel() < _WORTH_IT:
        return value
    low, high = (int(bound) for bound in torch.aminmax(value))
    bits = (high - low).bit_length()
    if bits == 8:
        return value
    fields = (value.detach().flatten().short() - low).to(torch.uint8)
    digits = (fields[:, None] >> torch.arange(bits, dtype=torch.uint8, device=fields.device)) & 1
    filled = torch.nn.functional.pad(digits.flatten(), (0, -digits.numel() % 8)).reshape(-1, 8)
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=filled.device)
    return {
        "bits": bits,
        "low": low,
        "shape": list(value.shape),
        "dtype": str(value.dtype),
        "bytes": (filled * places).sum(1, dtype=torch.uint8),
    }


def unpacked(value: Any) -> Any:
    """What ``packed`` was given."""
    if not isinstance(value, Mapping):
        return value
    bits, shape = int(value["bits"]), list(value["shape"])
    count = torch.Size(shape).numel()
    digits = (value["bytes"][:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    fields = digits.flatten()[: count * bits].reshape(count, bits)
    numbers = (fields.short() << torch.arange(bits, dtype=torch.int16)).sum(1) + int(value["low"])
    return numbers.to(getattr(torch, value["dtype"].removeprefix("torch."))).reshape(shape)
