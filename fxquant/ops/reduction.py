"""Pooling, means and sums, and interpolation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.behaviour import Passing, Rescaling
from fxquant.errors import Refusal
from fxquant.nn.integer import IntegerLinearMap, IntegerPass, Site
from fxquant.ops.entry import Call, OpEntry, without_dtype
from fxquant.ops.example import example
from fxquant.ops.exported_forms import adaptive_by_parts, averages_over

__all__ = ["max_pool1d", "max_pool2d", "max_pool3d"]


def max_pool1d(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor:
    """``F.max_pool1d`` without indices."""
    return F.max_pool1d(input, kernel_size, stride, padding, dilation, ceil_mode)


def max_pool2d(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor:
    """``F.max_pool2d`` without indices."""
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


def max_pool3d(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor:
    """``F.max_pool3d`` without indices."""
    return F.max_pool3d(input, kernel_size, stride, padding, dilation, ceil_mode)


def adaptive_max_pool1d(input: Tensor, output_size: Any) -> Tensor:
    """``F.adaptive_max_pool1d`` without indices."""
    return F.adaptive_max_pool1d(input, output_size)


def adaptive_max_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """``F.adaptive_max_pool2d`` without indices."""
    return F.adaptive_max_pool2d(input, output_size)


def adaptive_max_pool3d(input: Tensor, output_size: Any) -> Tensor:
    """``F.adaptive_max_pool3d`` without indices."""
    return F.adaptive_max_pool3d(input, output_size)


def carried_pass(site: Site) -> IntegerPass:
    return IntegerPass(site, carried=True)


def _indices_reason(call: Call) -> Refusal | None:
    return Refusal("it also returns indices") if call["return_indices"] else None


_MAX = "input*, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False"
_AVG = "input*, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None"


def _pool(
    name: str,
    function: Callable[..., Any],
    signature: str,
    module: type[nn.Module],
    sample: nn.Module,
    shape: tuple[int, ...],
    *,
    onnx: str,
    functions: tuple[Callable[..., Any], ...] = (),
    exported_as: Callable[..., Any] | None = None,
    native: str = "",
) -> None:
    """One row: a maximum passes values, an average rescales them."""
    is_max = "max" in name
    OpEntry(
        name=name,
        function=function,
        signature=signature,
        behaviour=Passing() if is_max else Rescaling(),
        functions=functions,
        modules=(module,),
        integer=carried_pass if is_max else IntegerLinearMap,
        fresh=not is_max,
        quantized=name == "max_pool2d",
        native=native,
        check=_indices_reason if "return_indices" in signature else None,
        onnx=onnx,
        exported_as=exported_as,
        example=example(sample, shape, behind_op=is_max),
    )


_pool(
    "max_pool1d",
    max_pool1d,
    _MAX,
    nn.MaxPool1d,
    nn.MaxPool1d(3, stride=2, padding=1, dilation=2, ceil_mode=True),
    (2, 3, 17),
    onnx="MaxPool",
    functions=(F.max_pool1d, torch.max_pool1d),
    native="maximum over lines",
)
_pool(
    "max_pool2d",
    max_pool2d,
    _MAX,
    nn.MaxPool2d,
    nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
    (2, 3, 9, 10),
    onnx="MaxPool",
    functions=(F.max_pool2d, torch.max_pool2d),
    native="maximum",
)
_pool(
    "max_pool3d",
    max_pool3d,
    _MAX,
    nn.MaxPool3d,
    nn.MaxPool3d(2, stride=(1, 2, 2), ceil_mode=True),
    (2, 3, 5, 7, 6),
    onnx="MaxPool",
    functions=(F.max_pool3d, torch.max_pool3d),
    native="maximum over volumes",
)
_pool(
    "avg_pool1d",
    F.avg_pool1d,
    "input*, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True",
    nn.AvgPool1d,
    nn.AvgPool1d(3, stride=2, padding=1, count_include_pad=False),
    (2, 3, 17),
    onnx="AveragePool",
    native="average over lines",
)
_pool(
    "avg_pool2d",
    F.avg_pool2d,
    _AVG,
    nn.AvgPool2d,
    nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
    (2, 3, 10, 9),
    onnx="AveragePool",
    exported_as=averages_over(F.avg_pool2d, 2),
    native="average",
)
_pool(
    "avg_pool3d",
    F.avg_pool3d,
    _AVG,
    nn.AvgPool3d,
    nn.AvgPool3d(2, stride=(1, 2, 2), padding=1, divisor_override=5),
    (2, 3, 5, 7, 6),
    onnx="AveragePool",
    exported_as=averages_over(F.avg_pool3d, 3),
)

_ADAPTIVE_MAX = "input*, output_size, return_indices=False"
_ADAPTIVE = "input*, output_size"
_pool(
    "adaptive_max_pool1d",
    adaptive_max_pool1d,
    _ADAPTIVE_MAX,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool1d(4),
    (2, 3, 17),
    onnx="MaxPool",
    exported_as=adaptive_by_parts(torch.amax, 1),
    functions=(F.adaptive_max_pool1d,),
)
_pool(
    "adaptive_max_pool2d",
    adaptive_max_pool2d,
    _ADAPTIVE_MAX,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool2d((3, None)),
    (2, 3, 8, 5),
    onnx="MaxPool",
    exported_as=adaptive_by_parts(torch.amax, 2),
    functions=(F.adaptive_max_pool2d,),
)
_pool(
    "adaptive_max_pool3d",
    adaptive_max_pool3d,
    _ADAPTIVE_MAX,
    nn.AdaptiveMaxPool3d,
    nn.AdaptiveMaxPool3d((2, 3, 1)),
    (2, 3, 5, 7, 4),
    onnx="MaxPool",
    exported_as=adaptive_by_parts(torch.amax, 3),
    functions=(F.adaptive_max_pool3d,),
)
_pool(
    "adaptive_avg_pool1d",
    F.adaptive_avg_pool1d,
    _ADAPTIVE,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool1d(4),
    (2, 3, 17),
    onnx="AveragePool",
    exported_as=adaptive_by_parts(torch.mean, 1),
    functions=(torch.adaptive_avg_pool1d,),
    native="adaptive average over lines",
)
_pool(
    "adaptive_avg_pool2d",
    F.adaptive_avg_pool2d,
    _ADAPTIVE,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool2d((3, None)),
    (2, 3, 8, 5),
    onnx="AveragePool",
    exported_as=adaptive_by_parts(torch.mean, 2),
    native="adaptive average",
)
_pool(
    "adaptive_avg_pool3d",
    F.adaptive_avg_pool3d,
    _ADAPTIVE,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveAvgPool3d((2, 3, 1)),
    (2, 3, 5, 7, 4),
    onnx="AveragePool",
    exported_as=adaptive_by_parts(torch.mean, 3),
    native="adaptive average over volumes",
)


OpEntry(
    name="mean",
    function=torch.mean,
    signature="input*, dim=None, keepdim=False, dtype=None",
    behaviour=Rescaling(),
    methods=("mean",),
    integer=IntegerLinearMap,
    native="mean",
    fresh=True,
    check=without_dtype,
    onnx="ReduceMean",
    aliases={"axis": "dim", "keepdims": "keepdim"},
    example=example(lambda x: x.mean((2, 3), keepdim=True), (2, 5, 6, 7)),
)
OpEntry(
    name="sum",
    function=torch.sum,
    signature="input*, dim=None, keepdim=False, dtype=None",
    behaviour=Rescaling(),
    methods=("sum",),
    integer=IntegerLinearMap,
    fresh=True,
    check=without_dtype,
    onnx="ReduceSum",
    aliases={"axis": "dim", "keepdims": "keepdim"},
    example=example(lambda x: torch.sum(x, dim=1), (2, 5, 6, 7)),
)

_NEAREST = ("nearest", "nearest-exact")
_INTERPOLATE = (
    "input*, size=None, scale_factor=None, mode='nearest', align_corners=None, recompute_scale_factor=None, "
    "antialias=False"
)
OpEntry(
    name="interpolate_nearest",
    function=F.interpolate,
    signature=_INTERPOLATE,
    behaviour=Passing(),
    modules=(nn.Upsample, nn.UpsamplingNearest2d),
    integer=carried_pass,
    quantized=True,
    accepts=lambda call: call["mode"] in _NEAREST,
    onnx="Resize",
    example=example(
        lambda x: F.interpolate(x, scale_factor=(2.0, 1.5), mode="nearest-exact"), (2, 3, 5, 6), behind_op=True
    ),
)
OpEntry(
    name="interpolate",
    function=F.interpolate,
    signature=_INTERPOLATE,
    behaviour=Rescaling(),
    functions=(F.interpolate,),
    modules=(nn.Upsample, nn.UpsamplingBilinear2d),
    integer=IntegerLinearMap,
    fresh=True,
    accepts=lambda call: call["mode"] not in _NEAREST,
    onnx="Resize",
    example=example(lambda x: F.interpolate(x, size=(9, 7), mode="bilinear", align_corners=True), (2, 3, 5, 6)),
)
