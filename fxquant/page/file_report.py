"""A report of a file: what its grids are, and with data and the float model what they cost."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fxquant.analysis.batches import batches_of
from fxquant.analysis.faults import Fault
from fxquant.analysis.file_info import PRODUCTS, FileInfo, info, reads_integers, span_text
from fxquant.analysis.file_layers import FileLayer, FileLayers, layers_of_file
from fxquant.analysis.qdq_file import QdqFile
from fxquant.capture.islands import graphs_of
from fxquant.checkpoint import load_model
from fxquant.errors import InputError
from fxquant.export.agreement import OutputAgreement
from fxquant.page.agreement import agreement
from fxquant.page.compare import Comparison, Side, SideLayer, compared_with, sqnr_of
from fxquant.page.drawing import Drawn
from fxquant.page.file_html import page_of_file
from fxquant.page.numbers import agreement_words, percent
from fxquant.page.saving import Page
from fxquant.reporting.tabled import Tabled, decibels, in_decibels, megabytes, versions

__all__ = ["FileReport", "report_of_file"]

_FLOAT_COST = 30.0
"""What a product in float costs in the order of faults, times its share of all, as in ``analysis.faults``."""
_MOVES = ("QuantizeLinear", "DequantizeLinear", "Constant")


_HEADER = ["tensor", "kind", "operator", "bits [1]", "shape", "size [kB]", "scale", "zero point [1]", "used [%]"]
_HEADER += ["clipped [%]", "weight [dB]", "by rounding [dB]", "accumulated [dB]", "what"]


@dataclass(frozen=True)
class FileReport(Page, Tabled):
    """What ``report`` found of a file; prints as a table, and is saved as a page.

    Attributes:
        path: the file.
        name: what it is called on the page.
        info: what is in it.
        layers: one entry per tensor with a grid.
        faults: what is wrong, the worst first.
        outputs: how each output agrees with the float model's; empty without one.
        graph: how its operators are drawn; None for a file without a graph.
        left_out: what has no grid that can be told, or is not in the reference.
        batches: how many were run.
        versions: of what took part.
        seconds: what all this took.
    """

    path: str
    name: str
    info: FileInfo
    layers: tuple[FileLayer, ...]
    faults: tuple[Fault, ...]
    outputs: tuple[OutputAgreement, ...]
    graph: Drawn | None
    left_out: tuple[str, ...]
    batches: int
    versions: dict[str, str]
    seconds: float

    def __getitem__(self, name: str) -> FileLayer:
        """The entry of the tensor ``name``."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def header(self) -> Sequence[str]:
        return [_HEADER[i] for i in self.columns()]

    def cells(self) -> Sequence[Sequence[str]]:
        kept = self.columns()
        return [[row[i] for i in kept] for row in map(cells_of, self.layers)]

    def columns(self) -> list[int]:
        """The columns that have anything in them."""
        rows = [cells_of(layer) for layer in self.layers]
        return [i for i in range(len(_HEADER)) if i < 2 or any(row[i] for row in rows)]

    def title(self) -> str:
        return "\n".join([f"{self.name}: {self.info.form}", *(f"  {a}: {b}" for a, b, _ in self.numbers())])

    def notes(self) -> Sequence[str]:
        lines = [f"wrong: {fault}" for fault in self.faults] + [agreement_words(own) for own in self.outputs]
        if self.left_out:
            more = f" and {len(self.left_out) - 6} more" if len(self.left_out) > 6 else ""
            lines.append(f"no grid to tell, or not in the reference: {', '.join(self.left_out[:6])}{more}")
        return lines

    def records(self) -> list[dict[str, Any]]:
        rows = []
        for layer in self.layers:
            errors = {name: getattr(layer, name) for name in ("weight", "by_rounding", "accumulated")}
            row = {name: getattr(layer, name) for name in ("name", "path", "kind", "op", "bits", "shape", "bytes")}
            row |= {"scale": layer.scale, "zero_point": layer.zero_point}
            rows.append(row | {f"{name}_sqnr": error and error.sqnr for name, error in errors.items()})
        return rows

    def numbers(self) -> list[tuple[str, str, str]]:
        """The numbers at the top of the page, each with a word about it."""
        weights = [layer for layer in self.layers if layer.kind == "weight"]
        found = [("size", megabytes(self.info.bytes), "")]
        least = min(self.outputs, key=lambda own: own.sqnr, default=None)
        if least is not None:
            found.append(("agreement with float", in_decibels(least.sqnr), "SQNR of the worst output"))
            if least.top1 is not None:
                found.append(("same top-1", percent(least.top1), f"of {least.rows} rows"))
        bits = " and ".join(map(str, sorted({layer.bits for layer in weights if layer.bits is not None})))
        if bits:
            found.append(("bits of weights", bits, f"{len(weights)} tensors"))
        known = [layer for layer in self.layers if layer.accumulated is not None]
        if known:
            worst = min(known, key=lambda layer: sqnr_of(layer.accumulated) or 0.0)
            found.append(("worst, accumulated", in_decibels(sqnr_of(worst.accumulated) or 0.0), worst.path))
        if coverage := self.info.facts.get("coverage"):
            share, _, of_what = coverage.partition(" products")
            found.append(("in integers", share, f"products{of_what.removesuffix(' read integers only')}"))
        wanted = ("opset", "model", "target", "processor")
        return found + [(name, self.info.facts[name], "") for name in wanted if self.info.facts.get(name)]

    def html(self) -> str:
        """The page: one file with all that it needs."""
        return page_of_file(self)

    def side(self) -> Side:
        """What a comparison takes of it."""
        layers: dict[str, SideLayer] = {}
        for layer in self.layers:
            own = layers.setdefault(layer.path, SideLayer())
            if layer.kind == "weight":
                own.weight_bits, own.bytes = layer.bits, layer.bytes
                own.weight = sqnr_of(layer.weight)
            elif layer.kind == "activation":
                own.bits = layer.bits
                own.accumulated = sqnr_of(layer.accumulated)
        numbers = {name: value for name, value, _ in self.numbers()}
        return Side(self.name, numbers, self.faults, layers, f"the file {self.path}")

    def compare(self, other: Any) -> Comparison:
        """This file beside another one's report, or a model's.

        Raises:
            InputError: ``other`` is no report.
        """
        return compared_with(self, other)


