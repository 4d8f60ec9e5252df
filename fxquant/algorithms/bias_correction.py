"""Bias correction: make up in the bias for what rounding a weight does to the mean of each output channel.

    b ← b - (E[Ŵ∗x̂] - E[W∗x])        empirical: on data, x̂ what the quantized layers before really give
    b ← b - (Ŵ - W)·E[x]             analytic: E[x] from the batch norm before, no data

(Nagel et al., 1906.04721, §4.2 and appendix D; eq. 17 to 20 and 33.) For a normal variable of mean β and deviation γ that is
clipped to [l, u], with a = (l - β)/γ, c = (u - β)/γ, φ and Φ density and distribution of the standard normal one:

    E[x]  = l·Φ(a) + u·(1 - Φ(c)) + β·(Φ(c) - Φ(a)) + γ·(φ(a) - φ(c))
    E[x²] = l²·Φ(a) + u²·(1 - Φ(c)) + (β² + γ²)·(Φ(c) - Φ(a)) + γ·((β + l)·φ(a) - (β + u)·φ(c))
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.algorithms.channels import Channels, weighted_parts
from fxquant.algorithms.engine import Layer
from fxquant.behaviour import Clamping, Weighted
from fxquant.calibration import activation_quantizers
from fxquant.capture.islands import Model, graphs_of
from fxquant.errors import CalibrationError, LevelError, Refusal
from fxquant.flow import require_level
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.fake_quantize import WeightQuantize
from fxquant.numerics.affine import quantize
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.passes.facts import Folded

__all__ = ["bias_correction", "clipped_normal", "correct_biases", "pinned_integers"]

Spread = tuple[Tensor, Tensor]
"""Mean and deviation of each channel, float64 ``(C,)``."""


def pinned_integers(quantizer: WeightQuantize, weight: Tensor) -> Tensor:
    """The integers that ``weight`` has now: those that were pinned, or the nearest ones."""
    if quantizer.integers is not None:
        return quantizer.integers.to(weight.dtype)
    quantizer.refresh(weight)
    scheme = quantizer.scheme
    return quantize(weight, quantizer.scale, quantizer.zero_point, scheme.qmin, scheme.qmax, axis=quantizer.axis)


def bias_correction(layer: Layer, generator: torch.Generator) -> Refusal | None:
    """Pin the roundings that a layer has, with the bias that gives each output channel its float mean; or why not.

    Source: Nagel et al., 1906.04721, §4.2 (empirical bias correction).
    """
    if layer.bias is None:
        return Refusal("it has no bias to correct")
    if any(isinstance(value, fx.Node) for value in layer.call.attributes.values()):
        return Refusal("an attribute of it is computed in the graph")
    own = layer.quantizer
    integers = pinned_integers(own, layer.weight)
    shape = [1] * integers.ndim
    if own.axis is not None and own.scale.ndim:
        shape[own.axis] = -1
    rounded = (integers * own.scale.reshape(shape)).to(layer.weight.dtype)
    total, count = torch.zeros_like(layer.bias, dtype=torch.float64), 0
    for sample in layer.samples():
        given = layer.call.entry.function(sample.quantized_input, rounded, layer.bias, **layer.call.attributes)
        lost = sample.target.double() - given.double()
        axis = -1 if layer.behaviour.channels_last else 1 if lost.ndim == layer.weight.ndim else 0
        lost = lost.movedim(axis, 0).reshape(len(layer.bias), -1)
        total, count = total + lost.sum(1), count + lost.shape[1]
    if not count:
        return Refusal("no batch reaches it")
    if not bool(torch.isfinite(total).all()):
        return Refusal("what it reads or gives is not finite")
    own.pin(integers, own.scale, (layer.bias.double() + total / count).to(layer.bias.dtype))
    return None


@torch.no_grad()
def correct_biases(prepared: Model) -> Model:
    """Correct the bias of every layer whose input's mean follows from batch norms, without data.

    Example:
        >>> int8 = fxquant.convert(correct_biases(prepared))

    Args:
        prepared: a calibrated model that ``prepare`` made of a model with batch norms; changed in place. Roundings stay, and
            are pinned with the new bias, which follows from the float one: a second call changes nothing, and what
            ``recover`` has found on data is replaced.

    Warns:
        UserWarning: of some layers the mean of the input is not known; names them.

    Raises:
        CalibrationError: the model is not calibrated, or no batch norm was folded into it.
        LevelError: the model is not a prepared one, or one for training.

    Source: Nagel et al., 1906.04721, §4.2 (analytic bias correction), appendix D.
    """
    require_level(prepared, ("prepared",), "correct_biases")
    if any(graph.settings.get("qat") for graph in graphs_of(prepared).values()):
        raise LevelError("correct_biases works after training: prepare the trained model without qat=True.")
    if any(not quantizer.ready for quantizer in activation_quantizers(prepared).values()):
        raise CalibrationError("correct_biases needs ranges.\n  what to do: fxquant.calibrate(prepared, loader) first.")
    found = [node for graph in graphs_of(prepared).values() for node in graph.graph.nodes if Folded(node).statistics]
    if not found:
        raise CalibrationError(
            "correct_biases takes the means of what layers read from batch norms that prepare has folded: there are none. "
            "(A model that fxquant.load made has forgotten them.)\n"
            "  what to do: fxquant.recover(prepared, loader, method='bias_correction') takes the means from data."
        )
    unknown = [f"{path}.{name}".strip(".") for path, graph in graphs_of(prepared).items() for name in _correct(graph)]
    if unknown:
        shown = ", ".join(unknown[:4]) + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
        warnings.warn(
            f"the means of what {len(unknown)} layers read do not follow from batch norms: {shown}.", stacklevel=3
        )
    return prepared


def _correct(graph: LeveledModule) -> list[str]:
    """Correct what can be corrected; the names of the other layers."""
    unknown = []
    for node, part in weighted_parts(graph).items():
        behaviour, own = behaviour_of(node), part.weight_quantizer
        assert isinstance(behaviour, Weighted)
        source: Any = node.args[0]
        spread = _spread_of(graph, source)
        if part.bias is None or type(own) is not WeightQuantize:
            continue
        channels = Channels(part, behaviour)
        if spread is None or len(spread[0]) != channels.inputs:
            unknown.append(str(node.target))
            continue
        integers = pinned_integers(own, part.weight.detach())
        shape = [1] * integers.ndim
        if own.axis is not None and own.scale.ndim:
            shape[own.axis] = -1
        channels.weight = integers.double() * own.scale.double().reshape(shape) - channels.weight
        bias = part.bias.detach()  # the float network's, whatever was pinned: what was corrected is not corrected again
        moved = channels.of_input(spread[0].to(bias.device))
        own.pin(integers, own.scale, (bias.double() - moved).to(bias.dtype))
    return unknown


def _spread_of(graph: LeveledModule, node: fx.Node) -> Spread | None:
    """Mean and deviation of what a node gives: of a batch norm, clipped by clamps, added by sums of independent operands."""
    if (known := Folded(node).statistics) is not None:
        return known
    part = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    behaviour, entry = behaviour_of(node), node.meta.get("entry")
    if isinstance(behaviour, Clamping) and part is not None:
        before = _spread_of(graph, node.all_input_nodes[0])
        bounds = behaviour.bounds(call_of(node, part))
        return None if before is None or isinstance(bounds, Refusal) else clipped_normal(*before, *bounds)
    plain = len(node.args) == 2 and not node.kwargs and not getattr(part, "attributes", None)
    if entry is not None and plain and entry.additive and entry.function(torch.ones(()), torch.ones(())) == 2:
        each = [_spread_of(graph, operand) if isinstance(operand, fx.Node) else None for operand in node.args]
        if each[0] is None or each[1] is None or each[0][0].shape != each[1][0].shape:
            return None
        return each[0][0] + each[1][0], (each[0][1].square() + each[1][1].square()).sqrt()
    return None


def clipped_normal(mean: Tensor, deviation: Tensor, low: float | None, high: float | None) -> Spread:
    """Mean and deviation of normal variables clipped to ``[low, high]``; a deviation of 0 is a constant.

    Args:
        mean, deviation: float64, of one shape.
        low, high: None where open.
    """
    safe = deviation.clamp(min=torch.finfo(torch.float64).tiny)
    below, above = torch.zeros_like(mean), torch.ones_like(mean)
    first, second = torch.zeros_like(mean), torch.zeros_like(mean)
    for bound, sign in ((low, 1.0), (high, -1.0)):
        if bound is None:
            continue
        at = ((bound - mean) / safe).clamp(-40.0, 40.0)
        share = 0.5 * torch.erfc(-at / math.sqrt(2.0))
        density = torch.exp(-0.5 * at * at) / math.sqrt(2.0 * math.pi)
        outside = share if sign > 0 else 0.5 * torch.erfc(at / math.sqrt(2.0))
        if sign > 0:
            below = share
        else:
            above = share
        first = first + bound * outside + sign * deviation * density
        second = second + bound * bound * outside + sign * deviation * (mean + bound) * density
    first = first + mean * (above - below)
    second = second + (mean.square() + deviation.square()) * (above - below)
    return first, (second - first.square()).clamp(min=0.0).sqrt()
