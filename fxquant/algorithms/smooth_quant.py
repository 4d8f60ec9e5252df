"""SmoothQuant: move the outliers of activations into the weights that read them.

    s_j = max|X_j|^α / max|W_{:,j}|^(1-α),   X_j ← X_j / s_j,   W_{:,j} ← s_j · W_{:,j}

(Xiao et al., 2211.10438, §4, eq. 3–4). The division is folded into what makes X: a norm's weight and bias, or a linear
layer's rows. All readers of X share s; max|W| is taken over all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.algorithms.channels import Channels, Link, links_of, weighted_parts
from fxquant.algorithms.equalization import require_uncalibrated
from fxquant.behaviour import Weighted
from fxquant.calibration import run_batches
from fxquant.capture.islands import Model, graphs_of
from fxquant.capture.values import unchanged
from fxquant.errors import InputError
from fxquant.flow import quantizers_off
from fxquant.graph.leveled import LeveledModule
from fxquant.ops.calls import behaviour_of

__all__ = ["smooth"]

_LEAST = 1e-5


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
        UserWarning: nothing in the model can be smoothed: no norm or linear layer is read by linear layers alone.

    Raises:
        InputError: the model is calibrated already, or ``alpha`` lies outside of [0, 1].
        CalibrationError: the loader is empty; then the model is as it was before.
        LevelError: the model is not a prepared one, or one for training.

    Source: Xiao et al., SmoothQuant, 2211.10438, §4.
    """
    require_uncalibrated(prepared, "smooth")
    if not 0.0 <= alpha <= 1.0:
        raise InputError(f"alpha={alpha!r}: the share of the range that weights take lies between 0 and 1.")
    with torch.no_grad(), quantizers_off(prepared), unchanged(prepared):
        prepared.eval()
        links = [(graph, link) for graph in graphs_of(prepared).values() for link in _links(graph)]
        largest = _largest(prepared, links, loader, forward, batches, progress)
    for graph, link in links:
        if link in largest:
            _smooth(graph, link, largest[link], alpha)
    if not largest:
        warnings.warn(
            "nothing was smoothed: no norm or linear layer of the model is read by linear layers alone.", stacklevel=2
        )
    return prepared


def _links(graph: LeveledModule) -> Iterator[Link]:
    """Norms with all their readers, and linear layers with the only one."""
    parts = weighted_parts(graph)
    for node in graph.graph.nodes:
        if node.op == "call_module" and node not in parts and _is_norm(graph, node):
            readers = tuple(node.users)
            if readers and all(_reads_last_axis(user, node, parts) for user in readers):
                yield Link(node, (), readers)
    for link in links_of(graph, {}):
        if _is_channels_last(link.source) and _is_channels_last(link.readers[0]):
            yield link


def _is_channels_last(node: fx.Node) -> bool:
    behaviour = behaviour_of(node)
    return isinstance(behaviour, Weighted) and behaviour.channels_last


def _reads_last_axis(user: fx.Node, node: fx.Node, parts: dict[fx.Node, Any]) -> bool:
    return user in parts and user.args[0] is node and _is_channels_last(user)


def _is_norm(graph: LeveledModule, node: fx.Node) -> bool:
    """Whether a module's weight and bias ``(C,)`` are a factor and an offset of the last axis of what it gives."""
    part: Any = graph.get_submodule(str(node.target))
    weight, bias = getattr(part, "weight", None), getattr(part, "bias", None)
    calls = sum(other.target == node.target for other in graph.graph.nodes)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or calls != 1:
        return False
    shape = list(node.all_input_nodes[0].meta.get("shape") or (2, 3, len(weight)))
    shape[0] = 1
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)
    factor = torch.linspace(0.5, 2.0, len(weight)).to(weight)
    try:
        before = part(x)
        _divide(part, factor)
        after = part(x)
    except (RuntimeError, TypeError):
        return False
    finally:
        part.weight, part.bias = weight, bias
    return before.shape[-1] == len(weight) and torch.allclose(after * factor, before, rtol=1e-4, atol=1e-5)


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
        top = x.detach().double().abs().flatten(0, -2).amax(0)
        found[link] = torch.maximum(found[link], top) if link in found else top

    hooks = [
        graph.get_submodule(str(link.readers[0].target)).register_forward_pre_hook(
            lambda part, args, link=link: keep(link, args[0])
        )
        for graph, link in links
    ]
    try:
        run_batches(prepared, {}, loader, forward, batches, progress)
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
    source: Any = graph.get_submodule(str(link.source.target))
    if link.source in parts:
        first = _channels(link.source, source)
        first.scale_outputs(1 / factor)
        first.write()
    else:
        _divide(source, factor)
    for reader in readers:
        reader.scale_inputs(factor)
        reader.write()


def _channels(node: fx.Node, part: nn.Module) -> Channels:
    behaviour = behaviour_of(node)
    assert isinstance(behaviour, Weighted)
    return Channels(part, behaviour)
