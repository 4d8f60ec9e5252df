"""TensorRT's rules for ONNX files with Q/DQ, checked without TensorRT.

Every rule is a function that yields the nodes that break it; ``tensorrt_violations`` runs them all. Some rules are what
the parser asserts (zero points, types, operators): a file that breaks one is refused. The others are what fusions need
to give integer kernels (where pairs of QuantizeLinear and DequantizeLinear stand): a file that breaks one runs, slower.
Source: NVIDIA, TensorRT documentation, *Explicit Quantization*; the ONNX-TensorRT parser.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxquant.installed import require

__all__ = ["FUSION_RULES", "PARSER_RULES", "Violation", "tensorrt_violations"]

Rule = Callable[["_File"], Iterator[tuple[Any, str]]]

SMALLEST_OPSET = 13
_WEIGHTED = {"Conv": 0, "ConvTranspose": 1}
"""The weight's axis of output channels, by operator; that of Gemm and MatMul depends on the call."""
_PRODUCTS = ("Gemm", "MatMul")
_CLAMPS = ("Relu", "Clip")
_ACTIVATIONS = (
    *(*_CLAMPS, "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "Tanh", "HardSwish", "Gelu", "Mish"),
    *("Softplus", "Swish"),
)
_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_OF_INTEGERS = ("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")


@dataclass(frozen=True)
class Violation:
    """One node that breaks a rule.

    Attributes:
        rule: the rule, by the name of its function.
        node: the node, by its name; a Q or DQ that has none by that of its integers. Empty where the file as a whole
            breaks it.
        operator: what it computes.
        what: what is wrong, and what would be right.
        refused: whether TensorRT refuses the file for it; otherwise it runs, with less in integers.
    """

    rule: str
    node: str
    operator: str
    what: str
    refused: bool

    def __str__(self) -> str:
        return f"{self.rule}: {self.node or 'the file'}{f' ({self.operator})' if self.operator else ''}: {self.what}"


def tensorrt_violations(file: bytes | str | os.PathLike[str]) -> list[Violation]:
    """What TensorRT would refuse in an ONNX file, or not run in integers.

    Args:
        file: its bytes, or its path.

    Raises:
        MissingPackageError: onnx is not installed.
    """
    onnx: Any = require("onnx", "reading an ONNX file", "onnx")
    read = _File(onnx.load_from_string(file) if isinstance(file, bytes) else onnx.load(os.fspath(file)))
    return [
        Violation(rule.__name__, _name(node), getattr(node, "op_type", ""), what, rule in PARSER_RULES)
        for rule in (*PARSER_RULES, *FUSION_RULES)
        for node, what in rule(read)
    ]


def _name(node: Any) -> str:
    """What a node is called in a message; nothing where it is None."""
    if node is None or node.name:
        return "" if node is None else str(node.name)
    return str(node.input[0] if node.op_type == "DequantizeLinear" else node.output[0])


class _File:
    """A graph with what its rules ask for: who makes a tensor, who reads it, and which are constants."""

    def __init__(self, proto: Any) -> None:
        onnx: Any = require("onnx", "reading an ONNX file", "onnx")
        self.opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
        self.nodes = list(proto.graph.node)
        self.constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                value = next((a.t for a in node.attribute if a.name == "value"), None)
                if value is not None:
                    self.constants[node.output[0]] = onnx.numpy_helper.to_array(value)
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in proto.graph.output}

    def pairs(self) -> Iterator[Any]:
        """Every QuantizeLinear and DequantizeLinear."""
        return (node for node in self.nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear"))

    def is_weight(self, node: Any) -> bool:
        """Whether a DequantizeLinear reads a constant."""
        return node.op_type == "DequantizeLinear" and node.input[0] in self.constants

    def zero_point(self, node: Any) -> Any:
        """The constant zero point of a pair's half; None where it has none."""
        return self.constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None

    def weighted(self) -> Iterator[Any]:
        """Every convolution and product whose second operand is a constant, or a dequantized one."""
        for node in self.nodes:
            if node.op_type in _WEIGHTED or node.op_type in _PRODUCTS:
                weight = self.through_moves(node.input[1])
                if weight in self.constants or self.is_dequantized_constant(weight):
                    yield node

    def through_moves(self, name: str) -> str:
        """The tensor that ``name`` is a view of."""
        while name in self.maker and self.maker[name].op_type in _MOVES:
            name = self.maker[name].input[0]
        return name

    def is_dequantized(self, name: str) -> bool:
        made = self.maker.get(self.through_moves(name))
        return made is not None and made.op_type == "DequantizeLinear"

    def is_dequantized_constant(self, name: str) -> bool:
        made = self.maker.get(name)
        return made is not None and self.is_weight(made)

    def rounded_from(self, name: str) -> Any:
        """The node whose result ``name`` is after one pair of Q and DQ; None where it is not."""
        dequantize = self.maker.get(name)
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            return None
        quantize = self.maker.get(dequantize.input[0])
        return None if quantize is None or quantize.op_type != "QuantizeLinear" else self.maker.get(quantize.input[0])

    def is_quantized(self, node: Any) -> bool:
        """Whether a weighted op computes in integers: its weight is dequantized."""
        return node.op_type in (*_WEIGHTED, *_PRODUCTS) and self.is_dequantized(node.input[1])

    def read_once(self, node: Any) -> bool:
        return len(self.readers.get(node.output[0], ())) == 1 and node.output[0] not in self.outputs


def opset_has_axes(file: _File) -> Iterator[tuple[Any, str]]:
    """QuantizeLinear has had an axis since opset 13."""
    if file.opset < SMALLEST_OPSET:
        yield None, f"opset {file.opset}; per-channel scales need {SMALLEST_OPSET} or later"


def no_integer_operators(file: _File) -> Iterator[tuple[Any, str]]:
    """Q and DQ around float operators, and no operators on integers or of other domains."""
    for node in file.nodes:
        if node.op_type.startswith(("QLinear", "QGemm")) or node.op_type in _OF_INTEGERS:
            yield node, "the parser takes no operators on integers; export the file as pairs of Q and DQ"
        elif node.domain not in ("", "ai.onnx"):
            yield node, f"an operator of domain {node.domain!r}, which needs a plugin"


def zero_points_are_zero(file: _File) -> Iterator[tuple[Any, str]]:
    """Quantization is symmetric."""
    for node in file.pairs():
        zero_point = file.zero_point(node)
        if len(node.input) > 2 and node.input[2] and zero_point is None:
            yield node, "its zero point is computed; it must be a constant"
        elif zero_point is not None and np.any(zero_point.astype(np.int64) != 0):
            shown = zero_point.reshape(-1)[0]
            yield node, f"its zero point is {shown}; TensorRT takes zero only: activation scheme symmetric and signed"


def integers_are_int8(file: _File) -> Iterator[tuple[Any, str]]:
    """Integers are signed and have 8 bits; biases are floats."""
    for node in file.pairs():
        zero_point = file.zero_point(node)
        kind = file.constants[node.input[0]].dtype if file.is_weight(node) else None
        if kind is None and zero_point is not None:
            kind = zero_point.dtype
        if kind is None and node.op_type == "QuantizeLinear":
            yield node, "without a zero point its integers are uint8; TensorRT takes int8"
        elif kind is not None and str(kind) == "int32":
            yield (
                node,
                "int32 behind a DequantizeLinear is a quantized bias, which the parser refuses; biases stay float",
            )
        elif kind is not None and str(kind) != "int8":
            yield node, f"its integers are {kind}; TensorRT takes int8"


def scales_are_constant_and_positive(file: _File) -> Iterator[tuple[Any, str]]:
    """Scales are finite positive constants."""
    for node in file.pairs():
        scale = file.constants.get(node.input[1])
        if scale is None:
            yield node, "its scale is computed; it must be a constant"
        elif not (np.isfinite(scale).all() and (scale > 0).all()):
            yield node, f"its scale is {scale.reshape(-1)[:3].tolist()}; scales must be finite and positive"


def tensors_have_one_scale(file: _File) -> Iterator[tuple[Any, str]]:
    """Only weights have a scale per channel."""
    for node in file.pairs():
        scale = file.constants.get(node.input[1])
        if scale is not None and scale.size > 1 and not file.is_weight(node):
            yield node, f"an activation with {scale.size} scales; TensorRT takes one"


def weights_have_their_axis(file: _File) -> Iterator[tuple[Any, str]]:
    """A weight's scales run over output channels."""
    for node in file.weighted():
        made = file.maker.get(file.through_moves(node.input[1]))
        scale = None if made is None else file.constants.get(made.input[1])
        if made is None or made.op_type != "DequantizeLinear" or scale is None or scale.size == 1:
            continue
        rank = file.constants[made.input[0]].ndim
        axis = next((a.i for a in made.attribute if a.name == "axis"), 1) % rank
        wanted = _output_axis(file, node, rank)
        if axis != wanted:
            yield made, f"its scales run along axis {axis}; for {node.op_type} {_name(node)} they must along {wanted}"


def _output_axis(file: _File, node: Any, rank: int) -> int:
    if node.op_type in _WEIGHTED:
        return _WEIGHTED[node.op_type]
    axis = rank - 1
    if node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute):
        axis = 0
    transposed = file.maker.get(node.input[1])
    if transposed is not None and transposed.op_type == "Transpose":
        order = next((list(a.ints) for a in transposed.attribute if a.name == "perm"), list(range(rank))[::-1])
        axis = order[axis]
    return axis


