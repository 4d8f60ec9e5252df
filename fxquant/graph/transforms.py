"""Calls of a graph inside transforms of ``torch.func``, which forbid writing into what they have not made.

A quantizer reads a weight's range in every pass, and a batch norm follows its statistics: both write into buffers. Inside
``grad`` and ``vjp`` they are given copies to write into, which count in that call and are forgotten behind it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fxquant.errors import InputError

__all__ = ["inside_transform", "lent_buffers", "without_aliases"]

_KEPT = ("_ready", "_version", "seen_dtype", "_drawn")
"""What quantizers note in Python of the buffers that they hold."""


def inside_transform() -> bool:
    """Whether this runs inside a transform of ``torch.func``, and no compiler traces it."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _rounds(part: nn.Module) -> bool:
    return bool(getattr(part, "follows_graph", False) and getattr(part, "enabled", False))


@contextmanager
def lent_buffers(module: nn.Module) -> Iterator[None]:
    """Inside, every buffer of ``module`` is a copy; behind it all is as it was.

    Warns:
        UserWarning: a range or a statistic would have followed this call, and does not.

    Raises:
        InputError: the transform is none of gradients (``vmap``, ``jvp``), and quantizers are on.
    """
    parts = list(module.modules())
    levels = torch._C._functorch.get_interpreter_stack() or []
    if any(level.key() != torch._C._functorch.TransformType.Grad for level in levels) and any(map(_rounds, parts)):
        raise InputError(
            "of the transforms of torch.func only those of reverse mode (grad, vjp, jacrev) go through a model whose "
            "quantizers are on, not vmap or jvp: quantizers ask for numbers, which those do not have.\n"
            "  what to do: torch.func.grad for each sample in turn; or transform it inside fxquant.quantizers_off(model)."
        )
    if any(map(_follows, parts)):
        warnings.warn(
            "inside a transform of torch.func ranges and batch-norm statistics do not follow what passes: they stay as "
            "they are.\n  what to do: loss.backward() for the steps of a training; or hold them still, with "
            "quantizer.tracking = False and fxquant.freeze_batchnorm(model).",
            stacklevel=4,
        )
    before = [
        (part, part._buffers, {name: part.__dict__[name] for name in _KEPT if name in part.__dict__}) for part in parts
    ]
    copies = {id(b): b.clone() for _, buffers, _ in before for b in buffers.values() if b is not None}
    try:
        for part, buffers, _ in before:
            part.__dict__["_buffers"] = {n: None if b is None else copies[id(b)] for n, b in buffers.items()}
        yield
    finally:
        for part, buffers, noted in before:
            part.__dict__["_buffers"] = buffers
            for name in _KEPT:
                part.__dict__.pop(name, None)
            part.__dict__.update(noted)


def _follows(part: nn.Module) -> bool:
    """Whether ``part`` would have followed what passes now."""
    if not part.training:
        return False
    if _rounds(part):
        return bool(getattr(part, "tracking", False)) and getattr(part, "fixed_range", None) is None
    held = getattr(part, "statistics_frozen", True)
    return not held and getattr(part, "running_mean", None) is not None


def without_aliases(
    module: nn.Module, named: Iterable[tuple[str, torch.Tensor]], prefix: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """``named`` without what quantizers hold under their second names, of the layers that share them.

    Duplicates are asked for to find tensors that two modules have in common. Of one module under two names
    ``torch.func.functional_call`` would put back the argument that it had put there itself.
    """
    seen, aliases = set[int](), []
    for path, part in module.named_modules(prefix=prefix, remove_duplicate=False):
        if id(part) in seen and hasattr(part, "follows_graph"):
            aliases.append(f"{path}.")
        seen.add(id(part))
    return (pair for pair in named if not pair[0].startswith(tuple(aliases)))
