"""Output and input channels of weighted ops, and which op's output channels another one reads as they are.

A *link* leads from an op's output channels to the input channels of the ops that read them, through ops that are positively
homogeneous channel by channel: f(k·x) = k·f(x) for every k > 0 per channel. Whether an op is so is found by running it on
random numbers of three magnitudes, not by its name: ReLU and pooling pass, ReLU6 and GELU do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.behaviour import Clamping, Weighted
from fxquant.errors import Refusal
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.folding import per_output_channel
from fxquant.nn.modules import QuantWeighted
from fxquant.ops.calls import behaviour_of, call_of

__all__ = ["Channels", "Link", "links_of", "weighted_parts"]

_MAGNITUDES = (1e-3, 1.0, 1e3)


class Channels:
    """Views and factors of one weighted module's channels; groups in order, as the op counts them.

    Args:
        part: the module; its parameters are replaced, never changed in place.
        behaviour: which axis of the weight is which.
    """

    def __init__(self, part: Any, behaviour: Weighted) -> None:
        self.part, self.out_axis, self.last = part, behaviour.out_axis, behaviour.channels_last
        self.groups = int(getattr(part, "groups", 1))
        self.weight: Tensor = part.weight.detach().double()
        self.bias: Tensor | None = None if part.bias is None else part.bias.detach().double()

    @property
    def outputs(self) -> int:
        """How many output channels there are."""
        return self.weight.shape[0] if self.out_axis == 0 else self.weight.shape[1] * self.groups

    @property
    def inputs(self) -> int:
        """How many input channels."""
        return self.weight.shape[1] * self.groups if self.out_axis == 0 else self.weight.shape[0]

    def by_output(self) -> Tensor:
        """``(outputs, weights of one)``."""
        return self.weight.flatten(1) if self.out_axis == 0 else self._across()

    def by_input(self) -> Tensor:
        """``(inputs, weights that read one)``."""
        return self._across() if self.out_axis == 0 else self.weight.flatten(1)

    def _across(self) -> Tensor:
        """The channels of axis 1, of every group, first."""
        inside = self.weight.reshape(self.groups, self.weight.shape[0] // self.groups, self.weight.shape[1], -1)
        return inside.transpose(1, 2).flatten(2).flatten(0, 1)

    def scale_outputs(self, factor: Tensor) -> None:
        """Let every output channel be ``factor`` ``(outputs,)`` times what it was."""
        self.weight = self.weight * per_output_channel(factor, self.weight, out_axis=self.out_axis, groups=self.groups)
        self.bias = None if self.bias is None else self.bias * factor

    def scale_inputs(self, factor: Tensor) -> None:
        """Weigh every input channel by ``factor`` ``(inputs,)`` more."""
        across = per_output_channel(factor, self.weight, out_axis=1 - self.out_axis, groups=self.groups)
        self.weight = self.weight * across

    def of_input(self, x: Tensor) -> Tensor:
        """``Σ W·x`` per output channel ``(outputs,)``, for an input that is ``x`` ``(inputs,)`` wherever it is read."""
        twin = per_output_channel(x, self.weight, out_axis=1 - self.out_axis, groups=self.groups) * self.weight
        if self.out_axis == 0:
            return twin.flatten(1).sum(1)
        inside = twin.reshape(self.groups, twin.shape[0] // self.groups, twin.shape[1], -1)
        return inside.sum((1, 3)).flatten()

    def write(self) -> None:
        """Give the module new parameters."""
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            old = getattr(self.part, name)
            if value is not None:
                setattr(self.part, name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))


@dataclass(frozen=True)
class Link:
    """Output channels of one op that others read.

    Attributes:
        source: the node that makes them.
        between: the nodes on the way, in order.
        readers: the weighted nodes that read them; one, where there are nodes between.
    """

    source: fx.Node
    between: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]


def weighted_parts(graph: LeveledModule) -> dict[fx.Node, QuantWeighted]:
    """The nodes that call a weighted module whose parameters nothing else uses, with that module."""
    calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    held = Counter(id(value) for _, value in graph.named_parameters(remove_duplicate=False))
    found = {}
    for node in graph.graph.nodes:
        part = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(part, QuantWeighted) and calls[node.target] == 1 and held[id(part.weight)] == 1:
            found[node] = part
    return found


def links_of(graph: LeveledModule, refused: dict[str, Refusal]) -> Iterator[Link]:
    """Every link from one weighted module to the only other that reads it; run it with quantizers off.

    Args:
        refused: gets each weighted module whose output is scaled otherwise on its way, by name.
    """
    parts = weighted_parts(graph)
    for source, part in parts.items():
        between: list[fx.Node] = []
        node = source
        while True:
            if len(node.users) != 1:
                break
            (node,) = node.users
            if node in parts and node.args[0] is (between[-1] if between else source):
                link = Link(source, tuple(between), (node,))
                refusal = _refusal(graph, link, part, parts[node])
                if refusal is None:
                    yield link
                else:
                    refused[str(source.target)] = refusal
                break
            if node.op == "output" or len(node.all_input_nodes) != 1:
                break
            between.append(node)


def _refusal(graph: LeveledModule, link: Link, part: Any, reader: Any) -> Refusal | None:
    """Why channels of ``link`` cannot be scaled, or None."""
    first, last = (behaviour_of(node) for node in (link.source, link.readers[0]))
    assert isinstance(first, Weighted) and isinstance(last, Weighted)
    channels = Channels(part, first).outputs
    if Channels(reader, last).inputs != channels:
        return Refusal(f"{link.readers[0].name} reads other channels than {link.source.name} has")
    factor, ndim = torch.rand(channels, generator=torch.Generator().manual_seed(0)) + 0.5, 0
    for node in link.between:
        found = _scaled_through(graph, node, channels, -1 if first.channels_last else 1, factor)
        if isinstance(found, Refusal):
            return found
        ndim = found
    if first.channels_last != last.channels_last and ndim != 2:
        return Refusal(f"{link.readers[0].name} reads channels along another axis than {link.source.name} has them")
    return None


def _scaled_through(graph: LeveledModule, node: fx.Node, channels: int, axis: int, factor: Tensor) -> int | Refusal:
    """How many axes a node's result has, where it is homogeneous per channel on random numbers; or why it is not."""
    source = node.all_input_nodes[0]
    shape = list(source.meta.get("shape") or ((2, channels) if axis == -1 else (2, channels, 8, 8)))
    if len(shape) < 2 or shape[axis] != channels:
        return Refusal(f"{node.name} reads another shape than the channels of {source.name}")
    shape[0] = 1
    device = next((p.device for p in graph.parameters()), torch.device("cpu"))
    x, factor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device), factor.to(device)
    ndim = 0
    for magnitude in _MAGNITUDES:
        plain, scaled = (_run(graph, node, x * magnitude * k) for k in (1.0, _along(factor, x.ndim, axis)))
        if not isinstance(plain, Tensor) or plain.ndim < 2 or plain.shape[axis] != channels:
            return Refusal(f"{node.name} gives other channels than it reads")
        wanted, ndim = plain * _along(factor, plain.ndim, axis), plain.ndim
        if not torch.allclose(scaled, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())):
            return Refusal(f"{node.name} is not positively homogeneous{_bounds_hint(graph, node)}")
    return ndim


def _bounds_hint(graph: LeveledModule, node: fx.Node) -> str:
    """What could be done about a clamp from above."""
    behaviour = behaviour_of(node)
    if not isinstance(behaviour, Clamping) or node.op != "call_module":
        return ""
    bounds = behaviour.bounds(call_of(node, graph.get_submodule(str(node.target))))
    if isinstance(bounds, Refusal) or not bounds[1]:
        return ""
    return f": it clamps at {bounds[1]:g}; ReLU would be, where the float model's accuracy allows it"


def _along(factor: Tensor, ndim: int, axis: int) -> Tensor:
    shape = [1] * ndim
    shape[axis] = -1
    return factor.reshape(shape)


@torch.no_grad()
def _run(graph: LeveledModule, node: fx.Node, x: Tensor) -> Any:
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda _: x)
    if node.op == "call_module":
        return graph.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    function: Any = node.target
    return function(*args, **kwargs)