def cells_of(layer: FileLayer) -> list[str]:
    """A tensor as a row of texts."""
    seen, errors = layer.histogram, (layer.weight, layer.by_rounding, layer.accumulated)
    return [
        layer.name,
        layer.kind,
        layer.op,
        "" if layer.bits is None else str(layer.bits),
        "" if layer.shape is None else "×".join(map(str, layer.shape)),
        "" if layer.bytes is None else f"{layer.bytes / 1e3:.3g}",
        "" if layer.scale is None else span_text(layer.scale),
        "" if layer.zero_point is None else str(layer.zero_point),
        "" if seen is None else f"{100 * seen.used:.3g}",
        "" if seen is None or not seen.clipped else f"{100 * seen.clipped:.2g}",
        *(decibels(None if error is None else error.sqnr) for error in errors),
        "; ".join(fault.kind for fault in layer.faults),
    ]


def report_of_file(
    path: str | os.PathLike[str],
    reference: Any = None,
    data: Any = None,
    *,
    title: str | None = None,
    batches: int | None = 2,
    progress: bool = True,
) -> FileReport:
    """Look at a file: its grids; with ``data`` what they do to it; with ``reference`` what is lost against float.

    Args:
        path: an ONNX file in the QDQ form, or a ``.pt`` that ``save`` wrote, of which the grids are shown.
        reference: the prepared model that an ONNX file was made of, or the path of the float ONNX file; for a ``.pt`` the
            float model.
        data: batches that the file takes, or one tensor.
        title: what the page is called; the file's name by default.
        batches: how many to use; None for all.
        progress: show a progress bar.

    Raises:
        InputError: the file cannot be read, or the batches do not fit it, or nothing of it is in the reference, or there
            is a reference and no data.
        CheckpointError: a ``.pt`` that fxquant did not write.
    """
    began, path = time.perf_counter(), os.fspath(path)
    if reference is not None and data is None:
        raise InputError("report of a file beside a float model needs data: report('int8.onnx', prepared, loader).")
    known = info(path)
    if path.lower().endswith(".onnx"):
        file = QdqFile(path)
        found = layers_of_file(file, data, reference, batches=batches, progress=progress)
        graph, in_float = _drawn(file), _in_float(file)
    elif reference is not None:
        found, graph, in_float = _beside_model(path, known, reference, data, batches), None, ()
    elif data is not None:
        raise InputError(
            f"{path!r}: a file of fxquant is run by the model that it belongs to.\n"
            "  what to do: fxquant.report('int8.pt', model, data), with a float model of the same class; or leave data out."
        )
    else:
        found, graph, in_float = FileLayers(_saved_layers(known), (), (), 0), None, ()
    faults = [*(fault for layer in found.layers for fault in layer.faults), *in_float]
    return FileReport(
        path=path,
        name=title or Path(path).name,
        info=known,
        layers=found.layers,
        faults=tuple(sorted(faults, key=lambda fault: -fault.cost)),
        outputs=found.outputs,
        graph=graph,
        left_out=found.left_out,
        batches=found.batches,
        versions=versions(),
        seconds=time.perf_counter() - began,
    )


