"""OpenVINO on a CPU: unsigned tensors, signed weights, and fusions that want no rounding inside.

A weighted op runs in one kernel with the activation and the sum behind it, which read its accumulator; the other operand
of the sum is quantized. OpenVINO 2026.4 does so even where a file asks for a rounding between the two: it clamps to that
grid and does not round (its integers equal those of such a model, and not those of the file). Placed for this target,
nothing is asked for that it skips. It moves a rounding behind a concatenation in front of it, and fails at that in some
models (see ``onnx/concat_inputs.py``), so files have it there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import ExportError
from fxquant.installed import require
from fxquant.onnx.concat_inputs import round_before_joining
from fxquant.onnx.files import serialized
from fxquant.onnx.fixed_sizes import takes_fixed_sizes
from fxquant.runtimes.op_groups import AVERAGES, CLAMPS, CONVOLUTIONS, MAX_POOLS, MOVES, TRANSPOSED_CONVOLUTIONS
from fxquant.runtimes.runtime import Deployed, Run, Runtime, Session, opened
from fxquant.runtimes.tensors import array, held_beside, readable, runs_files
from fxquant.targets.target import Target

__all__ = ["OPENVINO", "has_bfloat16", "openvino_session"]

_Code = Callable[[list[Any]], list[Tensor]]

_SHAPES = 4
"""Shapes of inputs that get code of their own: each holds the weights once more, packed."""

_ACTIVATIONS = frozenset(
    {"leaky_relu", "elu", "silu", "mish", "gelu", "hardswish", "softplus", "sigmoid", "hardsigmoid", "tanh"}
)

_TARGET = Target(
    name="openvino",
    title="OpenVINO",
    source="https://docs.openvino.ai/2025/documentation/openvino-extensibility/openvino-plugin-library/advanced-guides/"
    "low-precision-transformations.html",
    integer_ops=(
        CONVOLUTIONS
        | TRANSPOSED_CONVOLUTIONS
        | CLAMPS
        | MAX_POOLS
        | MOVES
        | _ACTIVATIONS
        | AVERAGES
        | {"linear", "addmm", "matmul", "bmm", "add", "mul", "interpolate", "interpolate_nearest", "embedding"}
    ),
    reads_accumulators=_ACTIVATIONS | {"add"},
    rounds_for_float=False,
    rounding="float",
    rounds_joined=False,
    integer_operators=False,
)


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
            self._model = self._core.read_model(readable(file))
        except Exception as error:
            raise self._refusal(error) from error
        self._read = held_beside(file)
        self._takes_fixed = takes_fixed and bool(self._model.is_dynamic())

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        shapes = tuple(tuple(x.shape) for x in tensors)
        code = self._fixed.get(shapes) or self._compiled_for(shapes)
        return code([array(x) for x in tensors])

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


def _open(model: Deployed, threads: int | None) -> Run:
    file = model.file()
    if 16 in file.model.tensor_bits():
        raise ExportError(
            "OpenVINO computes tensors of more than 8 bits wrongly on the CPU (measured: off by a quarter of the largest "
            "output).\n  what to do: use onnxruntime, or a recipe with 8-bit activations."
        )
    return opened(openvino_session, file, threads, float_dtype=file.model.float_dtype)


OPENVINO = Runtime(
    name="openvino",
    title="OpenVINO",
    target=_TARGET,
    session=openvino_session,
    open=_open,
    package="openvino",
    extra="openvino",
    status=runs_files,
    bfloat16=has_bfloat16,
    file_passes=(round_before_joining,),
)
