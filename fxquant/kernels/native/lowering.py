"""An integer graph as native operations: which form becomes which, and what is done on a convolution's way out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.leveled import LeveledModule
from fxquant.kernels.native.library import FLAGS, KINDS, Step
from fxquant.kernels.native.operations import Add, Concatenate, Flatten, Operation, Shape, Simple, Weighted, set_rescaling
from fxquant.kernels.native.weights import Rescaling, Unfit, channel_affine_numbers, held, rescaling_of
from fxquant.nn.accumulating import IntegerProduct, IntegerSum, IntegerWeighted
from fxquant.nn.integer import Dequantize, IntegerEvaluate, IntegerLinearMap, IntegerOp, IntegerPass, IntegerTable, Quantize
from fxquant.ops.behaviour import ChannelAffine

__all__ = ["NativeProgram", "lower"]


@dataclass
class NativeProgram:
    """A graph as operations in order, for inputs of any shape.

    Attributes:
        operations: in the order in which they run.
        inputs: the values of the graph's inputs, in order.
        result: the graph's result with values for nodes.
        skipped: nodes that do nothing here.
    """

    operations: list[Operation]
    inputs: list[int]
    result: Any
    outputs: list[int] = field(default_factory=list)


class _Lowering:
    def __init__(self, graph: LeveledModule) -> None:
        self.graph = graph
        self.values: dict[fx.Node, int] = {}
        self.signed: dict[fx.Node, bool] = {}
        self.operations: list[Operation] = []

    def program(self) -> NativeProgram:
        inputs, result = list[int](), None
        for node in self.graph.graph.nodes:
            if node.op == "output":
                result = torch.fx.node.map_arg(node.args[0], lambda n: _Output(self._value(n)))
            elif node.op == "placeholder":
                self.values[node] = len(self.values)
                inputs.append(self.values[node])
            elif node.users:
                self._lower(node)
        leaves = torch.utils._pytree.tree_leaves(result)
        if not leaves or not all(isinstance(leaf, _Output) for leaf in leaves):
            raise Unfit("the model returns what no native kernel computes")
        outputs = [leaf.value for leaf in leaves]
        return NativeProgram(_fused(self.operations, outputs), inputs, result, outputs)

    def _value(self, node: fx.Node) -> int:
        if node not in self.values:
            raise Unfit(f"{node.name} is no tensor of the graph's own")
        return self.values[node]

    def _lower(self, node: fx.Node) -> None:
        part = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        build = _FORMS.get(type(part))
        if build is None:
            raise Unfit(f"{node.name} ({_described(node, part)}) has no native kernel")
        try:
            made = build(self, node, part)
        except Unfit as reason:
            raise Unfit(f"{node.name} ({_described(node, part)}) has no native kernel: {reason}") from None
        self.operations.append(made)
        self.values[node] = made.output

    def start(self, node: fx.Node, operands: Sequence[Any] | None = None) -> tuple[str, list[int], int]:
        """Name, inputs and output of a new operation."""
        found = [a for a in (node.args if operands is None else operands) if isinstance(a, fx.Node)]
        return node.name, [self._value(a) for a in found], len(self.values)

    def held_zero_point(self, node: fx.Node, part: Any, index: int) -> int:
        return int(part.offset[index]) + 128 * self.is_signed(node.args[index])

    def is_signed(self, node: Any) -> bool:
        if node not in self.signed:
            raise Unfit("an operand is no tensor of bytes")
        return self.signed[node]

    def gives(self, node: fx.Node, dtype: torch.dtype | None) -> None:
        """Remember how a result is held."""
        if dtype not in (torch.uint8, torch.int8):
            raise Unfit(f"its result is {dtype}")
        self.signed[node] = dtype == torch.int8


@dataclass(frozen=True)
class _Output:
    value: int


def lower(graph: LeveledModule) -> NativeProgram:
    """The graph's operations.

    Raises:
        Unfit: a node has no native kernel; says which, and why.
    """
    with torch.no_grad():
        return _Lowering(graph).program()


def _described(node: fx.Node, part: Any) -> str:
    return str(part.entry.name) if isinstance(part, IntegerOp) else type(part).__name__ if part is not None else node.op


def _fused(operations: list[Operation], outputs: Sequence[int]) -> list[Operation]:
    """Tables and sums that only continue a convolution become its way out."""
    uses = Counter(value for operation in operations for value in operation.inputs)
    uses.update(outputs)
    made = {operation.output: operation for operation in operations}
    gone = set[Operation]()
    for operation in operations:
        sources = [made.get(value) for value in operation.inputs]
        ready = [s for s in sources if isinstance(s, Weighted) and uses[s.output] == 1 and not s.to_float and s.added is None]
        if isinstance(operation, Simple) and operation.kind == "table" and ready and ready[0].table is None:
            ready[0].table, ready[0].output = operation.keep[0], operation.output
            made[operation.output] = ready[0]
            gone.add(operation)
        elif isinstance(operation, Add) and ready:
            last = max(ready, key=operations.index)
            second = last.output == operation.inputs[1]
            last.added = operation, second
            last.inputs = [last.inputs[0], operation.inputs[0 if second else 1]]
            last.output = operation.output
            made[operation.output] = last
            gone.add(operation)
    return _in_order([o for o in operations if o not in gone], operations)


def _in_order(kept: list[Operation], before: list[Operation]) -> list[Operation]:
    """An operation that took over another's sum moves to where its second operand is there."""
    position = {operation: i for i, operation in enumerate(before)}

    def place(operation: Operation) -> int:
        if isinstance(operation, Weighted) and operation.added is not None:
            return position[operation.added[0]]
        return position[operation]

    return sorted(kept, key=place)


