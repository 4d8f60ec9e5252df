"""TensorFlow Lite's 8-bit specification: signed tensors with zero points, prescribed grids, shared scales.

Its reference kernels requantize in two roundings, as gemmlowp does. Biases are 32-bit integers at the product of scales.
A weighted op has a kernel only between integers, so results are rounded where they leave the model.
"""

from __future__ import annotations

from fxquant.numerics.scheme import WEIGHT, Scheme
from fxquant.runtimes.op_groups import CLAMPS, MOVES
from fxquant.runtimes.runtime import Runtime
from fxquant.targets.target import Target

__all__ = ["TFLITE"]

_AVERAGES = frozenset({"avg_pool2d", "adaptive_avg_pool2d"})

_TARGET = Target(
    name="tflite",
    title="TFLite",
    source="https://www.tensorflow.org/lite/performance/quantization_spec",
    activation=Scheme(signed=True),
    weight=WEIGHT,
    activation_signs=(True,),
    wide_weights=False,
    per_channel=frozenset({"conv1d", "conv2d", "conv_transpose2d"}),
    integer_ops=(
        CLAMPS
        | MOVES
        | _AVERAGES
        | {"interpolate", "interpolate_nearest"}
        | {"conv1d", "conv2d", "conv_transpose2d", "linear", "addmm", "matmul", "bmm", "max_pool1d", "max_pool2d"}
        | {"adaptive_max_pool2d", "add", "sub", "mul", "mean", "sum", "softmax", "log_softmax", "sigmoid", "tanh"}
        | {"hardswish", "leaky_relu", "prelu", "abs", "embedding"}
    ),
    keeps_scale=_AVERAGES | {"interpolate"},
    rounds_outputs=frozenset({"conv1d", "conv2d", "conv_transpose2d", "linear", "addmm"}),
    fixed_grids={
        "softmax": (1 / 256, -128),
        "sigmoid": (1 / 256, -128),
        "tanh": (1 / 128, 0),
        "log_softmax": (16 / 256, 127),
    },
    rounding="double",
    adds_pairs=False,
)


def _status(saturates: bool) -> str:
    return "runs files of export_tflite, in LiteRT's kernels, which do not saturate"


TFLITE = Runtime(
    name="tflite",
    title="TFLite",
    target=_TARGET,
    package="litert_torch",
    extra="litert",
    status=_status,
    instead="write a file with fxquant.export.export_tflite, and load it with LiteRT's interpreter",
)
