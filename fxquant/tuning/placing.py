"""Other regions of a calibrated model in integers, with the ranges that it has."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fxquant.capture.islands import graphs_of
from fxquant.errors import LevelError
from fxquant.flow import placing_passes, run_passes
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.fake_quantize import FakeQuantize
from fxquant.nn.modules import QuantInput
from fxquant.nn.pinning import PINNED
from fxquant.passes.drop_quantizers import drop_quantizers
from fxquant.quantizers.registry import without_rule
from fxquant.recipe import Recipe
from fxquant.targets import X86

__all__ = ["canonical_of", "place_again"]


def canonical_of(prepared: nn.Module) -> nn.Module:
    """The float graph that a prepared one was made of, with the same names of nodes."""
    return run_passes(prepared, (drop_quantizers,), None)


def place_again(prepared: nn.Module, recipe: Recipe) -> nn.Module:
    """A prepared model quantized as ``recipe`` says, from the same float graph; nothing is shared with ``prepared``.

    A tensor that was quantized and still is, be it where a region now begins, keeps its range.

    Raises:
        LevelError: a quantizer is of a user's own class, which would be lost.
    """
    own = without_rule(prepared)
    if own:
        raise LevelError(
            f"a model with quantizers of your own cannot be placed anew: {', '.join(own[:4])}.\n"
            "  what to do: tune the placement first, and put them into its result."
        )
    source = copy.deepcopy(prepared)
    before = graphs_of(source)
    settings = next(iter(before.values())).settings
    folds_first = bool(settings.get("qat")) and settings.get("batch_norm") == "whitepaper"
    steps = placing_passes(recipe, settings.get("target", X86), folds_first=folds_first)
    made = run_passes(source, (drop_quantizers, *steps), None)
    for path, graph in graphs_of(made).items():
        graph.meta.pop("sites", None)
        graph.meta["settings"] = {**graph.settings, "recipe": recipe}
        _keep_ranges(graph, before[path])
    return made


def _keep_ranges(graph: LeveledModule, before: LeveledModule) -> None:
    known = {tensor: quantizer for quantizer, tensors in _quantizers(before) for tensor in tensors}
    for quantizer, tensors in _quantizers(graph):
        if quantizer.fixed_range is not None:
            continue
        candidates = [known[tensor] for tensor in tensors if tensor in known]
        alike = [own for own in candidates if own.scheme == quantizer.scheme]
        if alike:
            _take(quantizer, alike[0])
        elif candidates and candidates[0].ready:
            grid = candidates[0].grid
            quantizer.set_range(*((end - grid.zero_point) * grid.scale for end in (grid.qmin, grid.qmax)))
            quantizer.tracking = candidates[0].tracking
    weights = {node.name: _part(before, node) for node in before.graph.nodes}
    for node in graph.graph.nodes:
        own, other = (getattr(p, "weight_quantizer", None) for p in (_part(graph, node), weights.get(node.name)))
        if isinstance(own, FakeQuantize) and isinstance(other, FakeQuantize) and own.scheme == other.scheme:
            _take(own, other)


def _take(quantizer: FakeQuantize, other: FakeQuantize) -> None:
    for name, buffer in other.named_buffers(recurse=False):
        if name in quantizer._buffers or name in PINNED:
            quantizer._buffers[name] = buffer.clone()
    for name, parameter in other.named_parameters(recurse=False):
        quantizer._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    quantizer.enabled = other.enabled
    quantizer.read_state()


def _quantizers(graph: LeveledModule) -> list[tuple[FakeQuantize, list[str]]]:
    """Every activation quantizer with the tensors that it rounds, by the names of the nodes that make them."""
    found: dict[FakeQuantize, list[str]] = {}
    for node in graph.graph.nodes:
        part = _part(graph, node)
        quantizer = getattr(part, "output_quantizer", None)
        if isinstance(quantizer, FakeQuantize):
            found.setdefault(quantizer, []).append(node.args[0].name if isinstance(part, QuantInput) else node.name)
    return list(found.items())


def _part(graph: LeveledModule, node: Any) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None
