"""Every error that fxquant raises on purpose.

    FxquantError
    ├── CaptureError          the model could not be traced            (module, line, cause)
    ├── SpecializationError   an input contradicts what a captured graph holds for given
    ├── SchemeError           a quantization scheme that cannot be     (also a ValueError)
    ├── RecipeError           a setting that matched nothing, or clashes
    ├── CalibrationError      nothing, NaN or infinity was observed; or ranges are missing
    ├── InputError            an input of the wrong shape, dtype, device or kind
    ├── LevelError            a verb was given a model of another level, or a pass broke a law
    ├── CheckpointError       a saved file that does not fit the model
    ├── ExportError           a model that cannot be written for another runtime, or that it refuses
    └── MissingPackageError   a package that an extra of fxquant brings   (also an ImportError)

Each message says what happened, where, why, and what to do about it.

A ``Refusal`` is no error: it is how any part says that it does not do something, and what asked decides what follows.
"""

from __future__ import annotations

__all__ = [
    "CalibrationError",
    "CaptureError",
    "CheckpointError",
    "ExportError",
    "FxquantError",
    "InputError",
    "LevelError",
    "MissingPackageError",
    "RecipeError",
    "Refusal",
    "SchemeError",
    "SpecializationError",
]


class FxquantError(Exception):
    """The root of the tree: catch this to catch everything fxquant raises on purpose.

    Example:
        >>> try:
        ...     fxquant.convert(model)
        ... except fxquant.FxquantError as error:
        ...     print(str(error).splitlines()[0])
        convert takes a model at level prepared or frozen, and was given a Net.
    """


class CaptureError(FxquantError):
    """The model could not be traced into a graph."""


class SpecializationError(FxquantError):
    """An input asks for another way through the model than the one that was captured."""


class SchemeError(FxquantError, ValueError):
    """A quantization scheme whose settings contradict each other or lie out of bounds."""


class RecipeError(FxquantError, ValueError):
    """A recipe whose setting matched nothing, or whose settings clash."""


class CalibrationError(FxquantError):
    """Ranges are missing or cannot be trusted."""


class InputError(FxquantError, ValueError):
    """An input (example, batch, file, model) of the wrong kind, shape, dtype or device."""


class LevelError(FxquantError):
    """A model or graph is not at the level that a verb or pass takes, or a pass broke a law of its level."""


class CheckpointError(FxquantError):
    """A saved file that does not fit the model it is loaded into."""


class ExportError(FxquantError):
    """A model that cannot be written in the format of another runtime, or that the runtime refuses."""


class MissingPackageError(FxquantError, ImportError):
    """A package that is not installed, and which extra of fxquant brings it."""


class Refusal(Exception):  # noqa: N818 - an answer, not a failure
    """The one way to say no: where, why and what to do. Everything else is a yes.

    It is returned where what asked goes on another way, as ``A | Refusal``, or as ``Refusal | None`` of a check; raised
    where the answer is found deep inside a call; and held where it is known beforehand, as the face that a form does not
    have. A node's ``reason`` and a report hold its ``why``; a verb that cannot go on raises an error of the tree above.

    Args:
        why: a clause in words for the user, which can follow "because".
        what_to_do: a clause too; empty where what asked knows better.
        where: the node, op, layer or setting; empty where what asked knows it.
    """

    def __init__(self, why: str, what_to_do: str = "", where: str = "") -> None:
        super().__init__(why, what_to_do, where)
        self.why, self.what_to_do, self.where = why, what_to_do, where

    def at(self, where: str) -> Refusal:
        """The same, within ``where``."""
        return Refusal(self.why, self.what_to_do, f"{where}: {self.where}" if self.where else where)

    def __str__(self) -> str:
        advice = f".\n  what to do: {self.what_to_do}." if self.what_to_do else ""
        return f"{self.where}: {self.why}{advice}" if self.where else f"{self.why}{advice}"
