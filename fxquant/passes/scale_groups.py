"""scale_groups: which tensors share one quantizer, because values pass from one to the other unchanged."""

from __future__ import annotations

from torch import fx

from fxquant.graph.edit import Edit
from fxquant.graph.leveled import LeveledModule
from fxquant.numerics.scheme import Scheme
from fxquant.ops.behaviour import Passing, Weighted
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.recipe import Recipe

__all__ = ["scale_groups"]


def scale_groups(module: LeveledModule, *, recipe: Recipe) -> LeveledModule:
    """Write on each quantized tensor its ``group``: the name of the node whose quantizer it has.

    Values that pass through keep the group of what they came from; where several tensors are joined, their groups become
    one, as far as their schemes agree: otherwise the join gets a group of its own and rounds once more. Where the last
    result of a weighted op only leaves the model, it has no group: its accumulator leaves as a float.

    Law:
        The graph is unchanged; a tensor and what it passes through are in one group.
    """
    edit = Edit(module, by="scale_groups")
    groups = _Groups(recipe)
    for node in edit.nodes:
        if not node.meta.get("quantized"):
            continue
        behaviour = behaviour_of(node)
        if isinstance(behaviour, Passing):
            _follow(edit, groups, node, behaviour)
        elif not node.meta.get("continues") and (recipe.quantize_outputs or not _leaves_as_float(node)):
            groups.start(node)
    for node in edit.nodes:
        if node.meta.get("quantized") and node in groups.parent:
            node.meta["group"] = groups.find(node).name
        elif node.meta.get("quantized") and not node.meta.get("continues"):
            node.meta["quantized"] = False
            node.meta["leaves_as_float"] = True
    return edit.done()


def _follow(edit: Edit, groups: _Groups, node: fx.Node, behaviour: Passing) -> None:
    operands = [operand for operand in call_of(node, edit.module(node)).operands if operand in groups.parent]
    if not operands:
        return
    first = groups.find(operands[0])
    others = [groups.find(operand) for operand in operands[1:]]
    if any(groups.scheme(other) != groups.scheme(first) for other in others):
        groups.start(node)
        node.meta["requantizes"] = True
        edit.note(node, "its inputs have different schemes: it has a quantizer of its own")
        return
    for other in others:
        groups.join(first, other)
    groups.parent[node] = first


def _leaves_as_float(node: fx.Node) -> bool:
    """Whether ``node`` is the accumulator of a weighted op and nothing but the model's output sees it."""
    head = node
    for _ in node.meta.get("chain", ())[1:]:
        before = head.args[0]
        assert isinstance(before, fx.Node)
        head = before
    if not isinstance(behaviour_of(head), Weighted):
        return False
    todo, seen = list(node.users), set[fx.Node]()
    while todo:
        user = todo.pop()
        if user in seen or user.op == "output":
            continue
        seen.add(user)
        if not isinstance(behaviour_of(user), Passing):
            return False
        todo.extend(user.users)
    return True


class _Groups:
    """Disjoint sets of nodes, each with one scheme."""

    def __init__(self, recipe: Recipe) -> None:
        self.parent: dict[fx.Node, fx.Node] = {}
        self._default = (recipe.default.activation,) if recipe.default is not None else ()

    def start(self, node: fx.Node) -> None:
        self.parent[node] = node

    def find(self, node: fx.Node) -> fx.Node:
        while self.parent[node] is not node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def join(self, a: fx.Node, b: fx.Node) -> None:
        self.parent[self.find(b)] = self.find(a)

    def scheme(self, node: fx.Node) -> Scheme | None:
        setting = node.meta.get("setting")
        if setting is not None:
            return setting.activation
        return self._default[0] if self._default else None
