"""fold_batchnorm: batch normalization with known statistics becomes part of a convolution's or linear layer's weights.

In eval mode  BN(y) = k·y + c  per channel, with  k = γ / sqrt(σ² + ε)  and  c = β − μ·k.

    after a weighted op    k·(W∗x + b) + c  =  (k·W)∗x + (k·b + c)
    before one             W∗(k·x + c) + b  =  (W·k)∗x + (Σ W·c + b)        exact only where nothing is padded

ε is the module's own. The arithmetic is done in float64 and rounded to the weight's dtype once. What the batch norm says of
its output, mean β and deviation |γ|, stays with the weighted op as ``facts.Folded``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.behaviour import ChannelAffine, Weighted
from fxquant.errors import Refusal
from fxquant.graph.edit import Edit, clone_module
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.pattern import next_in_chain
from fxquant.nn.folding import per_output_channel
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.ops.normalization import channel_affine_of
from fxquant.passes.facts import Folded

__all__ = ["fold_batchnorm", "pads"]


def fold_batchnorm(module: LeveledModule) -> LeveledModule:
    """Fold each batch norm into the weighted op before it, or else into the one behind it.

    Before:
        x = input
        conv = Conv2d[conv](x)
        bn = BatchNorm2d[bn](conv)
        relu = relu(bn)
        return relu

    After:
        x = input
        conv = Conv2d[conv](x)
        relu = relu(conv)
        return relu

    Law:
        Outputs in eval mode are unchanged up to the rounding of the folded weights.
    """
    edit = Edit(module, by="fold_batchnorm")
    for node in edit.nodes:
        if not isinstance(behaviour_of(node), ChannelAffine):
            continue
        backward = _fold_into_producer(edit, node)
        if not isinstance(backward, Refusal):
            continue
        forward = _fold_into_consumer(edit, node)
        if isinstance(forward, Refusal):
            edit.note(node, f"not folded: {backward.why}; {forward.why}")
    return edit.done()


def _fold_into_producer(edit: Edit, bn: fx.Node) -> fx.Node | Refusal:
    producer = bn.args[0]
    assert isinstance(producer, fx.Node)
    refusal = _refuse(edit, producer, "produces its input")
    if refusal is not None:
        return refusal
    following = next_in_chain(producer)
    if isinstance(following, Refusal):
        return following
    gain, offset = channel_affine_of(edit.module(bn))
    conv = edit.module(producer)
    assert conv is not None
    behaviour = behaviour_of(producer)
    assert isinstance(behaviour, Weighted)
    if behaviour.channels_last and len(producer.meta.get("shape", ())) != 2:
        return Refusal(
            f"{producer.name} may give more than (batch, features); example_inputs of two dimensions would settle it"
        )
    weight, bias = _scaled_outputs(behaviour, conv, gain)
    _put(edit, producer, conv, weight, offset if bias is None else bias * gain + offset)
    edit.absorb(producer, bn, "folded")
    Folded(producer).statistics = _statistics(edit.module(bn), gain)
    return producer


def _statistics(bn: nn.Module | None, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Mean β and standard deviation |γ| of what the batch norm gave in training, per channel, float64 ``(C,)``."""
    shift, slope = getattr(bn, "bias", None), getattr(bn, "weight", None)
    mean = torch.zeros_like(gain) if shift is None else shift.detach().double()
    return mean.clone(), torch.ones_like(gain) if slope is None else slope.detach().double().abs()


def _fold_into_consumer(edit: Edit, bn: fx.Node) -> fx.Node | Refusal:
    consumer = next_in_chain(bn)
    if isinstance(consumer, Refusal):
        return consumer
    refusal = _refuse(edit, consumer, "uses it")
    if refusal is not None:
        return refusal
    conv: Any = edit.module(consumer)
    call = call_of(consumer, conv)
    behaviour = call.entry.behaviour
    assert isinstance(behaviour, Weighted)
    if behaviour.out_axis != 0:
        return Refusal(f"{consumer.name} is transposed and folds only what follows it")
    if behaviour.channels_last and len(bn.meta.get("shape", ())) != 2:
        return Refusal(f"{consumer.name} may take more than (batch, features)")
    if not behaviour.channels_last and pads(call["padding"]):
        return Refusal(f"{consumer.name} pads, and padding is not shifted by a batch norm")
    gain, offset = channel_affine_of(edit.module(bn))
    old = conv.weight.detach().double()
    per_group = old.shape[1]
    groups = int(getattr(conv, "groups", 1))
    owner = torch.arange(old.shape[0], device=old.device) // (old.shape[0] // groups)
    inputs = owner[:, None] * per_group + torch.arange(per_group, device=old.device)[None]
    shape = (*inputs.shape, *[1] * (old.ndim - 2))
    bias = (old * offset[inputs].reshape(shape)).flatten(1).sum(1)
    if conv.bias is not None:
        bias = bias + conv.bias.detach().double()
    _put(edit, consumer, conv, old * gain[inputs].reshape(shape), bias)
    edit.absorb(consumer, bn, "folded")
    return consumer


def _refuse(edit: Edit, node: fx.Node, role: str) -> Refusal | None:
    if not isinstance(behaviour_of(node), Weighted):
        return Refusal(f"{node.name} {role} and has no weights")
    if node.op != "call_module":
        return Refusal(f"{node.name} {role}, and its weights are used at several places")
    return None


def pads(padding: object) -> bool:
    """Whether a convolution's argument ``padding`` adds anything."""
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, (tuple, list)) else bool(padding)


def _scaled_outputs(behaviour: Weighted, conv: nn.Module, gain: Tensor) -> tuple[Tensor, Tensor | None]:
    assert isinstance(conv.weight, Tensor)
    weight = conv.weight.detach().double()
    factor = per_output_channel(gain, weight, out_axis=behaviour.out_axis, groups=int(getattr(conv, "groups", 1)))
    bias = conv.bias
    return weight * factor, bias.detach().double() if isinstance(bias, Tensor) else None


def _put(edit: Edit, node: fx.Node, conv: nn.Module, weight: Tensor, bias: Tensor) -> None:
    old = conv.weight
    assert isinstance(old, Tensor)
    new_weight = nn.Parameter(weight.to(old.dtype), requires_grad=old.requires_grad)
    new_bias = nn.Parameter(bias.to(old.dtype), requires_grad=old.requires_grad)
    edit.set_module(node, clone_module(conv, weight=new_weight, bias=new_bias))
