"""Run a prepared model layer by layer, in float and in integers side by side.

``sweep`` visits every weighted op in the order of execution, but each as late as its readers allow, so that a shortcut is
known before the convolution that it is added to. At a visit everything before the op is final. A visit offers what an
algorithm needs: the op's inputs in the float network and in the quantized one, its output in the float network, and, where
that is only added to a shortcut, what the shortcut has lost. The algorithm may pin the weight; then the sweep goes on.

Only values that are still to be read are kept, in memory up to a limit and in a temporary folder beyond it. A graph inside
an island is swept on the inputs that the island's own code gives it; where the code of the float network and that of the
quantized one take different ways, the graph is left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from fxquant.algorithms.order import late_weights
from fxquant.algorithms.store import Store
from fxquant.algorithms.weights import attribute
from fxquant.behaviour import Weighted
from fxquant.capture.islands import graphs_of
from fxquant.errors import Refusal
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.nn.modules import QuantWeighted, QuantWeightedOp
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.ops.entry import Call

__all__ = ["GraphSweep", "Layer", "Sample", "Sweep"]

_OFF_TIES = 1.0 + 1 / 3449
"""Ranges that are taken of sums of integers end on one of them: a share of the others would lie halfway between two steps of
the grid, where float and fixed-point rounding part. A grid that is wider by this has no such ties."""

Run = Callable[[int], Any]
"""Runs the model, or a part of it, on the batch of a number."""


@dataclass(frozen=True)
class Sample:
    """One batch at a weighted op.

    Attributes:
        float_input, quantized_input: what the op reads in the float network and in the quantized one.
        target: what it gives in the float network.
        lacking: what the other operand of a sum, which alone reads the op, has lost: float less quantized; or None.
    """

    float_input: Tensor
    quantized_input: Tensor
    target: Tensor
    lacking: Tensor | None


@dataclass(frozen=True)
class Layer:
    """A weighted op at its turn.

    Attributes:
        name: its path in the model.
        call: its function, attributes and operands.
        weight, bias: the float parameters; no bias where calls of one weight have different ones, which then stay.
        quantizer: of the weight.
        entering: the quantizer of its input; None where it reads a float.
        samples: runs through its batches.
        is_shared: whether other calls read the same weight. Then both inputs are the float network's, of all calls.
    """

    name: str
    call: Call
    behaviour: Weighted
    weight: Tensor
    bias: Tensor | None
    quantizer: WeightQuantize
    entering: FakeQuantize | None
    samples: Callable[[], Iterator[Sample]]
    is_shared: bool


class Sweep:
    """One run through all weighted ops of a prepared model.

    Args:
        prepared: a calibrated model.
        run: runs the model on batch ``i``.
        batches: how many there are.
        refit: take the range of each activation quantizer anew from what passes, when everything before it is final.
        memory: bytes of activations to hold in memory; the rest goes to a temporary folder.
        progress: the label of a progress bar, or None for no bar.

    Attributes:
        left_out: what was not visited, by its path.
    """

    def __init__(
        self, prepared: nn.Module, run: Run, batches: int, *, refit: bool, memory: float, progress: str | None
    ) -> None:
        self.prepared, self.run, self.batches, self.refit, self.memory = prepared, run, batches, refit, memory
        self.progress = progress
        self.left_out: dict[str, Refusal] = {}
        self._quantizers = [part for part in prepared.modules() if isinstance(part, FakeQuantize)]
        self._visited: set[WeightQuantize] = set()
        self._bar: Any = None

    def __iter__(self) -> Generator[Layer, None, None]:
        """Visit the ops. What ran when the iteration ends is the whole model; a model's own state is the caller's care."""
        total = sum(isinstance(part, (QuantWeighted, QuantWeightedOp)) for part in self.prepared.modules())
        with tqdm(total=total, desc=self.progress, unit="layer", disable=not self.progress or None) as self._bar:
            yield from self._inside(self.prepared, "", self.run, self.run, self.batches)

    def leave_out(self, path: str, why: str) -> None:
        """Note that what is at ``path`` is not visited."""
        self.left_out[path] = Refusal(why, where=path)

    @contextmanager
    def in_float(self) -> Iterator[None]:
        """Inside, every quantizer lets everything pass."""
        before = [part.enabled for part in self._quantizers]
        for part in self._quantizers:
            part.enabled = False
        try:
            yield
        finally:
            for part, enabled in zip(self._quantizers, before, strict=True):
                part.enabled = enabled

    def _inside(
        self, module: nn.Module, path: str, run_float: Run, run_quantized: Run, batches: int
    ) -> Iterator[Layer]:
        """The ops of the outermost graphs in ``module``, graph by graph."""
        paths = {graph: f"{path}.{own}".strip(".") for own, graph in graphs_of(module).items()}
        inner = {id(deep) for graph in paths for deep in graphs_of(graph).values() if deep is not graph}
        graphs = [graph for graph in paths if id(graph) not in inner]
        order = self._recorded(graphs, run_quantized, range(1))
        for graph in sorted(graphs, key=lambda graph: order[graph][0][0] if order[graph] else 0):
            with self.in_float():
                floats = self._recorded([graph], run_float, range(batches))[graph]
            quantized = self._recorded([graph], run_quantized, range(batches))[graph]
            floats, quantized = [args for _, args in floats], [args for _, args in quantized]
            if not floats:
                self.leave_out(paths[graph], "no batch reaches it")
            elif [_shapes(a) for a in floats] != [_shapes(a) for a in quantized]:
                self.leave_out(paths[graph], "the model's own code calls it otherwise when it is quantized")
            else:
                yield from self._graph(graph, paths[graph], floats, quantized)

    def _recorded(self, graphs: Sequence[LeveledModule], run: Run, batches: range) -> dict[LeveledModule, list[Any]]:
        """The calls of each graph while the batches run: which call it is of all, and its inputs."""
        found: dict[LeveledModule, list[Any]] = {graph: [] for graph in graphs}
        count = iter(range(10**9))

        def keep(graph: Any, args: tuple[Any, ...]) -> None:
            found[graph].append((next(count), args))

        hooks = [graph.register_forward_pre_hook(keep) for graph in graphs]
        try:
            for i in batches:
                run(i)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @contextmanager
    def stores(self) -> Iterator[tuple[Store, Store]]:
        """Where the values of the float network and of the quantized one are kept."""
        with Store(self.memory / 2) as in_float, Store(self.memory / 2) as in_integers:
            yield in_float, in_integers

    def advance(self) -> None:
        """Move the progress bar by one layer."""
        self._bar.update(1)

    def _graph(self, graph: LeveledModule, path: str, floats: list[Any], quantized: list[Any]) -> Iterator[Layer]:
        with self.stores() as (in_float, in_integers):
            yield from GraphSweep(self, graph, path, in_float, in_integers, floats, quantized).run()


class GraphSweep:
    """The part of a sweep that goes through one graph."""

    def __init__(
        self,
        sweep: Sweep,
        graph: LeveledModule,
        path: str,
        floats: Store,
        quantized: Store,
        float_inputs: list[Any],
        inputs: list[Any],
    ) -> None:
        self.sweep, self.graph, self.path = sweep, graph, path
        self.floats, self.quantized, self.float_inputs, self.inputs = floats, quantized, float_inputs, inputs
        self.nodes = late_weights(graph)
        self.parts = {n: graph.get_submodule(str(n.target)) for n in self.nodes if n.op == "call_module"}
        self.last_reader = {read: node for node in self.nodes for read in node.all_input_nodes}
        self.calls: dict[Any, list[fx.Node]] = {}
        self.sources: dict[FakeQuantize, int] = {}
        for node, part in self.parts.items():
            if isinstance(own := getattr(part, "weight_quantizer", None), FakeQuantize):
                self.calls.setdefault(own, []).append(node)
            output: Any = getattr(part, "output_quantizer", None)
            if output is not None and getattr(part, "applies", False) and getattr(part, "observes", False):
                self.sources[output] = self.sources.get(output, 0) + 1

    def begin(self) -> None:
        """Put the graph's inputs and constants into both stores."""
        arguments = [node for node in self.nodes if node.op == "placeholder"]
        for store, calls in ((self.floats, self.float_inputs), (self.quantized, self.inputs)):
            for i, call in enumerate(calls):
                for node, value in zip(arguments, call, strict=True):
                    store.put(node, i, value)
        for store in (self.floats, self.quantized):
            self._put_constants(store)

    def run(self) -> Iterator[Layer]:
        """Visit the graph's weighted ops."""
        self.begin()
        for node in self.nodes:
            if node.op in ("placeholder", "output", "get_attr"):
                continue
            part = self.parts.get(node)
            with self.sweep.in_float():
                self.step(node, self.floats)
            if isinstance(part, (QuantWeighted, QuantWeightedOp)):
                yield from self._visit(node, part)
            elif part is not None and graphs_of(part):
                where = f"{self.path}.{node.target}".strip(".")
                run_float, run_quantized = (self._runner(node, store) for store in (self.floats, self.quantized))
                yield from self.sweep._inside(part, where, run_float, run_quantized, len(self.inputs))
            self.refit(node)
            self.step(node, self.quantized)
            for read in (node, *node.all_input_nodes):
                if self.last_reader.get(read, node) is node:
                    self.floats.drop(read)
                    self.quantized.drop(read)

    def _put_constants(self, store: Store) -> None:
        for node in self.nodes:
            if node.op == "get_attr":
                store.put_constant(node, attribute(self.graph, str(node.target)))

    def _runner(self, node: fx.Node, store: Store) -> Run:
        return partial(self._value, node, store)

    def _value(self, node: fx.Node, store: Store, batch: int) -> Any:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda read: store.get(read, batch))
        return self.call(node, args, kwargs)

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What ``node`` makes of ``args``."""
        if node.op == "call_module":
            value = self.parts[node](*args, **kwargs)
        elif node.op == "call_method":
            value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            function: Any = node.target
            value = function(*args, **kwargs)
        if hasattr(value, "_fxquant_unread"):
            del value._fxquant_unread  # it is read here: the next link must not overwrite it
        return value

    def step(self, node: fx.Node, store: Store) -> None:
        """Keep what ``node`` gives in every batch."""
        for i in range(len(self.inputs)):
            store.put(node, i, self._value(node, store, i))

    def sets_range(self, node: fx.Node) -> bool:
        """Whether the range of what ``node`` rounds is its own alone, and is not given."""
        part: Any = self.parts.get(node)
        quantizer: Any = getattr(part, "output_quantizer", None)
        if type(quantizer) is not FakeQuantize or self.sources.get(quantizer) != 1 or quantizer.fixed_range is not None:
            return False
        return bool(part.applies and part.observes)

    def refit(self, node: fx.Node) -> None:
        """Take the range of what ``node`` rounds anew, where it alone sets it."""
        if not self.sweep.refit or not self.sets_range(node):
            return
        quantizer: Any = self.parts[node].output_quantizer
        before = {name: value.clone() for name, value in quantizer.range_state().items()}
        quantizer.reset()
        quantizer.observing = True
        try:
            for i in range(len(self.inputs)):
                self._value(node, self.quantized, i)
        finally:
            quantizer.observing = False
        state = quantizer.range_state()
        if bool(torch.isfinite(state["low"]).all() and torch.isfinite(state["high"]).all()):
            quantizer.update_scale()
            quantizer.take_grid(quantizer.scale * _OFF_TIES, quantizer.zero_point)
        else:
            for name, value in state.items():
                value.copy_(before[name])

    def _visit(self, node: fx.Node, part: Any) -> Iterator[Layer]:
        quantizer, name = part.weight_quantizer, f"{self.path}.{node.target}".strip(".")
        self.sweep.advance()
        if quantizer in self.sweep._visited:
            return
        self.sweep._visited.add(quantizer)
        if type(quantizer) is not WeightQuantize:
            self.sweep.leave_out(name, f"its weight has a quantizer of its own, a {type(quantizer).__name__}")
            return
        call, behaviour = call_of(node, part), behaviour_of(node)
        assert isinstance(behaviour, Weighted)
        weight, bias = self.parameters(node, part)
        source: Any = node.args[0]
        shared = len(self.calls[quantizer]) > 1
        samples = self._float_samples if shared else self._samples
        yield Layer(
            name=name,
            call=call,
            behaviour=behaviour,
            weight=weight,
            bias=bias,
            quantizer=quantizer,
            entering=getattr(self.parts.get(source), "output_quantizer", None),
            samples=lambda: samples(node, quantizer),
            is_shared=shared,
        )

    def parameters(self, node: fx.Node, part: Any) -> tuple[Tensor, Tensor | None]:
        """The float weight and bias of a weighted op; no bias where calls of one weight have different ones."""
        weight: Any
        bias: Any
        if isinstance(part, QuantWeightedOp):
            read = (call_of(node, part).operand(name) for name in ("weight", "bias"))
            weight, bias = (None if held is None else self.floats.get(held, 0) for held in read)
        else:
            weight, bias = part.weight, part.bias
        if len({self._name_of_bias(other) for other in self.calls[part.weight_quantizer]}) > 1:
            bias = None  # each call has its own, and the quantizer is one
        return weight.detach(), None if bias is None else bias.detach()

    def _name_of_bias(self, node: fx.Node) -> str:
        """The bias that a call of a weighted op reads; empty where it reads none."""
        part = self.parts[node]
        if isinstance(part, QuantWeightedOp):
            held = call_of(node, part).operand("bias")
            return "" if held is None else str(held.target)
        return "" if part.bias is None else f"{node.target}.bias"

    def _samples(self, node: fx.Node, quantizer: Any) -> Iterator[Sample]:
        source: Any = node.args[0]
        other = self._beside(node)
        for i in range(len(self.inputs)):
            x, x_quantized = self.floats.get(source, i), self.quantized.get(source, i)
            target, lacking = self.floats.get(node, i), None
            if other is not None:
                lacking = self.floats.get(other, i) - self.quantized.get(other, i)
                lacking = lacking if lacking.shape == target.shape else None
            yield Sample(x, x_quantized, target, lacking)

    def _beside(self, node: fx.Node) -> fx.Node | None:
        """The other operand of the plain sum that alone reads ``node``, where it is known already."""
        if len(node.users) != 1:
            return None
        (user,) = node.users
        entry = user.meta.get("entry")
        plain = len(user.args) == 2 and not user.kwargs and not getattr(self.parts.get(user), "attributes", None)
        if entry is None or not (plain and entry.additive and entry.function(torch.ones(()), torch.ones(())) == 2):
            return None
        other: Any = user.args[1] if user.args[0] is node else user.args[0]
        known = isinstance(other, fx.Node) and other is not node and other in self.quantized
        return other if known and isinstance(self.quantized.get(other, 0), Tensor) else None

    def _float_samples(self, node: fx.Node, quantizer: Any) -> Iterator[Sample]:
        """What every call of one weight reads and gives in the float network, which is run once more for it."""
        for i, call in enumerate(self.float_inputs):
            values = Store(float("inf"))
            self._put_constants(values)
            given = iter(call)
            for step in self.nodes:
                if step.op in ("output", "get_attr"):
                    continue
                with self.sweep.in_float():
                    values.put(step, i, next(given) if step.op == "placeholder" else self._value(step, values, i))
                source: Any = step.args[0] if step in self.calls[quantizer] else None
                if source is not None:
                    x = values.get(source, i)
                    yield Sample(x, x, values.get(step, i), None)
                for read in step.all_input_nodes:
                    if self.last_reader.get(read) is step:
                        values.drop(read)


def _shapes(tree: Any) -> list[Any]:
    return [tuple(value.shape) if isinstance(value, torch.Tensor) else value for value in tree]
