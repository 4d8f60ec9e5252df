"""What a file's grids hold, tensor by tensor: read off it; with data, measured in it; with the float model, against that.

    weight        its integers: how much of the grid they use, where they pile up; against the float weight, if any
    by rounding   a tensor behind its QuantizeLinear   against   the same tensor before it, in the file
    accumulated   a tensor behind its QuantizeLinear   against   the tensor of the float model

Without the float weight, what a weight lost is estimated as that of values spread evenly between two levels, step² / 12.
Source: Bennett, *Spectra of quantized signals*, 1948 (the uniform noise model); ONNX Runtime, *Quantization debugging*.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fxquant.analysis.batches import batches_of
from fxquant.analysis.faults import Fault, Measured, faults_of
from fxquant.analysis.file_errors import Floats, floats_of, named_inputs, nothing_known
from fxquant.analysis.measures import Error, Histogram, HistogramCount, Noise, channel_peaks, on_own_grid
from fxquant.analysis.qdq_file import Held, QdqFile, Rounded
from fxquant.export.agreement import OutputAgreement, compare_output
from fxquant.numerics.affine import broadcast
from fxquant.numerics.scheme import Scheme

__all__ = ["FileLayer", "FileLayers", "layers_of_file"]

_PILED = 3.0
"""How many times as many values the outermost levels have to hold as their neighbours to be what was cut off."""
_WORTH_TELLING = 1e-3
"""The share of a weight's values that have to be cut off to be worth a word."""


@dataclass(frozen=True)
class FileLayer:
    """One tensor of a file that has a grid.

    Attributes:
        name: of its integers in the file.
        path: where a report of the model has it, as far as the names tell.
        kind: ``weight``, ``bias`` or ``activation``.
        op: the operator that reads a constant, or that makes a tensor.
        bits: of its type; None where the file does not tell.
        shape: of a constant; None for what is computed.
        bytes: that a constant takes.
        scale: the smallest and the largest; None where the file does not tell.
        zero_point: where one holds for all of it.
        weight, by_rounding, accumulated: see the head of this file; None where it was not measured.
        histogram: of a weight as it is in the file, of an activation before it is rounded.
        faults: what is wrong here.
    """

    name: str
    path: str
    kind: str
    op: str
    bits: int | None
    shape: tuple[int, ...] | None
    bytes: int | None
    scale: tuple[float, float] | None
    zero_point: int | None
    weight: Error | None
    by_rounding: Error | None
    accumulated: Error | None
    histogram: Histogram | None
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class FileLayers:
    """What ``layers_of_file`` found.

    Attributes:
        layers: one entry per tensor, weights first, in the order of the file.
        outputs: how each output agrees with the float model's, where there is one.
        left_out: what has no grid that can be told, or is not in the reference.
        batches: how many were run.
    """

    layers: tuple[FileLayer, ...]
    outputs: tuple[OutputAgreement, ...]
    left_out: tuple[str, ...]
    batches: int


def layers_of_file(
    file: QdqFile, data: Any = None, reference: Any = None, *, batches: int | None = None, progress: bool = True
) -> FileLayers:
    """Look at every grid of ``file``.

    Args:
        file: the file, in the QDQ form.
        data: batches that it takes, or one tensor; None for what the file alone tells.
        reference: as for ``errors_in_file``; None where there is no float model.
        batches: stop after that many.
        progress: show a progress bar.

    Raises:
        InputError: the batches do not fit the file, or the reference cannot be read.
    """
    floats = None if reference is None else floats_of(reference, file)
    makers = {name: node for node in file.model.graph.node for name in node.output}
    readers = _readers(file)
    weights = [_weight(own, readers.get(own.name), floats) for own in {own.name: own for own in file.held()}.values()]
    counts = [_Rounding(own, file, floats) for own in file.roundings()]
    if floats is not None and all(layer.weight is None for layer in weights) and not any(own.known for own in counts):
        raise nothing_known(file)
    kept = [] if data is None else batches_of(data, batches, "report")
    outputs = _run(file, counts, floats, kept, progress)
    missing = [own.name for own in counts if floats is not None and kept and not floats.has(own.rounded)]
    return FileLayers(
        layers=(*weights, *(own.layer(makers) for own in counts)),
        outputs=outputs,
        left_out=tuple(dict.fromkeys([*file.unread(), *missing])),
        batches=len(kept),
    )


def _run(
    file: QdqFile, counts: Sequence[_Rounding], floats: Floats | None, kept: Sequence[Any], progress: bool
) -> tuple[OutputAgreement, ...]:
    if not kept:
        return ()
    names = [value.name for value in file.model.graph.output]
    run = file.looking_at([*(name for own in counts for name in (own.rounded.source, own.name)), *names])
    pairs: list[tuple[list[Tensor], list[Tensor]]] = []
    known = [own.rounded for own in counts if floats is not None and floats.has(own.rounded)]
    for batch in tqdm(kept, desc="layers of the file", unit="batch", disable=not progress or None):
        values = run(named_inputs(batch, file.inputs) if floats is None else floats.feeds(batch))
        expected = {} if floats is None else floats.values(batch, known)
        for own in counts:
            own.add(values, expected)
        if floats is not None:
            pairs.append(([values[name] for name in names], floats.outputs(batch)))
    return tuple(_agreements(names, pairs))