def pairs_are_whole(file: _File) -> Iterator[tuple[Any, str]]:
    """What Q makes, DQ reads, on the same grid; nothing computes on integers between."""
    for node in file.pairs():
        if node.op_type == "QuantizeLinear":
            for reader in file.readers.get(node.output[0], ()):
                if reader.op_type != "DequantizeLinear":
                    yield (
                        node,
                        f"its integers go into {reader.op_type} {_name(reader)}; only DequantizeLinear may read them",
                    )
            if node.output[0] in file.outputs:
                yield node, "its integers are an output of the file"
        elif not file.is_weight(node):
            made = file.maker.get(node.input[0])
            if made is None or made.op_type != "QuantizeLinear":
                yield node, "it dequantizes what no QuantizeLinear made"
            elif _differ(file.constants.get(made.input[1]), file.constants.get(node.input[1])):
                yield node, f"its scale is another than that of {_name(made)}, whose integers it reads"


def _differ(one: Any, other: Any) -> bool:
    return one is not None and other is not None and not np.array_equal(one, other)


def weighted_ops_are_quantized_whole(file: _File) -> Iterator[tuple[Any, str]]:
    """A weighted op runs in integers if its input and its weight are both quantized."""
    for node in file.weighted():
        data, weight = file.is_dequantized(node.input[0]), file.is_dequantized(node.input[1])
        if weight and not data:
            yield node, "its weight is quantized and its input is not"
        elif data and not weight and file.through_moves(node.input[1]) in file.constants:
            yield node, "its input is quantized and its weight is not"


