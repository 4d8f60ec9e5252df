"""What capture found out: submodules that run as they are, and answers that Python forced while the model was traced.

``if x.shape[1] == 3`` has one answer for the example and perhaps another for a later input. The answer taken is written
into the graph as a call of `require`: a later input that contradicts it is an error, never a wrong result.
"""

from __future__ import annotations

import operator
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxquant.errors import Refusal, SpecializationError

__all__ = ["Island", "Specialization", "expression", "is_users", "require", "unproven", "user_line"]

_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_OWN = (
    os.path.join(os.path.dirname(torch.__file__), ""),
    *(os.path.join(_PACKAGE, d, "") for d in ("capture", "graph")),
    "<",
)
_ENTRY = os.path.join(os.path.dirname(__file__), "capture.py")
_LAYERS = os.path.join(os.path.dirname(torch.nn.__file__), "")
_CALLING = os.path.join(_LAYERS, "modules", "module.py")
_LIBRARY, _INSTALLED = os.path.join(sysconfig.get_path("stdlib"), ""), os.path.join(sysconfig.get_path("purelib"), "")


def is_users(filename: str) -> bool:
    """Whether a source file is neither torch's, nor of this package, nor of Python's own library."""
    if filename.startswith(_OWN) or filename.endswith("typing_extensions.py"):
        return False
    return not filename.startswith(_LIBRARY) or filename.startswith(_INSTALLED) or "site-packages" in filename


@dataclass(frozen=True)
class Island:
    """A module that runs its author's own code, with graphs inside where its parts could be traced.

    Attributes:
        path: the module; empty for the top module.
        cause: why it could not be traced, in a sentence.
        source: ``file:line`` that stopped the tracer.
        advice: what to change to avoid it.
        is_named: the user asked for it.
    """

    path: str
    cause: str
    source: str | None
    advice: str
    is_named: bool = False

    @classmethod
    def of(cls, error: BaseException, path: str) -> Island:
        """The island that ``error``, raised while tracing the module at ``path``, makes of it."""
        source, trace = None, error.__traceback__
        while trace is not None:
            if is_users(trace.tb_frame.f_code.co_filename):
                source = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
            trace = trace.tb_next
        line = str(error).splitlines()[0] if str(error) else ""
        if not isinstance(error, Refusal):
            why = f"{type(error).__name__}: {line or 'no message'}"
            error = Refusal(why, "make that line independent of tensor values")
        return cls(path, error.why, source, error.what_to_do)


@dataclass(frozen=True)
class Specialization:
    """A value that a Python statement asked for, and that the captured graph holds for given.

    Attributes:
        path: the module whose forward asked; empty for the top module.
        text: what was asked and the answer, as ``x.shape[1] == 3 is True``.
        source: ``file:line`` of the statement.
        exact: a number itself was needed (an index, a range), not the answer to a comparison.
    """

    path: str
    text: str
    source: str | None
    exact: bool


_UNPROVEN: ContextVar[list[str] | None] = ContextVar("unproven", default=None)


@contextmanager
def unproven() -> Iterator[list[str]]:
    """The answers held for given that do not follow from what is known of symbolic sizes, as graphs run on such."""
    found: list[str] = []
    token = _UNPROVEN.set(found)
    try:
        yield found
    finally:
        _UNPROVEN.reset(token)


def _is_known(value: Any, expected: Any) -> bool:
    if isinstance(value, torch.SymBool):
        return statically_known_true(value if expected else torch.sym_not(value))
    return not isinstance(value, (torch.SymInt, torch.SymFloat)) or statically_known_true(value == expected)


def require(value: Any, expected: Any, text: str, path: str, source: str | None) -> None:
    """Raise unless ``value`` is still ``expected``.

    Raises:
        SpecializationError: names the statement that was answered otherwise when the model was captured.
    """
    noted = _UNPROVEN.get()
    if noted is not None and not _is_known(value, expected):
        noted.append(f"{text} ({source or 'source unknown'})")
    if type(expected) is bool:
        value = bool(value)
    if value != expected:
        own = (
            f"keep the module's own code by naming it: prepare(..., leaves=[{path!r}])"
            if path
            else "move that statement into a submodule, and keep its own code by naming it in prepare(..., leaves=[...])"
        )
        raise SpecializationError(
            f"this input needs another way through the model than the example that it was captured with.\n"
            f"  where: {path or 'the top module'}, {source or 'source unknown'}\n"
            f"  captured: {text}; now it is {value}\n"
            f"  what to do: prepare with example_inputs like this one, or {own}."
        )


require.is_check = True  # type: ignore[attr-defined]

_SIGNS = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.mod: "%", operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">",
    operator.ge: ">=", operator.pow: "**",
}  # fmt: skip


def expression(value: Any, depth: int = 6) -> str:
    """A node's value as the user would write it: ``x.shape[1] % 4``."""
    if not isinstance(value, fx.Node):
        return str(value)
    args = value.args
    if value.op == "placeholder" or depth == 0 or value.op in ("get_attr", "call_module"):
        return str(value.target) if value.op == "placeholder" else value.name
    first = expression(args[0], depth - 1) if args else ""
    if value.target is getattr and len(args) > 1:
        return f"{first}.{args[1]}"
    if value.target is operator.getitem:
        return f"{first}[{expression(args[1], depth - 1)}]"
    if value.target in _SIGNS and len(args) == 2:
        return f"{first} {_SIGNS[value.target]} {expression(args[1], depth - 1)}"
    rest = ", ".join(expression(a, depth - 1) for a in args[1:])
    if value.op == "call_method":
        return f"{first}.{value.target}({rest})"
    name = getattr(value.target, "__name__", str(value.target))
    return f"{name}({first}{', ' if rest else ''}{rest})"


def user_line() -> str | None:
    """``file:line`` of the innermost frame that is neither torch's nor ours; in a layer of torch where there is none."""
    frame: FrameType | None = sys._getframe(1)
    layer = None
    while frame is not None and frame.f_code.co_filename != _ENTRY:
        name = frame.f_code.co_filename
        if is_users(name):
            return f"{name}:{frame.f_lineno}"
        if layer is None and name.startswith(_LAYERS) and name != _CALLING:
            layer = f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return layer
