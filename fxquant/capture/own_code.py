"""What the code of a module that runs as its author wrote it may do, in branches too that no example takes.

Read off the bytecode of its ``forward`` and of the methods and functions that it names. A chain that starts at ``self``
(``self.body.fc.weight``) is followed through the module itself. Of what is handed on (``norm_of(self.body)``,
``for layer in self.layers``) the code may use every attribute that it names, by a path that it names.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["Uses", "names_read", "uses_in"]

_ALL_TENSORS = {"parameters", "named_parameters", "buffers", "named_buffers", "state_dict"}
_AT_ANY_DEPTH = {"modules", "named_modules"}
_ALL_MODULES = _AT_ANY_DEPTH | {"children", "named_children"}
_OF_SEQUENCES = {"enumerate", "iter", "len", "list", "next", "reversed", "tuple", "zip"}
_ASKING = {"isinstance", "type", "__class__"}
_LOOKED_AHEAD = 5
"""Instructions from a sequence to the square bracket behind it: a slice's bounds and what builds it."""


@dataclass
class Uses:
    """What the code of one module may do with the modules that it holds.

    Attributes:
        reads: tensors by their module and name.
        methods: methods, properties and square brackets of other modules, by the module and the name.
        calls: modules that it calls, or hands on.
        replaced: modules of which torch is asked to run the code with other parameters (``functional_call``).
        asked: modules whose class it may ask for.
    """

    reads: set[tuple[nn.Module, str]] = field(default_factory=set)
    methods: set[tuple[nn.Module, str]] = field(default_factory=set)
    calls: set[nn.Module] = field(default_factory=set)
    replaced: set[nn.Module] = field(default_factory=set)
    asked: set[nn.Module] = field(default_factory=set)

    @property
    def modules(self) -> set[nn.Module]:
        """All that are used in one way or another."""
        return {module for module, _ in self.reads | self.methods} | self.calls | self.replaced | self.asked

    def among(self, modules: set[nn.Module]) -> Uses:
        """The uses of ``modules`` alone."""
        return Uses(
            {(module, name) for module, name in self.reads if module in modules},
            {(module, name) for module, name in self.methods if module in modules},
            self.calls & modules,
            self.replaced & modules,
            self.asked & modules,
        )

    def __ior__(self, other: Uses) -> Uses:
        for name, value in vars(other).items():
            getattr(self, name).update(value)
        return self


@dataclass(frozen=True)
class _Chain:
    """``self.a.b``: its names; whether it is called there; what stands around it."""

    names: tuple[str, ...]
    is_called: bool
    is_sequence: bool
    code: CodeType


@dataclass(frozen=True)
class _Code:
    """A method and all that it leads to: chains that start at the module, other attributes, classes that it may ask for."""

    chains: tuple[_Chain, ...]
    loose: frozenset[str]
    classes: tuple[type, ...]


def names_read(owner: type) -> set[str]:
    """The attributes and globals named in ``owner.forward``, and in the methods and functions that it calls.

    Followed are methods of the class, and functions and modules that the one it was written in knows. What code does with
    names that it makes up (``getattr(x, name)``) stays unknown.
    """
    codes = (code for function, _ in _functions(owner, "forward") for code in _codes(function.__code__))
    return {name for code in codes for name in code.co_names}


def uses_in(modules: Iterable[nn.Module]) -> dict[nn.Module, Uses]:
    """What the code of each module may do with what it holds, where its forward or what others call of it is run."""
    found: dict[nn.Module, Uses] = {}
    done: set[tuple[nn.Module, str]] = set()
    waiting = [(module, "forward") for module in modules]
    while waiting:
        module, name = waiting.pop()
        if (module, name) in done:
            continue
        done.add((module, name))
        uses = found.setdefault(module, Uses())
        kind: Any = type(module)
        code = _code_of(kind, name)
        for chain in code.chains:
            _follow(module, chain, code, uses)
        waiting.extend(uses.methods)
    return found


@functools.lru_cache(maxsize=1024)
def _code_of(owner: Any, start: str) -> _Code:
    """What a method leads to."""
    chains: list[_Chain] = []
    loose: set[str] = set()
    classes: set[type] = set()
    for function, is_method in _functions(owner, start):
        own = function.__code__.co_varnames[0] if is_method and function.__code__.co_argcount else None
        for code in _codes(function.__code__):
            chains.extend(_chains(code, own, loose))
            if "getattr" in code.co_names:
                loose |= {value for value in code.co_consts if isinstance(value, str)}
            if _ASKING & set(code.co_names):
                classes |= set(_classes(function, code))
    return _Code(tuple(chains), frozenset(loose), tuple(classes))