def activations_are_fused(file: _File) -> Iterator[tuple[Any, str]]:
    """No rounding between a weighted op and its activation."""
    for node in file.nodes:
        source = file.rounded_from(node.input[0]) if node.op_type in _ACTIVATIONS else None
        if source is not None and file.is_quantized(source) and file.read_once(source):
            yield node, f"{_name(source)} is rounded before it; Q and DQ belong behind the activation"


def residuals_are_fused(file: _File) -> Iterator[tuple[Any, str]]:
    """Of a sum's two operands, a weighted op's goes in wide and the other is quantized."""
    for node in file.nodes:
        if node.op_type != "Add" or any(name in file.constants for name in node.input):
            continue
        rounded = [source for name in node.input if (source := file.rounded_from(name)) is not None]
        fusible = [source for source in rounded if file.is_quantized(source) and file.read_once(source)]
        wide = [i for i, name in enumerate(node.input) if name in file.maker and file.is_quantized(file.maker[name])]
        if not wide and len(rounded) == 2 and fusible:
            yield (
                node,
                f"both operands are rounded; that of {_name(fusible[0])} must go in as it is, to be fused with it",
            )
        elif wide and _is_rounded(file, node) and not any(file.is_dequantized(n) for n in node.input):
            yield node, "neither operand is quantized; the residual needs Q and DQ"


def _is_rounded(file: _File, node: Any) -> bool:
    """Whether the result, or what a clamp makes of it, goes into a QuantizeLinear."""
    readers = file.readers.get(node.output[0], [])
    if len(readers) == 1 and readers[0].op_type in _CLAMPS:
        readers = file.readers.get(readers[0].output[0], [])
    return any(reader.op_type == "QuantizeLinear" for reader in readers)


PARSER_RULES: tuple[Rule, ...] = (
    opset_has_axes,
    no_integer_operators,
    zero_points_are_zero,
    integers_are_int8,
    scales_are_constant_and_positive,
    tensors_have_one_scale,
    weights_have_their_axis,
    pairs_are_whole,
)
FUSION_RULES: tuple[Rule, ...] = (weighted_ops_are_quantized_whole, activations_are_fused, residuals_are_fused)
