"""Runtimes, one object in one file each: what every verb that runs, times, writes or places a model reads.

fxquant.runtimes.register(fxquant.runtimes.Runtime(name="mine", title="Mine", target=..., session=...))
fxquant.compile(int8, x, runtime="mine")
"""

from __future__ import annotations

from fxquant.runtimes.executorch import EXECUTORCH
from fxquant.runtimes.native import NATIVE
from fxquant.runtimes.onnxruntime import ONNXRUNTIME
from fxquant.runtimes.openvino import OPENVINO
from fxquant.runtimes.pytorch import PYTORCH
from fxquant.runtimes.runtime import RUNNABLE, RUNTIMES, Deployed, Run, Runtime, Session, register, runtime_of
from fxquant.runtimes.tensorrt import TENSORRT
from fxquant.runtimes.tflite import TFLITE

__all__ = ["RUNNABLE", "RUNTIMES", "Deployed", "Run", "Runtime", "Session", "register", "runtime_of"]

for _own in (PYTORCH, NATIVE, ONNXRUNTIME, OPENVINO, TENSORRT, EXECUTORCH, TFLITE):
    register(_own)
