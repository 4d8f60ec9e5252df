"""An ONNX file in the QDQ form, taken apart: its weights as real numbers, and its rounded tensors as outputs to look at."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import ExportError, InputError
from fxquant.installed import require
from fxquant.numerics.affine import dequantize

__all__ = ["Held", "QdqFile", "Rounded"]

_WHAT = "measuring the errors of an ONNX file"


@dataclass(frozen=True)
class Rounded:
    """One QuantizeLinear of a tensor that is computed.

    Attributes:
        source, integers: the names of what it reads and of what it gives.
        scale, zero_point: of the grid; ``()`` or one per channel.
        axis: the channel axis of those.
    """

    source: str
    integers: str
    scale: Tensor
    zero_point: Tensor
    axis: int

    def reals(self, q: Tensor) -> Tensor:
        """What the integers ``q`` stand for."""
        axis = self.axis % q.ndim if self.scale.ndim else None
        return dequantize(q.long(), self.scale, self.zero_point, axis=axis)


@dataclass(frozen=True)
class Held:
    """Integers that a file holds behind a DequantizeLinear.

    Attributes:
        name: of the integers.
        q: them, in 64 bits.
        scale, zero_point: of the grid; ``()`` or one per channel.
        axis: the channel axis of those; None with one scale for all.
        bits, signed: of their type.
        reader: the DequantizeLinear.
    """

    name: str
    q: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    bits: int
    signed: bool
    reader: Any

    @property
    def reals(self) -> Tensor:
        """What the integers stand for."""
        return dequantize(self.q, self.scale, self.zero_point, axis=self.axis)


class QdqFile:
    """A file, read for its numbers.

    Args:
        path: the file; tensors that lie beside it are read too.

    Raises:
        InputError: there is no such file, or it is not ONNX.
        MissingPackageError: onnx or onnxruntime is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.onnx: Any = require("onnx", _WHAT, "onnx")
        self.ort: Any = require("onnxruntime", _WHAT, "onnx")
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise InputError(f"there is no file {self.path!r}.")
        try:
            self.model = self.onnx.load(self.path)
        except Exception as error:
            raise InputError(f"{self.path!r} cannot be read as ONNX: {error}") from error
        self.constants = {tensor.name: tensor for tensor in self.model.graph.initializer}
        for node in self.model.graph.node:
            if node.op_type == "Constant":
                self.constants.update((node.output[0], held) for held in self._held(node))
        self.inputs = [value.name for value in self.model.graph.input if value.name not in self.constants]
        self.made = {name for node in self.model.graph.node for name in node.output} | set(self.inputs)

    def _held(self, node: Any) -> Iterator[Any]:
        """The tensor of a Constant, whichever of its attributes has it."""
        for attribute in node.attribute:
            if attribute.name == "value":
                yield attribute.t
            elif attribute.name in ("value_float", "value_floats", "value_int", "value_ints"):
                value = self.onnx.helper.get_attribute_value(attribute)
                dtype = torch.float32 if "float" in attribute.name else torch.int64
                yield self.onnx.numpy_helper.from_array(torch.tensor(value, dtype=dtype).numpy())

    def bits(self, kind: int) -> int | None:
        """The width of a tensor's type in bits, where it is one of integers."""
        name = self.onnx.TensorProto.DataType.Name(kind).lower()
        return int(name.lstrip("uint")) if name.lstrip("u").startswith("int") else None

    def is_signed(self, kind: int) -> bool:
        """Whether a tensor's type has negative numbers."""
        return not self.onnx.TensorProto.DataType.Name(kind).startswith("UINT")

    def kind_given(self, node: Any) -> int:
        """The type that a QuantizeLinear gives: that of its zero point, or what it says, or else unsigned bytes."""
        if len(node.input) > 2 and node.input[2]:
            return int(self.constants[node.input[2]].data_type)
        told = (int(attribute.i) for attribute in node.attribute if attribute.name == "output_dtype")
        return next(told, 0) or int(self.onnx.TensorProto.UINT8)

    def tensor(self, name: str) -> Tensor:
        """A constant of the file."""
        array = self.onnx.numpy_helper.to_array(self.constants[name])
        if not array.dtype.isnative or array.dtype.kind not in "biuf":  # 4-bit integers come in a dtype of their own
            array = array.astype("int32")
        wide = {"uint16": "int32", "uint32": "int64", "uint64": "int64"}.get(array.dtype.name, array.dtype.name)
        return torch.from_numpy(array.astype(wide).copy())

    def held(self) -> Iterator[Held]:
        """Every constant of integers behind a DequantizeLinear, with one scale or one per channel."""
        for node in self.model.graph.node:
            if (
                node.op_type == "DequantizeLinear"
                and node.input[0] in self.constants
                and node.input[1] in self.constants
                and (bits := self.bits(self.constants[node.input[0]].data_type)) is not None
            ):
                scale, zero_point = self._grid(node)
                q = self.tensor(node.input[0]).long()
                if scale.ndim > 1:  # scales of blocks, which no tensor of ours has
                    continue
                axis = self._axis(node) % q.ndim if scale.ndim else None
                signed = self.is_signed(self.constants[node.input[0]].data_type)
                yield Held(node.input[0], q, scale, zero_point, axis, bits, signed, node)

    def weights(self) -> Iterator[tuple[str, Tensor, Tensor, int | None]]:
        """What ``held`` gives as real numbers: a name, what it stands for, its scale, and the axis of that."""
        for own in self.held():
            yield own.name, own.reals, own.scale, own.axis

    def unread(self) -> list[str]:
        """The constants behind a DequantizeLinear that ``weights`` leaves out: floats, or scaled by blocks or computed."""
        read = {name for name, *_ in self.weights()}
        nodes = [node for node in self.model.graph.node if node.op_type == "DequantizeLinear"]
        names = dict.fromkeys(node.input[0] for node in nodes if node.input[0] in self.constants)
        return [name for name in names if name not in read]

    def roundings(self) -> Iterator[Rounded]:
        """Every QuantizeLinear of a tensor that is computed."""
        for node in self.model.graph.node:
            if node.op_type == "QuantizeLinear" and node.input[0] in self.made and node.input[0] not in self.constants:
                if all(name in self.constants for name in node.input[1:] if name):
                    yield Rounded(node.input[0], node.output[0], *self._grid(node), self._axis(node))

    def _grid(self, node: Any) -> tuple[Tensor, Tensor]:
        scale = self.tensor(node.input[1]).float()
        zero = self.tensor(node.input[2]).int() if len(node.input) > 2 and node.input[2] else torch.zeros_like(scale)
        return (scale.reshape(()), zero.reshape(())) if scale.numel() == 1 else (scale, zero)

    @staticmethod
    def _axis(node: Any) -> int:
        return next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), 1)

    def looking_at(self, names: Sequence[str]) -> Any:
        """A function from inputs by name to the tensors of ``names``, computed operator by operator as they stand.

        Raises:
            ExportError: ONNX Runtime refuses the file.
        """
        model = self.onnx.ModelProto()
        model.CopyFrom(self.model)
        known = {value.name for value in model.graph.output}
        asked = [name for name in dict.fromkeys(names) if name not in self.inputs]
        model.graph.output.extend(self.onnx.ValueInfoProto(name=name) for name in asked if name not in known)
        options = self.ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            content = model.SerializeToString()
            session = self.ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"ONNX Runtime {self.ort.__version__} refuses {self.path!r}: {error}") from error

        def run(inputs: dict[str, Any]) -> dict[str, Tensor]:
            feeds = {name: value.detach().cpu().contiguous().numpy() for name, value in inputs.items()}
            try:
                results = session.run(asked, feeds) if asked else []  # no name would mean all outputs
            except Exception as error:
                shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
                raise InputError(f"{self.path!r} does not take {shapes}: {error}") from error
            found = {name: _tensor(array) for name, array in zip(asked, results, strict=True)}
            return {**{name: inputs[name] for name in names if name in inputs}, **found}

        return run


def _tensor(array: Any) -> Tensor:
    wide = {"uint16": "int32", "uint32": "int64", "uint64": "int64"}.get(array.dtype.name)
    return torch.from_numpy(array if wide is None else array.astype(wide))
