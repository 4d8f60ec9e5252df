"""How far the inputs of weighted ops reach, channel by channel: what calibration saw, as bytes with a margin.

Where two products are added in 16 bits (``numerics.pairs``), what an output channel may weigh depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.behaviour import Weighted
from fxquant.capture.islands import graphs_of
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.nn.modules import QuantWeightedOp
from fxquant.nn.processes import of_all
from fxquant.numerics.pairs import reach_of
from fxquant.ops.calls import behaviour_of

__all__ = ["keep_reach", "seen_by_all", "watching"]


@dataclass
class Watched:
    """The largest number of each input channel of an op, and in how many rows of batches it was looked for."""

    high: Tensor
    samples: int


Seen = dict[nn.Module, Watched]


@contextmanager
def watching(prepared: nn.Module) -> Iterator[Seen]:
    """Inside, the largest number of each input channel of each weighted op is kept, by its module; weights keep all bits.

    Only of models for post-training quantization: where weights and ranges are still to be trained, nothing that was seen
    is a bound.
    """
    seen: Seen = {}
    parts = {part: behaviour_of(node) for _, node, part in _limited(prepared)}
    bounds = {part.weight_quantizer: part.weight_quantizer.reach.clone() for part in parts}
    for quantizer in bounds:
        quantizer.reach.zero_()
    hooks = [part.register_forward_pre_hook(_keeper(seen, behaviour)) for part, behaviour in parts.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for quantizer, bound in bounds.items():
            quantizer.reach.copy_(bound)


def _keeper(seen: Seen, behaviour: Any) -> Any:
    """A hook that folds the first operand of a call into ``seen``; channels are an axis counted from the last."""
    assert isinstance(behaviour, Weighted)

    @torch.no_grad()
    def keep(part: Any, args: tuple[Any, ...]) -> None:
        x, weight = args[0], args[1] if isinstance(part, QuantWeightedOp) else part.weight
        axis = -1 if behaviour.channels_last else 1 - weight.ndim
        if x.numel():
            others, high = [i for i in range(x.ndim) if i != x.ndim + axis], x.detach().float()
            high = high.amax(others) if others else high
            before = seen.get(part, Watched(high, 0))
            seen[part] = Watched(torch.maximum(before.high, high), before.samples + x.shape[0])

    return keep


def seen_by_all(prepared: nn.Module, seen: Seen) -> Seen:
    """The largest numbers that any process has seen, and the samples of all."""
    names = {part: name for name, part in prepared.named_modules()}
    together: Seen = {}
    for found in of_all({names[part]: (watched.high.cpu(), watched.samples) for part, watched in seen.items()}):
        for name, (high, samples) in found.items():
            part = prepared.get_submodule(name)
            before = together.get(part, Watched(high, 0))
            together[part] = Watched(torch.maximum(before.high, high), before.samples + samples)
    return together


@torch.no_grad()
def keep_reach(prepared: nn.Module, seen: Seen) -> None:
    """Set the bounds of weight quantizers from what was seen now and at earlier calibrations, on the grids of now.

    A weight that several ops read keeps the largest bound of all; one of an op that no batch reached stays as it is.
    """
    found: dict[WeightQuantize, list[Tensor]] = {}
    for graph, node, part in _limited(prepared):
        own, entering, watched = part.weight_quantizer, _input_quantizer(graph, node), seen.get(part)
        bound = own.reach.clone()
        if watched is not None and entering is not None and entering.ready:
            own.seen.copy_(torch.maximum(own.seen, _shaped(watched.high, own).to(own.seen.device)))
            grid = entering.grid
            bound = reach_of(own.seen, watched.samples, grid.scale, grid.zero_point, grid.scheme)
        found.setdefault(own, []).append(bound)
    for own, bounds in found.items():
        own.reach.copy_(torch.stack(bounds).amax(0))


def _limited(prepared: nn.Module) -> Iterator[tuple[LeveledModule, fx.Node, Any]]:
    """Every call of an op whose weight's pairs are limited."""
    for graph in graphs_of(prepared).values():
        if graph.settings.get("qat"):
            continue
        for node in graph.graph.nodes:
            part: Any = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            quantizer = getattr(part, "weight_quantizer", None)
            if isinstance(quantizer, WeightQuantize) and quantizer.out_axis is not None:
                yield graph, node, part


def _shaped(high: Tensor, quantizer: WeightQuantize) -> Tensor:
    """One number for each input channel, group by group; the largest of all groups where the weight keeps none."""
    groups, each = quantizer.reach.shape
    return high.reshape(-1, groups, each).amax(0)


def _input_quantizer(graph: LeveledModule, node: fx.Node) -> FakeQuantize | None:
    source: Any = node.args[0]
    part: Any = graph.get_submodule(str(source.target)) if source.op == "call_module" else None
    quantizer = getattr(part, "output_quantizer", None)
    return quantizer if isinstance(quantizer, FakeQuantize) else None
