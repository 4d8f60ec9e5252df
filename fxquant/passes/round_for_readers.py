"""round_for_readers: give each op that multiplies what it reads in the scheme that its setting says.

    conv ──▶ relu ──▶ conv             only multiplications read it: rounded to their scheme at once

    add ──▶ relu ──┬──▶ low ──▶ conv   a sum that others read too: rounded anew, by a quantizer of the reader's own
                   └────────▶ add

A convolution of few bits needs its input in few bits; the sums of residual connections do not, and papers seldom round
them. Source: the recipes that LSQ (1902.08153) and its successors are measured with quantize inputs of layers alone.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from torch import fx

from fxquant.behaviour import Measuring, Passing, Weighted
from fxquant.graph.edit import Edit
from fxquant.graph.leveled import LeveledModule
from fxquant.numerics.scheme import Scheme
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.ops.table import TABLE
from fxquant.passes.choose_regions import quantized_operands
from fxquant.passes.facts import Placed
from fxquant.passes.merge_clamps import head_of
from fxquant.passes.scale_groups import scheme_of
from fxquant.recipe import Recipe, Setting
from fxquant.targets import X86, Target

__all__ = ["round_for_readers"]


def round_for_readers(module: LeveledModule, *, recipe: Recipe, target: Target = X86) -> LeveledModule:
    """Let tensors have the scheme that their readers want, or put an op in between that rounds for one reader.

    Args:
        module: a canonical graph with its regions, chains and accumulators.
        recipe: the scheme of what enters.
        target: likewise, and which ops keep their input's scale.

    Before:
        x = input
        relu = relu(x)
        conv = Conv2d[conv](relu)
        add = add(relu, conv)
        return add

    After:
        x = input
        relu = relu(x)
        relu_for_conv = identity(relu)
        conv = Conv2d[conv](relu_for_conv)
        add = add(relu, conv)
        return add

    Law:
        With quantizers off, outputs are the canonical graph's, bit for bit; a reader with a scheme of its own reads it.
    """
    edit = Edit(module, by="round_for_readers")
    if any(setting is not None and setting.input for setting in (recipe.default, *(s for _, s in recipe.pairs))):
        _Readers(edit, recipe, target).run()
    return edit.done()


class _Readers:
    def __init__(self, edit: Edit, recipe: Recipe, target: Target) -> None:
        self.edit, self.recipe, self.target = edit, recipe, target
        self.parent: dict[fx.Node, fx.Node] = {}
        self.wants: list[tuple[fx.Node, fx.Node, Scheme | None]] = []

    def run(self) -> None:
        tensors = [n for n in self.edit.nodes if Placed(n).quantized and not Placed(n).continues]
        self.parent = {node: node for node in tensors}
        for node in tensors:
            for user in node.users:
                self._see(node, user)
        schemes: dict[fx.Node, set[Scheme | None]] = defaultdict(set)
        for node, _, scheme in self.wants:
            schemes[self._find(node)].add(scheme)
        members: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in tensors:
            members[self._find(node)].append(node)
        for root, wanted in schemes.items():
            only = next(iter(wanted))
            if len(wanted) == 1 and only is not None and all(Placed(n).entering in (None, only) for n in members[root]):
                for node in members[root]:
                    self._give(node, only)
        for node, reader, scheme in self.wants:
            if scheme is not None and scheme != scheme_of(node, self.recipe, self.target):
                self._insert(node, reader, scheme)

    def _find(self, node: fx.Node) -> fx.Node:
        while self.parent[node] is not node:
            node = self.parent[node]
        return node

    def _see(self, node: fx.Node, user: fx.Node) -> None:
        """Note what ``user`` reads ``node`` as, or that the two are on one grid."""
        if isinstance(behaviour_of(user), Measuring):
            return
        end = self._end(user)
        moves = isinstance(behaviour_of(user), Passing) or _op(user) in self.target.keeps_scale
        if end in self.parent and moves:
            self.parent[self._find(end)] = self._find(node)
            return
        setting, scheme = Placed(user).setting, None
        if setting is not None and "reason" not in user.meta and _multiplies(user):
            scheme = setting.input if node in quantized_operands(call_of(user, self.edit.module(user))) else None
        self.wants.append((node, user, scheme))

    def _end(self, node: fx.Node) -> fx.Node:
        """The last link of the chain that ``node`` is in."""
        while Placed(node).continues:
            (node,) = node.users
        return node

    def _give(self, node: fx.Node, scheme: Scheme) -> None:
        setting = Placed(node).setting
        if setting is None or "reason" in node.meta:
            Placed(node).entering = scheme
        else:
            Placed(node).setting = replace(setting, activation=scheme)

    def _insert(self, node: fx.Node, reader: fx.Node, scheme: Scheme) -> None:
        entry = TABLE["identity"]
        made = self.edit.insert_function(
            reader, entry.function, node, f"{node.name}_for_{reader.name}", entry=entry, is_tensor=True,
            shape=node.meta.get("shape"), dtype=node.meta.get("dtype"), module_path="", source=reader.meta.get("source"),
        )  # fmt: skip
        Placed(made).setting = Setting(weight=None, activation=scheme)
        Placed(made).quantized = Placed(made).requantizes = Placed(made).rounds_for_reader = True
        self.edit.note(made, f"rounded anew for {reader.name}")


def _multiplies(node: fx.Node) -> bool:
    return isinstance(behaviour_of(node), Weighted) or node.meta["entry"].macs is not None


def _op(node: fx.Node) -> str:
    return head_of(node).meta["entry"].name if "entry" in node.meta else ""
