"""SmoothQuant: move the outliers of activations into the weights that read them.

    s_j = max|X_j|^α / max|W_{:,j}|^(1-α),   X_j ← X_j / s_j,   W_{:,j} ← s_j · W_{:,j}

(Xiao et al., 2211.10438, §4, eq. 3–4). The division is folded into what makes X: a norm's weight and bias, or a linear
layer's rows. All readers of X share s; max|W| is taken over all of them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.algorithms.channels import Channels, Link, Uses, exact_in, links_of, listed, unfit, weighted_parts
from fxquant.algorithms.equalization import require_uncalibrated
from fxquant.behaviour import Weighted
from fxquant.calibration import run_batches
from fxquant.capture.islands import Model, graphs_of
from fxquant.capture.values import unchanged
from fxquant.errors import CalibrationError, InputError, Refusal
from fxquant.flow import quantizers_off
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.modules import QuantInput
from fxquant.ops.calls import behaviour_of
from fxquant.passes.facts import Folded

__all__ = ["smooth"]

_LEAST = 1e-5
_NOTHING = "no norm or linear layer of the model is read by linear layers alone"


def smooth(
    prepared: Model,
    loader: Iterable[Any],
    *,
    alpha: float = 0.5,
    forward: Callable[[Any, Any], Any] | None = None,
    batches: int | None = None,
    progress: bool = True,
) -> Model:
    """Divide the input channels of linear layers by what makes them large, in the layer before; the float function stays.

    For transformers, whose norms give a few channels a hundred times the others' range. Call it between ``prepare`` and
    ``calibrate``.

    Example:
        >>> prepared = smooth(fxquant.prepare(model, images), loader)
        >>> fxquant.calibrate(prepared, loader)

    Args:
        prepared: what ``prepare`` returned, not calibrated yet; its layers get new parameters, the user's model stays.
        loader: batches as for ``calibrate``.
        alpha: how much of the range goes over to the weights, between 0 (none) and 1 (all).
        forward, batches, progress: as of ``calibrate``.

    Warns:
        UserWarning: nothing in the model can be smoothed: no norm or linear layer is read by linear layers alone; or some
            were left out, with the reasons.

    Raises:
        InputError: the model is calibrated already, or ``alpha`` lies outside of [0, 1].
        CalibrationError: the loader is empty, or a layer reads NaN or infinity; then the model is as it was before.
        LevelError: the model is not a prepared one, or one for training.

    Source: Xiao et al., SmoothQuant, 2211.10438, §4.
    """
    require_uncalibrated(prepared, "smooth")
    if not 0.0 <= alpha <= 1.0:
        raise InputError(f"alpha={alpha!r}: the share of the range that weights take lies between 0 and 1.")
    refused, uses = list[Refusal](), Uses(prepared)
    with torch.no_grad(), quantizers_off(prepared), unchanged(prepared):
        prepared.eval()
        links = []
        for path, graph in graphs_of(prepared).items():
            own: dict[str, Refusal] = {}
            links += [(graph, link) for link in _links(graph, uses, own)]
            refused += [refusal.at(f"{path}.{name}".strip(".")) for name, refusal in own.items()]
        largest = _largest(prepared, links, loader, forward, batches, progress)
    for graph, link in links:
        if link in largest:
            _smooth(graph, link, largest[link], alpha)
    if refused or not largest:
        found = f"{len(largest)} layers are smoothed" if largest else f"nothing was smoothed: {_NOTHING}"
        warnings.warn(f"{found}{listed(refused, 'are')}.", stacklevel=2)
    return prepared


def _links(graph: LeveledModule, uses: Uses, refused: dict[str, Refusal]) -> Iterator[Link]:
    """Norms with all their readers, and linear layers with the only one; ``refused`` gets the others."""
    parts = weighted_parts(graph)
    for node in graph.graph.nodes:
        readers = tuple(_readers_of(graph, node))
        if node.op != "call_module" or node in parts or not readers:
            continue
        if not all(user in parts and _is_channels_last(user) for user in readers) or not _is_norm(graph, node):
            continue
        refusal = unfit(graph, uses, graph.get_submodule(str(node.target)), *(parts[user] for user in readers))
        if refusal is None:
            yield Link(node, (), readers)
        else:
            refused[str(node.target)] = refusal
    own: dict[str, Refusal] = {}
    for link in links_of(graph, uses, {}, own):
        if _is_channels_last(link.source) and _is_channels_last(link.readers[0]):
            yield link
    linear = {str(node.target) for node in parts if _is_channels_last(node)}
    refused.update({name: refusal for name, refusal in own.items() if name in linear})


def _is_channels_last(node: fx.Node) -> bool:
    behaviour = behaviour_of(node)
    return isinstance(behaviour, Weighted) and behaviour.channels_last


def _readers_of(graph: LeveledModule, node: fx.Node) -> Iterator[fx.Node]:
    """What reads ``node``; behind the quantizer of a tensor that a float op gives, what reads that.

    For an op of which ``node`` is not the first operand alone, ``node`` itself is given, which is no weighted op.
    """
    for user in node.users:
        part = graph.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(part, QuantInput):
            yield from _readers_of(graph, user)
        else:
            yield user if user.args and user.args[0] is node and user.all_input_nodes.count(node) == 1 else node


def _is_norm(graph: LeveledModule, node: fx.Node) -> bool:
    """Whether a module's weight and bias ``(C,)`` are a factor and an offset of the last axis of what it gives."""
    part: Any = graph.get_submodule(str(node.target))
    weight = getattr(part, "weight", None)
    calls = sum(other.target == node.target for other in graph.graph.nodes)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or calls != 1:
        return False
    shape = list(node.all_input_nodes[0].meta.get("shape") or (2, 3, len(weight)))
    factor = torch.linspace(0.5, 2.0, len(weight), dtype=torch.float64)
    try:
        twin = copy.deepcopy(part).to("cpu", torch.float64).eval()
        x = torch.randn(
            [1, *shape[1:]] if len(shape) > 1 else shape,
            generator=torch.Generator().manual_seed(0),
            dtype=torch.float64,
        )
        before = twin(x)
        _divide(twin, factor)
        after = twin(x)
    except Exception:  # whatever a module of the user's own raises on numbers that it was not made for
        return False
    same = isinstance(after, Tensor) and before.shape[-1] == len(weight)
    return same and torch.allclose(after * factor, before, rtol=1e-4, atol=1e-5)


