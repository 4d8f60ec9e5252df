"""Functions of one number: clamps, activations, bounded functions. Each becomes a table over the input's integers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.behaviour import Behaviour, Bounded, Clamping, Rescaling
from fxquant.errors import Refusal
from fxquant.nn.integer import IntegerEvaluate, IntegerTable
from fxquant.ops.entry import Call, OpEntry, scalar, without_dtype
from fxquant.ops.example import example


def _clamp_bounds(call: Call) -> tuple[float | None, float | None] | Refusal:
    ends = call["min"], call["max"]
    for name, end in zip(("min", "max"), ends, strict=True):
        if isinstance(end, (fx.Node, Tensor)):
            return Refusal(f"its bound {name!r} is a tensor")
    low, high = (None if end is None else float(end) for end in ends)
    return low, high


def _hardtanh_bounds(call: Call) -> tuple[float | None, float | None]:
    return float(call["min_val"]), float(call["max_val"])


OpEntry(
    name="relu",
    function=F.relu,
    signature="input*, inplace=False",
    behaviour=Clamping(bounds=lambda call: (0.0, None)),
    functions=(torch.relu,),
    methods=("relu",),
    inplace_functions=(torch.relu_, F.relu_),
    inplace_methods=("relu_",),
    modules=(nn.ReLU,),
    integer=IntegerTable,
    onnx="Relu",
    example=example(lambda x: F.relu(x * 0.7 - 0.1), (2, 3, 8, 8)),
)
OpEntry(
    name="relu6",
    function=F.relu6,
    signature="input*, inplace=False",
    behaviour=Clamping(bounds=lambda call: (0.0, 6.0)),
    modules=(nn.ReLU6,),
    integer=IntegerTable,
    onnx="Clip",
    example=example(lambda x: F.relu6(x * 5.0), (2, 3, 8, 8)),
)
OpEntry(
    name="hardtanh",
    function=F.hardtanh,
    signature="input*, min_val=-1.0, max_val=1.0, inplace=False",
    behaviour=Clamping(bounds=_hardtanh_bounds),
    inplace_functions=(F.hardtanh_,),
    modules=(nn.Hardtanh,),
    integer=IntegerTable,
    onnx="Clip",
    example=example(nn.Hardtanh(min_val=-0.6, max_val=2.2), (2, 3, 8, 8)),
)
OpEntry(
    name="clamp",
    function=torch.clamp,
    signature="input*, min=None, max=None",
    behaviour=Clamping(bounds=_clamp_bounds),
    functions=(torch.clip,),
    methods=("clamp", "clip"),
    inplace_functions=(torch.clamp_,),
    inplace_methods=("clamp_", "clip_"),
    integer=IntegerTable,
    onnx="Clip",
    example=example(lambda x: (x * 2.0).clamp(max=1.3), (2, 3, 8, 8)),
)


_STEEP = "its slope has no bound near zero"


def _unary(
    name: str,
    function: Callable[..., Any],
    arguments: str = "",
    *,
    onnx: str,
    behaviour: Behaviour | None = None,
    modules: tuple[type[nn.Module], ...] = (),
    functions: tuple[Callable[..., Any], ...] = (),
    methods: tuple[str, ...] = (),
    inplace_functions: tuple[Callable[..., Any], ...] = (),
    inplace_methods: tuple[str, ...] = (),
    quantized_as: str = "",
    sensitive: str = "",
    sample: nn.Module | Callable[..., Any],
) -> None:
    """One row: a function of one number whose result has a range of its own, or a known one."""
    OpEntry(
        name=name,
        function=function,
        signature=f"input*, {arguments}" if arguments else "input*",
        behaviour=behaviour or Rescaling(),
        functions=functions,
        methods=methods,
        inplace_functions=inplace_functions,
        inplace_methods=inplace_methods,
        modules=modules,
        integer=IntegerTable,
        quantized_as=quantized_as,
        sensitive={"input": sensitive} if sensitive else {},
        onnx=onnx,
        example=example(sample, (2, 3, 9, 7)),
    )


_unary(
    "leaky_relu",
    F.leaky_relu,
    "negative_slope=0.01, inplace=False",
    onnx="LeakyRelu",
    modules=(nn.LeakyReLU,),
    inplace_functions=(F.leaky_relu_,),
    sample=nn.LeakyReLU(0.23),
)
_unary("elu", F.elu, "alpha=1.0, inplace=False", onnx="Elu", modules=(nn.ELU,), sample=nn.ELU(alpha=0.7))
_unary("celu", F.celu, "alpha=1.0, inplace=False", onnx="Celu", modules=(nn.CELU,), sample=nn.CELU(alpha=0.7))
_unary("selu", F.selu, "inplace=False", onnx="Selu", modules=(nn.SELU,), sample=F.selu)
_unary("silu", F.silu, "inplace=False", onnx="Mul", modules=(nn.SiLU,), sample=nn.SiLU())
_unary("mish", F.mish, "inplace=False", onnx="Mish", modules=(nn.Mish,), sample=F.mish)
_unary("gelu", F.gelu, "approximate='none'", onnx="Gelu", modules=(nn.GELU,), sample=nn.GELU(approximate="tanh"))
_unary(
    "hardswish",
    F.hardswish,
    "inplace=False",
    onnx="HardSwish",
    modules=(nn.Hardswish,),
    quantized_as="quantized::hardswish",
    sample=nn.Hardswish(),
)
_unary(
    "softplus",
    F.softplus,
    "beta=1.0, threshold=20.0",
    onnx="Softplus",
    modules=(nn.Softplus,),
    sample=nn.Softplus(beta=2.0, threshold=4.0),
)
_unary(
    "abs",
    torch.abs,
    onnx="Abs",
    functions=(operator.abs,),
    methods=("abs", "__abs__"),
    inplace_methods=("abs_",),
    sample=torch.abs,
)
_unary(
    "neg",
    torch.neg,
    onnx="Neg",
    functions=(operator.neg, torch.negative),
    methods=("neg", "__neg__"),
    inplace_methods=("neg_",),
    sample=lambda x: -(x * 0.7),
)
_unary(
    "exp",
    torch.exp,
    onnx="Exp",
    methods=("exp",),
    inplace_methods=("exp_",),
    sensitive="an error of its exponent is a factor of its result",
    sample=lambda x: torch.exp(x * 0.3),
)
_unary(
    "sqrt",
    torch.sqrt,
    onnx="Sqrt",
    methods=("sqrt",),
    sensitive=_STEEP,
    sample=lambda x: torch.sqrt(x.abs()),
)
_unary("square", torch.square, onnx="Mul", methods=("square",), inplace_methods=("square_",), sample=torch.square)
_unary(
    "sin",
    torch.sin,
    onnx="Sin",
    methods=("sin",),
    inplace_methods=("sin_",),
    sensitive="its phase counts to a fraction of a turn",
    sample=lambda x: torch.sin(x * 1.3),
)
_unary(
    "cos",
    torch.cos,
    onnx="Cos",
    methods=("cos",),
    inplace_methods=("cos_",),
    sensitive="its phase counts to a fraction of a turn",
    sample=lambda x: torch.cos(x * 1.3),
)
_unary(
    "log",
    torch.log,
    onnx="Log",
    methods=("log",),
    inplace_methods=("log_",),
    sensitive=_STEEP,
    sample=lambda x: torch.log(x.abs() + 0.5),
)
_unary(
    "rsqrt",
    torch.rsqrt,
    onnx="Reciprocal",
    methods=("rsqrt",),
    inplace_methods=("rsqrt_",),
    sensitive=_STEEP,
    sample=lambda x: torch.rsqrt(x.abs() + 0.5),
)
_unary(
    "reciprocal",
    torch.reciprocal,
    onnx="Reciprocal",
    methods=("reciprocal",),
    inplace_methods=("reciprocal_",),
    sensitive=_STEEP,
    sample=lambda x: torch.reciprocal(x.abs() + 0.5),
)


def _exponent_reason(call: Call) -> Refusal | None:
    if not scalar(call["exponent"]):
        return Refusal("its exponent is a tensor")
    return None if isinstance(call["input"], fx.Node) else Refusal("its base is a number")


def _flattens(call: Call) -> bool:
    """Whether small errors of the base stay small: not so for roots and what divides."""
    return not scalar(call["exponent"]) or call["exponent"] >= 1


OpEntry(
    name="pow",
    function=torch.pow,
    signature="input*, exponent",
    behaviour=Rescaling(),
    functions=(operator.pow,),
    methods=("pow", "__pow__"),
    integer=IntegerTable,
    accepts=_flattens,
    check=_exponent_reason,
    onnx="Pow",
    example=example(lambda x: torch.pow(x * 0.7, 3), (2, 3, 9, 7)),
)
OpEntry(
    name="root_pow",
    function=torch.pow,
    signature="input*, exponent",
    behaviour=Rescaling(),
    functions=(operator.pow,),
    methods=("pow", "__pow__"),
    integer=IntegerTable,
    accepts=lambda call: not _flattens(call),
    check=_exponent_reason,
    sensitive={"input": _STEEP},
    onnx="Pow",
    example=example(lambda x: torch.pow(x.abs() + 0.5, -0.7), (2, 3, 9, 7)),
)
_unary(
    "sigmoid",
    torch.sigmoid,
    onnx="Sigmoid",
    behaviour=Bounded(0.0, 1.0),
    modules=(nn.Sigmoid,),
    functions=(F.sigmoid,),
    methods=("sigmoid",),
    inplace_functions=(torch.sigmoid_,),
    inplace_methods=("sigmoid_",),
    sample=lambda x: torch.sigmoid(x * 2.0),
)
_unary(
    "hardsigmoid",
    F.hardsigmoid,
    "inplace=False",
    onnx="HardSigmoid",
    behaviour=Bounded(0.0, 1.0),
    modules=(nn.Hardsigmoid,),
    sample=lambda x: F.hardsigmoid(x * 2.0),
)
_unary(
    "tanh",
    torch.tanh,
    onnx="Tanh",
    behaviour=Bounded(-1.0, 1.0),
    modules=(nn.Tanh,),
    functions=(F.tanh,),
    methods=("tanh",),
    inplace_functions=(torch.tanh_,),
    inplace_methods=("tanh_",),
    sample=lambda x: torch.tanh(x * 0.8),
)
OpEntry(
    name="prelu",
    function=F.prelu,
    signature="input*, weight*",
    behaviour=Rescaling(inputs=("input",)),
    functions=(torch.prelu,),
    modules=(nn.PReLU,),
    parametric=True,
    integer=IntegerEvaluate,
    onnx="PRelu",
    example=example(nn.PReLU(num_parameters=3), (2, 3, 9, 7)),
)


OpEntry(
    name="softmax",
    function=F.softmax,
    signature="input*, dim=None, dtype=None, _stacklevel=3",
    behaviour=Bounded(0.0, 1.0),
    functions=(torch.softmax,),
    methods=("softmax",),
    modules=(nn.Softmax, nn.Softmax2d),
    read=lambda module: {"dim": getattr(module, "dim", -3)},
    integer=IntegerEvaluate,
    native="softmax",
    masked=("input",),
    check=without_dtype,
    onnx="Softmax",
    example=example(lambda x: F.softmax(x * 2.0, dim=1), (2, 7, 5)),
)
OpEntry(
    name="log_softmax",
    function=F.log_softmax,
    signature="input*, dim=None, dtype=None, _stacklevel=3",
    behaviour=Rescaling(),
    functions=(torch.log_softmax,),
    methods=("log_softmax",),
    modules=(nn.LogSoftmax,),
    integer=IntegerEvaluate,
    native="log softmax",
    masked=("input",),
    check=without_dtype,
    onnx="LogSoftmax",
    example=example(nn.LogSoftmax(dim=1), (2, 7, 5)),
)
