"""XNNPACK, as ExecuTorch lowers to it: signed tensors with zero points, symmetric weights, few ops.

Averages over the image and clamps keep their input's scale; kernels requantize with a float multiplier. A weighted op has
a kernel only between integers: one whose result left as a float would be computed outside of XNNPACK (and ExecuTorch 1.5
computes it wrongly there where its weight has one scale per channel), so results are rounded where they leave the model.
Transposed convolutions in groups take one scale for their weight.
"""

from __future__ import annotations

from fxquant.numerics.scheme import WEIGHT, Scheme
from fxquant.runtimes.op_groups import CLAMPS, MOVES
from fxquant.runtimes.runtime import Runtime
from fxquant.targets.target import Target

__all__ = ["EXECUTORCH"]

_WEIGHTED = frozenset({"conv1d", "conv2d", "conv_transpose2d", "linear", "addmm"})
_AVERAGES = frozenset({"adaptive_avg_pool2d", "mean"})

_TARGET = Target(
    name="xnnpack",
    title="XNNPACK",
    source="https://docs.pytorch.org/executorch/stable/backends-xnnpack.html",
    activation=Scheme(signed=True),
    weight=WEIGHT,
    activation_signs=(True,),
    wide_weights=False,
    per_tensor_in_groups=frozenset({"conv_transpose2d"}),
    integer_ops=CLAMPS | MOVES | _AVERAGES | _WEIGHTED | {"max_pool2d", "add", "mul"},
    keeps_scale=_AVERAGES,
    rounds_outputs=_WEIGHTED,
    rounding="float",
    adds_pairs=False,
)


def _status(saturates: bool) -> str:
    return "runs programs of export_executorch, in XNNPACK, which does not saturate"


EXECUTORCH = Runtime(
    name="executorch",
    title="ExecuTorch",
    target=_TARGET,
    package="executorch",
    extra="executorch",
    status=_status,
    instead="write a program with fxquant.export.export_executorch, and load it with ExecuTorch's own runtime",
)
