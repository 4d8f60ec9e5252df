"""place_quantizers: put a fake-quant module where each quantized op stands, and on each tensor that enters.

This is the pass that makes a canonical graph a prepared one: ``Conv2d`` becomes ``QuantConv2d``, ``relu`` ``QuantReLU``,
``a + b`` ``QuantAdd``; every group of tensors gets one quantizer, which the modules that make those tensors hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from fxquant.behaviour import Bounded, ChannelAffine, Passing, Weighted
from fxquant.errors import RecipeError
from fxquant.graph.edit import Edit, clone_module
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.pattern import nodes_in
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.nn.modules import QuantInput, QuantOp, QuantWeighted, QuantWeightedOp, quant_class_of
from fxquant.nn.switch import Switched
from fxquant.numerics.pairs import LIMIT, largest_byte
from fxquant.numerics.scheme import OBSERVED, Scheme
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.ops.entry import Call
from fxquant.ops.table import quant_op_class
from fxquant.passes.apply_recipe import op_path
from fxquant.passes.facts import Placed
from fxquant.passes.merge_clamps import clamp_bounds, head_of
from fxquant.passes.scale_groups import scheme_of
from fxquant.quantizers import RULES
from fxquant.recipe import Recipe
from fxquant.targets import X86, Target

__all__ = ["place_quantizers"]


def place_quantizers(
    module: LeveledModule, *, recipe: Recipe, target: Target = X86, folds_first: bool = False
) -> LeveledModule:
    """Replace each quantized op by its fake-quant module and quantize what enters.

    Args:
        module: a canonical graph with its groups.
        recipe: the scheme of what enters.
        target: likewise, and the grids that it prescribes.
        folds_first: let weighted ops fold the batch norm behind them in every pass (*whitepaper* mode).

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
        if "setting" in Placed(node) and Placed(node).setting is not None and "reason" not in node.meta:
            if Placed(node).quantized or Placed(node).leaves_as_float:
                placer.place(node)
        elif Placed(node).quantized:
            placer.quantize_entering(node)
    for node in edit.nodes:
        _ship_bias(edit, node, folds_first)
    return edit.done(level="prepared")


def _ship_bias(edit: Edit, node: fx.Node, folds_first: bool) -> None:
    """Let a weighted op, or the batch norm behind it, round the bias to the grid of what it reads; or fold that norm."""
    part: Any = edit.module(node)
    if not isinstance(part, (QuantWeighted, QuantWeightedOp)):
        return
    source = node.args[0]
    before: Any = edit.module(source) if isinstance(source, fx.Node) else None
    quantizer = getattr(before, "output_quantizer", None)
    behind = next(iter(node.users), None) if Placed(node).continues else None
    if behind is not None and isinstance(behaviour_of(behind), ChannelAffine):
        norm: Any = edit.module(behind)
        if not folds_first:
            norm.ships_bias(quantizer, part)
            return
        weighted: Any = part
        weighted.fold(norm)
    part.ships_bias(quantizer)


