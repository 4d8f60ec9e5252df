"""One call of a module, as an example for capturing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Call"]


@dataclass(frozen=True)
class Call:
    """The arguments of a call, the module whose forward made it, and that module's method it was made in, if any."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    caller: nn.Module | None = None
    method: str | None = None
