"""An integer graph as lines: native operations, and what stays Python.

What Python does is reading shapes, computing numbers from them, and moving views; all of that is done once, when a plan is
made. What it computes from the inputs before any native operation (rows of an embedding) it computes in each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.capture.measuring import is_measurement
from fxquant.errors import Refusal
from fxquant.graph.leveled import LeveledModule
from fxquant.kernels.data_flow import follows_data
from fxquant.kernels.native.library import Library, load
from fxquant.kernels.native.operations import Add, Operation, Pointwise
from fxquant.kernels.native.weighted import Weighted
from fxquant.kernels.place import HELD
from fxquant.nn.form import form_of
from fxquant.nn.integer import IntegerOp

__all__ = ["Line", "NativeProgram", "Reference", "Survey", "filled", "lower", "references", "survey"]


@dataclass(frozen=True)
class Reference:
    """The result of a line, where an argument stands."""

    line: int


@dataclass(eq=False)
class Line:
    """One node.

    Attributes:
        name: the node's, with its op.
        operation: what computes it natively.
        run: what computes it in Python; None for an input, and for a line that another does as well.
        arguments, keywords: of ``run``, with references for nodes.
        moves: whether ``run`` moves the numbers of a tensor of bytes.
        measures: whether ``run`` reads a tensor's shape or type alone.
        signed: whether its bytes are held 128 higher.
        gone: whether another line does it as well.
    """

    name: str
    operation: Operation | None = None
    run: Callable[..., Any] | None = None
    arguments: tuple[Any, ...] = ()
    keywords: Any = None
    moves: bool = False
    measures: bool = False
    signed: bool = False
    gone: bool = False


@dataclass
class NativeProgram:
    """A graph as lines in order, for inputs of any shape.

    Attributes:
        lines: in the order of the graph, of the nodes that something reads.
        names: the name of each line's node.
        inputs: the lines of the graph's inputs.
        result: the graph's result with references for nodes.
        library: that computes it; weights are laid out for its instruction set.
    """

    lines: list[Line]
    names: list[str]
    inputs: list[int]
    result: Any
    library: Library


def lower(graph: LeveledModule) -> NativeProgram:
    """The graph's lines.

    Raises:
        Refusal: a node has no native kernel; says which, and why.
    """
    if follows_data(graph):
        raise Refusal("the model decides by its data what to compute")
    with torch.no_grad():
        return _Lowering(graph).program()


@dataclass(frozen=True)
class Survey:
    """What could become of each node of a graph that does not lower as a whole, in the graph's order.

    Attributes:
        lines: its line; one of Python where ``refusals`` has the node.
        refusals: why a node has no native operation although it computes on integers.
    """

    lines: dict[fx.Node, Line]
    refusals: dict[fx.Node, Refusal]


def survey(graph: LeveledModule) -> Survey:
    """The lines of all nodes that are read, those among them that have no native kernel as lines of Python."""
    with torch.no_grad():
        refusals: dict[fx.Node, Refusal] = {}
        lowering = _Lowering(graph, refusals)
        lowering.read()
    return Survey({node: lowering.lines[i] for node, i in lowering.number.items()}, refusals)


class _Lowering:
    """Args:
    graph: what is lowered.
    refusals: where those of single nodes are noted; None raises the first.
    """

    def __init__(self, graph: LeveledModule, refusals: dict[fx.Node, Refusal] | None = None) -> None:
        self.graph, self.library, self.refusals = graph, load(), refusals
        self.number: dict[fx.Node, int] = {}
        self.lines: list[Line] = []
        self.inputs: list[int] = []
        self.result: Any = None

    def read(self) -> None:
        """Make a line for each node."""
        for node in self._read_nodes():
            if node.op == "output":
                self.result = self._referring(node.args[0])
                continue
            self.number[node] = len(self.lines)
            self.lines.append(Line(node.name))
            if node.op == "placeholder":
                self.inputs.append(self.number[node])
                self.lines[-1].signed = HELD in node.meta and node.meta[HELD].signed
                continue
            try:
                self._lower(node, self.lines[-1])
            except Refusal as refusal:
                if self.refusals is None:
                    raise
                self.refusals[node] = refusal

    def program(self) -> NativeProgram:
        self.read()
        if not any(line.operation for line in self.lines):
            raise Refusal("nothing in the model is computed in bytes")
        self._fuse()
        return NativeProgram(self.lines, [node.name for node in self.number], self.inputs, self.result, self.library)

    def _read_nodes(self) -> list[fx.Node]:
        """The graph's nodes, but for those whose results nobody reads: no kernel shall reserve memory for them."""
        read: set[fx.Node] = set()
        for node in reversed(self.graph.graph.nodes):
            acts = node.op in ("output", "placeholder") or "writes" in node.meta
            if acts or getattr(node.target, "is_check", False) or read & set(node.users):
                read.add(node)
        return [node for node in self.graph.graph.nodes if node in read]

    def _referring(self, value: Any) -> Any:
        refer: Any = lambda node: Reference(self.number[node])  # noqa: E731 - fx asks for nodes and their kin
        return fx.node.map_arg(value, refer)

    def _lower(self, node: fx.Node, line: Line) -> None:
        part = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        line.arguments, line.keywords = self._referring(node.args), self._referring(node.kwargs)
        line.name = f"{node.name} ({part.entry.name})" if isinstance(part, IntegerOp) else node.name
        form = form_of(part)
        build = None if form is None else form.builder(part)
        if build is None or isinstance(build, Refusal):
            self._as_python(node, part, line)
        else:
            try:
                self._require_bytes(node)
                line.operation = build(self, node, part)
            except Refusal as refusal:
                raise refusal.at(line.name) from None
        if form is not None and form.moves:
            first = node.args[0][0] if isinstance(node.args[0], (tuple, list)) else node.args[0]
            line.moves, line.signed = True, self.is_signed(first)

    def _require_bytes(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            part = self.graph.get_submodule(str(source.target)) if source.op == "call_module" else None
            given = getattr(part, "output_dtype", None)
            if given not in (None, torch.uint8, torch.int8):
                raise Refusal(f"its operand {source.name} is {given}")

    def _as_python(self, node: fx.Node, part: nn.Module | None, line: Line) -> None:
        if "writes" in node.meta:
            raise Refusal(f"{node.name} writes in place, and the plan's steps would be in another order")
        line.measures = is_measurement(node.op, node.target, node.args)
        if part is not None:
            line.run = part
            line.signed = getattr(part, "output_dtype", None) == torch.int8
        elif node.op == "get_attr":
            value = _attribute(self.graph, str(node.target))
            line.run, line.arguments = (lambda: value), ()
            line.signed = isinstance(value, Tensor) and value.dtype == torch.int8
        elif node.op == "call_method":
            name = str(node.target)
            line.run = lambda self_, *args, **kwargs: getattr(self_, name)(*args, **kwargs)
        else:
            assert callable(node.target)
            line.run = node.target

    # ---- what forms ask

    def operands(self, nodes: Sequence[Any]) -> list[int]:
        found = [self.number[a] for a in nodes if isinstance(a, fx.Node)]
        if len(found) != len(nodes):
            raise Refusal("an operand is no tensor")
        return found

    def is_signed(self, node: Any) -> bool:
        if not isinstance(node, fx.Node):
            raise Refusal("an operand is no tensor")
        return self.lines[self.number[node]].signed

    def gives(self, node: fx.Node, dtype: torch.dtype | None) -> None:
        if dtype not in (torch.uint8, torch.int8):
            raise Refusal(f"its result is {dtype}")
        self.lines[self.number[node]].signed = dtype == torch.int8

    # ---- epilogues

    def _fuse(self) -> None:
        """Fuse a lookup table or a residual add into the epilogue of the layer before it."""
        shapes = {self.number[n]: n.meta.get("shape") for n in self.number}
        uses = {self.number[n]: len(n.users) for n in self.number}
        for index, line in enumerate(self.lines):
            operation = line.operation
            if operation is None:
                continue
            layers = [self._layer(i) for i in operation.operands]
            ready = [
                (i, found)
                for i, found in zip(operation.operands, layers, strict=True)
                if found is not None and uses[i] == 1 and shapes[i] == shapes[index] and not found.to_float
            ]
            if isinstance(operation, Pointwise) and operation.kind == "table":
                ready = [(i, found) for i, found in ready if found.table is None]
                if ready:
                    ready[0][1].table = operation.keep[0]
                    self._take_over(index, *ready[0])
                continue
            ready = [(i, found) for i, found in ready if not found.moves]
            if type(operation) is Add and operation.by_halves and ready and len(set(operation.operands)) == 2:
                last, layer = max(ready)
                constant, q, *bounds = operation.numbers
                first = last == operation.operands[0]
                layer.added = constant, q if first else (q[1], q[0]), bounds[0], bounds[1], bounds[2]
                layer.operands = [*layer.operands, operation.operands[1 if first else 0]]
                self._take_over(index, last, layer)

    def _layer(self, index: int) -> Weighted | None:
        found = self.lines[index].operation
        return found if isinstance(found, Weighted) and found.added is None else None

    def _take_over(self, index: int, before: int, layer: Weighted) -> None:
        self.lines[index].operation = layer
        self.lines[before].operation, self.lines[before].gone = None, True


def _attribute(root: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(root.get_submodule(parent), name)


def references(source: Any) -> set[int]:
    """The lines that a line, or a template, takes results from."""
    template = (source.arguments, source.keywords) if isinstance(source, Line) else source
    found = list[int]()
    fx.node.map_aggregate(template, lambda leaf: found.append(leaf.line) if isinstance(leaf, Reference) else None)
    return set(found)


def filled(template: Any, values: Sequence[Any]) -> Any:
    """A template with results for references, in plain containers."""
    if isinstance(template, Reference):
        return values[template.line]
    if isinstance(template, tuple):
        items = [filled(item, values) for item in template]
        return type(template)(*items) if hasattr(template, "_fields") else tuple(items)
    if isinstance(template, list):
        return [filled(item, values) for item in template]
    if isinstance(template, dict):
        return {key: filled(value, values) for key, value in template.items()}
    if isinstance(template, slice):
        return slice(*(filled(v, values) for v in (template.start, template.stop, template.step)))
    return template
