"""Forward hooks of a model that is traced: kept, traced through, or a reason to leave a module as it is."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import nn

from fxquant.errors import Refusal

__all__ = ["HOOKS", "refuse_hooks"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def refuse_hooks(m: nn.Module) -> None:
    """Raise where a module has hooks that have to run as they are: backward hooks, and those that may keep what they see.

    Raises:
        Refusal: names the hooks.
    """
    for kind in HOOKS:
        hooks = [hook for hook in getattr(m, kind).values() if kind.startswith("_backward") or not _keeps_nothing(hook)]
        if hooks:
            names = ", ".join(getattr(hook, "__name__", type(hook).__name__) for hook in hooks)
            raise Refusal(f"it has hooks ({names}), which run as they are", "remove the hooks before prepare")


def _keeps_nothing(hook: Any) -> bool:
    """Whether a hook is a function with nothing at hand to keep what it sees in: then it is traced like forward."""
    if not isinstance(hook, FunctionType):
        return False
    held = [cell.cell_contents for cell in hook.__closure__ or ()]
    held += [hook.__globals__.get(name) for name in hook.__code__.co_names]
    return not any(isinstance(value, (list, dict, set, torch.Tensor, nn.Module)) for value in held)
