"""Output and input channels of weighted ops, and which op's output channels another one reads as they are.

A *link* leads from an op's output channels to the input channels of the ops that read them, through ops that are positively
homogeneous channel by channel: f(k·x) = k·f(x) for every k > 0 per channel. Whether an op is so is found by running it on
random numbers of several magnitudes, not by its name: ReLU and pooling pass, ReLU6 and GELU do not. It is a copy in
float64 that runs, so that a module's statistics and counters stay, and half precision is no excuse.

What is scaled must be read by its own call alone. ``Uses`` knows who else reads a parameter.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.algorithms.weights import OwnParameters, attribute
from fxquant.behaviour import Clamping, Weighted
from fxquant.capture.islands import graphs_of
from fxquant.capture.own_code import names_read
from fxquant.errors import Refusal
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.folding import per_output_channel
from fxquant.nn.modules import QuantWeighted
from fxquant.ops.calls import behaviour_of, call_of

__all__ = ["Channels", "Link", "Uses", "exact_in", "links_of", "listed", "unfit", "weighted_parts"]

_MAGNITUDES = (1e-6, 1e-3, 1.0, 1e3, 1e6)


class Channels:
    """Views and factors of one weighted op's channels; groups in order, as the op counts them.

    Args:
        part: the module, or ``OwnParameters``; the parameters are replaced, never changed in place.
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

    def holds(self, factor: Tensor) -> Tensor:
        """Which output channels ``(outputs,)`` keep finite biases in the parameters' dtype when they are scaled."""
        if self.bias is None:
            return torch.ones_like(factor, dtype=torch.bool)
        return torch.isfinite((self.bias * factor).to(self.part.bias.dtype))

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


class Uses:
    """Who reads the parameters of a prepared model, beside the call of the module that holds them.

    Args:
        prepared: the whole model; its parameters are looked at once, now.
    """

    def __init__(self, prepared: nn.Module) -> None:
        graphs = graphs_of(prepared)
        self._held = Counter(id(value) for _, value in prepared.named_parameters(remove_duplicate=False))
        self._read: dict[int, list[str]] = {}
        self._code: dict[LeveledModule, str] = {}
        for path, graph in graphs.items():
            for node in graph.graph.nodes:
                if node.op == "get_attr":
                    readers = [user.name for user in node.users] or [node.name]
                    self._read.setdefault(id(attribute(graph, str(node.target))), []).extend(readers)
            around = [path.rsplit(".", i)[0] for i in range(1, path.count(".") + 1)] + [""] * bool(path)
            own = [part for name in around if not isinstance(part := prepared.get_submodule(name), LeveledModule)]
            reading = [part for part in own if names_read(type(part)) & {"weight", "bias", "parameters", "state_dict"}]
            if reading:
                self._code[graph] = type(reading[0]).__name__

    def elsewhere(self, graph: LeveledModule, part: nn.Module | OwnParameters) -> Refusal | None:
        """That something else reads the parameters of ``part``, which ``graph`` calls; None where nothing does."""
        for name, value in part.named_parameters(recurse=False):
            readers = list(self._read.get(id(value), ()))
            if isinstance(part, OwnParameters) and part.reader in readers:
                readers.remove(part.reader)  # once: a function of this name in another graph is someone else
            if readers:
                return Refusal(f"{readers[-1]} reads its {name} too")
            if self._held[id(value)] > 1:
                return Refusal(f"its {name} is another layer's too")
        code = self._code.get(graph)
        if code is None:
            return None
        return Refusal(f"the code of {code}, which runs around it, may read its parameters")


def weighted_parts(graph: LeveledModule) -> dict[fx.Node, Any]:
    """The nodes that call a weighted module or function whose weight nothing else in the graph has, with its parameters.

    They are the module, or ``OwnParameters``.
    """
    calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    held = Counter(id(value) for _, value in graph.named_parameters(remove_duplicate=False))
    found: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        part = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        own = part if isinstance(part, QuantWeighted) else OwnParameters.of(graph, node, part)
        if own is not None and calls[node.target] == 1 and held[id(own.weight)] == 1:
            found[node] = own
    return found


def links_of(
    graph: LeveledModule, uses: Uses, refused: dict[str, Refusal], unfitting: dict[str, Refusal] | None = None
) -> Iterator[Link]:
    """Every link from one weighted module to the only other that reads it; run it with quantizers off.

    Args:
        uses: of the model that ``graph`` is part of.
        refused: gets each weighted module whose output is scaled otherwise on its way, by name.
        unfitting: gets each whose parameters, or whose reader's, have to stay; None for ``refused``.
    """
    unfitting = refused if unfitting is None else unfitting
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
                if (refusal := unfit(graph, uses, part, parts[node])) is not None:
                    unfitting[str(source.target)] = refusal
                elif (refusal := _refusal(graph, link, part, parts[node])) is not None:
                    refused[str(source.target)] = refusal
                else:
                    yield link
                break
            if node.op == "output" or len(node.all_input_nodes) != 1:
                break
            between.append(node)


