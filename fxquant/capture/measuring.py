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

__all__ = ["answer", "asks_type", "is_arithmetic", "is_measurement", "reads_numbers"]

_SHAPE_METHODS = frozenset(
    {
        *("size", "dim", "numel", "nelement", "stride", "storage_offset", "get_device", "ndimension"),
        *("is_contiguous", "is_conj", "is_inference", "is_neg", "is_pinned", "is_shared"),
    }
)
_SHAPE_ATTRIBUTES = frozenset(
    {
        *("shape", "ndim", "device", "layout", "requires_grad", "is_nested", "is_sparse", "is_sparse_csr", "is_mkldnn"),
        *("is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu"),
    }
)
_TYPE_METHODS = frozenset({"is_floating_point", "is_complex", "is_signed", "element_size"})
_TYPE_ATTRIBUTES = frozenset({"dtype", "itemsize", "is_quantized"})
_TYPE_FUNCTIONS: frozenset[Any] = frozenset({torch.is_floating_point, torch.is_complex, torch.is_signed})
_READERS: frozenset[Any] = frozenset({builtins.len, builtins.isinstance, require})
_NUMBERS: frozenset[Any] = frozenset(
    {
        *(builtins.int, builtins.float, builtins.bool, builtins.round, builtins.abs),
        *(builtins.max, builtins.min),
        *(torch.Size, torch._assert, by_mode),
    }
)


def is_measurement(op: str, target: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call reads a tensor's shape, type or device."""
    if op == "call_function" and target in _READERS:
        return True
    return asks_type(op, target, args) or _asks(op, target, args, _SHAPE_METHODS, _SHAPE_ATTRIBUTES)


def asks_type(op: str, target: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call reads a tensor's type, which says nothing of the model once the tensor is made of integers."""
    return (op == "call_function" and target in _TYPE_FUNCTIONS) or _asks(
        op, target, args, _TYPE_METHODS, _TYPE_ATTRIBUTES
    )


def _asks(op: str, target: Any, args: tuple[Any, ...], methods: frozenset[str], attributes: frozenset[str]) -> bool:
    if op == "call_method":
        return target in methods
    return op == "call_function" and target is builtins.getattr and len(args) > 1 and args[1] in attributes


def answer(op: str, target: Any, args: tuple[Any, ...], dtype: torch.dtype) -> Any:
    """What asking for the type of a tensor (see `asks_type`) gives for one of ``dtype``."""
    asked = torch.empty(0, dtype=dtype)
    function = getattr(torch.Tensor, target) if op == "call_method" else target
    return function(asked, *args[1:])


def reads_numbers(op: str, target: Any) -> bool:
    """Whether a call takes Python numbers out of a tensor's values."""
    return op == "call_method" and target in ("item", "tolist")


def is_arithmetic(target: Callable[..., Any]) -> bool:
    """Whether a function computes numbers from numbers."""
    module = getattr(target, "__module__", "")
    return module in (operator.__name__, "_operator", math.__name__) or target in _NUMBERS
