"""A quantized model written in the format that a file's ending names.

    .onnx  ONNX               .pte  ExecuTorch       .pt2  torch.export       .tflite  LiteRT
    .xml   OpenVINO IR, with its weights in a .bin of the same name beside it

Everything is written into a folder beside the file first and put in place in the end, or nothing is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxquant.export.to_executorch import export_executorch
from fxquant.export.to_onnx import export_onnx, make_onnx
from fxquant.export.to_program import export_program
from fxquant.export.to_tflite import export_tflite
from fxquant.installed import require
from fxquant.onnx.files import checked_path, replacing

__all__ = ["FORMATS", "TARGET_OF", "require_format", "write_as"]

TARGET_OF = {".pte": "xnnpack", ".tflite": "tflite", ".xml": "openvino"}
"""The target that a format is for, where there is one."""


def require_format(path: str) -> None:
    """Say at once what writing ``path`` will lack.

    Raises:
        InputError: its folder is not there, or is a file.
        MissingPackageError: the format's package is not installed.
    """
    ending = os.path.splitext(path)[1]
    checked_path(path, ending)
    for package, extra in _NEEDS[ending]:
        require(package, f"writing {ending} files", extra)


def write_as(integer: nn.Module, path: str, example_inputs: Any) -> str:
    """Write an integer model to ``path`` in the format of its ending, and what there is to say of it.

    Raises:
        as ``export_onnx``, ``export_executorch``, ``export_tflite`` and ``export_program``.
    """
    return FORMATS[os.path.splitext(path)[1]](integer, path, example_inputs)


def _onnx(integer: nn.Module, path: str, example_inputs: Any) -> str:
    return str(export_onnx(integer, path, example_inputs))


def _executorch(integer: nn.Module, path: str, example_inputs: Any) -> str:
    return str(export_executorch(integer, path, example_inputs))


def _tflite(integer: nn.Module, path: str, example_inputs: Any) -> str:
    return str(export_tflite(integer, path, example_inputs))


def _program(integer: nn.Module, path: str, example_inputs: Any) -> str:
    program = export_program(integer, example_inputs)
    with replacing(path) as new:
        torch.export.save(program, new)
    return f"{path}: a torch.export program; torch.export.load({path!r}).module() is the model"


def _openvino(integer: nn.Module, path: str, example_inputs: Any) -> str:
    openvino: Any = require("openvino", "writing .xml files", "openvino")
    made = make_onnx(integer, example_inputs)
    source = made.content if made.pair is None else os.fspath(made.pair)
    model = openvino.Core().read_model(source)
    beside = f"{os.path.splitext(path)[0]}.bin"
    with replacing(path) as new:
        openvino.save_model(model, new, compress_to_fp16=False)
        os.replace(f"{os.path.splitext(new)[0]}.bin", beside)
    return "\n".join(
        [f"{path}: OpenVINO IR, its weights in {os.path.basename(beside)}", *(f"  note: {n}" for n in made.notes)]
    )


FORMATS: dict[str, Callable[[Any, str, Any], str]] = {
    ".onnx": _onnx,
    ".pte": _executorch,
    ".pt2": _program,
    ".tflite": _tflite,
    ".xml": _openvino,
}
"""What writes each format."""
_NEEDS: dict[str, tuple[tuple[str, str], ...]] = {
    ".onnx": (("onnx", "onnx"), ("onnxscript", "onnx"), ("onnxruntime", "onnx")),
    ".pte": (("executorch", "executorch"),),
    ".pt2": (),
    ".tflite": (("litert_torch", "litert"),),
    ".xml": (("onnx", "onnx"), ("onnxscript", "onnx"), ("openvino", "openvino")),
}
