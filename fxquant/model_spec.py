"""Models named on the command line: ``torchvision:resnet18``, ``timm:resnet18``, ``path/to/file.py:factory(width=16)``."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.errors import InputError

__all__ = ["build_model"]

_FORMS = "give torchvision:NAME, timm:NAME or path/to/file.py:factory"
_SPEC = re.compile(r"(?P<kind>.+?):(?P<name>[^():]+)(?P<arguments>\(.*\))?", re.DOTALL)


def build_model(spec: str, *, weights: str | None = None) -> nn.Module:
    """The float model that ``spec`` names, in eval mode; nothing is downloaded.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``, or ``FILE.py:FACTORY``, where FACTORY returns an ``nn.Module`` (a class
            will do). What it needs to be called with stands behind its name as in Python: ``nets.py:Net(10, width=16)``,
            numbers, texts, flags, lists and the like.
        weights: a file with a state dict, as ``torch.save(model.state_dict(), file)`` writes it.

    Raises:
        InputError: no such model, file or factory, or weights that do not fit.
    """
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise InputError(f"{spec!r} names no model: {_meant(spec)}.")
    kind, name = found["kind"], found["name"]
    args, kwargs = _arguments(spec, found["arguments"])
    if kind in ("torchvision", "timm") and args:
        raise InputError(f"{spec!r}: {kind} takes arguments by name, as {kind}:{name}(num_classes=10).")
    if kind == "torchvision":
        model = _from_torchvision(name, kwargs)
    elif kind == "timm":
        model = _from_timm(name, kwargs)
    else:
        model = _from_file(Path(kind), name, args, kwargs)
    if weights is not None:
        _load_weights(model, weights)
    return model.eval()


def _meant(spec: str) -> str:
    """What to write instead of a spec that has no ``:``."""
    if spec.endswith(".py") and os.path.isfile(spec):
        return f"say which function or class of the file makes it, as {spec}:factory"
    if os.path.isfile(spec):
        return (
            f"it is a file, which holds numbers and no code: {_FORMS}, and a file with its state dict behind --weights"
        )
    return _FORMS


def _arguments(spec: str, text: str | None) -> tuple[list[Any], dict[str, Any]]:
    """The arguments in the parentheses behind a name.

    Raises:
        InputError: they are no plain values.
    """
    try:
        call = ast.parse(f"f{text or '()'}", mode="eval").body
        assert isinstance(call, ast.Call)
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        return [ast.literal_eval(value) for value in call.args], named
    except (SyntaxError, ValueError, AssertionError):
        raise InputError(
            f"{spec!r}: the arguments {text} are not plain numbers, texts, flags, lists or dicts. Write them as in Python, "
            "for example nets.py:Net(10, width=16), in quotes for the shell."
        ) from None


def _called(make: Callable[..., Any], name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """What a factory makes of these arguments.

    Raises:
        InputError: it takes others.
    """
    try:
        inspect.signature(make).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"{name}{inspect.signature(make)} cannot be called so: {error}.\n"
            f"  what to do: write what it needs behind its name, for example '…:{name}(10, width=16)'."
        ) from None
    except ValueError:  # a signature that cannot be read: the call itself will tell
        pass
    return make(*args, **kwargs)


def _from_torchvision(name: str, kwargs: dict[str, Any]) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        raise InputError(f"torchvision has no model {name!r}.{_nearest(name, models.list_models())}")
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = models.get_model(name, weights=None, **{**options, **kwargs})
    return model


def _from_timm(name: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise InputError("timm is not installed.\n  what to do: pip install timm") from error
    if name not in timm.list_models():
        raise InputError(f"timm has no model {name!r}.{_nearest(name, timm.list_models())}")
    model: nn.Module = timm.create_model(name, **{"pretrained": False, **kwargs})
    return model


def _from_file(path: Path, name: str, args: list[Any], kwargs: dict[str, Any]) -> nn.Module:
    if not path.is_file():
        raise InputError(
            f"there is no file {os.fspath(path)!r}: give torchvision:NAME, timm:NAME or path/to/file.py:factory."
        )
    loaded = importlib.util.spec_from_file_location(path.stem, path)
    if loaded is None or loaded.loader is None:
        raise InputError(f"{os.fspath(path)!r} is not a Python file.")
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    factory: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(factory):
        names = [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise InputError(f"{os.fspath(path)!r} has no function or class {name!r}.{_nearest(name, names)}")
    model = _called(factory, name, args, kwargs)
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
