"""leave_unrounded: find the tensors that must not be rounded, and let the ops around them compute in float.

    arange ─▶ mul ─▶ sin ─▶ cat ─▶ linear            phases: rounded where the linear layer reads them, not before
    conv ─┬─▶ sum ─▶ add ε ─▶ div ─▶ conv            a denominator must not round to zero
          └───────────────────┘
    matmul ─▶ add mask ─▶ softmax ─▶ matmul          one masked value would leave the others no integers

An 8-bit grid has 255 steps between the smallest and the largest value. A tensor is worth rounding where an integer op
reads it and where an error of half a step does little harm. What a tensor is follows from what it is computed from, and
what harm an error does from what reads it; ops tell both in their entries (``sensitive``, ``masked``, ``additive``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from enum import IntEnum

import torch
from torch import Tensor, fx, nn

from fxquant.behaviour import Bounded, ChannelAffine, Clamping, FloatOnly, Measuring, Passing, Rescaling, Weighted
from fxquant.errors import Refusal
from fxquant.graph.edit import Edit
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.pattern import nodes_in
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.ops.entry import Call
from fxquant.ops.layout import selects_nothing
from fxquant.passes.facts import Canonical, Placed
from fxquant.recipe import Op, Recipe

__all__ = ["leave_unrounded"]


VANISHES = (8 + 1 + 16) * math.log(2)
"""A score this far below the largest vanishes: e^-VANISHES = 2^-25, so that 2^16 of them together stay under half a step
of a probability of 8 bits, and one stays under half of float32's last digit."""


FAR = 100.0
"""What a select puts in the place of masked values, where it is no number of the others' kind: -100, 1e9, infinity."""


class _Origin(IntEnum):
    """What a tensor is computed from; of several operands the largest counts."""

    CONSTANT = 0  # parameters and buffers alone
    COUNTED = 1  # integers and bools: positions, indices, masks, lengths
    INPUT = 2  # real inputs of the model, through ops without weights
    ACTIVE = 3  # something that was multiplied by weights, or looked up


def leave_unrounded(module: LeveledModule, *, recipe: Recipe) -> LeveledModule:
    """Take the setting off each op that must not round, or whose operands must not be rounded; write down why.

    Ops that multiply (weighted ops, products of matrices, attention) always keep theirs; so does what a recipe names as
    ``Op(name)``. Of all others these compute in float:

    - what reads a tensor made of integers: positions, masks, counts;
    - a sum that adds a mask on its way into a softmax;
    - what reads values of which a select has put some far away, but for what bounds its result;
    - what magnifies errors of an operand without bound (division, exp, sin, sqrt …), and what reads its result together
      with other tensors;
    - what is computed for such an op alone;
    - what reads only such results.

    Args:
        module: a canonical graph whose ops have their settings.
        recipe: the ops that it names are left alone.

    Law:
        The graph is unchanged; an op that is left in float carries the reason.
    """
    edit = Edit(module, by="leave_unrounded")
    _Search(edit, recipe).run()
    return edit.done()


