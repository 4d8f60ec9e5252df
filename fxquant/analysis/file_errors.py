"""The two comparisons of ONNX Runtime's *Quantization debugging* on a QDQ file: weights, and activations, each per layer.

    weight        what a weight's integers stand for            against  the float weight
    by rounding   a tensor behind its QuantizeLinear            against  the same tensor before it, in the file
    accumulated   a tensor behind its QuantizeLinear            against  the tensor of the float model

A file may leave a ReLU to the rounding behind it, whose grid begins at 0: with a prepared model as the reference, what that
cuts off is no error; between two files it counts as one, as there. The file is computed operator by operator as it stands,
without a runtime's fusions.
Source: ONNX Runtime, *Quantize ONNX models*, section *Quantization debugging*.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from fxquant.analysis.batches import batches_of, left_alone, run_batch
from fxquant.analysis.measures import Error, Noise
from fxquant.analysis.qdq_file import QdqFile, Rounded
from fxquant.analysis.spots import end_of_chain, spots_of
from fxquant.capture.calls import Call
from fxquant.capture.islands import graphs_of
from fxquant.errors import InputError
from fxquant.export.signature import Signature
from fxquant.flow import convert, quantizers_off, require_level
from fxquant.inputs import arguments_of
from fxquant.nn.modules import QuantOp
from fxquant.onnx.names import integers_name
from fxquant.reporting.census import module_at
from fxquant.reporting.tabled import Tabled, decibels

__all__ = ["FileErrors", "FileTensor", "Floats", "errors_in_file", "floats_of", "named_inputs", "nothing_known"]

_SUFFIX = "_quantized"
"""What ONNX Runtime's own quantizer writes behind a weight's name."""


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a file.

    Attributes:
        name: of its integers in the file.
        weight: of a weight, against the float one; None for other tensors.
        by_rounding, accumulated: of a tensor that is computed, see the head of this file; None for weights.
    """

    name: str
    weight: Error | None
    by_rounding: Error | None
    accumulated: Error | None


