"""What is in a file: a model that ``fxquant.save`` wrote, or an ONNX file. Read off the file alone, without the model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.analysis.qdq_file import QdqFile
from fxquant.checkpoint import read
from fxquant.errors import CheckpointError, InputError
from fxquant.reporting.tabled import Tabled, megabytes

__all__ = ["PRODUCTS", "FileInfo", "FileTensorInfo", "info", "reads_integers", "span_text"]

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")


@dataclass(frozen=True)
class FileTensorInfo:
    """One tensor: its name, what it is (``weight``, ``bias``, ``activation``), and where the file tells them the bits that
    its integers need, its shape, the smallest and the largest scale, and the zero point that holds for all of it."""

    name: str
    kind: str
    bits: int | None
    shape: tuple[int, ...] | None
    scale: tuple[float, float] | None
    zero_point: int | None


@dataclass(frozen=True)
class FileInfo(Tabled):
    """What ``info`` found; prints as a table of grids.

    Attributes:
        path: the file.
        bytes: its size.
        form: what it is.
        facts: what is known of the whole, by name.
        tensors: every tensor that has a grid.
    """

    path: str
    bytes: int
    form: str
    facts: dict[str, str]
    tensors: tuple[FileTensorInfo, ...]

    def header(self) -> Sequence[str]:
        return ["tensor", "kind", "bits [1]", "shape", "scale", "zero point [1]"]

    def cells(self) -> Sequence[Sequence[str]]:
        return [
            [
                tensor.name,
                tensor.kind,
                "" if tensor.bits is None else str(tensor.bits),
                "" if tensor.shape is None else "×".join(map(str, tensor.shape)),
                "" if tensor.scale is None else span_text(tensor.scale),
                "" if tensor.zero_point is None else str(tensor.zero_point),
            ]
            for tensor in self.tensors
        ]

    def title(self) -> str:
        facts = "".join(f"\n  {name}: {value}" for name, value in self.facts.items() if value)
        return f"{self.path}: {self.form}, {megabytes(self.bytes)}{facts}"

    def records(self) -> list[dict[str, Any]]:
        return [
            {
                "tensor": t.name,
                "kind": t.kind,
                "bits": t.bits,
                "shape": t.shape,
                "scale": t.scale,
                "zero_point": t.zero_point,
            }
            for t in self.tensors
        ]


def span_text(scale: tuple[float, float]) -> str:
    """The smallest and the largest scale; one where they are the same."""
    return f"{scale[0]:.3g}" if scale[0] == scale[1] else f"{scale[0]:.3g}…{scale[1]:.3g}"


def info(path: str | os.PathLike[str]) -> FileInfo:
    """Read what is in ``path``: ``.onnx``, or ``.pt`` and ``.pth`` that ``fxquant.save`` wrote.

    Raises:
        InputError: there is no such file, or it is of another kind.
        CheckpointError: fxquant did not write it.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise InputError(f"{path!r} is a folder." if os.path.isdir(path) else f"there is no file {path!r}.")
    ending = os.path.splitext(path)[1].lower()
    if ending == ".onnx":
        return _onnx(path)
    if ending in (".pt", ".pth"):
        return _saved(path)
    raise InputError(f"{path!r}: info reads .onnx files, and .pt and .pth files that fxquant.save wrote.")


def _onnx(path: str) -> FileInfo:
    file = QdqFile(path)
    nodes = list(file.model.graph.node)
    operators = Counter(node.op_type for node in nodes)
    made_by = {name: node for node in nodes for name in node.output}
    products = [node for node in nodes if node.op_type in PRODUCTS]
    integer = [node for node in products if reads_integers(node, made_by)]
    tensors = []
    for name, values, scale, _ in file.weights():
        bits = file.bits(file.constants[name].data_type)
        span = (float(scale.min()), float(scale.max()))
        tensors.append(FileTensorInfo(name, "bias" if bits == 32 else "weight", bits, tuple(values.shape), span, None))
    for own in file.roundings():
        node = made_by[own.integers]
        bits = file.bits(file.kind_given(node))
        zero = int(own.zero_point) if own.zero_point.ndim == 0 else None
        span = (float(own.scale.min()), float(own.scale.max()))
        tensors.append(FileTensorInfo(own.integers, "activation", bits, None, span, zero))
    beside = os.path.getsize(f"{path}.data") if os.path.isfile(f"{path}.data") else 0
    form = "an ONNX file in the QDQ form" if operators["DequantizeLinear"] else "an ONNX file without quantization"
    if operators["QLinearConv"] or operators["QLinearMatMul"]:
        form = "an ONNX file of integer operators"
    facts = {
        "opset": ", ".join(f"{own.domain or 'onnx'} {own.version}" for own in file.model.opset_import),
        "inputs": ", ".join(_described(value) for value in file.model.graph.input if value.name in file.inputs),
        "outputs": ", ".join(_described(value) for value in file.model.graph.output),
        "operators": ", ".join(f"{count} {name}" for name, count in operators.most_common(8)),
        "coverage": f"{len(integer)} of {len(products)} products and convolutions read integers only",
        "bits": _bits(tensors),
    }
    if others := file.unread():
        facts["not listed"] = f"{', '.join(others[:4])}: of floats, or scaled by blocks or by what is computed"
    return FileInfo(path, os.path.getsize(path) + beside, form, facts, tuple(tensors))


