"""Models named on the command line: ``torchvision:resnet18``, ``timm:resnet18``, ``path/to/file.py:factory``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.errors import InputError

__all__ = ["build_model"]

_FORMS = "give torchvision:NAME, timm:NAME or path/to/file.py:factory"


def build_model(spec: str, *, weights: str | None = None) -> nn.Module:
    """The float model that ``spec`` names, in eval mode; nothing is downloaded.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``, or ``FILE.py:FACTORY``, where FACTORY takes no arguments and returns
            an ``nn.Module`` (a class will do).
        weights: a file with a state dict, as ``torch.save(model.state_dict(), file)`` writes it.

    Raises:
        InputError: no such model, file or factory, or weights that do not fit.
    """
    kind, separator, name = spec.rpartition(":")
    if not separator or not kind or not name:
        raise InputError(f"{spec!r} names no model: {_FORMS}.")
    if kind == "torchvision":
        model = _from_torchvision(name)
    elif kind == "timm":
        model = _from_timm(name)
    else:
        model = _from_file(Path(kind), name)
    if weights is not None:
        _load_weights(model, weights)
    return model.eval()


def _from_torchvision(name: str) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        raise InputError(f"torchvision has no model {name!r}.{_nearest(name, models.list_models())}")
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = models.get_model(name, weights=None, **options)
    return model


def _from_timm(name: str) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise InputError("timm is not installed.\n  what to do: pip install timm") from error
    if name not in timm.list_models():
        raise InputError(f"timm has no model {name!r}.{_nearest(name, timm.list_models())}")
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def _from_file(path: Path, name: str) -> nn.Module:
    if not path.is_file():
        raise InputError(
            f"there is no file {os.fspath(path)!r}: give torchvision:NAME, timm:NAME or path/to/file.py:factory."
        )
    loaded = importlib.util.spec_from_file_location(path.stem, path)
    if loaded is None or loaded.loader is None:
        raise InputError(f"{os.fspath(path)!r} is not a Python file.")
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    factory: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(factory):
        names = [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise InputError(f"{os.fspath(path)!r} has no function or class {name!r}.{_nearest(name, names)}")
    model = factory()
    if not isinstance(model, nn.Module):
        raise InputError(f"{name}() of {os.fspath(path)!r} returned a {type(model).__name__}, not an nn.Module.")
    return model


def _load_weights(model: nn.Module, path: str) -> None:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path!r} with weights.") from error
    except Exception as error:
        raise InputError(f"{path!r} cannot be read as a state dict: {error}") from error
    if not isinstance(state, dict):
        raise InputError(f"{path!r} holds a {type(state).__name__}; save model.state_dict() instead.")
    state = state.get("state_dict", state)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise InputError(f"the weights in {path!r} do not fit: {first}") from error


def _nearest(wanted: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wanted, known, n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""
