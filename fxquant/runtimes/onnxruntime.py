"""ONNX Runtime on a CPU: unsigned tensors and signed weights (U8S8), and the ops that have an integer kernel there.

Its kernels read integers and write integers, so that each op between pairs of QuantizeLinear and DequantizeLinear needs
both: what a float op reads is rounded too. Integers of 16 bits are computed in float, rightly, and so are weights of 4.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import ExportError, FxquantError
from fxquant.installed import require
from fxquant.kernels.audit import saturates_here
from fxquant.runtimes.op_groups import CLAMPS, CONVOLUTIONS, MAX_POOLS, MOVES
from fxquant.runtimes.runtime import Deployed, Run, Runtime, Session, opened
from fxquant.runtimes.tensors import array, held_beside, readable, runs_files
from fxquant.targets.target import Target

__all__ = ["ONNXRUNTIME", "onnxruntime_session"]

_TARGET = Target(
    name="onnxruntime",
    title="ONNX Runtime",
    source="https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html",
    activation_bits=(8, 16),
    integer_ops=(
        CONVOLUTIONS
        | CLAMPS
        | MAX_POOLS
        | MOVES
        | {"linear", "addmm", "matmul", "bmm", "add", "mul", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d"}
        | {"adaptive_avg_pool2d", "softmax", "sigmoid", "leaky_relu", "interpolate_nearest", "embedding"}
    ),
    rounding="float",
)


def onnxruntime_session(
    file: bytes | str | os.PathLike[str], threads: int | None = None, *, precise: bool = False
) -> Session:
    """A file (its bytes, or its path where it has tensors beside it) in ONNX Runtime on the CPU.

    ``precise`` has it hold signed weights as unsigned ones where this processor's kernels for signed ones saturate
    (``session.x64quantprecision``): exact, and slower. Some files it refuses so: of layers over one dimension, and those
    of operators on integers that share a zero point.

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
    if precise:
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = ort.InferenceSession(readable(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime {ort.__version__} refuses the file: {error}") from error
    return _InONNXRuntime(session, held_beside(file))


class _InONNXRuntime:
    """A session, and what it may still read."""

    def __init__(self, session: Any, read: Any) -> None:
        self._session, self._read = session, read
        self._names = [value.name for value in session.get_inputs()]

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        feeds = {name: array(x) for name, x in zip(self._names, tensors, strict=True)}
        return [torch.from_numpy(y) for y in self._session.run(None, feeds)]


def _open(model: Deployed, threads: int | None) -> Run:
    """Precisely where this processor's kernels for signed weights would saturate, and the file can be had so."""
    file = model.file()
    if saturates_here(file.model.integer):
        with contextlib.suppress(FxquantError):  # 1.24 refuses some files so, when they are opened or when they are run
            return opened(onnxruntime_session, file, threads, precise=True)
    return opened(onnxruntime_session, file, threads)


ONNXRUNTIME = Runtime(
    name="onnxruntime",
    title="ONNX Runtime",
    target=_TARGET,
    session=onnxruntime_session,
    open=_open,
    package="onnxruntime",
    extra="onnx",
    status=runs_files,
)
