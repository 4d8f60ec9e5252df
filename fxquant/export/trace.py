"""A model as torch.export sees it: with as many free sizes as can be had, and why where it cannot be followed."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.capture.islands import islands_of
from fxquant.errors import ExportError
from fxquant.export.free_sizes import is_fixed, refused_axes
from fxquant.graph.leveled import ISLAND_MARK

__all__ = ["first_line", "has_free_batch", "quiet", "refusal", "trace", "two_rows"]


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: str, *, largest_batch: int | None = None
) -> torch.export.ExportedProgram:
    """``model`` as torch.export sees it.

    Args:
        model: any module whose inputs and outputs torch.export knows.
        args, kwargs: an example of a call, of at least two rows where the batch is to be free.
        dynamic: which sizes stay free where the model's code allows: ``sizes`` (all), ``batch`` (axis 0) or ``none``.
        largest_batch: the most rows that a free first axis has; None for any number.
    """
    refused = refused_axes(model, args, kwargs) if dynamic == "sizes" else set()

    def shape(x: Any) -> dict[int, Any] | None:
        if not isinstance(x, Tensor):
            return None
        axes = {"sizes": range(x.ndim), "batch": range(min(1, x.ndim))}.get(dynamic, range(0))
        fixed = {x.ndim + axis for axis in refused} if x.ndim >= 4 else set()
        auto = torch.export.Dim.AUTO
        first = auto if largest_batch is None else auto(max=largest_batch)
        return {axis: auto if axis else first for axis in axes if x.shape[axis] != 1 and axis not in fixed}

    named = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    with torch.no_grad(), quiet():
        return torch.export.export(
            model, args, kwargs, dynamic_shapes=pytree.tree_map(shape, dict(named)), strict=False
        )


def has_free_batch(program: torch.export.ExportedProgram) -> bool:
    """Whether the first axis of some input may have any size."""
    inputs = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    return any(isinstance(x, Tensor) and x.ndim > 0 and not is_fixed(x.shape[0]) for x in values)


def two_rows(example: Any) -> Any:
    """The exporter takes an axis of size 1 for fixed: where the example's first tensor is one row, it is given twice."""
    tensors = [x for x in pytree.tree_leaves(example) if isinstance(x, Tensor)]
    if not tensors or not tensors[0].ndim or tensors[0].shape[0] != 1:
        return example
    return pytree.tree_map_only(Tensor, lambda x: torch.cat([x, x]) if x.ndim and x.shape[0] == 1 else x, example)


def refusal(error: BaseException, model: nn.Module) -> ExportError:
    """Why torch.export cannot follow the model, and in which island."""
    islands = {island.path: island for island in islands_of(model)}
    inside = _island_of(error.__traceback__)
    told = f"torch.export cannot follow the model: {first_line(error)}"
    if inside in islands or (inside is None and len(islands) == 1):
        island = islands[inside] if inside is not None else next(iter(islands.values()))
        where = f" ({island.source})" if island.source else ""
        told += f"\n  where: {island.path or 'the top module'}, which runs its own code because {island.cause}{where}"
        told += f"\n  what to do: {island.advice}; or export the part of the model around it."
    elif islands:
        told += f"\n  where: one of the modules that run their own code: {', '.join(p or '(top)' for p in islands)}."
    return ExportError(told)


def _island_of(trace_back: TracebackType | None) -> str | None:
    """The path of the innermost island whose code was running."""
    found = None
    while trace_back is not None:
        owner = trace_back.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and ISLAND_MARK in owner.__dict__:
            found = str(owner.__dict__[ISLAND_MARK].path)
        trace_back = trace_back.tb_next
    return found


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's own warnings, log and prints, which speak of what the user did not write."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
