"""freeze: fix every grid, fold batch norms into weight scales, and put biases on their integer grid.

After training with batch norms behind quantized convolutions (*late* mode), the exact fold is into the scales:

    BN(conv(x, s_w·q_w)) = k·(s_w·q_w ∗ x + b) + c          k = γ / sqrt(σ² + ε),  c = β − μ·k
                         = (|k|·s_w · sign(k)·q_w) ∗ x + (k·b + c)

so that the integers that were trained stay what they were, up to a sign per channel, which a narrow weight range can
always take. Source: AIMET's batch-norm re-estimation guide; Jacob et al., 1712.05877, §2.4 for the bias.

The bias grid is s_b = s_x·s_w with zero point 0. Where a bias would not fit into 31 bits on it, the channel's weight
scale is raised until it does, and its integers shrink: such a channel has weights near zero, and lives by its bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.behaviour import ChannelAffine, Weighted
from fxquant.graph.edit import Edit, clone_module
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.nn.folding import per_output_channel
from fxquant.nn.modules import QuantWeighted, QuantWeightedOp
from fxquant.nn.shipped_bias import fit_bias
from fxquant.numerics.affine import broadcast, dequantize, quantize
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.ops.normalization import channel_affine_of
from fxquant.passes.facts import Placed
from fxquant.passes.fold_trained_batchnorm import take_over

__all__ = ["freeze", "input_quantizer"]


def freeze(module: LeveledModule) -> LeveledModule:
    """Make a prepared graph's numbers final.

    Before:
        x = input
        x_quantizer = QuantInput[x_quantizer](x)
        conv = QuantConv2d[conv](x_quantizer)
        bn = QuantBatchNorm2d[bn](conv)
        relu = QuantReLU[relu](bn)
        return relu

    After:
        x = input
        x_quantizer = QuantInput[x_quantizer](x)
        conv = QuantConv2d[conv](x_quantizer)
        relu = QuantReLU[relu](conv)
        return relu

    Law:
        Outputs in eval mode are the prepared graph's up to float rounding and to the rounding of biases to s_x·s_w.
    """
    edit = Edit(module, by="freeze")
    _Freezer(edit).run()
    frozen: LeveledModule = edit.done(level="frozen").eval()
    return frozen


class _Freezer:
    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self.frozen: dict[int, FakeQuantize] = {}

    def run(self) -> None:
        for node in self.edit.nodes:
            part = self.edit.module(node)
            quantizer = getattr(part, "output_quantizer", None)
            if part is not None and quantizer is not None:
                self.edit.set_module(node, clone_module(part, output_quantizer=self._freeze(quantizer)))
            elif part is not None and node.meta.get("entry") is not None and "reason" not in node.meta:
                self.edit.set_module(node, clone_module(part))
        calls = [node for node in self.edit.nodes if isinstance(self.edit.module(node), QuantWeightedOp)]
        for node in calls:
            self._raise_scale_for_call(node)
        for node in calls:
            self._settle_call(node)
        for node in self.edit.nodes:
            if isinstance(part := self.edit.module(node), QuantWeighted):
                self._settle(node, part)
        for node in self.edit.nodes:
            part = self.edit.module(node)
            if isinstance(part, (QuantWeighted, QuantWeightedOp)):
                part.ships_bias(None)

    def _freeze(self, quantizer: FakeQuantize) -> FakeQuantize:
        """One frozen twin for each quantizer, so that what was shared stays shared."""
        if id(quantizer) not in self.frozen:
            twin = _twin(quantizer)
            twin.observing, twin.enabled, twin.delayed = False, True, False
            if twin.tracking:
                twin.tracking = False
            self.frozen[id(quantizer)] = twin
        return self.frozen[id(quantizer)]

    def _freeze_weight(self, quantizer: WeightQuantize, weight: Tensor) -> WeightQuantize:
        twin = self._freeze(quantizer)
        assert isinstance(twin, WeightQuantize)
        if not twin.pinned:
            twin.refresh(weight)
            twin.pinned = True
        return twin

    def _settle(self, node: fx.Node, part: Any) -> None:
        """Final weight, scale and bias of a module; the batch norm behind it is folded."""
        behaviour = behaviour_of(node)
        assert isinstance(behaviour, Weighted)
        quantizer = self._freeze_weight(part.weight_quantizer, part.weight)
        real = part.weight.detach()
        q = quantize(
            real.float(),
            quantizer.scale,
            quantizer.zero_point,
            quantizer.scheme.qmin,
            quantizer.scheme.qmax,
            axis=quantizer.axis,
        )
        scale = quantizer.scale.double()
        bias = None if part.bias is None else part.bias.detach().double()
        batch_norm = self._batch_norm_behind(node)
        if batch_norm is not None:
            gain, offset = channel_affine_of(self.edit.module(batch_norm))
            q = q * per_output_channel(torch.where(gain < 0, -1.0, 1.0), q, out_axis=behaviour.out_axis, groups=1).to(
                q.dtype
            )
            scale = scale * gain.abs()
            bias = offset if bias is None else gain * bias + offset
            part = take_over(self.edit, node, part, batch_norm)
        given = scale
        scale, bias = self._fit_bias(node, scale, bias)
        axis = behaviour.out_axis if scale.ndim else None
        q = torch.round(q * broadcast(given / scale, q.ndim, axis)).to(q.dtype)
        twin = self._with_scale(quantizer, scale, axis)
        weight = dequantize(q, twin.scale, twin.zero_point, axis=axis).to(real.dtype)
        changes: dict[str, Any] = {"weight": nn.Parameter(weight, requires_grad=False), "weight_quantizer": twin}
        if bias is not None:
            changes["bias"] = nn.Parameter(bias.to(real.dtype), requires_grad=False)
        self.edit.set_module(node, clone_module(part, **changes))

    def _with_scale(self, quantizer: WeightQuantize, scale: Tensor, axis: int | None) -> WeightQuantize:
        safe = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
        twin: WeightQuantize = clone_module(quantizer)
        twin.set_grid(safe, torch.zeros_like(safe, dtype=torch.int32))
        twin.axis = axis
        return twin

    def _batch_norm_behind(self, node: fx.Node) -> fx.Node | None:
        if not Placed(node).continues:
            return None
        (user,) = node.users
        return user if isinstance(behaviour_of(user), ChannelAffine) else None

    def _fit_bias(self, node: fx.Node, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The bias on the grid s_x·s_w, with weight scales raised where it would not fit."""
        if bias is None:
            return scale, None
        return fit_bias(bias, input_quantizer(self.edit, node).scale, scale)

    def _raise_scale_for_call(self, node: fx.Node) -> None:
        """Freeze the weight's quantizer, which several calls may share, and let each call's bias fit on its grid.

        A call whose bias asks for a coarser grid gets one of its own: the others keep their weights' precision.
        """
        part: Any = self.edit.module(node)
        call = call_of(node, part)
        read = call.operand("weight")
        assert read is not None
        weight = self.edit.attributes[str(read.target)]
        quantizer = self._freeze_weight(part.weight_quantizer, weight)
        self.edit.set_module(node, clone_module(part, weight_quantizer=quantizer))
        bias_node = call.operand("bias")
        if bias_node is not None:
            bias = self.edit.constant(bias_node).detach().double()
            scale, _ = self._fit_bias(node, quantizer.scale.double(), bias)
            if not torch.equal(scale, quantizer.scale.double()):
                own = _twin(quantizer)
                own.set_grid(scale, own.zero_point)
                self.edit.set_module(node, clone_module(part, weight_quantizer=own))

    def _settle_call(self, node: fx.Node) -> None:
        """A call whose parameters are read from the graph: the bias becomes a rounded constant of this call."""
        part: Any = self.edit.module(node)
        call = call_of(node, part)
        bias_node = call.operand("bias")
        if bias_node is None:
            return
        bias = self.edit.constant(bias_node).detach()
        _, fitted = self._fit_bias(node, part.weight_quantizer.scale.double(), bias.double())
        assert fitted is not None
        rounded = fitted.to(bias.dtype)
        path = self.edit.fresh_path(f"{str(node.target).replace('.', '_')}_bias")
        constant = self.edit.insert_attribute(node, path, rounded, is_tensor=True, constant=True, quantized=False)
        self.edit.redirect([node], bias_node, constant)


def _twin(quantizer: FakeQuantize) -> FakeQuantize:
    """A copy with buffers of its own."""
    own = {name: buffer.clone() for name, buffer in quantizer.named_buffers(recurse=False)}
    twin: FakeQuantize = clone_module(quantizer, None, **own)
    twin.read_state()
    return twin


def input_quantizer(edit: Edit, node: fx.Node) -> FakeQuantize:
    """The quantizer of what ``node`` reads first: the one that the producing or passing module holds."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    part: Any = edit.module(source)
    quantizer = part.output_quantizer
    assert isinstance(quantizer, FakeQuantize)
    return quantizer
