"""Ops spelled for the ONNX exporter of torch, where it lacks the op or drops an argument of it.

``avg_pool2d`` and ``avg_pool3d`` lose ``divisor_override`` there without a word; adaptive pools are refused unless they
give one number per channel; ``linear`` on more than two axes becomes a MatMul, for which runtimes have no integer kernel
with a bias; attention is refused unless it has a batch and heads; ``squeeze`` of an axis of more than one element, which
torch lets be, becomes a file that no runtime takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.errors import ExportError

__all__ = ["adaptive_by_parts", "attention_by_heads", "averages_over", "linear_by_rows", "squeeze_of_ones"]


def linear_by_rows(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` as a product of two matrices, whatever the number of axes."""
    if input.ndim == 2:
        return F.linear(input, weight, bias)
    if input.ndim == 1:
        return F.linear(input.unsqueeze(0), weight, bias).squeeze(0)
    return F.linear(input.flatten(0, -2), weight, bias).unflatten(0, input.shape[:-1])


def attention_by_heads(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any
) -> Tensor:
    """``F.scaled_dot_product_attention`` with one axis for the batch and one for the heads, whatever the number of axes."""
    if query.ndim == 4:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **rest)

    def in_four(x: Tensor) -> Tensor:
        return x[(None,) * (4 - x.ndim)] if x.ndim < 4 else x.flatten(0, x.ndim - 4)

    mask = attn_mask if attn_mask is None or attn_mask.ndim <= 2 else in_four(attn_mask)
    result = F.scaled_dot_product_attention(in_four(query), in_four(key), in_four(value), mask, **rest)
    return result.reshape(*query.shape[:-1], value.shape[-1])


def squeeze_of_ones(input: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """``torch.squeeze`` of those of the axes ``dim`` that have one element."""
    ones = tuple(d for d in ((dim,) if isinstance(dim, int) else dim) if input.ndim and input.shape[d] == 1)
    return torch.squeeze(input, ones) if ones else input


def averages_over(function: Callable[..., Tensor], dims: int) -> Callable[..., Tensor]:
    """An average pool of ``dims`` dimensions whose ``divisor_override`` is a factor behind it.

    Raises:
        ExportError: when called with ``ceil_mode`` too, whose last windows have fewer elements.
    """

    def pool(input: Tensor, kernel_size: Any, *args: Any, divisor_override: int | None = None, **rest: Any) -> Tensor:
        if divisor_override is None:
            return function(input, kernel_size, *args, **rest)
        if rest.get("ceil_mode"):
            raise ExportError(
                f"{function.__name__} with both divisor_override and ceil_mode has no ONNX form.\n"
                "  what to do: give one of them, or keep this module in float and out of the file."
            )
        rest["count_include_pad"] = True
        size = kernel_size**dims if isinstance(kernel_size, int) else math.prod(kernel_size)
        return function(input, kernel_size, *args, **rest) * (size / divisor_override)

    return pool


def adaptive_by_parts(reduce: Callable[..., Tensor], dims: int) -> Callable[..., Tensor]:
    """An adaptive pool of ``dims`` dimensions as ``reduce`` over slices, one axis after the other.

    Part ``i`` of ``n`` of an axis of size ``L`` is ``[floor(i·L/n), ceil((i+1)·L/n))``, as torch has it. Sizes become
    constants, except where the result is one number per axis.
    """

    def pool(input: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
        sizes = [output_size] * dims if isinstance(output_size, int) else list(output_size)
        if all(size == 1 for size in sizes):
            return reduce(input, tuple(range(-dims, 0)), keepdim=True)
        for axis, size in zip(range(-dims, 0), sizes, strict=True):
            if size == 1:
                input = reduce(input, axis, keepdim=True)
            elif size is not None and (length := int(input.shape[axis])) != size:
                bounds = [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
                parts = [reduce(input.narrow(axis, a, b - a), axis, keepdim=True) for a, b in bounds]
                input = torch.cat(parts, axis)
        return input

    return pool
