"""Run a prepared model block by block, in float and in integers side by side; blocks are residual units.

The counterpart of ``engine.Sweep`` for algorithms that look at several layers at once. At a visit everything before the
block is final. A graph inside an island is left as it is, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fxquant.algorithms.engine import GraphSweep, Sweep
from fxquant.algorithms.order import may_write, units
from fxquant.capture.islands import graphs_of
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.nn.modules import QuantWeighted, QuantWeightedOp

__all__ = ["Block", "BlockSweep"]


@dataclass(frozen=True)
class Block:
    """Nodes that one tensor leaves, at their turn.

    Attributes:
        name: the paths of its weighted ops.
        weights: the quantizers of its weights that nothing outside of it uses, with the float weight and bias of each.
        steps: quantizers of tensors inside it that it alone sets.
        batches: how many batches there are.
    """

    name: str
    weights: dict[WeightQuantize, tuple[Tensor, Tensor | None]]
    steps: tuple[FakeQuantize, ...]
    batches: int
    sweep: GraphSweep
    nodes: tuple[fx.Node, ...]
    entering: tuple[fx.Node, ...]

    def inputs(self, batch: int) -> tuple[list[Any], list[Any]]:
        """What enters it in the float network and in the quantized one."""
        floats, quantized = self.sweep.floats, self.sweep.quantized
        return [floats.get(n, batch) for n in self.entering], [quantized.get(n, batch) for n in self.entering]

    def target(self, batch: int) -> Any:
        """What leaves it in the float network."""
        return self.sweep.floats.get(self.nodes[-1], batch)

    def samples(self, batch: int) -> int | None:
        """How many samples a batch has, where it may be cut along the first axis of all its tensors."""
        target = self.target(batch)
        count = target.shape[0] if target.ndim else 0
        tensors = [self.sweep.floats.get(n, batch) for n in self.entering if n.op != "get_attr"]
        fits = all(isinstance(x, Tensor) and x.ndim and x.shape[0] == count for x in tensors)
        return count if fits and count > 1 else None

    def run(self, values: list[Any]) -> Any:
        """Send ``values``, one for each entering node, through the block."""
        found = dict(zip(self.entering, values, strict=True))
        for node in self.nodes:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), found.__getitem__)
            found[node] = self.sweep.call(node, args, kwargs)
        return found[self.nodes[-1]]

    @contextmanager
    def without_overwriting(self) -> Iterator[None]:
        """Inside, no module of the block writes into what it reads."""
        parts: list[Any] = [self.sweep.parts[n] for n in self.nodes if n in self.sweep.parts]
        before = [getattr(part, "inplace", None) for part in parts]
        for part, value in zip(parts, before, strict=True):
            if value:
                part.inplace = False
        try:
            yield
        finally:
            for part, value in zip(parts, before, strict=True):
                if value:
                    part.inplace = value


class BlockSweep(Sweep):
    """One run through all blocks of a prepared model; arguments as of ``Sweep``. It yields blocks."""

    def _graph(self, graph: Any, path: str, floats: list[Any], quantized: list[Any]) -> Iterator[Any]:
        with self.stores() as (in_float, in_integers):
            yield from _GraphBlocks(self, graph, path, in_float, in_integers, floats, quantized).run()


class _GraphBlocks(GraphSweep):
    """The part of a sweep that goes through one graph."""

    def run(self) -> Iterator[Any]:
        self.nodes = list(self.graph.graph.nodes)
        self.last_reader = {read: node for node in self.nodes for read in node.all_input_nodes}
        self.begin()
        for nodes in units(self.graph):
            for node in nodes:
                with self.sweep.in_float():
                    self.step(node, self.floats)
            block = self._block(nodes)
            if block is not None:
                yield block
            for node in nodes:
                self.refit(node)
                self.step(node, self.quantized)
            for read in {read for node in nodes for read in (node, *node.all_input_nodes)}:
                if self.last_reader.get(read, nodes[-1]) in nodes:
                    self.floats.drop(read)
                    self.quantized.drop(read)

    def _block(self, nodes: list[fx.Node]) -> Block | None:
        weights: dict[WeightQuantize, tuple[Tensor, Tensor | None]] = {}
        names = []
        for node in nodes:
            part: Any = self.parts.get(node)
            name = f"{self.path}.{node.target}".strip(".")
            if part is not None and graphs_of(part):
                self.sweep.leave_out(name, "it runs code of its own, with graphs inside")
            if not isinstance(part, (QuantWeighted, QuantWeightedOp)):
                continue
            self.sweep.advance()
            own = part.weight_quantizer
            if len(self.calls[own]) > 1 or type(own) is not WeightQuantize:
                self.sweep.leave_out(name, "other calls read the same weight, or it has a quantizer of its own")
                continue
            weights[own] = self.parameters(node, part)
            names.append(name)
        made = set(nodes)
        entering = tuple(dict.fromkeys(read for node in nodes for read in node.all_input_nodes if read not in made))
        target = self.floats.get(nodes[-1], 0)
        if not weights or not isinstance(target, Tensor) or not target.is_floating_point():
            return None
        if any(may_write(node) for node in nodes):
            self.sweep.leave_out(", ".join(names), "an op in its block may write into what it reads")
            return None
        held: list[Any] = [self.parts[node].output_quantizer for node in nodes if self.sets_range(node)]
        steps = tuple(dict.fromkeys(held))
        return Block(", ".join(names), weights, steps, len(self.inputs), self, tuple(nodes), entering)
