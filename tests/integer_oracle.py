"""Weighted ops once more, written from the definitions: int64 numpy loops over the kernel and Python integers.

Nothing here calls torch's convolutions or fxquant's numerics.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import floor, frexp
from typing import Any

import numpy as np
from torch import nn

PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def listed(value: Any, dims: int) -> list[int]:
    return [int(value)] * dims if isinstance(value, int) else [int(v) for v in value]


def sides(conv: nn.Module, kernel: list[int], dilation: list[int]) -> list[tuple[int, int]]:
    if conv.padding == "valid":
        return [(0, 0)] * len(kernel)
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(t // 2, t - t // 2) for t in totals]
    return [(p, p) for p in listed(conv.padding, len(kernel))]


def convolve(x: np.ndarray, w: np.ndarray, conv: nn.Module) -> np.ndarray:
    """The integer accumulators of a convolution: ``x`` has its zero point taken off already."""
    dims = w.ndim - 2
    kernel, stride, dilation = list(w.shape[2:]), listed(conv.stride, dims), listed(conv.dilation, dims)
    padded = np.pad(x, [(0, 0), (0, 0), *sides(conv, kernel, dilation)], mode=PADDING_MODES[conv.padding_mode])
    out = [
        (n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(padded.shape[2:], dilation, kernel, stride, strict=True)
    ]
    per_in, per_out = w.shape[1], w.shape[0] // conv.groups
    y = np.zeros((x.shape[0], w.shape[0], *out), dtype=np.int64)
    for g in range(conv.groups):
        rows, columns = slice(g * per_out, (g + 1) * per_out), slice(g * per_in, (g + 1) * per_in)
        for at in product(*(range(k) for k in kernel)):
            window = tuple(
                slice(a * d, a * d + s * (o - 1) + 1, s) for a, d, s, o in zip(at, dilation, stride, out, strict=True)
            )
            y[:, rows] += np.einsum(
                "oi,ni...->no...", w[(rows, slice(None), *at)], padded[(slice(None), columns, *window)]
            )
    return y


def transpose_convolve(x: np.ndarray, w: np.ndarray, conv: nn.Module) -> np.ndarray:
    """The integer accumulators of a transposed convolution: every input is scattered over the output."""
    dims = w.ndim - 2
    kernel, stride, dilation = list(w.shape[2:]), listed(conv.stride, dims), listed(conv.dilation, dims)
    padding, more = listed(conv.padding, dims), listed(conv.output_padding, dims)
    full = [
        (n - 1) * s + d * (k - 1) + 1 + m
        for n, s, d, k, m in zip(x.shape[2:], stride, dilation, kernel, more, strict=True)
    ]
    per_in, per_out = w.shape[0] // conv.groups, w.shape[1]
    y = np.zeros((x.shape[0], per_out * conv.groups, *full), dtype=np.int64)
    for g in range(conv.groups):
        rows, columns = slice(g * per_out, (g + 1) * per_out), slice(g * per_in, (g + 1) * per_in)
        for at in product(*(range(k) for k in kernel)):
            window = tuple(
                slice(a * d, a * d + s * (n - 1) + 1, s)
                for a, d, s, n in zip(at, dilation, stride, x.shape[2:], strict=True)
            )
            y[(slice(None), rows, *window)] += np.einsum(
                "io,ni...->no...", w[(columns, slice(None), *at)], x[:, columns]
            )
    return y[(slice(None), slice(None), *(slice(p, f - p) for p, f in zip(padding, full, strict=True)))]


def accumulate(x: np.ndarray, w: np.ndarray, float_module: nn.Module) -> np.ndarray:
    if isinstance(float_module, nn.Linear):
        return np.einsum("...i,oi->...o", x, w)
    is_transposed = isinstance(float_module, nn.modules.conv._ConvTransposeNd)
    return (transpose_convolve if is_transposed else convolve)(x, w, float_module)


def half_up(value: Fraction) -> int:
    return floor(value + Fraction(1, 2))


def half_away(value: Fraction) -> int:
    return half_up(value) if value >= 0 else -half_up(-value)


def requantized(acc: int, multiplier: Fraction, rounding: str) -> int:
    """``acc`` times ``multiplier``, which is first made a number of 31 bits and a shift."""
    fraction, e = frexp(multiplier)
    q = floor(Fraction(fraction) * 2**31 + Fraction(1, 2))
    if q == 2**31:
        q, e = q // 2, e + 1
    if rounding == "single":
        return half_up(Fraction(acc * q) * Fraction(2) ** (e - 31))
    high = half_up(Fraction(acc * 2 ** max(e, 0) * q, 2**31))
    return half_away(Fraction(high, 2 ** max(-e, 0)))
