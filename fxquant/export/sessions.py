"""ONNX Runtime and OpenVINO as functions from tensors to tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import ExportError, InputError
from fxquant.export.installed import require

__all__ = ["has_bfloat16", "onnxruntime_session", "openvino_session", "run_session"]

Session = Callable[[Sequence[Tensor]], list[Tensor]]


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
    names = [value.name for value in session.get_inputs()]

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        feeds = {name: _array(x) for name, x in zip(names, tensors, strict=True)}
        return [torch.from_numpy(y) for y in session.run(None, feeds)]

    return run


def openvino_session(
    file: bytes | str | os.PathLike[str], threads: int | None = None, *, float_dtype: str = "float32"
) -> Session:
    """A file (its bytes, or its path where it has tensors beside it) in OpenVINO on the CPU, for the least time a call.

    ``float_dtype`` is what it computes floats in: ``float32``, or ``bfloat16`` where it has that on this processor.

    Raises:
        MissingPackageError: openvino is not installed.
        ExportError: it refuses the file.
    """
    openvino: Any = require("openvino", "running a file in OpenVINO", "openvino")
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if float_dtype == "bfloat16" and has_bfloat16():
        settings["INFERENCE_PRECISION_HINT"] = "bf16"
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(_readable(file)), "CPU", settings)
    except Exception as error:
        raise ExportError(f"OpenVINO {openvino.__version__} refuses the file: {error}") from error
    request = compiled.create_infer_request()
    outputs = list(compiled.outputs)

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        results = request.infer([_array(x) for x in tensors], share_inputs=True)
        return [torch.from_numpy(results[output].copy()) for output in outputs]

    return run


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
    """
    try:
        return session(tensors)
    except Exception as error:
        shapes = ", ".join(str(list(x.shape)) for x in tensors)
        raise InputError(f"the runtime refuses inputs of shapes {shapes}: {error}") from error


def _readable(file: bytes | str | os.PathLike[str]) -> bytes | str:
    return file if isinstance(file, bytes) else os.fspath(file)


def _array(x: Tensor) -> Any:
    return x.detach().cpu().contiguous().numpy()