def reads_integers(node: Any, made_by: dict[str, Any]) -> bool:
    """Whether every real operand of a product comes out of a DequantizeLinear, or it is an operator on integers."""
    if "Integer" in node.op_type or node.op_type.startswith("QLinear"):
        return True

    def source(name: str) -> str:
        while name in made_by and made_by[name].op_type in ("Transpose", "Reshape", "Unsqueeze", "Squeeze"):
            name = made_by[name].input[0]
        return made_by[name].op_type if name in made_by else ""

    return all(source(name) == "DequantizeLinear" for name in node.input[:2])


def _described(value: Any) -> str:
    sizes = value.type.tensor_type.shape.dim
    return f"{value.name} [{', '.join(str(s.dim_value) if s.HasField('dim_value') else s.dim_param or '?' for s in sizes)}]"


def _bits(tensors: Sequence[FileTensorInfo]) -> str:
    counts = Counter((tensor.kind, tensor.bits) for tensor in tensors)
    plural = {"weight": "weights", "bias": "biases", "activation": "activations"}
    named = {key: plural[key[0]] if count > 1 else key[0] for key, count in counts.items()}
    return ", ".join(f"{count} {named[key]} of {key[1]}" for key, count in sorted(counts.items(), key=str))


def _saved(path: str) -> FileInfo:
    content = read(path)
    if not isinstance(content, dict) or not {"fxquant", "state", "model", "level"} <= set(content):
        raise CheckpointError(f"{path!r} was not written by fxquant.save; it holds a {type(content).__name__}.")
    state: dict[str, Tensor] = content["state"]
    tensors = [
        found for name in state if name.endswith(".weight") and (found := _saved_weight(name, state)) is not None
    ]
    tensors += [found for name in state if name.endswith("scale") and (found := _saved_grid(name, state)) is not None]
    numbers = sum(t.numel() for t in state.values())
    integers = sum(t.numel() for t in state.values() if not t.is_floating_point())
    facts = {
        "model": f"{content['model']}, {content['level']}",
        "format": str(content["fxquant"]),
        "compiled for": content.get("compiled", {}).get("runtime", ""),
        "target": _name(content.get("target", "x86")),
        "processor": str(content.get("processor", "")),
        "training": "yes" if content.get("qat") else "no",
        "recipe": str(content.get("recipe")),
        "numbers": f"{numbers}, of which {100 * integers / max(numbers, 1):.1f} % are stored as integers",
    }
    return FileInfo(path, os.path.getsize(path), "a model that fxquant.save wrote", facts, tuple(tensors))


def _name(target: Any) -> str:
    return str(target.get("name", target)) if isinstance(target, dict) else str(target)


def _saved_weight(name: str, state: dict[str, Tensor]) -> FileTensorInfo | None:
    weight = state[name]
    if weight.is_floating_point():
        return None
    return FileTensorInfo(name, "weight", _needed(weight), tuple(weight.shape), None, None)


def _saved_grid(name: str, state: dict[str, Tensor]) -> FileTensorInfo | None:
    path = name.rpartition(".")[0]
    prefix = f"{path}." if path else ""
    zero, scale = state.get(f"{prefix}zero_point"), state[name]
    if name.rpartition(".")[2] != "scale" or zero is None or not scale.numel():
        return None
    kind = "weight" if path.endswith("weight_quantizer") else "activation"
    bounds = [state[f"{prefix}{own}"] for own in ("low", "high") if f"{prefix}{own}" in state]
    bits = _needed(torch.stack([bound.reshape(()) for bound in bounds])) if len(bounds) == 2 else None
    known = int(zero) if zero.ndim == 0 else None
    return FileTensorInfo(path, kind, bits, None, (float(scale.min()), float(scale.max())), known)


def _needed(q: Tensor) -> int:
    """The bits that the integers ``q`` need."""
    low, high = (int(q.min()), int(q.max())) if q.numel() else (0, 0)
    return max(high, -low - 1).bit_length() + 1 if low < 0 else max(high.bit_length(), 1)
