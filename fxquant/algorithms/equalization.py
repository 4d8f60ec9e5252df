"""Cross-layer equalization: move scale between layers, so that the channels of one tensor need the same range.

For two layers W1, W2 with a positively homogeneous op between them (Nagel et al., 1906.04721, §4.1, eq. 9–12), channel by
channel of what the one gives and the other reads:

    r1 = max|W1[c, :]|,  r2 = max|W2[:, c]|,  S = r1 / √(r1 r2)
    W1[c, :] ← W1[c, :] / S,   b1[c] ← b1[c] / S,   W2[:, c] ← W2[:, c] · S

Pairs are taken in order again and again until no factor changes. A depthwise convolution is the second of one pair and
the first of the next, so that three ranges end at (r1 r2 r3)^⅓ (§4.1.2 of the paper).

High biases (§4.1.3): where an output channel lies nearly always above zero, c = max(0, β - 3γ) of its batch norm is taken
out of it and put into what the next layer adds: b1 ← b1 - c, b2 ← b2 + Σ W2·c. ReLU(x - c) = ReLU(x) - c holds for x ≥ c.
Only where the next layer does not pad: what it pads with is not shifted.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.algorithms.channels import Channels, Link, Uses, exact_in, links_of, listed, weighted_parts
from fxquant.behaviour import Clamping, Weighted
from fxquant.calibration import activation_quantizers
from fxquant.capture.islands import Model, graphs_of
from fxquant.errors import InputError, LevelError, Refusal
from fxquant.flow import quantizers_off, require_level
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.fake_quantize import WeightQuantize
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.passes.facts import Folded
from fxquant.passes.fold_batchnorm import pads

__all__ = ["equalize", "require_uncalibrated"]

_SWEEPS = 100
_CHANGE = 1e-4
_DEVIATIONS = 3.0


@torch.no_grad()
def equalize(prepared: Model, *, absorb: bool = True) -> Model:
    """Give the channels between two layers equal ranges; the float network computes what it did.

    What one scale for a whole weight cannot hold becomes what it can: for runtimes with one scale per tensor, and for
    depthwise convolutions. Call it between ``prepare`` and ``calibrate``.

    Example:
        >>> per_tensor = fxquant.Setting(weight=fxquant.Scheme.weight(8, per_channel=False))
        >>> prepared = fxquant.prepare(model, images, recipe=per_tensor)
        >>> fxquant.calibrate(equalize(prepared), loader)

    Args:
        prepared: what ``prepare`` returned, not calibrated yet; its layers get new parameters, the user's model stays.
        absorb: also move high biases to the next layer. This leaves the float function only where no activation lies three
            deviations below its mean.

    Warns:
        UserWarning: there is no pair of layers, or some were left out; with the reasons.

    Raises:
        InputError: the model is calibrated already: its ranges would no longer fit.
        LevelError: the model is not a prepared one, or one for training.

    Source: Nagel et al., Data-Free Quantization, 1906.04721, §4.1.
    """
    require_uncalibrated(prepared, "equalize")
    refused, count, uses = list[Refusal](), 0, Uses(prepared)
    with quantizers_off(prepared):
        for path, graph in graphs_of(prepared).items():
            own: dict[str, Refusal] = {}
            links = list(links_of(graph, uses, own))
            refused += [refusal.at(f"{path}.{name}".strip(".")) for name, refusal in own.items()]
            _equalize(graph, links, absorb)
            count += len(links)
    if refused or not count:
        found = f"{count} pairs of layers are equalized" if count else "there is no pair of layers to equalize"
        warnings.warn(f"{found}{listed(refused, 'are')}.", stacklevel=3)
    return prepared


def require_uncalibrated(prepared: Any, verb: str) -> None:
    """Raise unless ``prepared`` is for inference, has no ranges yet, and no roundings that were pinned."""
    require_level(prepared, ("prepared",), verb)
    if any(graph.settings.get("qat") for graph in graphs_of(prepared).values()):
        raise LevelError(
            f"{verb} works after training, and was given a model prepared with qat=True, whose batch norms are not folded.\n"
            "  what to do: prepare the float model, or the trained one, without qat=True."
        )
    ready = [name for name, q in activation_quantizers(prepared).items() if q.ready and q.fixed_range is None]
    pinned = [name for name, q in prepared.named_modules() if isinstance(q, WeightQuantize) and q.integers is not None]
    if ready or pinned:
        what = "calibrated" if ready else "pinned"
        raise InputError(
            f"{verb} changes weights and what passes between layers, and this model is {what} already, at "
            f"{(ready or pinned)[0]!r}.\n  what to do: call {verb} between fxquant.prepare and fxquant.calibrate."
        )


def _equalize(graph: LeveledModule, links: list[Link], absorb: bool) -> None:
    parts = weighted_parts(graph)
    channels = {node: _channels(node, parts[node]) for link in links for node in (link.source, *link.readers)}
    total = {link: torch.ones(channels[link.source].outputs, dtype=torch.float64) for link in links}
    for _ in range(_SWEEPS):
        largest = 0.0
        for link in links:
            first, second = channels[link.source], channels[link.readers[0]]
            factor = exact_in(first.part.weight.dtype, _factor(first, second))
            factor = torch.where(first.holds(1 / factor), factor, torch.ones_like(factor))
            first.scale_outputs(1 / factor)
            second.scale_inputs(factor)
            total[link] = total[link].to(factor.device) * factor
            largest = max(largest, float(factor.log().abs().max()))
        if largest < _CHANGE:
            break
    for link in links:
        folded = Folded(link.source)
        if folded.statistics is not None:
            mean, deviation = (value.to(total[link]) / total[link] for value in folded.statistics)
            folded.statistics = mean, deviation
            if absorb:
                _absorb(graph, link, channels[link.source], channels[link.readers[0]])
    for each in channels.values():
        each.write()


def _channels(node: fx.Node, part: nn.Module) -> Channels:
    behaviour = behaviour_of(node)
    assert isinstance(behaviour, Weighted)
    return Channels(part, behaviour)


def _factor(first: Channels, second: Channels) -> Tensor:
    """``S`` per channel; 1 where either layer has zeros only."""
    r1, r2 = first.by_output().abs().amax(1), second.by_input().abs().amax(1)
    factor = r1 / (r1 * r2).sqrt()
    return torch.where(torch.isfinite(factor) & (factor > 0), factor, torch.ones_like(factor))


def _absorb(graph: LeveledModule, link: Link, first: Channels, second: Channels) -> None:
    """Move high biases of ``link`` from its first to its second layer."""
    if first.bias is None or second.bias is None or not _only_relu(graph, link):
        return
    reader = link.readers[0]
    if pads(call_of(reader, graph.get_submodule(str(reader.target))).attributes.get("padding", 0)):
        return
    statistics = Folded(link.source).statistics
    assert statistics is not None
    mean, deviation = statistics
    surplus = (mean - _DEVIATIONS * deviation).clamp(min=0.0)
    first.bias = first.bias - surplus
    second.bias = second.bias + second.of_input(surplus)
    Folded(link.source).statistics = (mean - surplus, deviation)


def _only_relu(graph: LeveledModule, link: Link) -> bool:
    for node in link.between:
        behaviour = behaviour_of(node)
        if not isinstance(behaviour, Clamping):
            return False
        if behaviour.bounds(call_of(node, graph.get_submodule(str(node.target)))) != (0.0, None):
            return False
    return bool(link.between)