def listed(refused: list[Refusal], verb: str) -> str:
    """``refused`` as the end of a sentence: how many, and the first of them."""
    if not refused:
        return ""
    shown = "; ".join(map(str, refused[:4]))
    more = f"; and {len(refused) - 4} more" if len(refused) > 4 else ""
    return f", {len(refused)} {verb} not: {shown}{more}"


def exact_in(dtype: torch.dtype, factor: Tensor) -> Tensor:
    """``factor``, or the next powers of two where products with it would be rounded to less than float32."""
    return factor if torch.finfo(dtype).bits > 16 else torch.exp2(factor.log2().round())


def unfit(graph: LeveledModule, uses: Uses, *parts: nn.Module | OwnParameters) -> Refusal | None:
    """Why the parameters of ``parts`` have to stay, or None."""
    return next((refusal for part in parts if (refusal := uses.elsewhere(graph, part) or _not_finite(part))), None)


def _not_finite(part: nn.Module | OwnParameters) -> Refusal | None:
    """That a parameter of ``part`` has no range; or None."""
    for name, value in part.named_parameters(recurse=False):
        if not bool(torch.isfinite(value).all()):
            return Refusal(f"its {name} holds NaN or infinity")
    return None


def _refusal(graph: LeveledModule, link: Link, part: Any, reader: Any) -> Refusal | None:
    """Why channels of ``link`` cannot be scaled, or None."""
    first, last = (behaviour_of(node) for node in (link.source, link.readers[0]))
    assert isinstance(first, Weighted) and isinstance(last, Weighted)
    channels = Channels(part, first).outputs
    if Channels(reader, last).inputs != channels:
        return Refusal(f"{link.readers[0].name} reads other channels than {link.source.name} has")
    factor = torch.rand(channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    axis = -1 if first.channels_last else 1
    shape = [2, channels] if axis == -1 else [2, channels, *[8] * (part.weight.ndim - 2)]
    with torch.random.fork_rng(devices=[]):
        for node in link.between:
            found = _scaled_through(graph, node, shape, channels, axis, factor)
            if isinstance(found, Refusal):
                return found
            shape = found
    if first.channels_last != last.channels_last and (not link.between or len(shape) != 2):
        return Refusal(f"{link.readers[0].name} reads channels along another axis than {link.source.name} has them")
    return None


def _scaled_through(
    graph: LeveledModule, node: fx.Node, usual: list[int], channels: int, axis: int, factor: Tensor
) -> list[int] | Refusal:
    """The shape of a node's result, where it is homogeneous per channel on random numbers; or why it is not.

    Args:
        usual: a shape of what it reads, where nothing is known of that.
    """
    source = node.all_input_nodes[0]
    shape = list(source.meta.get("shape") or usual)
    if len(shape) < 2 or shape[axis] != channels:
        return Refusal(f"{node.name} reads another shape than the channels of {source.name}")
    if (bounds := _bounds(graph, node)) is not None and any(bounds):  # None is open, and zero does no harm
        return Refusal(f"{node.name} is not positively homogeneous{_bounds_hint(bounds)}")
    shape[0] = 1
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = shape
    try:
        run = _in_float64(graph, node)
        for magnitude in _MAGNITUDES:
            plain, scaled = (run(x * magnitude * k) for k in (1.0, _along(factor, x.ndim, axis)))
            if not isinstance(plain, Tensor) or plain.ndim < 2 or plain.shape[axis] != channels:
                return Refusal(f"{node.name} gives other channels than it reads")
            wanted, given = plain * _along(factor, plain.ndim, axis), list(plain.shape)
            if not torch.allclose(scaled, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())):
                return Refusal(f"{node.name} is not positively homogeneous")
    except Exception as error:  # whatever the user's own code raises on numbers that it was not made for
        return Refusal(f"{node.name} does not run on random numbers ({type(error).__name__})")
    return given


def _bounds(graph: LeveledModule, node: fx.Node) -> tuple[float | None, float | None] | None:
    """What a node clamps to; None where it is no clamp."""
    behaviour = behaviour_of(node)
    if not isinstance(behaviour, Clamping) or node.op != "call_module":
        return None
    bounds = behaviour.bounds(call_of(node, graph.get_submodule(str(node.target))))
    return None if isinstance(bounds, Refusal) else bounds


def _bounds_hint(bounds: tuple[float | None, float | None]) -> str:
    """What could be done about a clamp from above."""
    if not bounds[1]:
        return ""
    return f": it clamps at {bounds[1]:g}; ReLU would be, where the float model's accuracy allows it"


def _along(factor: Tensor, ndim: int, axis: int) -> Tensor:
    shape = [1] * ndim
    shape[axis] = -1
    return factor.reshape(shape)


def _in_float64(graph: LeveledModule, node: fx.Node) -> Callable[[Tensor], Any]:
    """A node with one operand as a function; a module as a copy on the CPU, for inference."""
    run: Any = node.target
    if node.op == "call_module":
        run = copy.deepcopy(graph.get_submodule(str(node.target))).to("cpu", torch.float64).eval()
    elif node.op == "call_method":
        run = getattr(torch.Tensor, str(node.target))

    @torch.no_grad()
    def function(x: Tensor) -> Any:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda _: x.clone())
        return run(*args, **kwargs)

    return function
