"""OpenVINO on a CPU: unsigned tensors, signed weights, and fusions that want no rounding inside.

A weighted op runs in one kernel with the activation and the sum behind it, which read its accumulator; the other operand
of the sum is quantized. OpenVINO 2026.4 does so even where a file asks for a rounding between the two: it clamps to that
grid and does not round (its integers equal those of such a model, and not those of the file). Placed for this target,
nothing is asked for that it skips. It moves a rounding behind a concatenation in front of it, and fails at that in some
models (see ``export/joins.py``), so files have it there.
"""

from __future__ import annotations

from fxquant.targets.op_groups import CLAMPS, CONVOLUTIONS, MAX_POOLS, MOVES, TRANSPOSED_CONVOLUTIONS
from fxquant.targets.target import Target

__all__ = ["OPENVINO"]

_ACTIVATIONS = frozenset(
    {"leaky_relu", "elu", "silu", "mish", "gelu", "hardswish", "softplus", "sigmoid", "hardsigmoid", "tanh"}
)
_AVERAGES = frozenset(
    {
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "mean",
    }
)

OPENVINO = Target(
    name="openvino",
    title="OpenVINO",
    source="https://docs.openvino.ai/2025/documentation/openvino-extensibility/openvino-plugin-library/advanced-guides/"
    "low-precision-transformations.html",
    weight_bits=(4, 8),
    integer_ops=(
        CONVOLUTIONS
        | TRANSPOSED_CONVOLUTIONS
        | CLAMPS
        | MAX_POOLS
        | MOVES
        | _ACTIVATIONS
        | _AVERAGES
        | {"linear", "addmm", "matmul", "bmm", "add", "mul", "interpolate", "interpolate_nearest", "embedding"}
    ),
    reads_accumulators=_ACTIVATIONS | {"add"},
    rounds_for_float=False,
    rounding="float",
    rounds_joined=False,
    integer_operators=False,
)
