"""Integer forms with all their faces: the one registry through which kernels and file formats find what a form is there.

An integer form is a class that computes one op on integers, exactly: the reference. What else is known of it are its faces:

    real      what it computes on real numbers; QDQ files and PT2E programs are written from it
    torch     its kernel of torch's int8 operators
    native    its operation in a native plan
    operators the operators on integers that a QOperator file has in its place

Each is entered here, or a ``Refusal`` in its place says why there is none. A form is looked up by its own class, never
by a base class: what a subclass adds would be lost. One that is not entered runs by its reference, and is refused where it
would be written. ``fxquant.forms`` enters those of the package; enter your own by

    register_form(Form(arithmetic=MyForm, real=RealForm(lambda part, x_scale: Computation(function, {"gain": part.gain}))))
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import ExportError, LevelError, Refusal
from fxquant.numerics.scheme import Scheme

__all__ = [
    "FACES",
    "FORMS",
    "Computation",
    "Form",
    "HeldIntegers",
    "RealForm",
    "TorchKernel",
    "computation_of",
    "form_of",
    "lost_state",
    "moves",
    "own_function",
    "register_form",
]


@dataclass(frozen=True)
class HeldIntegers:
    """A constant that is kept as integers: ``x = q * scale``.

    Args:
        q: the integers.
        scale: ``()``, or ``(C,)`` for one scale per channel along ``axis``.
        axis: the channel axis.
        scheme: their grid; None for a 32-bit bias.
    """

    q: Tensor
    scale: Tensor
    axis: int
    scheme: Scheme | None


@dataclass(frozen=True)
class Computation:
    """An integer op on real numbers: ``function(*operands, **parameters, **attributes)``, clamped.

    Args:
        function: what is computed; None for the op's own function.
        parameters: its constant tensors, by the names that ``function`` takes them by.
        rows: for a lookup instead of a function: the integers of a table's rows, on the output's grid.
        bounds: of a clamp behind a result that stays real, None where open.
        dtype: of a result that stays real; as computed where None.
        border: ``enter`` for rounding alone, where real numbers become integers; ``leave`` where they become real again.
    """

    function: Callable[..., Any] | None = None
    parameters: dict[str, HeldIntegers | Tensor | None] = field(default_factory=dict)
    rows: Tensor | None = None
    bounds: tuple[float | None, float | None] = (None, None)
    dtype: torch.dtype | None = None
    border: str = ""


@dataclass(frozen=True)
class RealForm:
    """What a form computes on real numbers.

    Args:
        computation: from a form and the scale of its first operand to what it computes on real numbers.
        state: the names of all buffers, parameters and submodules that ``computation`` accounts for, beside those of every
            ``IntegerOp``. A form that holds more is an error at level *integer*.
    """

    computation: Callable[[Any, float], Computation]
    state: Collection[str] = ()


@dataclass(frozen=True)
class TorchKernel:
    """How a form runs on torch's int8 operators.

    Args:
        step: from a ``kernels.place.Place`` to a ``Step``; raises a ``Refusal`` where the reference has to run.
        expected: from a form and the ``Operators`` of this machine to the kernel's name in reports, before it has run.
    """

    step: Callable[[Any], Any]
    expected: Callable[[Any, Any], str]


Builder = Callable[[Any, Any, Any], Any]
"""From ``kernels.native.lines.Lines``, a node and its form to an ``Operation``; raises a ``Refusal`` where there is none."""

NOT_WRITTEN = Refusal("it is not written")


@dataclass(frozen=True, kw_only=True)
class Form:
    """An integer form and its faces; a ``Refusal`` in the place of each that it does not have.

    Args:
        arithmetic: its class, the reference on integers.
        real: what it computes on real numbers.
        torch: its kernel of torch's operators.
        native: its native operation, for every op that has none of its own in ``native_ops``.
        native_ops: native operations of single ops, by ``OpEntry.native``.
        moves: it moves the numbers of a tensor, and computes none.
        operators: the ONNX operators on integers that may stand for it in a QOperator file.
    """

    arithmetic: type[nn.Module]
    real: RealForm | Refusal = NOT_WRITTEN
    torch: TorchKernel | Refusal = NOT_WRITTEN
    native: Builder | Refusal = NOT_WRITTEN
    native_ops: Mapping[str, Builder] = field(default_factory=dict)
    moves: bool = False
    operators: tuple[str, ...] | Refusal = NOT_WRITTEN

    def builder(self, part: Any) -> Builder | Refusal:
        """What makes the native operation of ``part``."""
        return self.native_ops.get(getattr(getattr(part, "entry", None), "native", "")) or self.native

    def lacks(self) -> dict[str, str]:
        """The faces that it does not have, each with the reason."""
        found = {name: getattr(self, name) for name in FACES}
        return {name: face.why for name, face in found.items() if isinstance(face, Refusal)}


FACES = ("real", "torch", "native", "operators")

FORMS: dict[type[nn.Module], Form] = {}
"""Every form by the class of its arithmetic; open, see ``register_form``."""


def register_form(form: Form) -> Form:
    """Enter a form; one of the same class is replaced.

    Raises:
        LevelError: a face is neither what it should be nor a ``Refusal``.
    """
    if not (isinstance(form.arithmetic, type) and issubclass(form.arithmetic, nn.Module)):
        raise LevelError(f"a form's arithmetic is a class of modules; this is {form.arithmetic!r}.")
    wanted: dict[str, Any] = {"real": RealForm, "torch": TorchKernel, "operators": tuple}
    for name in FACES:
        face, kind = getattr(form, name), wanted.get(name)
        if not isinstance(face, Refusal) and not (callable(face) if kind is None else isinstance(face, kind)):
            raise LevelError(
                f"the form {form.arithmetic.__name__} has {face!r} for its face {name!r}.\n"
                f"  what to do: give {'a builder' if kind is None else f'a {kind.__name__}'}, or Refusal(reason)."
            )
    FORMS[form.arithmetic] = form
    return form


def form_of(part: Any) -> Form | None:
    """The form of a module by its own class; None where it is none that is known."""
    return FORMS.get(type(part))


def moves(part: Any) -> bool:
    """Whether a form moves numbers and computes none."""
    form = form_of(part)
    return form is not None and form.moves


def computation_of(part: Any, input_scale: float) -> Computation:
    """What ``part`` computes on real numbers.

    Args:
        part: an integer form.
        input_scale: the scale of its first operand.

    Raises:
        ExportError: that is not known of its class.
    """
    form = form_of(part)
    if form is None or isinstance(form.real, Refusal):
        name, known = type(part).__name__, "" if form is None else f" ({form.lacks()['real']})"
        op = getattr(getattr(part, "entry", None), "name", "")
        raise ExportError(
            f"the integer form {name} of op {op!r} cannot be written for other runtimes: what it computes on real numbers, "
            f"and with which parameters, is not known{known}.\n"
            f"  what to do: register it, as register_form(Form(arithmetic={name}, real=RealForm(...))) of fxquant.forms; or "
            "keep the op in float with a recipe; or export_program(..., form='integer'), which writes the integer "
            "arithmetic itself."
        )
    return form.real.computation(part, input_scale)


def own_function(part: Any, input_scale: float) -> Computation:
    """A form that computes its op's own function on real numbers, and has no parameters."""
    return Computation()


def lost_state(part: nn.Module) -> set[str]:
    """What ``part`` holds that its export would lose; empty for a form that cannot be written at all."""
    form = form_of(part)
    if form is None or isinstance(form.real, Refusal):
        return set()
    held = {name for owned in (part._buffers, part._parameters, part._modules) for name in owned}
    parameters = {f"parameter_{name}" for name in getattr(part, "parameter_names", ())}
    return held - _ROOT_STATE - parameters - set(form.real.state)


_ROOT_STATE = {"scale", "zero_point", "low", "high", "offset"}
"""What every form holds: the output's grid, merged clamps and the operands' zero points."""
