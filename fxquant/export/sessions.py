"""Sessions of runtimes that read ONNX files, by the path that they had before each runtime got a file of its own."""

from __future__ import annotations

from fxquant.runtimes.onnxruntime import onnxruntime_session
from fxquant.runtimes.openvino import has_bfloat16, openvino_session
from fxquant.runtimes.runtime import Session, run_session

__all__ = ["Session", "has_bfloat16", "onnxruntime_session", "openvino_session", "run_session"]
