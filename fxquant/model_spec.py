"""Models named on the command line: ``torchvision:resnet18``, ``timm:resnet18``, ``path/to/file.py:factory(width=16)``."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.checkpoint import unreadable
from fxquant.errors import FxquantError, InputError

__all__ = ["build_model"]

_FORMS = "give torchvision:NAME, timm:NAME or path/to/file.py:factory"
_SPEC = re.compile(r"(?P<kind>.+?):(?P<name>[^():]+)(?P<arguments>\(.*\))?", re.DOTALL)


def build_model(spec: str, *, weights: str | None = None) -> nn.Module:
    """The float model that ``spec`` names, in eval mode; nothing is downloaded.

    Weights that it draws at random are the same whenever it is built, so that what one command wrote fits the next one's
    model.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``, or ``FILE.py:FACTORY``, where FACTORY returns an ``nn.Module`` (a class
            will do). What it needs to be called with stands behind its name as in Python: ``nets.py:Net(10, width=16)``,
            numbers, texts, flags, lists and the like.
        weights: a file with a state dict, as ``torch.save(model.state_dict(), file)`` writes it.

    Raises:
        InputError: no such model, file or factory, one that raises, or weights that do not fit.
    """
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise InputError(f"{spec!r} names no model: {_meant(spec)}.")
    kind, name = found["kind"], found["name"]
    args, kwargs = _arguments(spec, found["arguments"])
    if kind in ("torchvision", "timm") and args:
        raise InputError(f"{spec!r}: {kind} takes arguments by name, as {kind}:{name}(num_classes=10).")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
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
        more = {
            ".onnx": f"; fxquant info {spec} tells what is in it, and fxquant errors MODEL --onnx {spec} what it loses",
            ".pt": f"; behind --weights stands a file with its state dict, and fxquant info {spec} tells what is in it",
        }.get(os.path.splitext(spec)[1], ", and a file with its state dict behind --weights")
        return f"it is a file, which holds numbers and no code: {_FORMS}{more}"
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


@contextlib.contextmanager
def _told(what: str, path: Path | None = None) -> Iterator[None]:
    """What code of others raises becomes one sentence that says where: in ``path``, or where it was raised."""
    try:
        yield
    except FxquantError:
        raise
    except SyntaxError as error:
        raise InputError(f"{what} is not Python: {error.msg} ({error.filename}:{error.lineno}).") from error
    except (Exception, SystemExit) as error:
        frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        own = [frame for frame in frames if path is not None and frame[0] == str(path.absolute())]
        where, line = (own or frames)[-1]
        words = " ".join(str(error).split())[:300]
        raise InputError(f"{what} raises {type(error).__name__}: {words} ({where}:{line}).") from error


def _from_torchvision(name: str, kwargs: dict[str, Any]) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        raise InputError(f"torchvision has no model {name!r}.{_nearest(name, models.list_models())}")
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with _told(_call_text("torchvision", name, kwargs)):
        model: nn.Module = models.get_model(name, weights=None, **{**options, **kwargs})
    return model


def _from_timm(name: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise InputError("timm is not installed.\n  what to do: pip install timm") from error
    if name not in timm.list_models():
        raise InputError(f"timm has no model {name!r}.{_nearest(name, timm.list_models())}")
    with _told(_call_text("timm", name, kwargs)):
        model: nn.Module = timm.create_model(name, **{"pretrained": False, **kwargs})
    return model


def _call_text(kind: str, name: str, kwargs: dict[str, Any]) -> str:
    given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    return f"{kind}:{name}({given})" if given else f"{kind}:{name}"


def _from_file(path: Path, name: str, args: list[Any], kwargs: dict[str, Any]) -> nn.Module:
    if not path.is_file():
        raise InputError(
            f"there is no file {os.fspath(path)!r}: give torchvision:NAME, timm:NAME or path/to/file.py:factory."
        )
    module = _executed(path)
    factory: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(factory):
        own = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        names = [n for n in own if callable(getattr(module, n)) and not n.startswith("_")]
        nearest = _nearest(name, names) or (f" It has {', '.join(names[:8])}." if names else "")
        raise InputError(f"{os.fspath(path)!r} has no function or class {name!r}.{nearest}")
    with _told(f"{name}({', '.join([*map(repr, args), *(f'{k}={v!r}' for k, v in kwargs.items())])})", path):
        model = _called(factory, name, args, kwargs)
    if not isinstance(model, nn.Module):
        raise InputError(f"{name}() of {os.fspath(path)!r} returned a {type(model).__name__}, not an nn.Module.")
    return model


def _executed(path: Path) -> Any:
    """The module that a file is: with the files beside it importable, as where Python runs it, and known by its name."""
    place = str(path.absolute())
    held = sys.modules.get(path.stem)
    name = path.stem if held is None or getattr(held, "__file__", None) == place else f"fxquant_model_{path.stem}"
    loaded = importlib.util.spec_from_file_location(name, place)
    if loaded is None or loaded.loader is None:
        raise InputError(f"{os.fspath(path)!r} is not a Python file.")
    module = sys.modules[name] = importlib.util.module_from_spec(loaded)
    folder = os.path.dirname(place)
    sys.path.insert(0, folder)
    try:
        with _told(repr(os.fspath(path)), path):
            loaded.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:  # what its functions import when they are called
            sys.path.append(folder)
    return module


def _load_weights(model: nn.Module, path: str) -> None:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path!r} with weights.") from error
    except Exception as error:
        remedy = f"Write it with torch.save(model.state_dict(), {path!r})."
        raise InputError(f"{path!r} cannot be read as a state dict: {unreadable(error)}. {remedy}") from error
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