def _beside_model(path: str, known: FileInfo, model: Any, data: Any, batches: int | None) -> FileLayers:
    """The grids of a file of fxquant, and how what it holds agrees with its float ``model``."""
    if not isinstance(model, nn.Module) or graphs_of(model):
        raise InputError(f"report of {path!r}: give the float model that was prepared, as to fxquant.load.")
    kept = batches_of(data, batches, "report")
    outputs = agreement(model, load_model(model, path), kept, None, [])
    return FileLayers(_saved_layers(known), outputs, (), len(kept))


def _saved_layers(known: FileInfo) -> tuple[FileLayer, ...]:
    """The grids of a file of fxquant, as ``info`` reads them."""
    return tuple(
        FileLayer(
            name=own.name,
            path=own.name.removesuffix(".weight_quantizer").removesuffix(".output_quantizer").removesuffix(".weight"),
            kind=own.kind,
            op="",
            bits=own.bits,
            shape=own.shape,
            bytes=None,
            scale=own.scale,
            zero_point=own.zero_point,
            weight=None,
            by_rounding=None,
            accumulated=None,
            histogram=None,
            faults=(),
        )
        for own in known.tensors
    )


def _in_float(file: QdqFile) -> tuple[Fault, ...]:
    """The products that do not read integers, as one fault."""
    makers = {name: node for node in file.model.graph.node for name in node.output}
    products = [node for node in file.model.graph.node if node.op_type in PRODUCTS]
    floats = [node for node in products if not reads_integers(node, makers)]
    if not floats:
        return ()
    more = f" and {len(floats) - 1} more" if len(floats) > 1 else ""
    what = f"the {floats[0].op_type}{more} of {len(products)} products and convolutions computes in float"
    cost = _FLOAT_COST * len(floats) / len(products)
    name = floats[0].name or floats[0].output[0]
    return (Fault(name, "float", what, "quantize both of its operands, if it was meant to be", cost),)


def _drawn(file: QdqFile) -> Drawn:
    """The operators without those that round; edges lead past them."""
    makers = {name: node for node in file.model.graph.node for name in node.output}
    read: dict[str, list[str]] = {name: [name] for name in file.inputs}
    nodes = [(name, name, "input", "input") for name in file.inputs]
    edges: list[tuple[str, str]] = []
    for node in file.model.graph.node:
        sources = list(dict.fromkeys(source for name in node.input for source in read.get(name, ())))
        key = node.output[0]
        if node.op_type in _MOVES or not sources:
            read.update((name, sources) for name in node.output)
            continue
        if node.op_type in ("Shape", "Size"):
            continue
        state = "integer" if _is_integer(node, makers, file) else "float"
        nodes.append((key, node.name or key, node.op_type, state))
        edges += [(source, key) for source in sources]
        read.update((name, [key]) for name in node.output)
    return Drawn("", tuple(nodes), tuple(edges))


def _is_integer(node: Any, makers: dict[str, Any], file: QdqFile) -> bool:
    """Whether all tensors that an operator reads come from integers; constants that are moved about do not count."""
    if node.op_type in PRODUCTS:
        return reads_integers(node, makers)
    computed = [name for name in node.input if name and name not in file.constants]
    return all(name in makers and makers[name].op_type == "DequantizeLinear" for name in computed[:1])
