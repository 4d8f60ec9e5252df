"""What a run is told by: a digest of a model, its data and its settings, the same in every process."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fxquant.capture.islands import graphs_of

__all__ = ["described", "fingerprint"]

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_PLAIN = (bool, int, float, str, type(None))


def fingerprint(model: nn.Module, prepared: nn.Module, data: Any, settings: Any) -> str:
    """A digest of the numbers, shapes, classes and attributes of ``model``, its graphs, of ``data`` and of ``settings``.

    Args:
        prepared: what ``prepare`` makes of the model: its graphs tell which functions the model's code calls.
        data: batches; of what is no tensor, plain values and classes count.
        settings: dataclasses, sets, dicts and plain values, see ``described``.
    """
    digest = hashlib.sha256()
    for name, part in model.named_modules(remove_duplicate=False):
        own = {key: value for key, value in vars(part).items() if isinstance(value, _PLAIN) and key != "training"}
        kind = type(part)
        digest.update(f"{name}: {kind.__module__}.{kind.__qualname__}({_text(part.extra_repr())}) {own!r}\n".encode())
    for held in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, value in held:
            digest.update(name.encode())
            _add(digest, value)
    for path, graph in graphs_of(prepared).items():
        digest.update(f"{path}: {_text(graph.graph)}\n".encode())
    leaves, form = tree_flatten(data)
    digest.update(_text(form).encode())
    for leaf in leaves:
        _add(digest, leaf)
    digest.update(described(settings).encode())
    return digest.hexdigest()


def described(value: Any) -> str:
    """A value as text that does not depend on the order of sets and dicts, nor on where objects lie in memory."""
    if is_dataclass(value) and not isinstance(value, type):
        inside = ", ".join(f"{field.name}={described(getattr(value, field.name))}" for field in fields(value))
        return f"{type(value).__qualname__}({inside})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{described(key)}: {described(one)}" for key, one in value.items())) + "}"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(described(one) for one in value)) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(described(one) for one in value) + ")"
    return _text(repr(value))


def _text(value: Any) -> str:
    return _ADDRESS.sub("", str(value))


def _add(digest: Any, leaf: Any) -> None:
    if not isinstance(leaf, Tensor):
        digest.update((repr(leaf) if isinstance(leaf, _PLAIN) else type(leaf).__qualname__).encode())
        return
    digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
    if leaf.layout is torch.strided and not leaf.is_meta:
        digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
