"""A user's own measure of a model: that it is a function, and that what it gives is a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import Tensor, nn

from fxquant.errors import InputError

__all__ = ["judged", "require_settings"]


def require_settings(evaluate: Any, max_drop: Any, budget: Any, steps: Any) -> None:
    """Raise unless ``auto`` can go on with these."""
    if not callable(evaluate):
        raise InputError(
            f"evaluate={evaluate!r} is not a function.\n"
            "  what to do: give one from a model to a number, the more the better, such as its accuracy in percent."
        )
    if not isinstance(max_drop, Real) or math.isnan(max_drop):
        raise InputError(f"max_drop={max_drop!r}: a number, in the unit of evaluate.")
    if budget is not None and not (isinstance(budget, Real) and 2 <= float(budget) <= 16):
        raise InputError(f"bits_per_weight={budget!r}: a budget lies between 2 and 16 bits.")
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps={steps!r}: a whole number of steps for each residual unit, at least 1.")


def judged(evaluate: Callable[[nn.Module], float], model: nn.Module, what: str) -> float:
    """What ``evaluate`` says of a model: a finite number, or a tensor that holds one."""
    found: Any = evaluate(model)
    number = found.item() if isinstance(found, Tensor) and found.numel() == 1 else found
    if not isinstance(number, Real):
        shown = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"{found!r:.60}"
        raise InputError(
            f"evaluate gave {shown} for {what}: it has to give a finite number.\n"
            "  what to do: let it return one float, the more the better."
        )
    if not math.isfinite(number):
        raise InputError(f"evaluate gave {number} for {what}: it has to give a finite number.")
    return float(number)