class _Placer:
    def __init__(self, edit: Edit, recipe: Recipe, target: Target) -> None:
        self.edit, self.recipe, self.target = edit, recipe, target
        self.members: dict[str, list[fx.Node]] = {}
        for node in edit.nodes:
            group = Placed(node).group
            if group:
                self.members.setdefault(group, []).append(node)
        self.quantizers: dict[str, FakeQuantize] = {}
        self.weight_quantizers: dict[tuple[int, Scheme, int | None], WeightQuantize] = {}

    def quantizer(self, node: fx.Node) -> FakeQuantize | None:
        """The one quantizer of ``node``'s group, made when it is first asked for."""
        group = Placed(node).group
        if group is None:
            return None
        if group not in self.quantizers:
            root = next(member for member in self.members[group] if member.name == group)
            scheme = scheme_of(root, self.recipe, self.target)
            fixed: dict[str, Any] = {"fixed_range": self._fixed_range(group), "fixed_grid": self._fixed_grid(root)}
            if fixed["fixed_range"] is None and fixed["fixed_grid"] is None:
                made = self._class_of(scheme, "tensor", root)(scheme)
            else:
                made = FakeQuantize(scheme, **fixed)
                if scheme.quantizer != OBSERVED:
                    self.edit.note(root, f"its range is known in advance: {scheme.quantizer} has nothing to find")
            self.quantizers[group] = made.to(self._device()).train(self.edit.training)
        return self.quantizers[group]

    def _class_of(self, scheme: Scheme, kind: str, node: fx.Node) -> Any:
        """The class of the rule that ``scheme`` names; notes on ``node`` that it is only simulated, where it is.

        Raises:
            RecipeError: the rule cannot quantize a ``"tensor"`` or a ``"weight"`` to this scheme.
        """
        rule = RULES[scheme.quantizer]
        refused = rule.refusal(scheme, kind)
        if refused is not None:
            field = "activation" if kind == "tensor" else "weight"
            raise RecipeError(
                f"{op_path(node) if 'entry' in node.meta else node.name} has the {field} scheme {scheme}, and {refused}.\n"
                f"  what to do: give it another {field} scheme in the recipe: as a setting of its own, or in the default."
            )
        if rule.simulates is not None:
            self.edit.note(node, f"{kind} simulated by {rule.name}, no integers: {rule.simulates}")
        return getattr(rule, kind)

    def _fixed_grid(self, root: fx.Node) -> tuple[float, int] | None:
        """The grid that the target prescribes for what the group's first tensor is made by."""
        entry = head_of(root).meta.get("entry")
        return None if entry is None else self.target.fixed_grids.get(entry.name)

    def _fixed_range(self, group: str) -> tuple[float, float] | None:
        """Known in advance where every tensor of the group comes from ops with the same bounds."""
        members = [m for m in self.members[group] if not Placed(m).keeps_scale]
        makers = [m for m in members if not isinstance(behaviour_of(m), Passing)]
        ranges = {_known_range(m) for m in makers}
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
        passes = isinstance(behaviour, Passing) and not Placed(node).requantizes
        chained = len(Placed(node).chain) > 1
        part.attach(
            self.quantizer(node),
            applies=not passes,
            inplace=self._may_overwrite(node, call, chained),
            observes=not Placed(node).keeps_scale,
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
        if isinstance(part, Switched):
            part.add_switches()
        if isinstance(part, QuantWeighted):
            part.weight_quantizer = self._weight_quantizer(node, part.weight)
        self.edit.set_module(node, part)
        Placed(node).float_module = type(old).__name__
        return part

    def _functional(self, node: fx.Node, call: Call) -> QuantOp:
        static = {k: v for k, v in call.attributes.items() if next(nodes_in(v), None) is None}
        dynamic = {k: v for k, v in call.attributes.items() if k not in static}
        cls = quant_op_class(call.entry)
        part = cls(call.entry, static, clamp_bounds(self.edit, node))
        if isinstance(part, QuantWeightedOp):
            source = call.arguments["weight"]
            part.weight_quantizer = self._weight_quantizer(node, self.edit.attributes[source.target])
        operands = {name: call.arguments[name] for name in call.entry.operand_names if name in call.arguments}
        args, kwargs = call.entry.arrange(operands)
        path = node.name if Placed(node).rounds_for_reader else op_path(node)
        self.edit.call_module(node, self.edit.fresh_path(path), part, args, {**kwargs, **dynamic})
        return part

    def _weight_quantizer(self, node: fx.Node, weight: torch.Tensor) -> WeightQuantize:
        """The quantizer of the parameter ``weight``: one, however many calls and layers use it with one scheme."""
        setting, behaviour = Placed(node).setting, behaviour_of(node)
        scheme = None if setting is None else setting.weight
        assert isinstance(behaviour, Weighted) and scheme is not None
        axis = behaviour.out_axis if scheme.per_channel else None
        key = (id(weight), scheme, axis)
        own = self.weight_quantizers.get(key)
        if own is None:
            channels = None if axis is None else weight.shape[axis]
            own = self._class_of(scheme, "weight", node)(scheme, axis=axis, channels=channels).to(weight.device)
            self.weight_quantizers[key] = own
        else:
            own.is_shared = True
        if self.target.limits_pairs:
            self._limit_pairs(node, own, weight)
        return own

    def _limit_pairs(self, node: fx.Node, quantizer: WeightQuantize, weight: torch.Tensor) -> None:
        """Keep sums of two products within 16 bits, where bytes of the input and of the weight could leave them."""
        call, behaviour, source = call_of(node, self.edit.module(node)), behaviour_of(node), node.args[0]
        assert isinstance(behaviour, Weighted) and isinstance(source, fx.Node)
        entering = self.quantizer(source)
        byte = 0 if entering is None else largest_byte(entering.scheme)
        if 2 * byte * max(quantizer.scheme.qmax, -quantizer.scheme.qmin) <= LIMIT or quantizer.scheme.bits > 8:
            return
        groups = int(call.attributes.get("groups", 1))
        inputs = weight.shape[1] if behaviour.out_axis == 0 else weight.shape[0] // groups
        quantizer.limit_pairs(behaviour.out_axis, groups, inputs, byte)

    def quantize_entering(self, node: fx.Node) -> None:
        """Quantize an input, a parameter or a float op's result for the quantized ops that read it."""
        readers = [user for user in node.users if Placed(user).quantized or Placed(user).leaves_as_float]
        quantizer = self.quantizer(node)
        Placed(node).quantized = False
        if quantizer is None or not readers:
            return
        for place, users in self._between_writes(node, readers):
            path = self.edit.fresh_path(
                f"{str(node.target).replace('.', '_') if node.op == 'get_attr' else node.name}_quantizer"
            )
            part = QuantInput(quantizer)
            part.training = self.edit.training
            self.edit.insert_module(
                node, path, part, users=users, before=place, group=Placed(node).group, quantized=True, is_tensor=True,
                shape=node.meta.get("shape"), dtype=node.meta.get("dtype"),
            )  # fmt: skip

    def _between_writes(self, node: fx.Node, readers: list[fx.Node]) -> Iterator[tuple[fx.Node | None, list[fx.Node]]]:
        """Readers that see the same values, and where these are read: a buffer that forward writes changes in between."""
        writes = self.edit.writes_into(node) if node.op == "get_attr" else []
        if not writes:
            yield None, readers
            return
        order = {n: i for i, n in enumerate(self.edit.nodes)}
        for count in range(len(writes) + 1):
            seen = [r for r in readers if sum(order[w] < order[r] for w in writes) == count]
            if seen:
                yield min(seen, key=order.__getitem__), seen


def _known_range(node: fx.Node) -> tuple[float, float] | None:
    """The range of what an op makes, where it is known in advance: a mask is 0 and 1."""
    if node.meta.get("dtype") is torch.bool:
        return 0.0, 1.0
    behaviour = behaviour_of(node)
    return (behaviour.low, behaviour.high) if isinstance(behaviour, Bounded) else None


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return list(value.parameters()) + list(value.buffers()) if isinstance(value, nn.Module) else []
