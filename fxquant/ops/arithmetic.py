"""Arithmetic of tensors and numbers, and products of matrices."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.behaviour import Rescaling
from fxquant.errors import Refusal
from fxquant.nn.accumulating import IntegerMatmul, IntegerProduct, IntegerSum
from fxquant.nn.integer import IntegerEvaluate, Site
from fxquant.ops.entry import Call, OpEntry, scalar
from fxquant.ops.example import example
from fxquant.ops.exported_forms import attention_by_heads

__all__ = ["add", "div", "sub"]


def add(input: Any, other: Any, alpha: float = 1) -> Tensor:
    """input + alpha·other, either of them a number."""
    return input + other if alpha == 1 else torch.add(input, other, alpha=alpha)


def sub(input: Any, other: Any, alpha: float = 1) -> Tensor:
    """input − alpha·other, either of them a number."""
    return input - other if alpha == 1 else torch.sub(input, other, alpha=alpha)


def div(input: Any, other: Any) -> Tensor:
    """input / other, either of them a number."""
    return input / other


def _operands_reason(call: Call) -> Refusal | None:
    for name in call.entry.operand_names:
        value = call.arguments[name]
        if isinstance(value, fx.Node) and not value.meta.get("is_tensor", True):
            return Refusal(f"its operand {name!r} is a number computed in the model")
        if not isinstance(value, fx.Node) and not scalar(value):
            return Refusal(f"its operand {name!r} is a {type(value).__name__}")
    alpha = call.attributes.get("alpha", 1)
    return None if scalar(alpha) else Refusal("its alpha is computed in the model")


def integer_add(site: Site) -> IntegerSum:
    return IntegerSum(site, signs=(1.0, float(site.attributes.get("alpha", 1))))


def integer_sub(site: Site) -> IntegerSum:
    return IntegerSum(site, signs=(1.0, -float(site.attributes.get("alpha", 1))))


def integer_div(site: Site) -> nn.Module:
    """Division by a number is a product; division by a tensor is evaluated."""
    if 1 not in site.scalars:
        return IntegerEvaluate(site)
    return IntegerProduct(replace(site, scalars={1: 1.0 / site.scalars[1]}))


OpEntry(
    name="add",
    function=add,
    signature="input*, other*, alpha=1",
    behaviour=Rescaling(),
    functions=(torch.add, operator.add),
    methods=("add", "__add__", "__radd__"),
    inplace_functions=(operator.iadd,),
    inplace_methods=("add_", "__iadd__"),
    integer=integer_add,
    fresh=True,
    additive=True,
    check=_operands_reason,
    onnx="Add",
    example=example(lambda x, y: torch.add(x, y, alpha=-0.7), (2, 3, 8, 8), (2, 3, 1, 8)),
)
OpEntry(
    name="sub",
    function=sub,
    signature="input*, other*, alpha=1",
    behaviour=Rescaling(),
    functions=(torch.sub, operator.sub, torch.subtract),
    methods=("sub", "__sub__"),
    inplace_functions=(operator.isub,),
    inplace_methods=("sub_", "__isub__"),
    integer=integer_sub,
    fresh=True,
    additive=True,
    check=_operands_reason,
    onnx="Sub",
    example=example(lambda x, y: 0.4 - torch.sub(x, y, alpha=1.7), (2, 3, 8, 8), (2, 3, 8, 8)),
)
OpEntry(
    name="mul",
    function=operator.mul,
    signature="input*, other*",
    behaviour=Rescaling(),
    functions=(torch.mul, torch.multiply),
    methods=("mul", "__mul__", "__rmul__"),
    inplace_functions=(operator.imul,),
    inplace_methods=("mul_", "__imul__"),
    integer=IntegerProduct,
    fresh=True,
    check=_operands_reason,
    onnx="Mul",
    example=example(lambda x, y: (x * y) * -0.3, (2, 3, 8, 8), (2, 3, 1, 1)),
)
OpEntry(
    name="div",
    function=div,
    signature="input*, other*",
    behaviour=Rescaling(),
    functions=(torch.div, operator.truediv, torch.true_divide),
    methods=("div", "__truediv__"),
    inplace_functions=(operator.itruediv,),
    inplace_methods=("div_", "__itruediv__"),
    integer=integer_div,
    fresh=True,
    sensitive={"other": "it divides by what could round to zero"},
    check=_operands_reason,
    onnx="Div",
    example=example(lambda x, y: (x / (y.abs() + 3.0)) / 0.7, (2, 3, 8, 8), (2, 3, 8, 8)),
)
OpEntry(
    name="matmul",
    function=torch.matmul,
    signature="input*, other*",
    behaviour=Rescaling(),
    functions=(operator.matmul,),
    methods=("matmul", "__matmul__"),
    integer=IntegerMatmul,
    fresh=True,
    check=_operands_reason,
    macs=lambda call: math.prod(call.shape()) * call.shape("input")[-1],
    onnx="MatMul",
    example=example(lambda x, y: x @ y.transpose(-2, -1), (2, 3, 6, 9), (2, 1, 5, 9)),
)
OpEntry(
    name="bmm",
    function=torch.bmm,
    signature="input*, mat2*",
    behaviour=Rescaling(),
    methods=("bmm",),
    integer=IntegerMatmul,
    fresh=True,
    check=_operands_reason,
    macs=lambda call: math.prod(call.shape()) * call.shape("input")[-1],
    onnx="MatMul",
    example=example(torch.bmm, (4, 5, 9), (4, 9, 3)),
)


def _attention_reason(call: Call) -> Refusal | None:
    rate = call["dropout_p"]
    return None if rate == 0.0 else Refusal(f"it drops attention weights (dropout_p={rate})")


OpEntry(
    name="scaled_dot_product_attention",
    function=F.scaled_dot_product_attention,
    signature="query*, key*, value*, attn_mask*=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False",
    behaviour=Rescaling(inputs=("query", "key", "value")),
    integer=IntegerEvaluate,
    native="attention",
    exported_as=attention_by_heads,
    check=_attention_reason,
    macs=lambda call: (
        math.prod(call.shape("query")) * call.shape("key")[-2] + math.prod(call.shape()) * call.shape("key")[-2]
    ),
    onnx="Attention",
    example=example(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4),
        (2, 3, 6, 8),
        (2, 3, 6, 8),
        (2, 3, 6, 8),
    ),
)
