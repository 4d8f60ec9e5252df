"""The networks of ``capture_zoo.py`` and their inputs: torchvision, timm and transformers, built without any download.

`entries` lists them by name, which costs nothing; `build` makes one, with weights that carry a signal to the output
(`zoo_signal.randomize`), and knows how to make its inputs at any batch size and any image size, clip size or length.
"""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Iterable

import torch
import zoo_timm
import zoo_torchvision
import zoo_transformers
from torch import Tensor, nn
from zoo_cases import Case, Entry, Inputs, call, leaves
from zoo_signal import randomize

__all__ = ["FAMILIES", "build", "entries"]

FAMILIES = ("torchvision", "timm", "transformers")


def entries(families: Iterable[str], patterns: Iterable[str] = ("*",), timm: str = "families") -> list[Entry]:
    """Every network of ``families`` whose name matches one of ``patterns``; ``timm`` is ``"families"`` or ``"all"``."""
    named = {
        "torchvision": zoo_torchvision.named,
        "timm": lambda: zoo_timm.named(timm),
        "transformers": zoo_transformers.named,
    }
    found = [entry for family in families for entry in named[family]()]
    return [entry for entry in found if any(fnmatch.fnmatch(entry.model, pattern) for pattern in patterns)]


def build(entry: Entry, largest: float = math.inf) -> Case:
    """Build the network of ``entry`` with random weights, the same on every call.

    Raises:
        TooLargeError: its parameters take more than ``largest`` bytes.
    """
    makers = {"torchvision": zoo_torchvision.build, "timm": zoo_timm.build, "transformers": zoo_transformers.build}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        case = makers[entry.family](entry, largest)
        case.model.eval()
        if entry.kind == "quantized":
            return case
        sample = case.inputs(4 if _is_small(case) else 2, case.size)
        state = {name: value.clone() for name, value in case.model.state_dict().items()}
        try:
            randomize(case.model, sample)
            finite = _is_finite(case.model, sample)
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            finite = False
            case.note.append(f"random weights: {type(error).__name__}")
        if not finite:
            case.model.load_state_dict(state)
            case.note.append("weights as built")
    return case


def _is_finite(model: nn.Module, sample: Inputs) -> bool:
    with torch.no_grad():
        found = [value for _, value in leaves(call(model, sample)) if isinstance(value, Tensor)]
    return all(bool(value.isfinite().all()) for value in found if value.is_floating_point())


def _is_small(case: Case) -> bool:
    return sum(parameter.numel() for parameter in case.model.parameters()) < 50e6 and not isinstance(case.size, tuple)
