"""Which names a module's own code reads: for modules that run as their author wrote them, whose graph nobody has."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

__all__ = ["names_read"]


def names_read(owner: type) -> set[str]:
    """The attributes and globals named in ``owner.forward``, and in the methods and functions that it calls.

    Followed are methods of the class and functions of the module that it was written in. What code does with names that it
    makes up (``getattr(x, name)``) stays unknown.
    """
    found: set[str] = set()
    seen: set[CodeType] = set()
    open_functions: list[Any] = [owner.forward] if hasattr(owner, "forward") else []
    while open_functions:
        function = inspect.unwrap(open_functions.pop())
        if not isinstance(function, FunctionType) or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        names = {name for code in _codes(function.__code__) for name in code.co_names}
        found |= names
        for name in names:
            for value in (inspect.getattr_static(owner, name, None), function.__globals__.get(name)):
                value = value.fget if isinstance(value, property) else value
                if isinstance(value, FunctionType) and not str(value.__module__).startswith("torch."):
                    open_functions.append(value)
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A code object, and those of functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
