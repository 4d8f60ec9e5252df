"""XNNPACK, as ExecuTorch lowers to it: signed tensors with zero points, symmetric weights, few ops.

Averages over the image and clamps keep their input's scale; kernels requantize with a float multiplier.
"""

from __future__ import annotations

from fxquant.numerics.scheme import WEIGHT, Scheme
from fxquant.targets.op_groups import CLAMPS, MOVES
from fxquant.targets.target import Target

__all__ = ["XNNPACK"]

_AVERAGES = frozenset({"adaptive_avg_pool2d", "mean"})

XNNPACK = Target(
    name="xnnpack",
    title="XNNPACK",
    source="https://docs.pytorch.org/executorch/stable/backends-xnnpack.html",
    activation=Scheme(signed=True),
    weight=WEIGHT,
    activation_signs=(True,),
    wide_weights=False,
    integer_ops=(
        CLAMPS
        | MOVES
        | _AVERAGES
        | {"conv1d", "conv2d", "conv_transpose2d", "linear", "addmm", "max_pool2d", "add", "mul"}
    ),
    keeps_scale=_AVERAGES,
    rounding="float",
)
