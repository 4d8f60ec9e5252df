"""Each fast form against the reference, on the reference's own inputs: how far they are apart, in integer steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import Refusal
from fxquant.graph.leveled import LeveledModule
from fxquant.kernels.choice import step_of
from fxquant.kernels.operators import Operators, operators
from fxquant.kernels.place import HELD, Known, Place, Step
from fxquant.kernels.storage import convert
from fxquant.nn.integer import IntegerOp, Quantize

__all__ = ["Agreement", "agreement", "described"]


@dataclass(frozen=True)
class Agreement:
    """One op of an integer graph, computed both ways.

    Attributes:
        node: its name in the graph.
        kernel: what computed it.
        worst: the largest difference, in integer steps of its result; for a float result, its largest difference by the
            result's largest magnitude.
        equal: how many values are equal.
        values: of how many.
    """

    node: str
    kernel: str
    worst: float
    equal: int
    values: int


@torch.no_grad()
def agreement(graph: LeveledModule, *inputs: Any) -> list[Agreement]:
    """What every fast form gives on the inputs that its node has when the reference computes ``graph``.

    Args:
        graph: an integer graph.
        inputs: its inputs, one per placeholder.

    Returns:
        One entry for each node with a fast form; empty where this machine has none.
    """
    found = operators()
    if found is None:
        return []
    recorder = _Recorder(graph)
    recorder.run(*inputs)
    return list(_compared(graph, recorder.values, found))


class _Recorder(fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, graph: LeveledModule) -> None:
        super().__init__(graph)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node as the graph has it."""
        self.values[n] = super().run_node(n)
        return self.values[n]


def _compared(graph: LeveledModule, values: dict[fx.Node, Any], found: Operators) -> Iterator[Agreement]:
    known = {node: described(graph, node, value) for node, value in values.items()}
    for node in graph.graph.nodes:
        part: Any = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(values[node], Tensor) or not values[node].numel():
            continue
        step = step_of(Place(part, node, known, found))
        if not isinstance(step, Refusal):
            got = _run(step, node, known, known[node].signed)
            if got is not None:
                yield _agreement(node.name, step.kernel, got, values[node])


def described(graph: LeveledModule, node: fx.Node, value: Any, step: Step | None = None) -> Known:
    """What is known of a node's value, computed by ``step`` or as the graph has it."""
    if HELD in node.meta:
        return Known(value, node.meta[HELD].scale, node.meta[HELD].signed)
    part = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    form = None if step is None else step.gives
    if isinstance(part, Quantize) or (isinstance(part, IntegerOp) and part.output_dtype is not None):
        dtype = part.scheme.storage_dtype if part.scheme is not None else None
        if dtype in (torch.uint8, torch.int8):
            return Known(value, float(part.scale), dtype == torch.int8, form)
    return Known(value, form=form)


def _run(step: Step, node: fx.Node, known: dict[fx.Node, Known], signed: bool) -> Tensor | None:
    """A step's result in the plain form; None where torch has no such form for these arguments."""

    def argument(source: fx.Node) -> Any:
        form = step.takes.get(source)
        value = known[source].sample
        return value if form is None else convert(value, form, known[source].signed)

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), argument)
    try:
        result = step.run(*args, **kwargs)
    except (RuntimeError, NotImplementedError):
        return None
    return result if step.gives is None else convert(result, None, signed)


def _agreement(name: str, kernel: str, got: Tensor, want: Tensor) -> Agreement:
    off = (got.double() - want.double()).abs()
    worst = float(off.max()) / (float(want.abs().max()) or 1.0) if want.is_floating_point() else float(off.max())
    return Agreement(name, kernel, worst, int((off == 0).sum()), off.numel())
