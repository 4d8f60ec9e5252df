"""to_exchange: from integer ops back to ops between real numbers, rounded where the integer model has integers.

Everything comes from the integer graph itself: a weight's scale, which an integer op does not keep, is its multiplier
times the output's scale over the input's,

    s_w = M · s_y / s_x          M = Q · 2^(e - 31)

and comes out as the float32 number that it was, since M has 31 bits of it and float32 has 24.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.graph.edit import Edit
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.accumulating import IntegerWeighted
from fxquant.nn.exchange import Cast, Exchanged, Lookup, Rounding, Spot, Stored, Unpack
from fxquant.nn.integer import Dequantize, IntegerEmbedding, IntegerEvaluate, IntegerOp, Quantize
from fxquant.ops.behaviour import Weighted
from fxquant.ops.entry import OpEntry

__all__ = ["real_scales", "to_exchange"]


def to_exchange(module: LeveledModule, *, integer_biases: bool = True) -> LeveledModule:
    """Replace each integer op by the op on real numbers with a rounding behind it.

    Args:
        module: an integer graph.
        integer_biases: keep biases as 32-bit integers; as the real numbers that those stand for otherwise.

    Before:
        x = input
        x_quantizer = Quantize[x_quantizer](x)
        conv = IntConv2d[conv](x_quantizer)
        fc = IntLinear[fc](conv)
        return fc

    After:
        x = input
        x_quantizer = Rounding[x_quantizer](x)
        conv = Exchanged[conv](x_quantizer)
        fc = Exchanged[fc](conv)
        return fc

    Law:
        Outputs are the frozen graph's, up to float32 rounding.
    """
    edit = Edit(module, by="to_exchange")
    scales: dict[fx.Node | None, float] = {}
    for node in edit.nodes:
        part = edit.module(node)
        if node.meta.get("integer_constant"):
            unpacked = _unpack(edit, node)
            scales[unpacked] = node.meta["grid"][0]
        elif isinstance(part, Dequantize):
            _leave(edit, node, part)
        elif isinstance(part, (Quantize, IntegerOp)):
            scale = part._buffers.get("scale")
            source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
            edit.set_module(node, _twin(part, scales.get(source, 1.0), integer_biases))
            scales[node] = 1.0 if scale is None else float(scale)
    return edit.done(level="exchange")


def _unpack(edit: Edit, node: fx.Node) -> fx.Node:
    """Read a constant's integers as real numbers."""
    path = edit.fresh_path(f"{str(node.target).replace('.', '_')}_real")
    scale, zero_point = node.meta["grid"]
    return edit.insert_module(node, path, Unpack(scale, zero_point), users=list(node.users), is_tensor=True)


def _leave(edit: Edit, node: fx.Node, part: Dequantize) -> None:
    """Values are real already; models in half precision get them in their own dtype."""
    if part.dtype == torch.float32:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        edit.remove(node, source)
    else:
        edit.set_module(node, Cast(part.dtype))


def _twin(part: nn.Module, input_scale: float, integer_biases: bool) -> nn.Module:
    """What computes on real numbers what ``part`` computes on integers."""
    if isinstance(part, Quantize):
        spot = Spot.of(part.scale, part.zero_point, part.scheme)
        return Rounding(spot, part.scheme.qmin, part.scheme.qmax)
    assert isinstance(part, IntegerOp) and isinstance(part.entry, OpEntry)
    rounding = _rounding(part)
    if isinstance(part, IntegerEmbedding):
        assert part.scheme is not None
        return Lookup(part.weight, Spot.of(part.scale, part.zero_point, part.scheme))
    function = part.entry.exchange or part.entry.function
    if isinstance(part, IntegerWeighted):
        weights = _weights(part, input_scale)
        if not integer_biases and isinstance(weights["bias"], Stored):
            weights["bias"] = weights["bias"]().detach()
        clamp, dtype = (part.clamp, part.real_dtype) if part.output_dtype is None else ((None, None), None)
        return Exchanged(function, part.attributes, weights, rounding, clamp, dtype)
    parameters: dict[str, Any] = {}
    if isinstance(part, IntegerEvaluate):
        function = part.function or function
        parameters = {name: getattr(part, f"parameter_{name}").float() for name in part.parameter_names}
    return Exchanged(function, part.attributes, parameters, rounding)


def _rounding(part: IntegerOp) -> Rounding | None:
    if part.scheme is None:
        return None
    return Rounding(Spot.of(part.scale, part.zero_point, part.scheme), int(part.low), int(part.high))


def _weights(part: IntegerWeighted, input_scale: float) -> dict[str, Stored | Tensor | None]:
    """The weight and bias of a weighted op as stored integers."""
    assert isinstance(part.entry, OpEntry) and isinstance(part.entry.behaviour, Weighted)
    of_weight, of_bias = real_scales(part, input_scale)
    weight = Stored(part.weight, of_weight, part.entry.behaviour.out_axis, part.weight_scheme.bits)
    return {"weight": weight, "bias": None if part.bias is None else Stored(part.bias, of_bias, 0, 32)}


def real_scales(part: IntegerWeighted, input_scale: float) -> tuple[Tensor, Tensor]:
    """The scales of a weighted op's weight, float32 and one a slice of its channel axis, and of its bias, s_x·s_w."""
    assert isinstance(part.entry, OpEntry) and isinstance(part.entry.behaviour, Weighted)
    product = part.output_scale.double() if part.output_dtype is None else _multiplier(part) * float(part.scale)
    per_slice = product[: part.weight.shape[part.entry.behaviour.out_axis]] if product.ndim else product
    return (per_slice / input_scale).float(), product


def _multiplier(part: IntegerWeighted) -> Tensor:
    """M, and where it is too small to have been kept, a number as small."""
    multiplier = torch.ldexp(part.multiplier.double(), part.shift - 31)
    return torch.where(part.multiplier == 0, torch.full_like(multiplier, 2.0**-33), multiplier)
