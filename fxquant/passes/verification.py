"""verification: run the graphs before and after a pass on the same inputs, and name the node where they part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from fxquant.capture.islands import graphs_of
from fxquant.capture.values import unchanged
from fxquant.errors import LevelError
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.text import node_text
from fxquant.nn.fake_quantize import FakeQuantize

__all__ = ["verify_against"]

TOLERANCE = 1e-4
"""Largest difference allowed where weights were folded, relative to the largest magnitude of the tensor."""


class _Recorder(fx.Interpreter):
    """Keeps every value by the name of its node."""

    def __init__(self, module: LeveledModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value.clone() if isinstance(value, Tensor) else value
        return value


@contextmanager
def _in_float(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` runs in eval mode, without gradients, quantizers off; buffers are put back."""
    quantizers = {part: part.enabled for part in model.modules() if isinstance(part, FakeQuantize)}
    modes = {part: part.training for part in model.modules()}
    try:
        for quantizer in quantizers:
            quantizer.enabled = False
        with unchanged(model), torch.no_grad():
            model.eval()
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        for quantizer, enabled in quantizers.items():
            quantizer.enabled = enabled


def _run(module: LeveledModule, inputs: tuple[Any, ...]) -> dict[str, Any]:
    recorder = _Recorder(module)
    with _in_float(module):
        recorder.run(*[value.clone() if isinstance(value, Tensor) else value for value in inputs])
    return recorder.values


def _copied(value: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, value)


def _as_weights_are(value: Tensor) -> Tensor:
    """A copy; of what an autocast block around a graph has made narrower, in float32: graphs are compared outside it."""
    if torch.is_autocast_enabled(value.device.type) and value.dtype == torch.get_autocast_dtype(value.device.type):
        return value.float()
    return value.clone()


def _inputs_of_graphs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """What each graph of ``model`` is first called with, by path."""
    seen: dict[str, tuple[Any, ...]] = {}

    def note(path: str) -> Any:
        return lambda graph, given: seen.setdefault(path, tree_map_only(Tensor, _as_weights_are, given)) and None

    hooks = [graph.register_forward_pre_hook(note(path)) for path, graph in graphs_of(model).items()]
    try:
        with _in_float(model):
            model(*_copied(args), **_copied(kwargs))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def verify_against(
    before: nn.Module, after: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, by: str
) -> None:
    """Compare the outputs of each graph of two models on the inputs it gets, quantizers off.

    Raises:
        LevelError: names the pass and the first node, present in both, whose values differ.
    """
    graphs = graphs_of(after)
    for path, inputs in _inputs_of_graphs(before, args, kwargs).items():
        _compare(graphs_of(before)[path], graphs[path], inputs, by)


def _compare(before: LeveledModule, after: LeveledModule, inputs: tuple[Any, ...], by: str) -> None:
    old, new = _run(before, inputs), _run(after, inputs)
    if _distance(old["output"], new["output"]) <= TOLERANCE:
        return
    for node in after.graph.nodes:
        if node.name in old and _distance(old[node.name], new[node.name]) > TOLERANCE and not node.meta.get("notes"):
            raise LevelError(
                f"pass {by} changed what the model computes: {node_text(node)}\n"
                f"  module path: {node.meta.get('module_path') or '(top)'}, source: {node.meta.get('source') or 'unknown'}\n"
                f"  largest difference: {_distance(old[node.name], new[node.name]):.3g} of the tensor's magnitude"
            )
    raise LevelError(f"pass {by} changed the model's outputs by {_distance(old['output'], new['output']):.3g}.")


def _distance(a: Any, b: Any) -> float:
    """The largest difference of two values, relative to the largest magnitude of the first; infinite for unlike ones."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape:
            return float("inf")
        if not a.is_floating_point():
            return 0.0 if torch.equal(a, b) else float("inf")
        if not a.numel():
            return 0.0
        alike = (a == b) | (a.isnan() & b.isnan())  # infinite and undefined values too: a mask is often one
        gap = (a.double() - b.double()).abs().masked_fill(alike, 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf).max()
        return float(gap / a.double().abs().masked_fill(~a.isfinite(), 0.0).max().clamp(min=1e-30))
    if isinstance(a, dict) and isinstance(b, dict):
        return max((_distance(a[k], b[k]) for k in a), default=0.0) if a.keys() == b.keys() else float("inf")
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return max((_distance(x, y) for x, y in zip(a, b, strict=False)), default=0.0)
    return 0.0
