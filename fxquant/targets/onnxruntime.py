"""ONNX Runtime on a CPU: unsigned tensors and signed weights (U8S8), and the ops that have an integer kernel there.

Its kernels read integers and write integers, so that each op between pairs of QuantizeLinear and DequantizeLinear needs
both: what a float op reads is rounded too. Integers of 16 bits are computed in float, rightly, and so are weights of 4.
"""

from __future__ import annotations

from fxquant.targets.op_groups import CLAMPS, CONVOLUTIONS, MAX_POOLS, MOVES
from fxquant.targets.target import Target

__all__ = ["ONNXRUNTIME"]

ONNXRUNTIME = Target(
    name="onnxruntime",
    title="ONNX Runtime",
    source="https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html",
    activation_bits=(8, 16),
    weight_bits=(4, 8),
    integer_ops=(
        CONVOLUTIONS
        | CLAMPS
        | MAX_POOLS
        | MOVES
        | {"linear", "addmm", "matmul", "bmm", "add", "mul", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d"}
        | {"adaptive_avg_pool2d", "softmax", "sigmoid", "leaky_relu", "interpolate_nearest", "embedding"}
    ),
    rounding="float",
)
