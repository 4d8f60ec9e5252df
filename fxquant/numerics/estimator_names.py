"""Names of range estimators as a scheme holds them; a parameter stands behind a colon: ``percentile:99.9``, ``lp:2``."""

from __future__ import annotations

import math

from fxquant.errors import SchemeError

__all__ = ["ESTIMATORS", "PARAMETRIZED", "estimator_and_parameter"]

ESTIMATORS = ["minmax", "moving_average", "percentile", "mse", "kl", "auto"]
"""The names that need no parameter; ``fxquant.quantizers.register_estimator`` adds to them."""

PARAMETRIZED = {"percentile": ("percentile:P", 50.0, 100.0), "lp": ("lp:P", 0.0, 64.0)}
"""Names that take one: how they are written, and the interval ``(low, high]`` of the parameter."""


def estimator_and_parameter(name: str) -> tuple[str, float | None]:
    """The parts of an estimator's name: ``("percentile", 99.9)`` of ``"percentile:99.9"``, ``("mse", None)`` of ``"mse"``.

    Raises:
        SchemeError: there is no such estimator, or the parameter is not a number of its interval.
    """
    if name in ESTIMATORS:
        return name, None
    kind, colon, text = name.partition(":") if isinstance(name, str) else (name, "", "")
    if kind not in PARAMETRIZED or not colon:
        written = ", ".join(form for form, _, _ in PARAMETRIZED.values())
        raise SchemeError(
            f"estimator={name!r} is not known. Choose one of {', '.join(ESTIMATORS)}; or {written} with a number for P.\n"
            "  what to do: if it is one of your own, call fxquant.quantizers.register_estimator before it is named (in a "
            "new process too, before load)."
        )
    form, low, high = PARAMETRIZED[kind]
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not low < number <= high:
        raise SchemeError(f"estimator={name!r}: P of {form} is a number above {low:g}, up to {high:g}.")
    return kind, number