@dataclass(frozen=True)
class FileErrors(Tabled):
    """What ``errors_by_layer`` found of a file; prints as a table, worst first, weights before activations.

    Attributes:
        path: the file.
        weights, activations: one entry per tensor.
        left_out: tensors of the file that the reference does not have, integers that several layers share, and weights that
            are floats of 8 bits or scaled by blocks.
        batches: how many were run.
    """

    path: str
    weights: tuple[FileTensor, ...]
    activations: tuple[FileTensor, ...]
    left_out: tuple[str, ...]
    batches: int

    def header(self) -> Sequence[str]:
        return ["tensor", "weight [dB]", "by rounding [dB]", "accumulated [dB]", "rms [LSB]", "most [LSB]"]

    def cells(self) -> Sequence[Sequence[str]]:
        rows = []
        for tensor in (*self.weights, *self.activations):
            last = tensor.weight or tensor.accumulated or tensor.by_rounding
            steps = (last.lsb, last.lsb_max) if last is not None else (None, None)
            errors = (tensor.weight, tensor.by_rounding, tensor.accumulated)
            shown = [decibels(None if error is None else error.sqnr) for error in errors]
            rows.append([tensor.name, *shown, *("" if step is None else f"{step:.2f}" for step in steps)])
        return rows

    def title(self) -> str:
        batches = f"{self.batches} batch{'es' if self.batches > 1 else ''}"
        return f"{os.path.basename(self.path)}: SQNR against float on {batches}, worst first"

    def notes(self) -> Sequence[str]:
        if not self.left_out:
            return []
        more = f" and {len(self.left_out) - 6} more" if len(self.left_out) > 6 else ""
        why = "not in the reference, shared by several layers, or no integers with one scale per channel"
        return [f"{why}: {', '.join(self.left_out[:6])}{more}"]

    def records(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for tensor in (*self.weights, *self.activations):
            row: dict[str, Any] = {"tensor": tensor.name}
            for name in ("weight", "by_rounding", "accumulated"):
                error: Error | None = getattr(tensor, name)
                row |= {f"{name}_sqnr": error and error.sqnr, f"{name}_lsb": error and error.lsb}
            rows.append(row)
        return rows


def errors_in_file(
    path: str | os.PathLike[str],
    data: Any,
    reference: Any,
    *,
    batches: int | None = None,
    progress: bool = True,
) -> FileErrors:
    """Measure a QDQ file against the float model.

    Args:
        path: an ONNX file, from ``export_onnx`` or another quantizer.
        data: batches as for ``errors_by_layer``, of sizes that the file takes; tensors with keys are found by the names of
            the file's inputs, others are given in order.
        reference: the prepared model that the file was made of; or the path of the float ONNX file that another quantizer
            made it of, with the same names of tensors and, behind a weight's name, ``_quantized``.
        batches: stop after that many.
        progress: show a progress bar.

    Raises:
        InputError: a file cannot be read, the batches do not fit it, or nothing of it is in the reference.
        MissingPackageError: onnx or onnxruntime is not installed.
    """
    if reference is None:
        raise InputError(
            "errors_by_layer of a file needs the float model.\n  what to do: errors_by_layer('int8.onnx', data, "
            "reference=prepared), or reference='float.onnx' where another quantizer made the file."
        )
    file = QdqFile(path)
    kept = batches_of(data, batches, "errors_by_layer")
    floats = floats_of(reference, file)
    weights, unknown = _weights(file, floats)
    roundings = [own for own in file.roundings() if floats.has(own)]
    unknown += [own.integers for own in file.roundings() if not floats.has(own)]
    if not weights and not roundings:
        raise nothing_known(file)
    run = file.looking_at([name for own in roundings for name in (own.source, own.integers)])
    noise = {own: (Noise(), Noise()) for own in roundings}
    for batch in tqdm(kept, desc="errors by layer", unit="batch", disable=not progress or None):
        values = run(floats.feeds(batch))
        expected = floats.values(batch, roundings)
        for own, (by_rounding, accumulated) in noise.items():
            actual, scale = own.reals(values[own.integers]), own.scale if own.scale.ndim == 0 else None
            by_rounding.add(actual, floats.clamped(own, values[own.source]), scale)
            if own.integers in expected and expected[own.integers].shape == actual.shape:
                accumulated.add(actual, expected[own.integers], scale)
    found = [FileTensor(own.integers, None, one.error(), both.error()) for own, (one, both) in noise.items()]
    return FileErrors(
        path=os.fspath(path),
        weights=tuple(sorted(weights, key=lambda tensor: tensor.weight.sqnr if tensor.weight else 0.0)),
        activations=tuple(sorted(found, key=lambda t: t.accumulated.sqnr if t.accumulated else float("inf"))),
        left_out=tuple(dict.fromkeys(unknown)),
        batches=len(kept),
    )


def _weights(file: QdqFile, floats: Floats) -> tuple[list[FileTensor], list[str]]:
    found: list[FileTensor] = []
    unknown = file.unread()
    uses = Counter(name for name, *_ in file.weights())
    for name, values, scale, axis in file.weights():
        expected = (
            floats.weight(name) if uses[name] == 1 else None
        )  # integers that layers share stand for several tensors
        if expected is None or expected.shape != values.shape:
            unknown.append(name)
            continue
        noise = Noise()
        noise.add(values, expected, scale, axis)
        found.append(FileTensor(name, noise.error(), None, None))
    return found, unknown


def nothing_known(file: QdqFile) -> InputError:
    """What is said where no name of a file is one of the reference."""
    return InputError(
        f"nothing in {file.path!r} is in the reference: no weight and no rounded tensor has a name of it.\n"
        "  what to do: give the prepared model that the file was exported from, or the float ONNX file it was made of."
    )


def floats_of(reference: Any, file: QdqFile) -> Floats:
    """The float model behind ``reference``: a prepared model, or the path of a float ONNX file.

    Raises:
        InputError: the file is quantized itself, or cannot be read.
        LevelError: the model is not a prepared one.
    """
    is_file = isinstance(reference, (str, os.PathLike))
    return _OfFile(reference, file) if is_file else _OfPrepared(reference, file)


class Floats:
    """The float model: its weights and tensors by the names of the file, and how a batch is given to the file."""

    def weight(self, name: str) -> Tensor | None:
        raise NotImplementedError

    def has(self, own: Rounded) -> bool:
        raise NotImplementedError

    def clamped(self, own: Rounded, x: Tensor) -> Tensor:
        """``x`` within the bounds of a clamp that the file leaves to the rounding, where the reference tells it."""
        return x

    def path(self, own: Rounded) -> str | None:
        """Where a report of the reference has what is rounded there; None where it has no such paths."""
        return None

    def outputs(self, batch: Any) -> list[Tensor]:
        """What the float model gives."""
        raise NotImplementedError

    def values(self, batch: Any, roundings: Sequence[Rounded]) -> dict[str, Tensor]:
        raise NotImplementedError

    def feeds(self, batch: Any) -> dict[str, Tensor]:
        raise NotImplementedError


class _OfFile(Floats):
    """A float ONNX file with the same names."""

    def __init__(self, path: str | os.PathLike[str], quantized: QdqFile) -> None:
        self.file = QdqFile(path)
        if any(True for _ in self.file.weights()) or any(True for _ in self.file.roundings()):
            raise InputError(
                f"the reference {os.fspath(path)!r} is quantized itself.\n"
                "  what to do: give the float file that the quantized one was made of, or the prepared model."
            )
        self.inputs = quantized.inputs
        self._run: Callable[[dict[str, Any]], dict[str, Tensor]] | None = None

    def weight(self, name: str) -> Tensor | None:
        own = name.removesuffix(_SUFFIX)
        return self.file.tensor(own) if own in self.file.constants else None

    def has(self, own: Rounded) -> bool:
        return own.source in self.file.made

    def values(self, batch: Any, roundings: Sequence[Rounded]) -> dict[str, Tensor]:
        if self._run is None:
            self._run = self.file.looking_at([own.source for own in roundings])
        found = self._run(self.feeds(batch))
        return {own.integers: found[own.source] for own in roundings}

    def outputs(self, batch: Any) -> list[Tensor]:
        names = [value.name for value in self.file.model.graph.output]
        found = self.file.looking_at(names)(self.feeds(batch))
        return [found[name] for name in names]

    def feeds(self, batch: Any) -> dict[str, Tensor]:
        return named_inputs(batch, self.inputs)


class _OfPrepared(Floats):
    """The prepared model, quantizers off, whose modules gave the file its names."""

    def __init__(self, prepared: Any, quantized: QdqFile) -> None:
        require_level(prepared, ("prepared",), "errors_by_layer's reference")
        self.prepared, self.inputs = prepared, quantized.inputs
        trained = any(graph.settings.get("qat") for graph in graphs_of(prepared).values())
        norms = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in prepared.modules())
        self.is_folded = not (trained and norms)  # trained behind norms, the file's weights are scaled by them
        self.tensors = dict(prepared.named_parameters(remove_duplicate=False)) | dict(prepared.named_buffers())
        self.parts = self._parts()
        self.known = {integers_name(path, set()): part for part, path in self.parts.items()}

    def _parts(self) -> dict[nn.Module, str]:
        """The modules that give float values, each with the path of the rounding in the integer model that rounds them."""
        by_key = {spot.key: spot.part for spot in spots_of(self.prepared) if spot.rounds}
        before, found = graphs_of(self.prepared), dict[nn.Module, str]()
        for path, graph in graphs_of(convert(self.prepared)).items():
            old = {node.name: node for node in before[path].graph.nodes}
            for node in graph.graph.nodes:
                if module_at(graph, node) is not None and node.name in old:
                    part = by_key.get((path, end_of_chain(old[node.name]).name))
                    if part is not None:
                        found.setdefault(part, f"{path}.{node.target}".strip("."))
        return found

    def weight(self, name: str) -> Tensor | None:
        own, _, changed = name.partition(":")
        found = self.tensors.get(own) if self.is_folded else None
        if found is None:
            return None
        found = found.detach().cpu()
        return found.transpose(-1, -2) if changed == "transposed" else found

    def has(self, own: Rounded) -> bool:
        return own.integers in self.known

    def clamped(self, own: Rounded, x: Tensor) -> Tensor:
        part: Any = self.known[own.integers]
        clamp = (part.clamp if isinstance(part, QuantOp) else None) or (None, None)
        return x if clamp == (None, None) else torch.clamp(x, *clamp)

    def path(self, own: Rounded) -> str | None:
        part = self.known.get(own.integers)
        return next((spot.path for spot in spots_of(self.prepared) if spot.part is part), None)

    def outputs(self, batch: Any) -> list[Tensor]:
        with left_alone(self.prepared), quantizers_off(self.prepared), torch.no_grad():
            return [y for y in tree_leaves(run_batch(self.prepared, batch, None)) if isinstance(y, Tensor)]

    def values(self, batch: Any, roundings: Sequence[Rounded]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        calls: Counter[nn.Module] = Counter()

        def keep(part: nn.Module, args: Any, result: Any) -> None:
            calls[part] += 1
            if calls[part] == 1 and isinstance(result, Tensor):
                found[integers_name(self.parts[part], set())] = result.detach().cpu().clone()  # before a write into it

        hooks = [part.register_forward_hook(keep) for part in self.parts]
        try:
            with left_alone(self.prepared), quantizers_off(self.prepared), torch.no_grad():
                run_batch(self.prepared, batch, None)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def feeds(self, batch: Any) -> dict[str, Tensor]:
        args, kwargs = arguments_of(self.prepared, batch)
        try:
            signature = Signature(self.prepared, Call(args, kwargs))
            named = dict(zip(signature.input_names, signature.tensors(args, kwargs), strict=True))
        except InputError:  # objects that no file takes; its tensors may be given in order
            named = {}
        return named_inputs(named if set(self.inputs) <= set(named) else kwargs or args, self.inputs)


def named_inputs(batch: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a batch by the names of a file's inputs: by key where it has keys, else in order.

    Raises:
        InputError: it has too few tensors, or has keys, and others than the inputs.
    """
    if isinstance(batch, Mapping) and set(names) <= set(batch):
        return {name: batch[name] for name in names}
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    parts = batch if isinstance(batch, (tuple, list)) else [batch]
    keys = [str(key) for part in parts if isinstance(part, Mapping) for key in part]
    if keys and (len(names) > 1 or len(leaves) != 1):
        raise InputError(
            f"a batch has the keys {', '.join(keys)}, and the file takes {', '.join(names)}.\n"
            "  what to do: name the tensors as the file's inputs are named, or give them as a tuple in that order."
        )
    if len(leaves) < len(names):
        raise InputError(f"a batch has {len(leaves)} tensors, and the file takes {len(names)}: {', '.join(names)}.")
    return dict(zip(names, leaves, strict=False))
