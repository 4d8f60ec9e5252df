"""Frozen against prepared, op by op: the same real numbers up to float32's own rounding, and at most one step apart.

Freezing writes the same numbers down otherwise: weights as integers times scales, biases on their grids, sums of floats in
another order. So a value that lies within float32's noise of the middle between two steps may round to either. From there on
the two models go apart as any two roundings do, and a figure at the outputs says little: of 100 values with a
spread of 40 steps, a single tie is 52 dB. What is exact is each op by itself. Each op of the frozen graph is given
the prepared graph's operands:

    before rounding    |frozen − prepared| ≤ NOISE · (what the op's sum of magnitudes can be)
    after rounding     they are equal, or that difference moved them across one tie: one step, plus the difference itself
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comparisons import _TeacherForced, _Values, tensors_of
from torch import Tensor, fx, nn

from fxquant.capture.islands import graphs_of
from fxquant.graph.leveled import LeveledModule

NOISE = 2e-6
"""Of the sum of magnitudes that an op adds: 16 units in the last place of float32, 2^-23 = 1.2e-7 each."""


def calls_of(model: nn.Module, run: Any) -> dict[str, list[tuple[Any, ...]]]:
    """The flat inputs of every call of every graph of ``model`` while ``run(model)`` runs, by the graph's path."""
    found: dict[str, list[tuple[Any, ...]]] = {}

    def keep(path: str) -> Any:
        def hook(graph: nn.Module, inputs: Any) -> None:
            found.setdefault(path, []).append(copied(inputs))

        return hook

    hooks = [g.register_forward_pre_hook(keep(p)) for p, g in graphs_of(model).items()]
    try:
        run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def copied(value: Any) -> Any:
    """``value`` with copies of its tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map(copied, value))
    return value


class _Forced(fx.Interpreter):
    """Runs a frozen graph in which every op reads the prepared graph's values, and compares each result."""

    def __init__(self, frozen: LeveledModule, prepared: LeveledModule, values: dict[str, Any]) -> None:
        super().__init__(frozen, garbage_collect_values=False)
        self.prepared, self.values = prepared, values

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "output" or n.name not in self.values:
            return value
        expected = self.values[n.name]
        for x, y in zip(tensors_of(value), tensors_of(expected), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype, f"{n.name}: {x.dtype} {x.shape}, not {y.dtype} {y.shape}"
        if any(not torch.equal(x, y) for x, y in zip(tensors_of(value), tensors_of(expected), strict=True)):
            self.require_a_tie(n, value, expected)
        return copied(expected)

    def require_a_tie(self, n: fx.Node, value: Any, expected: Any) -> None:
        magnitude = self.magnitude(n)
        quantizer = getattr(self.part(n, self.module), "output_quantizer", None)
        before = zip(
            tensors_of(self.unrounded(n, self.module)), tensors_of(self.unrounded(n, self.prepared)), strict=True
        )
        for (own, other), x, y in zip(before, tensors_of(value), tensors_of(expected), strict=True):
            assert torch.isfinite(y.double()).all(), f"{n.name}: the prepared model's values are not finite"
            moved = largest(own - other) if own.numel() else 0.0
            allowed = NOISE * max(magnitude, largest(other))
            assert moved <= allowed, f"frozen against prepared: {n.name} is off by {moved:.3g}, {allowed:.3g} allowed"
            if quantizer is not None:
                steps = largest(x - y) / float(quantizer.grid.scale.max())
                most = 1.001 + moved / float(quantizer.grid.scale.min())
                assert steps <= most, f"frozen against prepared: {n.name} is {steps:.4g} steps off"

    def part(self, n: fx.Node, graph: Any) -> Any:
        return graph.get_submodule(str(n.target)) if n.op == "call_module" else None

    def unrounded(self, n: fx.Node, graph: Any) -> Any:
        """What the op of ``n`` in ``graph`` gives without its rounding, on the operands that are here."""
        part = self.part(n, graph)
        if part is None:
            return self.env_result(n)
        quantizer = getattr(part, "output_quantizer", None)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if quantizer is None:
            return part(*copied(args), **copied(kwargs))
        quantizer.enabled, before = False, quantizer.enabled
        try:
            return part(*copied(args), **copied(kwargs))
        finally:
            quantizer.enabled = before

    def env_result(self, n: fx.Node) -> Any:
        return super().run_node(n)

    def magnitude(self, n: fx.Node) -> float:
        """A bound of the sum of magnitudes of what the op adds: operands, times the sum of a row of a layer's weights."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        sizes = [largest(x) for x in tensors_of([args, kwargs]) if x.is_floating_point() and x.numel()]
        weight = getattr(self.part(n, self.module), "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1:
            return max(sizes, default=0.0) * float(weight.detach().abs().flatten(1).sum(1).max())
        return max(sizes, default=0.0)


def largest(x: Tensor) -> float:
    return float(x.detach().double().abs().max()) if x.numel() else 0.0


@contextmanager
def restored(*models: nn.Module) -> Iterator[None]:
    """Afterwards the buffers of ``models`` hold what they held before."""
    before = [(buffer, buffer.clone()) for model in models for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


@torch.no_grad()
def calls_in_pairs(reference: nn.Module, other: nn.Module, run: Any) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
    """Each graph of ``reference`` beside its twin in ``other``, with the flat inputs of each call in ``run(reference)``."""
    own, twins = graphs_of(reference), graphs_of(other)
    calls = calls_of(reference, run)
    with restored(reference, other):
        for path, found in calls.items():
            for inputs in found:
                yield own[path], twins[path], inputs


@torch.no_grad()
def require_same_ops(frozen: nn.Module, prepared: nn.Module, run: Any) -> None:
    """Raise ``AssertionError`` where an op of ``frozen`` is not ``prepared``'s; ``run(model)`` makes one call."""
    for own, twin, inputs in calls_in_pairs(prepared, frozen, run):
        recorder = _Values(own)
        recorder.run(*copied(inputs))
        _Forced(twin, own, recorder.values).run(*copied(inputs))


@torch.no_grad()
def ops_in_pairs(frozen: nn.Module, integer: nn.Module, run: Any) -> Iterator[tuple[Any, Any, _TeacherForced]]:
    """Each call of a graph: the frozen one, the integer one, and their ops' results on the frozen graph's operands."""
    for own, twin, inputs in calls_in_pairs(frozen, integer, run):
        recorder = _Values(own)
        recorder.run(*copied(inputs))
        forced = _TeacherForced(twin, own, recorder.values)
        forced.run(*copied(inputs))
        yield own, twin, forced
