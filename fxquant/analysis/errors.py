"""errors_by_layer: what each rounding of a model costs, alone and together with all before it.

For a layer f with the float input x, the float weight w, and Q the rounding to its grids:

    weight             Q(w)                   against  w
    weight alone       f(x, Q(w))             against  f(x, w)
    activation alone   Q(f(x, w))             against  f(x, w)
    alone              Q(f(x, Q(w)))          against  f(x, w)
    accumulated        the value in the quantized model against the value in the float model

Only what one batch makes in float is kept, in memory up to a limit and in a temporary folder beyond it.
Source: ONNX Runtime, *Quantization debugging* (weights and activations against the float model, layer by layer).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from fxquant.algorithms.store import Store
from fxquant.analysis.batches import Forward, batches_of, left_alone, require_ranges, run_batch, same_randomness
from fxquant.analysis.counts import Count, LayerError, cells_of, record_of
from fxquant.analysis.faults import Fault, few_bits, float_faults
from fxquant.analysis.file_errors import FileErrors, errors_in_file
from fxquant.analysis.spots import Spot, end_of_chain, spots_of
from fxquant.capture.islands import graphs_of, level_of
from fxquant.errors import InputError
from fxquant.flow import quantizers_off, require_level
from fxquant.nn.integer import IntegerOp, Quantize
from fxquant.numerics.affine import dequantize
from fxquant.reporting.census import module_at
from fxquant.reporting.coverage import Coverage, coverage
from fxquant.reporting.tabled import Tabled

__all__ = ["LayerError", "LayerErrors", "errors_by_layer"]


@dataclass(frozen=True)
class LayerErrors(Tabled):
    """What ``errors_by_layer`` found; prints as a table, worst first.

    Attributes:
        name: the model's class.
        level: how far the model has come that was measured.
        layers: one entry per op that rounds something, the one that loses most by its own roundings first.
        in_float: what stays in float, by path, and why.
        faults: everything that is wrong, the worst first.
        left_out: what could not be measured, by path, and why.
        batches: how many were run.
    """

    name: str
    level: str
    layers: tuple[LayerError, ...]
    in_float: dict[str, str]
    faults: tuple[Fault, ...]
    left_out: dict[str, str]
    batches: int

    def __getitem__(self, path: str) -> LayerError:
        """The entry of the op at ``path``."""
        for layer in self.layers:
            if layer.path == path:
                return layer
        raise KeyError(path)

    def header(self) -> Sequence[str]:
        head = ["layer", "op", "weight [dB]", "by weight [dB]", "by result [dB]", "alone [dB]", "accumulated [dB]"]
        return [*head, "rms [LSB]", "most [LSB]", "clipped [%]", "what"]

    def cells(self) -> Sequence[Sequence[str]]:
        return [cells_of(layer) for layer in self.layers]

    def title(self) -> str:
        batches = f"{self.batches} batch{'es' if self.batches > 1 else ''}"
        return f"{self.name}, {self.level}: SQNR against float on {batches}, worst by its own roundings first"

    def notes(self) -> Sequence[str]:
        lines = [f"wrong: {fault}" for fault in self.faults]
        lines += [f"not measured: {path}: {reason}" for path, reason in self.left_out.items()]
        skipped = sum(layer.not_measured for layer in self.layers)
        lines += (
            [f"{skipped} result{'s are' if skipped > 1 else ' is'} a mask or whole numbers, and not measured"]
            if skipped
            else []
        )
        return lines

    def records(self) -> list[dict[str, Any]]:
        return [record_of(layer) for layer in self.layers]


def errors_by_layer(
    model: nn.Module | str | os.PathLike[str],
    data: Any,
    *,
    reference: Any = None,
    forward: Forward | None = None,
    batches: int | None = None,
    memory: float = 2.0,
    progress: bool = True,
) -> LayerErrors | FileErrors:
    """Measure what each rounding costs against the float network, layer by layer.

    Example:
        >>> print(fxquant.errors_by_layer(prepared, loader, batches=4))

    Args:
        model: a calibrated or trained prepared model; or what ``freeze`` or ``convert`` made of it, or the path of the QDQ
            ONNX file that ``export_onnx`` wrote, together with ``reference``. None of them is changed.
        data: batches as for ``calibrate``, without labels; or one tensor.
        reference: the prepared model that a frozen or integer one, or the file, was made of. It holds the float weights; the
            accumulated errors are then those of the frozen or integer model. For a file also that of the float model, where
            another quantizer made it; see ``errors_in_file``.
        forward: how to run one batch, as ``forward(model, batch)``, for batches of another form; not for files.
        batches: stop after that many.
        memory: gigabytes of one batch's activations to hold in memory; what is more goes to a temporary folder.
        progress: show a progress bar.

    Raises:
        InputError: there is no data, or it is not finite, or ``reference`` is missing or is not what the model was made of.
        CalibrationError: the model has no ranges yet.
        LevelError: the model is not fxquant's.
    """
    if isinstance(model, (str, os.PathLike)):
        return errors_in_file(model, data, reference, batches=batches, progress=progress)
    prepared = _prepared_of(model, reference)
    require_ranges(prepared, "errors_by_layer")
    kept = batches_of(data, batches, "errors_by_layer")
    session = _Session(prepared, model, forward, memory * 2**30)
    bar = tqdm(kept, desc="errors by layer", unit="batch", disable=not progress or None)
    with left_alone(prepared), left_alone(model), torch.no_grad():
        for batch in bar:
            session.run(batch)
    return session.result(coverage(prepared), len(kept))


def _prepared_of(model: Any, reference: Any) -> Any:
    require_level(model, ("prepared", "frozen", "integer"), "errors_by_layer")
    if level_of(model) == "prepared":
        if reference is not None and reference is not model:
            raise InputError("errors_by_layer: a prepared model is its own reference; leave reference out.")
        return model
    if reference is None:
        raise InputError(
            f"errors_by_layer was given a model at level {level_of(model)!r}, which holds no float weights.\n"
            "  what to do: errors_by_layer(int8, data, reference=prepared), with the prepared model that it was made of."
        )
    require_level(reference, ("prepared",), "errors_by_layer's reference")
    unknown = set(graphs_of(model)) - set(graphs_of(reference))
    if unknown or type(model).__name__ != type(reference).__name__:
        raise InputError(
            f"errors_by_layer: the {type(model).__name__} was not made of this reference, a {type(reference).__name__}.\n"
            "  what to do: give the prepared model that was given to convert."
        )
    return reference


class _Session:
    """Hooks on every spot, and what they counted."""

    def __init__(self, prepared: Any, model: Any, forward: Forward | None, memory: float) -> None:
        self.prepared, self.model, self.forward, self.memory = prepared, model, forward, memory
        self.spots = spots_of(prepared)
        self.counts = {spot: Count(spot) for spot in self.spots}
        self.left_out: dict[str, str] = {}
        self.watched = self._watched()

    def _watched(self) -> dict[nn.Module, Spot]:
        """The modules of the quantized model whose results are held against those of spots."""
        if self.model is self.prepared:
            return {spot.part: spot for spot in self.spots}
        by_key = {spot.key: spot for spot in self.spots} | {spot.key: spot for spot in self.spots if spot.rounds}
        by_part = {spot.part: spot for spot in self.spots}
        found: dict[nn.Module, Spot] = {}
        before = graphs_of(self.prepared)
        for path, graph in graphs_of(self.model).items():
            old = {node.name: node for node in before[path].graph.nodes}
            for node in graph.graph.nodes:
                part = module_at(graph, node)
                if part is None or node.name not in old:
                    continue
                if isinstance(part, (IntegerOp, Quantize)):  # one op for a whole chain
                    spot = by_key.get((path, end_of_chain(old[node.name]).name))
                else:
                    spot = by_part.get(module_at(before[path], old[node.name]) or part)
                if spot is not None:
                    found.setdefault(part, spot)
        return found

    def run(self, batch: Any) -> None:
        """Count one batch."""
        with Store(self.memory) as store:
            calls: dict[Spot, int] = {}

            def in_float(spot: Spot, part: Any, args: Any, kwargs: Any, result: Any) -> None:
                key: Any = spot
                number = calls[spot] = calls.get(spot, -1) + 1
                store.put(key, number, tree_map_only(Tensor, _copied, result))
                self.counts[spot].count_alone(args, kwargs, result)

            with same_randomness(), quantizers_off(self.prepared), _hooks(self.prepared_parts(), in_float):
                run_batch(self.prepared, batch, self.forward)
            seen: dict[Spot, int] = {}

            def rounded(spot: Spot, part: Any, args: Any, kwargs: Any, result: Any) -> None:
                key: Any = spot
                number = seen[spot] = seen.get(spot, -1) + 1
                if number <= calls.get(spot, -1):
                    self.counts[spot].count_accumulated(_real(part, result), store.get(key, number))

            with same_randomness(), _hooks(self.watched, rounded):
                run_batch(self.model, batch, self.forward)
            for spot in set(self.watched.values()):
                if calls.get(spot) != seen.get(spot):
                    self.left_out[spot.path] = "the model's own code calls it otherwise when it is quantized"

    def prepared_parts(self) -> dict[nn.Module, Spot]:
        """The prepared model's modules with their spots."""
        return {spot.part: spot for spot in self.spots}

    def _sharing(self, spot: Spot) -> tuple[str, ...]:
        """The other ops that round with the quantizer of ``spot``, and use it well."""
        others = [o for o in self.spots if o is not spot and o.rounds and spot.rounds and o.grid is spot.grid]
        return tuple(other.path for other in others if self.counts[other].uses_its_grid())

    def result(self, covered: Coverage, batches: int) -> LayerErrors:
        """What all batches came to."""
        for spot in self.spots:
            if (reason := self.counts[spot].nothing()) is not None:
                self.left_out.setdefault(spot.path, reason)
        layers = [self.counts[s].layer(self._sharing(s)) for s in self.spots if self.counts[s].was_reached]
        order = sorted(layers, key=lambda layer: layer.alone.sqnr if layer.alone is not None else float("inf"))
        faults = [fault for layer in layers for fault in layer.faults]
        poor = {own.path: own.alone.sqnr for own in layers if own.alone is not None and not own.faults}
        faults += [*few_bits(poor, {spot.path: spot.bits for spot in self.spots}), *float_faults(covered)]
        return LayerErrors(
            name=covered.name,
            level=str(level_of(self.model)),
            layers=tuple(order),
            in_float={op.path: op.reason for op in covered.float_ops},
            faults=tuple(sorted(faults, key=lambda fault: -fault.cost)),
            left_out=self.left_out,
            batches=batches,
        )


def _copied(tensor: Tensor) -> Tensor:
    """What ``tensor`` holds now: the model's own code may write into it after the call."""
    return tensor.detach().clone()


def _real(part: Any, result: Any) -> Any:
    """The real numbers that an op's result stands for."""
    if isinstance(part, (IntegerOp, Quantize)) and isinstance(result, Tensor) and not result.is_floating_point():
        return dequantize(result, part.scale.float(), part.zero_point)
    return result


@contextmanager
def _hooks(parts: dict[nn.Module, Spot], hook: Any) -> Iterator[None]:
    """Inside, ``hook(spot, part, args, kwargs, result)`` sees every call of ``parts``."""
    handles = [part.register_forward_hook(partial(_call, hook, spot), with_kwargs=True) for part, spot in parts.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(hook: Any, spot: Spot, part: Any, args: Any, kwargs: Any, result: Any) -> None:
    hook(spot, part, args, kwargs, result)