def _agreements(
    names: Sequence[str], pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]
) -> Iterator[OutputAgreement]:
    for i, name in enumerate(names):
        both = [(own[i], other[i]) for own, other in pairs if i < len(other) and own[i].shape == other[i].shape]
        if both and both[0][1].ndim and len({other.shape[1:] for _, other in both}) == 1:
            own, other = (torch.cat([pair[side] for pair in both]) for side in (0, 1))
            yield compare_output(name, own, other, None)


def _readers(file: QdqFile) -> dict[str, Any]:
    """The operator that reads each constant, behind its DequantizeLinear and what only moves it."""
    after: dict[str, Any] = {}
    for node in file.model.graph.node:
        after.update((name, node) for name in node.input if name not in after)

    def reader(node: Any) -> Any:
        following = after.get(node.output[0])
        moves = following is not None and following.op_type in ("Transpose", "Reshape", "Unsqueeze", "Squeeze")
        return reader(following) if moves else following

    return {own.name: reader(own.reader) for own in file.held()}


def _scheme(bits: int, signed: bool, zero_point: Tensor, axis: int | None, lowest: int) -> Scheme | None:
    """The grid of a file as a scheme; None for one that no scheme describes."""
    symmetric = bool((zero_point == (0 if signed else 2 ** (bits - 1))).all())
    if not 2 <= bits <= 16 or (axis is not None and not symmetric):
        return None
    narrow = signed and symmetric and lowest > -(2 ** (bits - 1))
    return Scheme(bits=bits, symmetric=symmetric, signed=signed, per_channel=axis is not None, narrow_range=narrow)


def _path(name: str) -> str:
    """Where a tensor belongs, from its name: of ours, and of ONNX Runtime's quantizer."""
    own = name.partition(":")[0]
    for ending in ("_QuantizeLinear_Output", "_quantized"):
        own = own.removesuffix(ending)
    return own.removesuffix(".weight").removesuffix(".bias") or own


def _span(scale: Tensor) -> tuple[float, float]:
    return float(scale.min()), float(scale.max())


def _weight(own: Held, reader: Any, floats: Floats | None) -> FileLayer:
    zero = int(own.zero_point) if own.zero_point.ndim == 0 else None
    is_bias = own.bits > 16
    layer = FileLayer(
        name=own.name,
        path=_path(own.name),
        kind="bias" if is_bias else "weight",
        op="" if reader is None else reader.op_type,
        bits=own.bits,
        shape=tuple(own.q.shape),
        bytes=math.ceil(own.q.numel() * own.bits / 8),
        scale=_span(own.scale),
        zero_point=zero,
        weight=None,
        by_rounding=None,
        accumulated=None,
        histogram=None,
        faults=(),
    )
    lowest = int(own.q.min()) if own.q.numel() else 0
    scheme = None if is_bias else _scheme(own.bits, own.signed, own.zero_point, own.axis, lowest)
    if scheme is None or not own.q.numel():
        return layer
    reals, expected = own.reals, None if floats is None else floats.weight(own.name)
    expected = expected if expected is not None and expected.shape == reals.shape else None
    seen = HistogramCount(own.scale, own.zero_point, scheme, own.axis)
    seen.add(reals if expected is None else expected)
    if expected is not None:
        error, best = Noise(), Noise()
        error.add(reals, expected, own.scale, own.axis)
        best.add(on_own_grid(expected.float(), scheme, own.axis), expected)
        lost, could = error.error(), best.error()
    else:
        lost, could = _estimated(own, scheme)
    peaks = reals.abs().flatten(1).amax(1) if reals.ndim > 1 and own.axis is None else None
    measured = replace(
        _nothing(layer.path),
        weight_bits=own.bits,
        weight=lost,
        weight_best=could,
        weight_histogram=seen.histogram(),
        weight_peaks=peaks,
    )
    faults = [*faults_of(measured), *(_piled(layer.path, own, scheme) if expected is None else ())]
    error_known = None if expected is None else lost
    return replace(layer, weight=error_known, histogram=seen.histogram(), faults=tuple(faults))


def _nothing(path: str) -> Measured:
    names = ("result", "best", "histogram", "peaks", "weight_bits", "weight", "weight_best", "weight_histogram")
    nothing: dict[str, Any] = dict.fromkeys((*names, "weight_peaks"))
    return Measured(path=path, bits=None, fixed=False, shared_with=(), **nothing)


