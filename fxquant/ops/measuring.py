"""Reading shapes and types, and arithmetic on what was read: none of it touches a value of a tensor."""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from fxquant.capture.findings import require
from fxquant.capture.modes import by_mode
from fxquant.ops.behaviour import Measuring
from fxquant.ops.entry import OpEntry
from fxquant.ops.example import example

__all__ = ["MEASURING", "is_arithmetic", "is_measurement", "reads_numbers"]

_METHODS = frozenset({"size", "dim", "numel", "nelement", "stride", "is_floating_point", "get_device", "ndimension"})
_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_nested", "requires_grad"})
_READERS: frozenset[Any] = frozenset({builtins.len, builtins.isinstance, require})
_NUMBERS: frozenset[Any] = frozenset(
    {
        *(builtins.int, builtins.float, builtins.bool, builtins.round, builtins.abs),
        *(builtins.max, builtins.min),
        *(torch.Size, torch._assert, by_mode),
    }
)

MEASURING = OpEntry(
    name="measure",
    function=getattr,
    signature="input*, attribute",
    behaviour=Measuring(),
    onnx="Shape",
    example=example(lambda x: x.reshape(x.shape[0], x.size(1) * 2, -1), (2, 3, 4), behind_op=True),
)
"""Any reading of a shape or type, and arithmetic on such readings."""


def is_measurement(op: str, target: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call reads a tensor's shape, type or device."""
    if op == "call_method":
        return target in _METHODS
    if op != "call_function":
        return False
    return target in _READERS or (target is builtins.getattr and len(args) > 1 and args[1] in _ATTRIBUTES)


def reads_numbers(op: str, target: Any) -> bool:
    """Whether a call takes Python numbers out of a tensor's values."""
    return op == "call_method" and target in ("item", "tolist")


def is_arithmetic(target: Callable[..., Any]) -> bool:
    """Whether a function computes numbers from numbers."""
    module = getattr(target, "__module__", "")
    return module in (operator.__name__, "_operator", math.__name__) or target in _NUMBERS
