"""fold_batchnorm: batch normalization with known statistics becomes part of a convolution's or linear layer's weights.

In eval mode  BN(y) = k·y + c  per channel, with  k = γ / sqrt(σ² + ε)  and  c = β − μ·k.

    after a weighted op    k·(W∗x + b) + c  =  (k·W)∗x + (k·b + c)
    before one             W∗(k·x + c) + b  =  (W·k)∗x + (Σ W·c + b)        exact only where nothing is padded

A weighted op is a module, or a function of parameters that nothing else reads, as in a convolution with a forward of its own
(``F.conv2d(F.pad(x, …), self.weight)``): then these parameters become the folded ones, and a bias is put beside the weight.

ε is the module's own. The arithmetic is done in float64 and rounded to the weight's dtype once. What the batch norm says of
its output, mean β and deviation |γ|, stays with the weighted op as ``facts.Folded``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.behaviour import ChannelAffine, Weighted
from fxquant.errors import Refusal
from fxquant.graph.edit import Edit, clone_module
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.pattern import next_in_chain, reads_alone
from fxquant.nn.folding import per_output_channel
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.ops.entry import Call
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


@dataclass(frozen=True)
class _Layer:
    """A weighted op, and the parameters that it alone reads.

    Attributes:
        module: None where it is a function of them.
    """

    node: fx.Node
    call: Call
    behaviour: Weighted
    module: nn.Module | None
    weight: Tensor
    bias: Tensor | None

    @property
    def groups(self) -> int:
        """How many groups of channels it computes apart."""
        return int(self.call.attributes.get("groups", 1))


def _fold_into_producer(edit: Edit, bn: fx.Node) -> fx.Node | Refusal:
    producer = bn.args[0]
    assert isinstance(producer, fx.Node)
    layer = _layer(edit, producer, "produces its input")
    if isinstance(layer, Refusal):
        return layer
    following = next_in_chain(producer)
    if isinstance(following, Refusal):
        return following
    gain, offset = channel_affine_of(edit.module(bn))
    if layer.behaviour.channels_last and len(producer.meta.get("shape", ())) != 2:
        return Refusal(
            f"{producer.name} may give more than (batch, features); example_inputs of two dimensions would settle it"
        )
    weight = layer.weight.detach().double()
    weight = weight * per_output_channel(gain, weight, out_axis=layer.behaviour.out_axis, groups=layer.groups)
    bias = offset if layer.bias is None else layer.bias.detach().double() * gain + offset
    _put(edit, layer, weight, bias)
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
    layer = _layer(edit, consumer, "uses it")
    if isinstance(layer, Refusal):
        return layer
    behaviour = layer.behaviour
    if behaviour.out_axis != 0:
        return Refusal(f"{consumer.name} is transposed and folds only what follows it")
    if behaviour.channels_last and len(bn.meta.get("shape", ())) != 2:
        return Refusal(f"{consumer.name} may take more than (batch, features)")
    if not behaviour.channels_last and pads(layer.call["padding"]):
        return Refusal(f"{consumer.name} pads, and padding is not shifted by a batch norm")
    gain, offset = channel_affine_of(edit.module(bn))
    old = layer.weight.detach().double()
    per_group = old.shape[1]
    owner = torch.arange(old.shape[0], device=old.device) // (old.shape[0] // layer.groups)
    inputs = owner[:, None] * per_group + torch.arange(per_group, device=old.device)[None]
    shape = (*inputs.shape, *[1] * (old.ndim - 2))
    bias = (old * offset[inputs].reshape(shape)).flatten(1).sum(1)
    if layer.bias is not None:
        bias = bias + layer.bias.detach().double()
    _put(edit, layer, old * gain[inputs].reshape(shape), bias)
    edit.absorb(consumer, bn, "folded")
    return consumer


def _layer(edit: Edit, node: fx.Node, role: str) -> _Layer | Refusal:
    """The weighted op that ``node`` calls; refused where its parameters may not change."""
    behaviour, module = behaviour_of(node), edit.module(node)
    if not isinstance(behaviour, Weighted):
        return Refusal(f"{node.name} {role} and has no weights")
    call = call_of(node, module)
    if not isinstance(call.attributes.get("groups", 1), int):
        return Refusal(f"{node.name} {role}, and computes its groups")
    if module is not None:
        held: Any = module
        return _Layer(node, call, behaviour, module, held.weight, held.bias)
    weight, bias = call.operand("weight"), call.operand("bias")
    own = _read_once(edit, weight, role)
    if isinstance(own, Refusal):
        return own
    added = None if bias is None else _read_once(edit, bias, role)
    return added if isinstance(added, Refusal) else _Layer(node, call, behaviour, None, own, added)


def _read_once(edit: Edit, node: fx.Node | None, role: str) -> nn.Parameter | Refusal:
    """The parameter that ``node`` reads for one op alone, which ``role`` says the place of; refused where it is none."""
    if node is None or node.op != "get_attr" or not isinstance(edit.attributes[str(node.target)], nn.Parameter):
        return Refusal(f"what {role} computes its weights")
    if not reads_alone(node, edit.attributes.__getitem__):
        user = next(iter(node.users)).name
        return Refusal(f"{user} {role}, and its weights are used at several places")
    return edit.attributes[str(node.target)]


def pads(padding: object) -> bool:
    """Whether a convolution's argument ``padding`` adds anything."""
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, (tuple, list)) else bool(padding)


def _put(edit: Edit, layer: _Layer, weight: Tensor, bias: Tensor) -> None:
    old = layer.weight
    new_weight = nn.Parameter(weight.to(old.dtype), requires_grad=old.requires_grad)
    new_bias = nn.Parameter(bias.to(old.dtype), requires_grad=old.requires_grad)
    if layer.module is not None:
        edit.set_module(layer.node, clone_module(layer.module, weight=new_weight, bias=new_bias))
        return
    weights, biases = layer.call.operand("weight"), layer.call.operand("bias")
    assert weights is not None
    edit.attributes[str(weights.target)] = new_weight
    if biases is not None:
        edit.attributes[str(biases.target)] = new_bias
        return
    inside = str(weights.target).rpartition(".")[0]
    path = edit.fresh_path(f"{inside}.bias".strip("."))
    facts = {"shape": tuple(new_bias.shape), "dtype": new_bias.dtype}
    read = edit.insert_attribute(layer.node, path, new_bias, is_tensor=True, is_container=False, constant=True, **facts)
    args, names = list(layer.node.args), [parameter.name for parameter in layer.call.entry.parameters]
    at = names.index("bias")
    if at < len(args):
        edit.set_args(layer.node, [*args[:at], read, *args[at + 1 :]])
    else:
        edit.set_args(layer.node, args, {**layer.node.kwargs, "bias": read})