def _estimated(own: Held, scheme: Scheme) -> tuple[Error, Error]:
    """What a weight lost, and what it would on the finest grid that holds its integers, by step² / 12."""
    centred = (own.q - broadcast(own.zero_point.long(), own.q.ndim, own.axis)).abs()
    reach = centred.max() if own.axis is None else centred.transpose(0, own.axis).flatten(1).amax(1)
    used = (reach / max(abs(scheme.qmin - int(own.zero_point.reshape(-1)[0])), scheme.qmax)).clamp(0, 1)
    signal = float(own.reals.double().square().mean())
    steps = own.scale.double().reshape(-1)
    found = []
    for step in (steps, steps * used.double().reshape(-1)):
        noise = float(step.square().mean()) / 12
        sqnr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf
        found.append(Error(sqnr, None, None, float(step.max()) / 2, own.q.numel()))
    return found[0], found[1]


def _piled(path: str, own: Held, scheme: Scheme) -> Iterator[Fault]:
    """Values that pile up at the ends of the grid: what lay beyond it. Each channel's largest one stands there by right."""
    if scheme.bits < 3:
        return
    channels = own.scale.numel()
    ends = int(((own.q == scheme.qmin) | (own.q == scheme.qmax)).sum()) - channels
    inside = int(((own.q == scheme.qmin + 1) | (own.q == scheme.qmax - 1)).sum())
    share = ends / own.q.numel()
    if share < _WORTH_TELLING or ends < _PILED * max(inside, 1):
        return
    what = (
        f"its weight saturates: {100 * share:.2g} % of its integers stand at the ends of the grid, and few beside them"
    )
    yield Fault(path, "weight saturates", what, "quantize it with a larger scale", 30 + 10 * math.log10(share))


class _Rounding:
    """The sums of one QuantizeLinear."""

    def __init__(self, rounded: Rounded, file: QdqFile, floats: Floats | None) -> None:
        self.rounded, self.name, self.floats = rounded, rounded.integers, floats
        node = next(node for node in file.model.graph.node if rounded.integers in node.output)
        kind = file.kind_given(node)
        self.bits, signed = file.bits(kind) or 8, file.is_signed(kind)
        self.axis = rounded.axis if rounded.scale.ndim else None
        self.scheme = _scheme(self.bits, signed, rounded.zero_point, self.axis, -(2 ** (self.bits - 1)))
        self.known = floats is not None and floats.has(rounded)
        self.by_rounding, self.accumulated, self.best = Noise(), Noise(), Noise()
        self.seen: HistogramCount | None = None
        self.peaks: Tensor | None = None

    def add(self, values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        """Count one batch."""
        own = self.rounded
        x, scale = self._clamped(values[own.source].float()), own.scale if own.scale.ndim == 0 else None
        actual = own.reals(values[own.integers])
        self.by_rounding.add(actual, x, scale)
        if self.name in expected and expected[self.name].shape == actual.shape:
            self.accumulated.add(actual, expected[self.name], scale)
        if self.scheme is not None:
            self.seen = self.seen or HistogramCount(own.scale, own.zero_point, self.scheme, self.axis)
            self.seen.add(x)
            self.best.add(on_own_grid(x, self.scheme, self.axis), x)
        peaks = channel_peaks(x)
        if peaks is not None and (self.peaks is None or self.peaks.shape == peaks.shape):
            self.peaks = peaks if self.peaks is None else torch.maximum(self.peaks, peaks)

    def _clamped(self, x: Tensor) -> Tensor:
        """``x`` within the clamp that the file leaves to the grid: told by the reference, or by a grid that begins at 0, and
        by one that ends at 6, as ReLU and ReLU6 make them."""
        own = self.rounded
        if self.known and self.floats is not None:
            return self.floats.clamped(own, x)
        if self.scheme is None or own.scale.ndim:
            return x
        low, high = (float((q - own.zero_point) * own.scale) for q in (self.scheme.qmin, self.scheme.qmax))
        is_six = low == 0 and abs(high - 6) <= float(own.scale) / 2
        return x if low else x.clamp(min=0.0, max=6.0 if is_six else None)

    def layer(self, makers: Mapping[str, Any]) -> FileLayer:
        """What was counted."""
        own, maker = self.rounded, makers.get(self.rounded.source)
        path = (self.floats.path(own) if self.known and self.floats is not None else None) or _path(self.name)
        measured = replace(
            _nothing(path),
            bits=self.bits,
            result=self.by_rounding.error(),
            best=self.best.error(),
            histogram=None if self.seen is None else self.seen.histogram(),
            peaks=self.peaks,
        )
        return FileLayer(
            name=self.name,
            path=path,
            kind="activation",
            op="input" if maker is None else maker.op_type,
            bits=self.bits,
            shape=None,
            bytes=None,
            scale=_span(own.scale),
            zero_point=int(own.zero_point) if own.zero_point.ndim == 0 else None,
            weight=None,
            by_rounding=measured.result,
            accumulated=self.accumulated.error(),
            histogram=measured.histogram,
            faults=tuple(faults_of(measured)),
        )