def _quantize(low: _Lowering, node: fx.Node, part: Quantize) -> Operation:
    scheme = part.scheme
    low.gives(node, scheme.storage_dtype)
    shift, scale = 128 * scheme.signed, float(part.scale)
    zero_point = int(part.zero_point) + shift

    def write(step: Step, _: Any, __: Any) -> None:
        step.scale[0], step.zero_point[0] = scale, zero_point
        step.out.low, step.out.high = scheme.qmin + shift, scheme.qmax + shift

    return Simple(*low.start(node), "quantize", write, floats_in=True)


def _dequantize(low: _Lowering, node: fx.Node, part: Dequantize) -> Operation:
    if part.dtype != torch.float32:
        raise Unfit(f"its result is {part.dtype}")
    scale, zero_point = float(part.scale), int(part.zero_point) + 128 * low.is_signed(node.args[0])

    def write(step: Step, _: Any, __: Any) -> None:
        step.scale[0], step.zero_point[0] = scale, zero_point

    return Simple(*low.start(node), "dequantize", write, floats_out=True)


def _weighted(low: _Lowering, node: fx.Node, part: IntegerWeighted) -> Operation:
    if part.output_dtype is not None:
        low.gives(node, part.output_dtype)
    elif part.real_dtype != torch.float32:
        raise Unfit(f"its result is {part.real_dtype}")
    if len(node.args) != 1 or node.kwargs:
        raise Unfit("it is called with more than its input")
    return Weighted(*low.start(node), part, low.held_zero_point(node, part, 0))


def _tabulated(low: _Lowering, node: fx.Node, part: IntegerOp) -> Operation:
    """A function of one tensor's numbers, asked for all 256."""
    (source,) = (a for a in node.args if isinstance(a, fx.Node))
    signed = low.is_signed(source)
    low.gives(node, part.output_dtype)
    every = torch.arange(256, dtype=torch.int32) - 128 * signed
    if isinstance(part, IntegerTable):  # a grid of fewer bits has fewer entries, and its tensors no other numbers
        every = every.clamp(int(part.first), int(part.first) + len(part.table) - 1)
    found = part(*(every.to(torch.int8 if signed else torch.uint8) if a is source else a for a in node.args))
    table = (found.to(torch.int32) + 128 * low.signed[node]).to(torch.uint8).contiguous()

    def write(step: Step, _: Any, __: Any) -> None:
        step.out.table = table.data_ptr()

    return Simple(*low.start(node), "table", write, keep=(table,))