def _classes(function: FunctionType, code: CodeType) -> Iterator[type]:
    """The classes of modules that a function names."""
    for name in code.co_names:
        known = function.__globals__.get(name)
        inside = [vars(known).get(inner) for inner in code.co_names] if isinstance(known, ModuleType) else []
        for value in (known, *inside):
            if isinstance(value, type) and issubclass(value, nn.Module) and value is not nn.Module:
                yield value


def _functions(owner: type, start: str) -> Iterator[tuple[FunctionType, bool]]:
    """A method and what it may call, each with whether its first argument is the module."""
    seen: set[tuple[FunctionType, bool]] = set()
    waiting: list[tuple[Any, bool]] = [(value, True) for value in _of_class(owner, start, False)]
    while waiting:
        value, is_method = waiting.pop()
        function: Any = value.fget if isinstance(value, property) else value
        function = inspect.unwrap(function)
        if not isinstance(function, FunctionType) or (function, is_method) in seen or _is_torchs(function):
            continue
        seen.add((function, is_method))
        yield function, is_method
        names = {name for code in _codes(function.__code__) for name in code.co_names}
        for name in names:
            waiting.extend((value, True) for value in _of_class(owner, name, "super" in names))
        for name in _globals_named(function):
            waiting.extend((value, False) for value in _of_globals(function.__globals__.get(name), names))


def _globals_named(function: FunctionType) -> set[str]:
    steps = (step for code in _codes(function.__code__) for step in dis.get_instructions(code))
    return {str(step.argval) for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}


def _is_torchs(function: FunctionType) -> bool:
    return str(function.__module__).split(".")[0] == "torch"


def _of_class(owner: type, name: str, every: bool) -> Iterator[Any]:
    """What ``name`` is in a class; in each of its bases too, which ``super()`` may reach."""
    found = [vars(kind)[name] for kind in owner.__mro__ if name in vars(kind)]
    yield from (getattr(value, "__func__", value) for value in (found if every else found[:1]))


def _of_globals(value: Any, names: set[str]) -> Iterator[Any]:
    """A global, what is in a container of them, and of a module of functions those that are named."""
    if isinstance(value, ModuleType):
        if value.__name__.split(".")[0] != "torch":
            yield from (vars(value)[name] for name in names if name in vars(value))
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value
    else:
        yield value


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A code object, and those of functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _chains(code: CodeType, own: str | None, loose: set[str]) -> Iterator[_Chain]:
    """Every chain of attributes that starts at ``own``; attributes of anything else are added to ``loose``."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG")]
    at = 0
    while at < len(steps):
        start, at = at, at + 1
        if not _loads(steps[start], own):
            loose |= {str(steps[start].argval)} if _is_attribute(steps[start]) else set()
            continue
        names, called = [], False
        while at < len(steps) and not called:
            if _is_attribute(steps[at]):
                names.append(str(steps[at].argval))
                called = _is_method(steps[at])
                at += 1
            elif (index := _index(steps[at : at + 2])) is not None:
                names.append(index)
                at += 2
                called = _is_called(steps, start, at)
            else:
                break
        yield _Chain(tuple(names), called, _as_sequence(steps, start, at), code)


def _is_called(steps: Sequence[dis.Instruction], start: int, end: int) -> bool:
    """Whether what stands between is what a call is of: Python 3.11 and 3.12 say so before it, later ones behind it."""
    around = (steps[start - 1 : start], steps[end : end + 1])
    return any(step.opname == "PUSH_NULL" for side in around for step in side) and not _is_attribute_at(steps, end)


def _is_attribute_at(steps: Sequence[dis.Instruction], at: int) -> bool:
    return at < len(steps) and (_is_attribute(steps[at]) or _index(steps[at : at + 2]) is not None)


def _loads(step: dis.Instruction, own: str | None) -> bool:
    if own is None or not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
        return False
    return step.argval[-1] == own if isinstance(step.argval, tuple) else step.argval == own


def _is_attribute(step: dis.Instruction) -> bool:
    return step.opname in ("LOAD_ATTR", "LOAD_METHOD")


def _is_method(step: dis.Instruction) -> bool:
    """Whether what an instruction loads is called at once; older Pythons have an instruction of its own for that."""
    return step.opname == "LOAD_METHOD" or "NULL|self" in step.argrepr


def _index(steps: Sequence[dis.Instruction]) -> str | None:
    """``[2]`` behind a chain, as the name that a sequence of modules has for that."""
    if len(steps) == 2 and steps[0].opname.startswith(("LOAD_CONST", "LOAD_SMALL_INT")) and _is_bracket(steps[1]):
        return str(steps[0].argval) if isinstance(steps[0].argval, (int, str)) else None
    return None


def _is_bracket(step: dis.Instruction) -> bool:
    return step.opname in ("BINARY_SUBSCR", "BINARY_SLICE") or (step.opname == "BINARY_OP" and step.argrepr == "[]")


def _as_sequence(steps: Sequence[dis.Instruction], start: int, end: int) -> bool:
    """Whether what a chain gives is counted, gone through, or has square brackets behind it."""
    before = [step.argval for step in steps[max(start - 2, 0) : start] if step.opname.startswith("LOAD_")]
    if _OF_SEQUENCES & {name for name in before if isinstance(name, str)}:
        return True
    if end < len(steps) and steps[end].opname == "GET_ITER":
        return True
    behind = steps[end : end + _LOOKED_AHEAD]
    for step in behind:
        if _is_bracket(step):
            return True
        if not step.opname.startswith(("LOAD_", "BUILD_SLICE", "UNARY_NEGATIVE")):
            break
    return False


def _follow(reader: nn.Module, chain: _Chain, code: _Code, found: Uses) -> None:
    """Go along ``chain`` from ``reader``, and note where it gets to."""
    part = reader
    for i, name in enumerate(chain.names):
        if name in _ALL_TENSORS:
            found.reads |= set(_tensors(part.modules(), first="next" in chain.code.co_names))
            return
        if name in _ALL_MODULES:
            break
        if isinstance(part, (nn.Sequential, nn.ModuleList)) and name.startswith("-"):
            name = str(int(name) + len(part))
        if name not in part._modules:
            _note_attribute(part, name, found, is_readers=part is reader)
            for held in _modules_held(part.__dict__.get(name)):
                _note_handed_on(held, chain, code, found, is_readers=False)
            return
        child = part._modules[name]
        if child is None:
            return
        if isinstance(part, nn.Sequential) and part is not reader and name.isdigit():
            found.methods.add((part, "__getitem__"))
        part = child
        if chain.is_called and i == len(chain.names) - 1:
            found.calls.add(part)
            return
    _note_handed_on(part, chain, code, found, is_readers=part is reader)


def _modules_held(value: Any) -> list[nn.Module]:
    """The modules in an attribute that torch does not see: a list, a dict, or one put past its registry."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
    return [module for module in values if isinstance(module, nn.Module)]


