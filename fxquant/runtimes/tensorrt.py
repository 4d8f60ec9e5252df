"""TensorRT with explicit quantization: signed integers around zero, and Q/DQ only where its fusions begin.

All inputs of a weighted op are quantized, its output is not: what follows it in the same kernel (a bias, an activation, a
sum) reads the accumulator, and the other operand of the sum, the residual, is quantized. Biases are floats.
"""

from __future__ import annotations

from fxquant.numerics.scheme import WEIGHT, Scheme
from fxquant.runtimes.op_groups import AVERAGES, CLAMPS, CONVOLUTIONS, MAX_POOLS, MOVES, TRANSPOSED_CONVOLUTIONS
from fxquant.runtimes.runtime import Runtime
from fxquant.runtimes.tensorrt_rules import tensorrt_violations
from fxquant.targets.target import Target

__all__ = ["TENSORRT"]

_ACTIVATIONS = frozenset(
    {"leaky_relu", "elu", "selu", "silu", "mish", "gelu", "hardswish", "softplus", "sigmoid", "hardsigmoid", "tanh"}
)

_TARGET = Target(
    name="tensorrt",
    title="TensorRT",
    source="https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html",
    activation=Scheme(symmetric=True, signed=True),
    weight=WEIGHT,
    activation_signs=(True,),
    affine=False,
    integer_ops=(
        CONVOLUTIONS
        | TRANSPOSED_CONVOLUTIONS
        | CLAMPS
        | MAX_POOLS
        | MOVES
        | _ACTIVATIONS
        | AVERAGES
        | {"linear", "addmm", "matmul", "bmm", "add", "sub", "mul", "batch_norm", "interpolate_nearest", "interpolate"}
    ),
    reasons={
        "softmax": "TensorRT computes softmax in float",
        "log_softmax": "TensorRT computes log_softmax in float",
        "layer_norm": "TensorRT computes normalizations in float",
        "scaled_dot_product_attention": "TensorRT computes attention in float",
    },
    reads_accumulators=_ACTIVATIONS | {"add", "sub"},
    rounds_for_float=False,
    rounding="float",
    integer_biases=False,
    packs_weights=False,
    integer_operators=False,
    file_rules="tensorrt",
    adds_pairs=False,
)

TENSORRT = Runtime(
    name="tensorrt",
    title="TensorRT",
    target=_TARGET,
    file_rules=tensorrt_violations,
    instead="write a file with export_onnx of a model prepared for target='tensorrt', and build its engine with trtexec",
)
