"""A weighted op as products of matrices: what each output position reads, and which rows the weight has.

For every group g of an op, ``y_g = W_g · X_g``: ``W_g`` is ``(R, K)``, a row for each output channel of the group, and
``X_g`` is ``(K, P)``, a column for each output position. In a convolution, and in a transposed one, each entry of ``X_g`` is
one number of the input or zero, so a column is a gather. Which number it is follows from the op itself: an op of one input
and ``taps`` output channels, whose weight is one for one tap each, is run on the numbers 1, 2, 3 … in place of an input, and
gives the place of every tap's number, 0 where that is padding. No formula of strides, paddings or padding modes is needed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxquant.behaviour import Weighted
from fxquant.ops.entry import Call

__all__ = ["Matrices"]


class Matrices:
    """Views of one weighted op's tensors.

    Args:
        call: the op with its attributes.
        behaviour: which axis of the weight is which.
        weight: a weight of the op, for its shape.
    """

    def __init__(self, call: Call, behaviour: Weighted, weight: Tensor) -> None:
        self.function = call.entry.function
        self.attributes = {name: value for name, value in call.attributes.items() if name != "groups"}
        self.out_axis, self.channels_last, self.shape = behaviour.out_axis, behaviour.channels_last, tuple(weight.shape)
        self.groups = int(call.attributes.get("groups", 1))
        self.taps = math.prod(weight.shape[2:])
        self._places: dict[Any, Tensor] = {}

    @property
    def shares_scales(self) -> bool:
        """Whether a channel of the weight's axis stands for one output channel in every group."""
        return self.out_axis == 1 and self.groups > 1

    def rows(self, weight: Tensor) -> Tensor:
        """``(G, R, K)`` of a weight as its op takes it."""
        if self.out_axis == 0:
            return weight.reshape(self.groups, self.shape[0] // self.groups, -1)
        inside = weight.reshape(self.groups, self.shape[0] // self.groups, self.shape[1], -1)
        return inside.transpose(1, 2).flatten(2)

    def weight(self, rows: Tensor) -> Tensor:
        """What ``rows`` came from."""
        if self.out_axis == 0:
            return rows.reshape(self.shape)
        inside = rows.reshape(self.groups, self.shape[1], self.shape[0] // self.groups, self.taps)
        return inside.transpose(1, 2).reshape(self.shape)

    def per_position(self, y: Tensor) -> Tensor:
        """``(N, G, R, P)`` of the op's output, or of a tensor of its shape."""
        if self.channels_last:
            return y.reshape(1, -1, self.groups, y.shape[-1] // self.groups).permute(0, 2, 3, 1)
        y = y if y.ndim == len(self.shape) else y[None]
        return y.reshape(y.shape[0], self.groups, y.shape[1] // self.groups, -1)

    def columns(self, x: Tensor, positions: Tensor) -> Tensor:
        """What the output positions ``(P,)`` of each of ``x``'s samples read, ``(N, G, K, P)``."""
        if self.channels_last:
            return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 2, 3, 1)[..., positions]
        x = x if x.ndim == len(self.shape) else x[None]
        places = self._places_of(x)[:, positions]
        padded = torch.cat([x.new_zeros(*x.shape[:2], 1), x.flatten(2)], 2)
        read = padded[:, :, places]
        return read.reshape(x.shape[0], self.groups, -1, len(positions))

    def _places_of(self, x: Tensor) -> Tensor:
        """``(taps, P)``: one more than the place of the number that a tap reads in its channel, 0 for padding."""
        sizes = tuple(x.shape[2:])
        if sizes not in self._places:
            numbers = torch.arange(1, math.prod(sizes) + 1, dtype=torch.float64, device=x.device).reshape(1, 1, *sizes)
            ones = torch.eye(self.taps, dtype=torch.float64, device=x.device)
            kernel = ones.reshape(self.taps, 1, *self.shape[2:])
            kernel = kernel if self.out_axis == 0 else kernel.transpose(0, 1)
            found = self.function(numbers, kernel, None, **self.attributes)
            self._places[sizes] = found.reshape(self.taps, -1).round().long()
        return self._places[sizes]