def _sum(low: _Lowering, node: fx.Node, part: IntegerSum) -> Operation:
    if len([a for a in node.args if isinstance(a, fx.Node)]) == 1:
        return _tabulated(low, node, part)
    low.gives(node, part.output_dtype)
    return Add(*low.start(node), part, (low.held_zero_point(node, part, 0), low.held_zero_point(node, part, 1)))


def _product(low: _Lowering, node: fx.Node, part: IntegerProduct) -> Operation:
    if len([a for a in node.args if isinstance(a, fx.Node)]) == 1:
        return _tabulated(low, node, part)
    if int(part.sign) < 0:
        raise Unfit("its factors have scales of different signs")
    low.gives(node, part.output_dtype)
    zero_points = low.held_zero_point(node, part, 0), low.held_zero_point(node, part, 1)
    return Product(*low.start(node), rescaling_of(part, 16, 255 * 255), zero_points)


@dataclass(eq=False)
class Product(Operation):
    """A product of two tensors, of which one may have a single number for all pixels of an image."""

    rescaling: Rescaling
    zero_points: tuple[int, int]

    def __post_init__(self) -> None:
        self.constants = self.rescaling.laid_out(lambda values, _: values.contiguous())

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        result = tuple(torch.broadcast_shapes(*shapes))
        if len(shapes[0]) == len(shapes[1]) == 4 and result == shapes[1] != shapes[0]:
            self.inputs, self.zero_points = self.inputs[::-1], self.zero_points[::-1]
            shapes = shapes[::-1]
        axis = 1 if len(result) == 4 else -1
        if result != shapes[0] or len(shapes[0]) != len(shapes[1]) or shapes[0][axis] != shapes[1][axis]:
            raise Unfit(f"it multiplies shapes {list(shapes[0])} and {list(shapes[1])}")
        if len(result) != 4 and shapes[0] != shapes[1]:
            raise Unfit(f"it multiplies shapes {list(shapes[0])} and {list(shapes[1])}")
        return result

    def fill(self, step: Step, shapes: Sequence[Shape], result: Shape) -> None:
        step.kind, step.zero_point[:] = KINDS["multiply"], self.zero_points
        set_rescaling(step, self.rescaling, self.constants)


def _evaluate(low: _Lowering, node: fx.Node, part: IntegerEvaluate) -> Operation:
    if not isinstance(part.entry.behaviour, ChannelAffine):  # type: ignore[attr-defined]
        raise Unfit("it computes in floats inside")
    low.gives(node, part.output_dtype)
    zero_point, least, most = held(part)
    ratio = float(part.input_scale[0]) / float(part.output_scale)
    gain, offset = (getattr(part, f"parameter_{name}").double() for name in part.parameter_names)
    source = low.held_zero_point(node, part, 0)
    numbers, shift = channel_affine_numbers(gain * ratio, offset / float(part.output_scale), (source, zero_point))

    def write(step: Step, _: Any, __: Any) -> None:
        step.numbers, step.zero_point[0] = numbers.data_ptr(), shift
        step.out.low, step.out.high = least, most

    return Simple(*low.start(node), "affine", write, keep=(numbers,))


def _of_meta(part: IntegerOp) -> Callable[[Sequence[Shape]], Shape]:
    """The shape that torch's own function gives."""

    def shape(shapes: Sequence[Shape]) -> Shape:
        return tuple(part.entry.function(torch.empty(shapes[0], device="meta"), **part.attributes).shape)  # type: ignore[attr-defined]

    return shape


def _pair(value: Any) -> list[int]:
    return [int(value)] * 2 if isinstance(value, int) else [int(v) for v in value]


