"""ONNX Runtime and OpenVINO as functions from tensors to tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import ExportError, InputError
from fxquant.export.files import serialized
from fxquant.export.fixed_sizes import takes_fixed_sizes
from fxquant.export.installed import require
from fxquant.export.joins import round_before_joining

__all__ = ["has_bfloat16", "onnxruntime_session", "openvino_session", "run_session"]

Session = Callable[[Sequence[Tensor]], list[Tensor]]
_Code = Callable[[list[Any]], list[Tensor]]

_SHAPES = 4
"""Shapes of inputs that get code of their own in OpenVINO: each holds the weights once more, packed."""


def onnxruntime_session(file: bytes | str | os.PathLike[str], threads: int | None = None) -> Session:
    """A file (its bytes, or its path where it has tensors beside it) in ONNX Runtime on the CPU.

    Its threads spin while a call runs only: by default they go on for some 0.2 s, and whatever else computes in the process
    then has the processor to share (measured: OpenVINO's calls and ours took twice as long behind one of ONNX Runtime's).

    Raises:
        MissingPackageError: onnxruntime is not installed.
        ExportError: it refuses the file.
    """
    ort: Any = require("onnxruntime", "running a file in ONNX Runtime", "onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = ort.InferenceSession(_readable(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime {ort.__version__} refuses the file: {error}") from error
    return _InONNXRuntime(session, _beside(file))


class _InONNXRuntime:
    """A session, and what it may still read."""

    def __init__(self, session: Any, read: Any) -> None:
        self._session, self._read = session, read
        self._names = [value.name for value in session.get_inputs()]

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        feeds = {name: _array(x) for name, x in zip(self._names, tensors, strict=True)}
        return [torch.from_numpy(y) for y in self._session.run(None, feeds)]


def openvino_session(
    file: bytes | str | os.PathLike[str], threads: int | None = None, *, float_dtype: str = "float32"
) -> Session:
    """A file (its bytes, or its path where it has tensors beside it) in OpenVINO on the CPU, for the least time a call.

    ``float_dtype`` is what it computes floats in: ``float32``, or ``bfloat16`` where it has that on this processor.

    Inputs of each shape get code of their own when they are first seen, which is faster than code for free sizes. A fifth
    shape and all after it share code for free sizes; so do the calls of a file that OpenVINO does not compile for fixed
    ones, see ``takes_fixed_sizes``.

    Raises:
        MissingPackageError: openvino, or what reads the file for it, is not installed.
        ExportError: it cannot read the file. What it refuses to compile, the first call says.
    """
    what = "running a file in OpenVINO"
    openvino: Any = require("openvino", what, "openvino")
    for package in ("onnx", "onnx_ir"):
        require(package, what, "onnx")
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if float_dtype == "bfloat16" and has_bfloat16():
        settings["INFERENCE_PRECISION_HINT"] = "bf16"
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    return _InOpenVINO(openvino, file, settings)


class _InOpenVINO:
    """A file behind its codes: for the shapes that came first, and for all the others.

    None is dropped again: a caller with more shapes than are kept would pay for a compilation at every call.
    """

    def __init__(self, openvino: Any, file: bytes | str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self._openvino, self._settings = openvino, settings
        self._fixed: dict[tuple[Any, ...], _Code] = {}
        self._free: _Code | None = None
        try:
            file, takes_fixed = _rounded_before_joining(file)
            self._core = openvino.Core()
            self._model = self._core.read_model(_readable(file))
        except Exception as error:
            raise self._refusal(error) from error
        self._read = _beside(file)
        self._takes_fixed = takes_fixed and bool(self._model.is_dynamic())

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        shapes = tuple(tuple(x.shape) for x in tensors)
        code = self._fixed.get(shapes) or self._compiled_for(shapes)
        return code([_array(x) for x in tensors])

    def _compiled_for(self, shapes: tuple[tuple[int, ...], ...]) -> _Code:
        model = self._reshaped(shapes) if self._takes_fixed and len(self._fixed) < _SHAPES else None
        if model is not None:
            try:
                self._fixed[shapes] = self._compiled(model)
                return self._fixed[shapes]
            except Exception:  # what is wrong with more than fixed sizes, the other code says
                self._takes_fixed = False
        if self._free is None:
            try:
                self._free = self._compiled(self._model)
            except Exception as error:
                raise self._refusal(error) from error
        return self._free

    def _reshaped(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        """The model for inputs of these shapes; None where they are not the file's, which the code for free sizes tells.

        An image that is too small for a layer raises here; the code for free sizes would give a result of no rows.
        """
        free = [value.partial_shape for value in self._model.inputs]
        given = [self._openvino.PartialShape(list(shape)) for shape in shapes]
        if any(0 in shape for shape in shapes) or len(free) != len(given):
            return None
        if not all(own.compatible(other) for own, other in zip(free, given, strict=True)):
            return None
        model = self._model.clone()
        model.reshape(dict(zip(model.inputs, given, strict=True)))
        return model

    def _compiled(self, model: Any) -> _Code:
        made = self._core.compile_model(model, "CPU", self._settings)
        request, outputs = made.create_infer_request(), list(made.outputs)

        def run(arrays: list[Any]) -> list[Tensor]:
            results = request.infer(arrays, share_inputs=True)
            return [torch.from_numpy(results[output].copy()) for output in outputs]

        return run

    def _refusal(self, error: Exception) -> ExportError:
        return ExportError(f"OpenVINO {self._openvino.__version__} refuses the file: {error}")


def _rounded_before_joining(file: bytes | str | os.PathLike[str]) -> tuple[bytes | str | os.PathLike[str], bool]:
    """The file with each Concat behind the roundings of what it joins, and whether it may be given fixed sizes."""
    import onnx
    import onnx_ir as ir

    model = ir.from_proto(onnx.load_from_string(file)) if isinstance(file, bytes) else ir.load(file)
    if round_before_joining(model):
        content, pair = serialized(ir.external_data.load_to_model(model), None, None)
        file = pair or content
    return file, takes_fixed_sizes(model)


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor.

    Raises:
        MissingPackageError: openvino is not installed.
    """
    openvino: Any = require("openvino", "asking OpenVINO what it computes in", "openvino")
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def run_session(session: Session, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Run ``session``; what it says when it fails becomes an error of ours.

    Raises:
        InputError: the runtime refuses these inputs.
        ExportError: it refuses the file, which some say when they are first called.
    """
    try:
        return session(tensors)
    except ExportError:
        raise
    except Exception as error:
        shapes = ", ".join(str(list(x.shape)) for x in tensors)
        raise InputError(f"the runtime refuses inputs of shapes {shapes}: {error}") from error


def _readable(file: bytes | str | os.PathLike[str]) -> bytes | str:
    return file if isinstance(file, bytes) else os.fspath(file)


def _beside(file: bytes | str | os.PathLike[str]) -> Any:
    """What a runtime may still read while it runs, to be held as long; bytes it has taken in."""
    return None if isinstance(file, bytes) else file


def _array(x: Tensor) -> Any:
    return x.detach().cpu().contiguous().numpy()
