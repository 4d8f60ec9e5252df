"""scale_groups: which tensors share one quantizer, because values pass from one to the other unchanged."""

from __future__ import annotations

from torch import fx

from fxquant.behaviour import Passing, Weighted
from fxquant.graph.edit import Edit
from fxquant.graph.leveled import LeveledModule
from fxquant.numerics.scheme import Scheme
from fxquant.ops.calls import behaviour_of, call_of
from fxquant.passes.facts import Placed
from fxquant.passes.merge_clamps import head_of
from fxquant.recipe import Recipe
from fxquant.targets import X86, Target

__all__ = ["scale_groups", "scheme_of"]


def scale_groups(module: LeveledModule, *, recipe: Recipe, target: Target = X86) -> LeveledModule:
    """Write on each quantized tensor its ``group``: the name of the node whose quantizer it has.

    Values that pass through keep the group of what they came from; where several tensors are joined, their groups become
    one, as far as their schemes agree: otherwise the join gets a group of its own and rounds once more. What a target
    computes on the grid of its input is in that input's group. Where the last result of a weighted op only leaves the
    model, or goes on wide, it has no group: its accumulator leaves as a float, where the target has a kernel for that.

    Args:
        module: a canonical graph with its regions and chains.
        recipe: whether outputs are rounded.
        target: which ops keep their input's scale, which lie on a grid of the target's own, and which cannot give floats.

    Law:
        The graph is unchanged; a tensor and what it passes through are in one group.
    """
    edit = Edit(module, by="scale_groups")
    groups = _Groups(recipe, target)
    for node in edit.nodes:
        if not Placed(node).quantized:
            continue
        behaviour = behaviour_of(node)
        if Placed(node).rounds_for_reader:
            groups.start(node)
        elif isinstance(behaviour, Passing):
            _follow(edit, groups, node)
        elif Placed(node).continues or Placed(node).stays_wide:
            continue
        elif _op(head_of(node)) in target.keeps_scale:
            _keep(edit, groups, node)
        elif recipe.quantize_outputs or Placed(node).rounds_output or not _leaves_as_float(node, target):
            groups.start(node)
        elif _op(head_of(node)) in target.rounds_outputs:
            groups.start(node)
            edit.note(node, f"{target.title} has no {_op(head_of(node))} whose result is a float: rounded")
    for node in edit.nodes:
        if Placed(node).quantized and node in groups.parent:
            Placed(node).group = groups.find(node).name
        elif Placed(node).quantized and not Placed(node).continues:
            Placed(node).quantized = False
            Placed(node).leaves_as_float = True
    return edit.done()


def scheme_of(node: fx.Node, recipe: Recipe, target: Target) -> Scheme:
    """The scheme of a tensor: its op's, or for what enters that of the recipe's ``INPUT``, or of its default."""
    entering = Placed(node).entering
    if entering is not None:
        return entering
    setting = Placed(node).setting or recipe.default
    scheme: Scheme | None = None if setting is None else setting.activation
    return scheme or target.activation


def _op(node: fx.Node) -> str:
    return node.meta["entry"].name if "entry" in node.meta else ""


def _keep(edit: Edit, groups: _Groups, node: fx.Node) -> None:
    """The result of an op that rounds to the grid it reads."""
    head = head_of(node)
    source = next((operand for operand in call_of(head, edit.module(head)).operands if operand in groups.parent), None)
    if source is None:
        groups.start(node)
        return
    groups.parent[node] = groups.find(source)
    Placed(node).keeps_scale = True


def _follow(edit: Edit, groups: _Groups, node: fx.Node) -> None:
    operands = [operand for operand in call_of(node, edit.module(node)).operands if operand in groups.parent]
    if not operands or len(operands) < len(_quantized_operands(edit, node)):
        return  # of accumulators that leave as floats, alone or beside other tensors, a float is made
    first = groups.find(operands[0])
    others = [groups.find(operand) for operand in operands[1:]]
    if any(groups.grid(other) != groups.grid(first) for other in others):
        groups.start(node)
        Placed(node).requantizes = True
        differ = "different schemes" if len({groups.grid(n)[0] for n in (first, *others)}) > 1 else "prescribed grids"
        edit.note(node, f"its inputs have {differ}: it has a quantizer of its own")
        return
    for other in others:
        groups.join(first, other)
    groups.parent[node] = first


def _quantized_operands(edit: Edit, node: fx.Node) -> list[fx.Node]:
    return [operand for operand in call_of(node, edit.module(node)).operands if Placed(operand).quantized]


def _leaves_as_float(node: fx.Node, target: Target) -> bool:
    """Whether ``node`` is the accumulator of a weighted op and nothing but floats are made of it.

    What a float op reads is rounded all the same, where the target has it so; but not what magnifies errors reads: a root
    of what was rounded to zero has no gradient, and a quotient no value.
    """
    if not isinstance(behaviour_of(head_of(node)), Weighted):
        return False
    todo, seen = list(node.users), set[fx.Node]()
    while todo:
        user = todo.pop()
        if user in seen or user.op == "output":
            continue
        seen.add(user)
        exactly = Placed(user).reads_exactly or not target.rounds_for_float
        if not Placed(user).quantized and exactly:
            continue
        if not isinstance(behaviour_of(user), Passing):
            return False
        todo.extend(user.users)
    return True


class _Groups:
    """Disjoint sets of nodes, each on one grid."""

    def __init__(self, recipe: Recipe, target: Target) -> None:
        self.parent: dict[fx.Node, fx.Node] = {}
        self._recipe, self._target = recipe, target

    def start(self, node: fx.Node) -> None:
        self.parent[node] = node

    def find(self, node: fx.Node) -> fx.Node:
        while self.parent[node] is not node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def join(self, a: fx.Node, b: fx.Node) -> None:
        self.parent[self.find(b)] = self.find(a)

    def grid(self, node: fx.Node) -> tuple[Scheme, tuple[float, int] | None]:
        """What two nodes have to have in common to be in one set: the scheme, and the grid where that is prescribed."""
        return scheme_of(node, self._recipe, self._target), self._target.fixed_grids.get(_op(head_of(node)))