def _divide(part: Any, factor: Tensor) -> None:
    for name in ("weight", "bias"):
        old = getattr(part, name, None)
        if old is not None:
            new = (old.detach().double() / factor.double()).to(old.dtype)
            setattr(part, name, nn.Parameter(new, requires_grad=old.requires_grad))


def _largest(
    prepared: Model,
    links: list[tuple[LeveledModule, Link]],
    loader: Iterable[Any],
    forward: Callable[[Any, Any], Any] | None,
    batches: int | None,
    progress: bool,
) -> dict[Link, Tensor]:
    """The largest magnitude of each channel that the readers of each link read."""
    found: dict[Link, Tensor] = {}

    def keep(link: Link, x: Tensor) -> None:
        if not x.numel():
            return
        top = x.detach().double().abs().reshape(-1, x.shape[-1]).amax(0)
        if not bool(torch.isfinite(top).all()):
            raise CalibrationError(
                f"smooth: {link.readers[0].target} reads NaN or infinity. The model is as it was before.\n"
                "  what to do: check the batches, and whether the float model gives finite outputs on them."
            )
        found[link] = torch.maximum(found[link], top) if link in found else top

    hooks = [
        graph.get_submodule(str(link.readers[0].target)).register_forward_pre_hook(
            lambda part, args, link=link: keep(link, args[0])
        )
        for graph, link in links
    ]
    try:
        run_batches(prepared, {}, loader, forward, batches, progress, "smooth")
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _smooth(graph: LeveledModule, link: Link, largest: Tensor, alpha: float) -> None:
    parts = weighted_parts(graph)
    readers = [_channels(node, parts[node]) for node in link.readers]
    weights = torch.stack([reader.by_input().abs().amax(1) for reader in readers]).amax(0)
    factor = largest.pow(alpha) / weights.clamp(min=_LEAST).pow(1 - alpha)
    factor = torch.where((largest > 0) & (weights > 0), factor.clamp(min=_LEAST), torch.ones_like(factor))
    factor = exact_in(readers[0].part.weight.dtype, factor)
    source: Any = graph.get_submodule(str(link.source.target))
    if link.source in parts:
        first = _channels(link.source, source)
        first.scale_outputs(1 / factor)
        first.write()
        if (statistics := Folded(link.source).statistics) is not None:
            mean, deviation = (value.to(factor) / factor for value in statistics)
            Folded(link.source).statistics = mean, deviation
    else:
        _divide(source, factor)
    for reader in readers:
        reader.scale_inputs(factor)
        reader.write()


def _channels(node: fx.Node, part: nn.Module) -> Channels:
    behaviour = behaviour_of(node)
    assert isinstance(behaviour, Weighted)
    return Channels(part, behaviour)
