"""What is known of a node, as typed fields: one class for each owner, over the node's ``meta``.

A fact has a name, a type, a meaning and one owner, the pass or part that writes it; all of that stands in the owner's class.
The values lie in ``node.meta`` under their names, which fx carries along: a class is a view, and holds nothing itself.

    class Placed(Facts):
        quantized = Fact(bool, False, "its result is rounded")

    Placed(node).quantized = True
    Placed.reset(node)
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar, overload

from torch import fx

from fxquant.errors import LevelError

__all__ = ["DECLARED", "OWNERS", "Edited", "Fact", "Facts", "Traced"]

T = TypeVar("T")

OWNERS: list[type[Facts]] = []
"""Every class of facts, in the order in which they were made."""
DECLARED: dict[str, type[Facts]] = {}
"""The owner of every fact."""


class Fact(Generic[T]):
    """One field.

    Args:
        kind: what its values are instances of; None is a value of every fact.
        default: what a node has that nobody wrote it on.
        meaning: in words.
    """

    def __init__(self, kind: type | tuple[type, ...], default: T, meaning: str) -> None:
        self.kind, self.default, self.meaning, self.name = kind, default, meaning, ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, facts: None, owner: type) -> Fact[T]: ...

    @overload
    def __get__(self, facts: Facts, owner: type) -> T: ...

    def __get__(self, facts: Facts | None, owner: type) -> Any:
        return self if facts is None else facts.node.meta.get(self.name, self.default)

    def __set__(self, facts: Facts, value: T) -> None:
        if not self.fits(value):
            raise LevelError(
                f"{facts.node.name}: {type(facts).__name__}.{self.name} ({self.meaning}) is {self.kind}, and was given "
                f"{value!r}."
            )
        facts.node.meta[self.name] = value

    def __delete__(self, facts: Facts) -> None:
        facts.node.meta.pop(self.name, None)

    def fits(self, value: Any) -> bool:
        """Whether ``value`` is of its type."""
        return value is None or isinstance(value, self.kind)


class Facts:
    """The facts of one owner on one node.

    Args:
        node: whose they are.

    Raises:
        LevelError: a fact of that name has another owner (when the class is made).
    """

    facts: ClassVar[dict[str, Fact[Any]]] = {}

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    def __init_subclass__(cls) -> None:
        cls.facts = {name: fact for name, fact in vars(cls).items() if isinstance(fact, Fact)}
        for name in sorted(set(cls.facts) & set(DECLARED)):
            raise LevelError(f"{cls.__name__} owns {name}, which {DECLARED[name].__name__} owns.")
        OWNERS.append(cls)
        DECLARED.update(dict.fromkeys(cls.facts, cls))

    def __contains__(self, name: str) -> bool:
        """Whether the fact of that name was written, if only as None."""
        return name in self.facts and name in self.node.meta

    def take(self, other: Facts, *names: str) -> None:
        """The facts of these names as ``other`` has them, None where it has none."""
        for name in names:
            self.node.meta[name] = other.node.meta.get(name)

    @classmethod
    def reset(cls, node: fx.Node) -> None:
        """Take all of this owner's facts back from ``node``."""
        for name in cls.facts:
            node.meta.pop(name, None)


class Traced(Facts):
    """What capture saw when the model ran."""

    module_path = Fact[str](str, "", "the path of the module whose forward made the call; empty for the model's own")
    source = Fact[str | None](str, None, "the user's line, as file:line")
    shape = Fact[tuple[int, ...] | None](tuple, None, "of the result on the example inputs")
    dtype = Fact[Any](object, None, "of the result on the example inputs; its name where that depends on data")
    is_tensor = Fact[bool](bool, True, "the result is a tensor")
    is_container = Fact[bool](bool, False, "the result is a tuple, list or dict of tensors")
    is_tuple = Fact[bool](bool, False, "the result is a tuple that is indexed")
    constant = Fact[bool](bool, False, "it follows from parameters alone, the same in every call")
    writes = Fact[str](str, "", "it writes in place: into an ``attribute`` of the model, or into a ``value``")
    specialization = Fact[Any](object, None, "the guard on sizes that this node checks")
    island = Fact[Any](object, None, "the submodule that runs its own code here")
    part_of = Fact[Any](object, None, "the call inside an island that it was captured for")


class Edited(Facts):
    """What ``Edit`` signs."""

    by = Fact[str](str, "", "the pass that last rewrote it")
    origin = Fact[list[str]](list, [], "the nodes that it came from, by name")
    notes = Fact[list[str]](list, [], "what passes say of it, for the diff")
    noted_by = Fact[dict[str, str]](dict, {}, "which pass wrote which note")
    absorbed = Fact[list[tuple[str, str]]](list, [], "the nodes that went into it, and how")