class _Search:
    def __init__(self, edit: Edit, recipe: Recipe) -> None:
        self.edit = edit
        self.named = {s.name for s, setting in recipe.pairs if isinstance(s, Op) and setting is not None}
        self.origin: dict[fx.Node, _Origin] = {}
        self.sensitive: dict[fx.Node, str] = {}
        self.left: set[fx.Node] = set()
        self.far: set[fx.Node] = set()
        self.constants: dict[fx.Node, Tensor | None] = {}
        for node in edit.nodes:
            if _is_data(node):
                self.origin[node] = self._origin(node)
            if Canonical(node).reads_counts:
                self.left.add(node)

    def run(self) -> None:
        for node in self.edit.nodes:
            if self._may_round(node):
                self._read_facts(node)
        for node in self.edit.nodes:
            for operand in self._operands_with_masks(node):
                self._follow_masks(operand, seen=set())
        for node in self.edit.nodes:
            if _is_data(node) and self._is_far(node):
                self.far.add(node)
        for node in self.edit.nodes:
            if self._may_round(node):
                self._read_operands(node)
        for node in reversed(self.edit.nodes):
            if self._may_round(node):
                self._read_users(node)
        for node in self.edit.nodes:
            if self._may_round(node) and (operands := self._operands(node)):
                if all(self._is_float(operand) for operand in operands):
                    self._leave(node, f"it reads {_listed(operands)}, which is float")
        for node in self.sensitive:
            Placed(node).reads_exactly = True

    # What a tensor is

    def _origin(self, node: fx.Node) -> _Origin:
        dtype = node.meta.get("dtype")
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point and not dtype.is_complex:
            return _Origin.COUNTED
        if selects_nothing(node):
            return _Origin.CONSTANT
        if node.op in ("placeholder", "get_attr"):
            return _Origin.INPUT if node.op == "placeholder" else _Origin.CONSTANT
        passes = isinstance(behaviour_of(node), Passing)
        origins = [self.origin[operand] for operand in (self._operands(node) if passes else _data_of(node))]
        if origins and max(origins) == _Origin.CONSTANT:
            return _Origin.CONSTANT
        if "island" in node.meta or (node.op == "call_module" and isinstance(behaviour_of(node), FloatOnly)):
            return _Origin.ACTIVE
        if self._multiplies(node):
            return _Origin.COUNTED if self._is_phase(node, origins) else _Origin.ACTIVE
        return max(origins, default=_Origin.COUNTED)

    def _is_phase(self, node: fx.Node, origins: list[_Origin]) -> bool:
        """Whether a product multiplies what is counted by constants that nobody trains: frequencies, not weights."""
        if node.op != "call_function" or node.meta["entry"].macs is None or isinstance(behaviour_of(node), Weighted):
            return False
        if max(origins) != _Origin.COUNTED:
            return False
        sources = [n for operand in _data_of(node) for n in _sources_of(operand) if n.op == "get_attr"]
        return not any(isinstance(self.edit.attributes[str(n.target)], nn.Parameter) for n in sources)

    def _multiplies(self, node: fx.Node) -> bool:
        """Whether ``node`` is what integers are for: a product with weights or of matrices, or a lookup of values."""
        entry, behaviour = node.meta.get("entry"), behaviour_of(node)
        if entry is None or isinstance(behaviour, FloatOnly):
            return False
        looks_up = isinstance(behaviour, Rescaling) and behaviour.inputs == ()
        return isinstance(behaviour, Weighted) or entry.macs is not None or looks_up

    def _may_round(self, node: fx.Node) -> bool:
        """Whether ``node`` would round its result and computes little: the ops that this pass decides on."""
        if Placed(node).setting is None or "reason" in node.meta or node.meta["entry"].name in self.named:
            return False
        light = isinstance(behaviour_of(node), (Rescaling, Clamping, Bounded))
        return light and (not self._multiplies(node) or self.origin[node] == _Origin.COUNTED)

    # What is left in float

    def _leave(self, node: fx.Node, reason: str) -> None:
        Placed(node).setting, node.meta["reason"] = None, reason
        self.left.add(node)

    def _call(self, node: fx.Node) -> Call:
        return call_of(node, self.edit.module(node))

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        return [operand for operand in self._call(node).operands if _is_data(operand)]

    def _read_facts(self, node: fx.Node) -> None:
        """Leave an op that reads integers, or whose operand must not be rounded."""
        call = self._call(node)
        for name, why in call.entry.sensitive.items():
            operand = call.operand(name)
            if operand is None:
                continue
            if self.origin[operand] == _Origin.CONSTANT:
                Placed(node).exact_operands = (*Placed(node).exact_operands, name)
            else:
                del Placed(node).exact_operands
                self.sensitive[node] = f"{why} ({operand.name})"
                self._leave(node, self.sensitive[node])
                return
        counted = next((o for o in self._operands(node) if self.origin[o] == _Origin.COUNTED), None)
        if counted is not None:
            self._leave(node, f"it reads {counted.name}, which is made of integers (a position, a mask or a count)")

    def _operands_with_masks(self, node: fx.Node) -> list[fx.Node]:
        if Placed(node).setting is None or "reason" in node.meta:
            return []
        call = self._call(node)
        return [operand for name in call.entry.masked if (operand := call.operand(name)) is not None]

    def _follow_masks(self, node: fx.Node, seen: set[fx.Node]) -> bool:
        """Whether ``node``, which a softmax reads, may hold masked values; the sums that add them are left in float."""
        if node in seen or self._multiplies(node) or not _data_of(node):
            return False
        seen.add(node)
        operands = _data_of(node)
        found = sum(self._follow_masks(operand, seen) for operand in operands) > 0  # each operand is followed
        entry = node.meta["entry"]
        if isinstance(behaviour_of(node), FloatOnly) and "island" not in node.meta:
            scores = [o for o in operands if self.origin[o] == _Origin.ACTIVE and not self._is_mask(o)]
            if scores and any(map(self._is_mask, operands)):
                self.left.add(node)  # scores and a mask go into one op that the table lacks, as baddbmm
                return True
        if entry.additive and "reason" not in node.meta:
            mask = next((o for o in operands if self._is_mask(o)), None)
            active = any(self.origin[o] == _Origin.ACTIVE for o in operands)
            if mask is not None and active and self._may_round(node):
                what = "which is float and may be masked" if self.origin[mask] == _Origin.ACTIVE else "a mask"
                self._leave(node, f"it adds {mask.name}, {what}: such values would leave the others no integers")
                return True
        if found and self._may_round(node):
            self._leave(node, "it reads masked values, which would leave the others no integers")
        return found

    def _is_mask(self, node: fx.Node) -> bool:
        """Whether ``node``, added to scores, is no score: counted, an input, or constants of which some vanish."""
        if self.origin[node] == _Origin.CONSTANT:
            value = self._constant(node)
            return isinstance(value, Tensor) and value.numel() > 0 and bool((value < value.max() - VANISHES).any())
        entry = _root(node).meta.get("entry")
        unknown = entry is not None and isinstance(entry.behaviour, FloatOnly)  # masked_fill, where; no op of the table
        return self.origin[node] != _Origin.ACTIVE or unknown

    def _constant(self, node: fx.Node) -> Tensor | None:
        """The numbers of a constant; all of them, where the graph takes as many as an input is long (``tri[:n, :n]``)."""
        if self.edit.is_constant(node):
            return self.edit.constant(node)
        if node.op == "get_attr":
            return self.edit.attributes[str(node.target)]
        if node not in self.constants:
            self.constants[node] = self._computed(node)
        return self.constants[node]

    def _computed(self, node: fx.Node) -> Tensor | None:
        operands = _data_of(node)
        if len(operands) < len(node.all_input_nodes):
            cuts = isinstance(behaviour_of(node), Passing) and len(operands) == 1
            return self._constant(operands[0]) if cuts else None
        values = {operand: self._constant(operand) for operand in operands}
        if not callable(node.target) or any(value is None for value in values.values()):
            return None
        try:
            return node.target(*fx.map_arg(node.args, values.__getitem__), **fx.map_arg(dict(node.kwargs), values.get))
        except RuntimeError:  # sizes that fit only once they are cut
            return None

    def _read_operands(self, node: fx.Node) -> None:
        """Leave an op that reads, beside other tensors, what an op magnified, or what an unknown op made with a mask."""
        roots = [_root(operand) for operand in self._operands(node)]
        far = next((root for root in roots if root in self.far), None)
        if far is not None and node in self.far:
            self._leave(node, f"it reads {far.name}, some of whose values a mask has put far from the others")
            return
        if len(roots) < 2:
            return
        for root in roots:
            if root in self.sensitive or self._selects(root):
                self._leave(node, f"it reads {root.name} as it is, which is float")

    def _selects(self, node: fx.Node) -> bool:
        """Whether an op outside of the table chooses values by a mask, and may have put any number in."""
        if not isinstance(behaviour_of(node), FloatOnly) or self.origin.get(node) != _Origin.ACTIVE:
            return False
        return any(operand.meta.get("dtype") is torch.bool for operand in _data_of(node))

    def _is_far(self, node: fx.Node) -> bool:
        """Whether a mask has put some values of ``node`` far from the others: here, or before an op that keeps them so."""
        if not self._selects(node):
            keeps = isinstance(behaviour_of(node), (Rescaling, FloatOnly)) and "island" not in node.meta
            return keeps and not self._multiplies(node) and any(_root(o) in self.far for o in _data_of(node))
        constants = [self._constant(o) for o in _data_of(node) if self.origin[o] == _Origin.CONSTANT]
        numbers = [float(c.abs().max()) for c in constants if c is not None and c.numel()]
        made = [
            o
            for o in _data_of(node)
            if isinstance(behaviour_of(o), FloatOnly) and o.meta.get("dtype") is not torch.bool
        ]
        for maker in (node, *made):  # masked_fill(scores, mask, -1e9), where(mask, scores, full_like(scores, -1e9))
            numbers += [v for v in (*maker.args, *maker.kwargs.values()) if isinstance(v, (int, float))]
        return any(abs(v) >= FAR for v in numbers)

    def _read_users(self, node: fx.Node) -> None:
        """Leave an op whose result only such ops read that must not read it rounded."""
        if self._ends_weighted(node):
            return
        readers = list(_readers(node))
        exact = [r for r in readers if self._wants_floats(r)]
        if not exact or any(Placed(r).setting is not None and "reason" not in r.meta for r in readers):
            return
        why = next((self.sensitive[r] for r in exact if r in self.sensitive), "in float")
        if exact[0] in self.sensitive:
            self.sensitive.setdefault(node, why)
        self._leave(node, f"only ops in float read it ({_listed(exact)})")

    def _wants_floats(self, node: fx.Node) -> bool:
        """Whether ``node`` reads values as they are: this pass left it in float, or it puts masks on them."""
        return node in self.left or self._selects(node)

    def _ends_weighted(self, node: fx.Node) -> bool:
        """Whether ``node`` is a clamp that a weighted op takes along, and whose bounds any grid has."""
        behaviour, before = behaviour_of(node), node.args[0] if node.args else None
        if not isinstance(behaviour, Clamping) or not isinstance(before, fx.Node) or len(before.users) != 1:
            return False
        bounds = behaviour.bounds(self._call(node))
        if isinstance(bounds, Refusal) or (bounds[0] or 0.0) > 0.0 or (bounds[1] or 0.0) < 0.0:
            return False
        return isinstance(behaviour_of(before), (Weighted, ChannelAffine)) or self._multiplies(before)

    def _is_float(self, node: fx.Node) -> bool:
        """Whether ``node`` is exact: this pass left it in float, it is made of integers or constants, or has masks on it.

        What else is float (an op that the table lacks, or that a recipe keeps) was never worth more than 8 bits.
        """
        exact = node in self.left or node in self.far or self._selects(node)
        if exact or self.origin[node] in (_Origin.CONSTANT, _Origin.COUNTED):
            return True
        operands = _data_of(node)
        if isinstance(behaviour_of(node), Passing):
            return all(self._is_float(operand) for operand in operands)
        return isinstance(behaviour_of(node), FloatOnly) and any(o in self.left for o in map(_root, operands))


def _is_data(node: fx.Node) -> bool:
    if isinstance(behaviour_of(node), Measuring) or node.op == "output":
        return False
    return bool(node.meta.get("is_tensor", True) or node.meta.get("is_container"))


def _data_of(node: fx.Node) -> list[fx.Node]:
    return [operand for operand in nodes_in((node.args, node.kwargs)) if _is_data(operand)]


def _root(node: fx.Node) -> fx.Node:
    """The op whose values ``node`` passes on; a join is its own root."""
    while isinstance(behaviour_of(node), Passing) and len(operands := _data_of(node)) == 1:
        node = operands[0]
    return node


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads ``node``, directly or through ops that pass values on."""
    for user in node.users:
        behaviour = behaviour_of(user)
        if isinstance(behaviour, Passing):
            yield from _readers(user)
        elif not isinstance(behaviour, Measuring):
            yield user


def _sources_of(node: fx.Node) -> Iterator[fx.Node]:
    seen, waiting = {node}, [node]
    while waiting:
        found = waiting.pop()
        yield found
        more = set(found.all_input_nodes) - seen
        seen |= more
        waiting.extend(more)


def _listed(nodes: Iterable[fx.Node]) -> str:
    names = list(dict.fromkeys(node.name for node in nodes))
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
