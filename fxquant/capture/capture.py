"""Capturing a model: from an ``nn.Module`` as its author wrote it to graphs that compute the same, bit for bit.

The model is copied first and never touched. What cannot be traced makes the smallest submodule an island that runs its
own code, and the parts of an island that can be traced become graphs inside it, at any depth.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxquant.capture.calls import Call, as_call
from fxquant.capture.filling import graphs_in
from fxquant.capture.islands import graphs_of, islands_of
from fxquant.capture.model_tracer import ModelTracer
from fxquant.capture.models import check_model, is_layer, own_copy, same_random_numbers, unwrapped
from fxquant.capture.seen_types import note_seen_types
from fxquant.graph.leveled import LeveledModule

__all__ = ["Captured", "capture"]


@dataclass(frozen=True)
class Captured:
    """A model as graphs, and what was given to make them.

    Attributes:
        model: a ``LeveledModule``; or, where the top module could not be traced, that module with graphs inside.
        graphs: every graph in it, outer ones first.
        call: the example's call; None without one.
        leaves: the paths of the modules that were named as leaves.
        is_layer: the model is one layer of torch.
    """

    model: Any
    graphs: tuple[LeveledModule, ...]
    call: Call | None
    leaves: tuple[str, ...]
    is_layer: bool


def capture(
    model: nn.Module, example_inputs: Any = None, *, for_training: bool = True, leaves: Iterable[str | type] = ()
) -> Captured:
    """Trace a copy of ``model`` into graphs at level *captured*.

    Args:
        model: any eager module. ``DataParallel``, DDP and ``torch.compile`` wrappers are taken off.
        example_inputs: what one call takes, see `as_call`; without it what Python asks about shapes has no answer.
        for_training: ask for the mode at run time; otherwise trace what eval mode does.
        leaves: paths or classes of modules to leave as they are.

    Raises:
        InputError: ``model`` is not an eager ``nn.Module`` (scripted, exported, already quantized, a class, a function),
            or does not run on ``example_inputs``.
        CaptureError: no part of it could be traced; the message names the module, the line and the cause.
    """
    model = check_model(unwrapped(model))
    owned, single = own_copy(model, for_training=for_training), is_layer(model)
    call = None if example_inputs is None else as_call(model, example_inputs)
    with same_random_numbers():
        tracer = ModelTracer(owned, call, for_training=for_training, leaves=tuple(leaves))
        made = graphs_in(tracer, type(model).__name__)
        graphs = tuple(graphs_of(made).values())
        if call is not None:
            note_seen_types(made, graphs, call)
    named = tuple(island.path for island in islands_of(made) if island.is_named)
    return Captured(made, graphs, call, named, single)
