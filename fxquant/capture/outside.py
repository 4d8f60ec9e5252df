"""What code around a part of a model does with it besides calling it: what a graph in its place has to keep, or cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxquant.capture.eager_recorder import EagerRecorder
from fxquant.capture.models import is_layer
from fxquant.capture.own_code import Uses

__all__ = ["Use", "use_from_outside"]


@dataclass(frozen=True)
class Use:
    """What code around a part does with it.

    Attributes:
        reads: the names of a layer's own tensors that it reads; a graph keeps them.
        refused: in words, what else it does; a graph cannot answer that.
        is_asked_for: whether it asks what modules the part is made of; nothing may stand in the place of any.
    """

    reads: tuple[str, ...] = ()
    refused: str | None = None
    is_asked_for: bool = False


def use_from_outside(
    part: nn.Module, recorder: EagerRecorder | None, possible: Mapping[nn.Module, Uses], paths: dict[nn.Module, str]
) -> Use:
    """What code around ``part`` does with it and with what is in it.

    Args:
        part: a part of an island.
        recorder: what the island's code did in a real run, if there was one.
        possible: what the code of each module may do, in branches too that the run did not take.
        paths: the names of all modules.
    """
    may = _among(part, possible)
    if part in may.replaced or (part in may.asked and is_layer(part)):
        return Use(is_asked_for=True)
    reads = sorted(
        {*(_reads(part, recorder) if recorder else ()), *may.reads}, key=lambda read: (paths[read[0]], read[1])
    )
    own = tuple(name for module, name in reads if module is part) if is_layer(part) else ()
    refused = (_method_called(part, recorder) or _inner_call(part, recorder, paths)) if recorder else None
    if refused is None and (used := may.methods or may.calls - {part}):
        refused = f"{_first_name(used, part, paths)} may be called"
    elif refused is None and may.asked:
        refused = f"the class of {_first_name(may.asked, part, paths)} may be asked for"
    if refused is None and len(reads) > len(own):
        refused = next(f"{paths[module]}.{name} is read" for module, name in reads if not own or module is not part)
    return Use(own, refused)


def _among(part: nn.Module, possible: Mapping[nn.Module, Uses]) -> Uses:
    """What code around ``part`` may do with it and what is in it."""
    found, inside = Uses(), set(part.modules())
    for reader, uses in possible.items():
        if reader not in inside and uses.modules & inside:
            found |= uses.among(inside - _reached(reader, without=part) | {part})
    return found


def _first_name(used: set[Any], part: nn.Module, paths: dict[nn.Module, str]) -> str:
    """Of modules, and methods of modules, the first as the user would call it."""
    pairs = [use if isinstance(use, tuple) else (use, "") for use in used]
    named = [f"{paths[module]}.{name}".strip(".") for module, name in pairs if module is not part]
    return min(named or [f"its method {name}" if name else paths[part] for _, name in pairs])


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
