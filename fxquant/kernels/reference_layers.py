"""The layers of a program that the exact reference computes, which is right and slow: what is told of them, once."""

from __future__ import annotations

from collections.abc import Mapping

from fxquant.errors import Refusal
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.integer import multiplies

__all__ = ["BY_REFERENCE", "told_of_layers", "told_of_model"]

BY_REFERENCE = r"(\d+ layers? of the model|the whole model) runs? by the exact reference"
"""What such a warning begins with."""
_SHOWN = 4

_ADVICE = (
    "\n  what to do: nothing for right results; coverage(model) names the kernel of each op, and "
    "convert(..., kernels='reference') asks for this."
)


def told_of_layers(
    graph: LeveledModule, seconds: Mapping[str, float], refusals: Mapping[str, Refusal], native: str
) -> str:
    """Which layers of a program run by the reference, the dearest first, and why; empty where none does.

    Args:
        graph: what is computed.
        seconds, refusals: as a ``Program`` has them.
        native: why the native kernels have no part in it; empty where they were not asked for.
    """
    parts = {node.name: str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    layers = {name: lasted for name, lasted in seconds.items() if multiplies(graph.get_submodule(parts[name]))}
    if not layers:
        return ""
    dearest = sorted(layers, key=lambda name: -layers[name])
    shown = "; ".join(f"{parts[name]} ({_ms(layers[name])}: {_why(refusals, name)})" for name in dearest[:_SHOWN])
    more = f"; and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
    count = "1 layer of the model runs" if len(layers) == 1 else f"{len(layers)} layers of the model run"
    return f"{count} by the exact reference, {_ms(sum(layers.values()))} of this call: {shown}{more}." + (
        f"\n  The native kernels do not have the whole model: {native}." * bool(native) + _ADVICE
    )


def told_of_model(native: str) -> str:
    """That all of a model runs by the reference, and why."""
    why = "torch has no int8 operators that are right on this machine"
    return (
        f"the whole model runs by the exact reference: {why}"
        + f"; no native kernels: {native}" * bool(native)
        + f".{_ADVICE}"
    )


def _why(refusals: Mapping[str, Refusal], name: str) -> str:
    return refusals.get(name, Refusal("no kernel takes it")).why


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