def _window(step: Step, attributes: dict[str, Any]) -> None:
    kernel, stride = attributes["kernel_size"], attributes.get("stride")
    step.window.kernel[:] = _pair(kernel)
    step.window.stride[:] = _pair(kernel if stride is None or stride == [] else stride)
    step.window.padding[:] = _pair(attributes.get("padding", 0))
    step.window.dilation[:] = _pair(attributes.get("dilation", 1))


def _maximum(low: _Lowering, node: fx.Node, part: IntegerPass) -> Operation:
    def write(step: Step, _: Any, __: Any) -> None:
        _window(step, part.attributes)

    return Simple(*low.start(node), "maximum", write, _of_meta(part))


def _concatenate(low: _Lowering, node: fx.Node, part: IntegerPass) -> Operation:
    (tensors,) = node.args
    if not isinstance(tensors, (list, tuple)) or len({low.is_signed(t) for t in tensors}) != 1:
        raise Unfit("its tensors are not held alike")
    return Concatenate(*low.start(node, tensors), int(part.attributes.get("dim", 0)))


def _flatten(low: _Lowering, node: fx.Node, part: IntegerPass) -> Operation:
    return Flatten(*low.start(node), part.entry.function, dict(part.attributes))  # type: ignore[attr-defined]


_PASSES: dict[str, Callable[..., Operation]] = {
    "maximum": _maximum,
    "concatenation": _concatenate,
    "flattening": _flatten,
}


def _passing(low: _Lowering, node: fx.Node, part: IntegerPass) -> Operation:
    form = part.entry.native  # type: ignore[attr-defined]
    if form not in _PASSES:
        raise Unfit("how it moves numbers is not written natively")
    if node.kwargs:
        raise Unfit("its arguments are computed in the graph")
    made = _PASSES[form](low, node, part)
    first = node.args[0][0] if isinstance(node.args[0], (list, tuple)) else node.args[0]
    low.signed[node] = low.is_signed(first)
    return made


def _linear_map(low: _Lowering, node: fx.Node, part: IntegerLinearMap) -> Operation:
    form, attributes = part.entry.native, part.attributes  # type: ignore[attr-defined]
    if form not in ("average", "adaptive average", "mean") or node.kwargs or len(node.args) != 1:
        raise Unfit("only averages over images are written natively")
    if attributes.get("divisor_override") is not None:
        raise Unfit("it divides by a number of its own")
    low.gives(node, part.output_dtype)
    zero_point, least, most = held(part)
    source, ratio = low.held_zero_point(node, part, 0), float(part.ratio)
    of_torch = _of_meta(part)

    def of_shapes(shapes: Sequence[Shape]) -> Shape:
        result = of_torch(shapes)
        n, c = shapes[0][:2]
        if len(shapes[0]) != 4 or result[:2] != (n, c) or (form == "mean" and result not in ((n, c), (n, c, 1, 1))):
            raise Unfit(f"it makes {list(result)} of {list(shapes[0])}")
        return result

    def write(step: Step, shapes: Sequence[Shape], result: Shape) -> Tensor | None:
        step.zero_point[:], step.scale[0] = (source, zero_point), ratio
        step.out.low, step.out.high = least, most
        if form == "average":
            _window(step, attributes)
            step.flags = FLAGS["counts_padding"] * bool(attributes.get("count_include_pad", True))
            return None
        sizes = list(zip(shapes[0][2:], result[2:] or (1, 1), strict=True))
        spans = [(i * size // out, -((-(i + 1) * size) // out)) for size, out in sizes for i in range(out)]
        windows = torch.tensor(spans, dtype=torch.int32).contiguous()
        step.numbers = windows.data_ptr()
        return windows

    return Simple(*low.start(node), "average", write, of_shapes)


_FORMS: dict[type, Callable[[_Lowering, fx.Node, Any], Operation]] = {
    Quantize: _quantize,
    Dequantize: _dequantize,
    IntegerWeighted: _weighted,
    IntegerTable: _tabulated,
    IntegerSum: _sum,
    IntegerProduct: _product,
    IntegerEvaluate: _evaluate,
    IntegerPass: _passing,
    IntegerLinearMap: _linear_map,
}
