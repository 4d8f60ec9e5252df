"""WRPN's clipping: weights on an even grid of [-1, 1], activations on one of [0, 1].

    ŵ = round((2^(k-1) - 1) · clamp(w, -1, 1)) / (2^(k-1) - 1),    â = round((2^k - 1) · clamp(a, 0, 1)) / (2^k - 1)

The rest of the method, wider layers, is the model's. Source: Mishra et al., WRPN, 1709.01134, §4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import Refusal
from fxquant.nn.fake_quantize import WeightQuantize
from fxquant.numerics.scheme import Scheme
from fxquant.quantizers.dorefa import DoReFaTensor, of_unit_range
from fxquant.quantizers.registry import register

__all__ = ["WRPNTensor", "WRPNWeight"]


class WRPNWeight(WeightQuantize):
    """The quantizer of a weight: the grid of [-1, 1], whatever the weight."""

    takes_estimator = False

    @torch.no_grad()
    def read_range(self, weight: Tensor) -> None:
        one = torch.ones_like(self.scale)
        self.set_range(-one, one)


class WRPNTensor(DoReFaTensor):
    """The quantizer of a tensor."""


def _refuses(scheme: Scheme, kind: str) -> Refusal | None:
    if kind == "weight" and not scheme.narrow_range:
        return Refusal("its grid is even around zero: set narrow_range=True")
    return of_unit_range(scheme) if kind == "tensor" else None


register("wrpn", tensor=WRPNTensor, weight=WRPNWeight, refuses=_refuses)
