"""place_quantizers: put a fake-quant module where each quantized op stands, and on each tensor that enters.

This is the pass that makes a canonical graph a prepared one: ``Conv2d`` becomes ``QuantConv2d``, ``relu`` ``QuantReLU``,
``a + b`` ``QuantAdd``; every group of tensors gets one quantizer, which the modules that make those tensors hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxquant.graph.edit import Edit, clone_module
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.pattern import nodes_in
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.nn.modules import QuantInput, QuantOp, QuantWeighted, QuantWeightedOp, quant_class_of
from fxquant.ops.behaviour import Bounded, Passing, Weighted
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.ops.entry import Call
from fxquant.ops.table import quant_op_class
from fxquant.passes.apply_recipe import op_path
from fxquant.passes.merge_clamps import clamp_bounds, head_of
from fxquant.passes.scale_groups import scheme_of
from fxquant.recipe import Recipe
from fxquant.targets import X86, Target

__all__ = ["place_quantizers"]


def place_quantizers(module: LeveledModule, *, recipe: Recipe, target: Target = X86) -> LeveledModule:
    """Replace each quantized op by its fake-quant module and quantize what enters.

    Args:
        module: a canonical graph with its groups.
        recipe: the scheme of what enters.
        target: likewise, and the grids that it prescribes.

    Before:
        x = input
        conv = Conv2d[conv](x)
        relu = relu(conv)
        max_pool2d = max_pool2d(relu, kernel_size=2)
        fc = Linear[fc](max_pool2d)
        return fc

    After:
        x = input
        x_quantizer = QuantInput[x_quantizer](x)
        conv = QuantConv2d[conv](x_quantizer)
        relu = QuantReLU[relu](conv)
        max_pool2d = QuantMaxPool2d[max_pool2d](relu)
        fc = QuantLinear[fc](max_pool2d)
        return fc

    Law:
        With quantizers off, outputs are the canonical graph's, bit for bit.
    """
    edit = Edit(module, by="place_quantizers")
    placer = _Placer(edit, recipe, target)
    for node in edit.nodes:
        if "setting" in node.meta and node.meta["setting"] is not None and "reason" not in node.meta:
            if node.meta.get("quantized") or node.meta.get("leaves_as_float"):
                placer.place(node)
        elif node.meta.get("quantized"):
            placer.quantize_entering(node)
    return edit.done(level="prepared")


class _Placer:
    def __init__(self, edit: Edit, recipe: Recipe, target: Target) -> None:
        self.edit, self.recipe, self.target = edit, recipe, target
        self.members: dict[str, list[fx.Node]] = {}
        for node in edit.nodes:
            if node.meta.get("group"):
                self.members.setdefault(node.meta["group"], []).append(node)
        self.quantizers: dict[str, FakeQuantize] = {}
        self.weight_quantizers: dict[str, WeightQuantize] = {}

    def quantizer(self, node: fx.Node) -> FakeQuantize | None:
        """The one quantizer of ``node``'s group, made when it is first asked for."""
        group = node.meta.get("group")
        if group is None:
            return None
        if group not in self.quantizers:
            root = next(member for member in self.members[group] if member.name == group)
            scheme = scheme_of(root, self.recipe, self.target)
            made = FakeQuantize(scheme, fixed_range=self._fixed_range(group), fixed_grid=self._fixed_grid(root))
            self.quantizers[group] = made.to(self._device()).train(self.edit.training)
        return self.quantizers[group]

    def _fixed_grid(self, root: fx.Node) -> tuple[float, int] | None:
        """The grid that the target prescribes for what the group's first tensor is made by."""
        entry = head_of(root).meta.get("entry")
        return None if entry is None else self.target.fixed_grids.get(entry.name)

    def _fixed_range(self, group: str) -> tuple[float, float] | None:
        """Known in advance where every tensor of the group comes from ops with the same bounds."""
        members = [m for m in self.members[group] if not m.meta.get("keeps_scale")]
        makers = [m for m in members if not isinstance(behaviour_of(m), Passing)]
        ranges = {(b.low, b.high) if isinstance(b := behaviour_of(m), Bounded) else None for m in makers}
        return next(iter(ranges)) if len(ranges) == 1 else None

    def _device(self) -> torch.device:
        if not hasattr(self, "_model_device"):
            tensors = (t for v in self.edit.attributes.values() for t in _tensors(v))
            self._model_device = next((t.device for t in tensors), torch.device("cpu"))
        return self._model_device

    def place(self, node: fx.Node) -> None:
        call = call_of(node, self.edit.module(node))
        part = self._parametric(node) if node.op == "call_module" else self._functional(node, call)
        behaviour = behaviour_of(node)
        passes = isinstance(behaviour, Passing) and not node.meta.get("requantizes")
        chained = len(node.meta.get("chain", ())) > 1
        part.attach(
            self.quantizer(node),
            applies=not passes,
            inplace=self._may_overwrite(node, call, chained),
            observes=not node.meta.get("keeps_scale"),
        )
        part.training = bool(getattr(self.edit.module(node), "training", self.edit.training))

    def _may_overwrite(self, node: fx.Node, call: Call, chained: bool) -> bool:
        """Whether what the quantizer is given is a fresh buffer: the op's own, or its merged predecessor's."""
        if clamp_bounds(self.edit, node) is None:
            return call.entry.fresh
        before = node.args[0]
        assert isinstance(before, fx.Node)
        return chained and before.meta["entry"].fresh

    def _parametric(self, node: fx.Node) -> Any:
        old = self.edit.module(node)
        assert old is not None
        cls = quant_class_of(old)
        assert cls is not None, f"no fake-quant class for {type(old).__name__}"
        part: Any = clone_module(old, cls)
        part.entry = node.meta["entry"]
        if isinstance(part, QuantWeighted):
            part.weight_quantizer = self._weight_quantizer(node, str(node.target), part.weight)
        self.edit.set_module(node, part)
        node.meta["float_module"] = type(old).__name__
        return part

    def _functional(self, node: fx.Node, call: Call) -> QuantOp:
        static = {k: v for k, v in call.attributes.items() if next(nodes_in(v), None) is None}
        dynamic = {k: v for k, v in call.attributes.items() if k not in static}
        cls = quant_op_class(call.entry)
        part = cls(call.entry, static, clamp_bounds(self.edit, node))
        if isinstance(part, QuantWeightedOp):
            source = call.arguments["weight"]
            part.weight_quantizer = self._weight_quantizer(
                node, str(source.target), self.edit.attributes[source.target]
            )
        operands = {name: call.arguments[name] for name in call.entry.operand_names if name in call.arguments}
        args, kwargs = call.entry.arrange(operands)
        self.edit.call_module(node, self.edit.fresh_path(op_path(node)), part, args, {**kwargs, **dynamic})
        return part

    def _weight_quantizer(self, node: fx.Node, path: str, weight: torch.Tensor) -> WeightQuantize:
        """The quantizer of the parameter at ``path``: one, however many calls use it."""
        if path not in self.weight_quantizers:
            setting, behaviour = node.meta["setting"], behaviour_of(node)
            assert isinstance(behaviour, Weighted)
            axis = behaviour.out_axis if setting.weight.per_channel else None
            channels = None if axis is None else weight.shape[axis]
            self.weight_quantizers[path] = WeightQuantize(setting.weight, axis=axis, channels=channels).to(
                weight.device
            )
        return self.weight_quantizers[path]

    def quantize_entering(self, node: fx.Node) -> None:
        """Quantize an input, a parameter or a float op's result for the quantized ops that read it."""
        readers = [user for user in node.users if user.meta.get("quantized") or user.meta.get("leaves_as_float")]
        quantizer = self.quantizer(node)
        node.meta["quantized"] = False
        if quantizer is None or not readers:
            return
        path = self.edit.fresh_path(
            f"{str(node.target).replace('.', '_') if node.op == 'get_attr' else node.name}_quantizer"
        )
        part = QuantInput(quantizer)
        part.training = self.edit.training
        self.edit.insert_module(
            node, path, part, users=readers, group=node.meta["group"], quantized=True, is_tensor=True,
            shape=node.meta.get("shape"), dtype=node.meta.get("dtype"),
        )  # fmt: skip


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return list(value.parameters()) + list(value.buffers()) if isinstance(value, nn.Module) else []