def _note_attribute(part: nn.Module, name: str, found: Uses, *, is_readers: bool) -> None:
    if name in part._parameters or name in part._buffers:
        found.reads.add((part, name))
    elif not is_readers and _is_users_method(type(part), name):
        found.methods.add((part, name))


def _note_handed_on(part: nn.Module, chain: _Chain, code: _Code, found: Uses, *, is_readers: bool) -> None:
    """What is done with ``part`` where the code has it in a variable, or gives it to another function."""
    loose, names = code.loose, {*chain.names, *code.loose}
    if not is_readers:
        found.calls.add(part)
        if chain.is_sequence and isinstance(part, nn.Sequential):
            found.methods.add((part, "__getitem__"))
        if "functional_call" in chain.code.co_names:
            found.replaced.add(part)
    for path, inner in part.named_modules():
        if not names & _AT_ANY_DEPTH and not all(step.isdigit() or step in names for step in path.split(".") if step):
            continue
        if loose & _ALL_TENSORS:
            found.reads |= set(_tensors(inner.modules(), first="next" in chain.code.co_names))
        found.reads |= {(inner, name) for name in loose if name in inner._parameters or name in inner._buffers}
        if inner is not part or not is_readers:
            no_tensors = [name for name in loose if not hasattr(torch.Tensor, name)]  # a tensor is asked for x.device
            found.methods |= {(inner, name) for name in no_tensors if _is_users_method(type(inner), name)}
            found.asked |= {inner} if any(isinstance(inner, kind) for kind in code.classes) else set()


def _tensors(modules: Iterable[nn.Module], *, first: bool) -> Iterator[tuple[nn.Module, str]]:
    for module in modules:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if isinstance(tensor, torch.Tensor):
                yield module, name
                if first:
                    return


def _is_users_method(kind: type, name: str) -> bool:
    """Whether ``name`` is a method or property that a user's class adds to what modules have."""
    if name.startswith("__") or name == "forward" or hasattr(nn.Module, name):
        return False
    owner = next((base for base in kind.__mro__ if name in vars(base)), None)
    if owner is None or owner.__module__.split(".")[0] == "torch":
        return False
    value = vars(owner)[name]
    return isinstance(value, (FunctionType, property, classmethod, staticmethod))
