"""What code around a part of a model does with it besides calling it: what a graph in its place has to keep, or cannot."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fxquant.capture.eager_recorder import EagerRecorder
from fxquant.capture.models import is_layer

__all__ = ["Use", "use_from_outside"]


@dataclass(frozen=True)
class Use:
    """What code around a part does with it.

    Attributes:
        reads: the names of a layer's own tensors that it reads; a graph keeps them.
        refused: in words, what else it does; a graph cannot answer that.
    """

    reads: tuple[str, ...] = ()
    refused: str | None = None


def use_from_outside(part: nn.Module, recorder: EagerRecorder, paths: dict[nn.Module, str]) -> Use:
    """What the code that ran in ``recorder`` did with ``part`` and what is in it; ``paths`` name modules."""
    reads = _reads(part, recorder)
    own = sorted(name for module, name in reads if module is part) if is_layer(part) else []
    refused = _method_called(part, recorder) or _inner_call(part, recorder, paths)
    if refused is None and len(reads) > len(own):
        refused = next(f"{paths[module]}.{name} is read" for module, name in reads if not own or module is not part)
    return Use(tuple(own), refused)


def _method_called(part: nn.Module, recorder: EagerRecorder) -> str | None:
    for (owner, name), calls in recorder.methods.items():
        if owner is part and any(call.caller is not part for call in calls):
            return f"its method {name} is called"
    return None


def _inner_call(part: nn.Module, recorder: EagerRecorder, paths: dict[nn.Module, str]) -> str | None:
    """A module in ``part`` that code around it calls: in a graph it computes with what the graph hands it, alone."""
    inside = set(part.modules())
    for module in inside - {part}:
        callers = {call.caller for call in recorder.calls.get(module, ()) if call.caller is not None}
        if any(module not in _reached(caller, without=part) for caller in callers - inside):
            return f"{paths[module]} is called"
    return None


def _reads(part: nn.Module, recorder: EagerRecorder) -> list[tuple[nn.Module, str]]:
    """The parameters and buffers of ``part`` and what is in it that code around it reads, each by module and name."""
    inside = set(part.modules())
    return [
        (module, name)
        for module in inside & set(recorder.reads)
        for name, readers in recorder.reads[module].items()
        if any(module not in _reached(reader, without=part) for reader in readers - inside)
    ]


def _reached(module: nn.Module, *, without: nn.Module) -> set[nn.Module]:
    """``module`` and all that its code finds in it, but for ``without`` and what is found only there."""
    found, waiting = {without}, [module]
    while waiting:
        part = waiting.pop()
        if part not in found:
            found.add(part)
            waiting.extend(child for child in part._modules.values() if child is not None)
    return found - {without}
