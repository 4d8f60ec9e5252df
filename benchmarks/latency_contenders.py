"""Every contender of latency.py: one function each, from a float model and an example to runs at any number of threads.

What does not depend on the number of threads (quantizing, exporting, writing a file) is done once; the function that comes
back is then asked for a run at each number. Each peer is called as its own manual says, in the form that is fastest here,
and what torch keeps for one number of threads is made anew for each. Imports stay inside the functions, so that a peer that
is not installed costs nothing. A model has one input: images, or token ids.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import Peer, fx_x86
from torch import Tensor, nn

__all__ = ["CONTENDERS", "ON_REQUEST", "OURS", "AtThreads", "Run", "integer_model", "new_row"]

Run = Callable[[Tensor], Any]
AtThreads = Callable[[int], Run]
_WARM_UP = 3
_OPSET = 17


def new_row(threads: int) -> None:
    """Let nothing of the row before be seen by the next: torch.compile's code, and the threads it was generated for."""
    from torch._inductor import config

    torch.set_num_threads(threads)
    torch._dynamo.reset()
    torch.backends.quantized.engine = "x86" if "x86" in torch.backends.quantized.supported_engines else "none"
    config.cpp.threads = threads
    config.compile_threads = 1  # no workers that would go on after a time limit


def _float(model: nn.Module, x: Tensor) -> AtThreads:
    return lambda threads: model


def _compiled(model: nn.Module, x: Tensor) -> AtThreads:
    return lambda threads: torch.compile(copy.deepcopy(model), options={"freezing": True})


def integer_model(model: nn.Module, x: Tensor) -> Any:
    """fxquant's int8 model, which all contenders of ours start from."""
    import fxquant

    prepared = fxquant.prepare(model, (x,))
    return fxquant.convert(fxquant.calibrate(prepared, [x], progress=False))


def _int8(int8: Any, x: Tensor) -> AtThreads:
    return lambda threads: copy.deepcopy(int8)


def _in_runtime(int8: Any, x: Tensor, *, runtime: str) -> AtThreads:
    import fxquant

    return lambda threads: fxquant.compile(copy.deepcopy(int8), (x,), runtime=runtime, threads=threads)


def _fx_frozen(model: nn.Module, x: Tensor) -> AtThreads:
    converted = fx_x86(model, [(x, torch.zeros(len(x)))]).eval()

    def at(threads: int) -> Run:
        frozen = torch.jit.freeze(torch.jit.trace(copy.deepcopy(converted), x, check_trace=False))
        for _ in range(_WARM_UP):
            frozen(x)
        return frozen

    return at


def _pt2e_inductor(model: nn.Module, x: Tensor) -> AtThreads:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torch._inductor import config
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (x,), strict=True).module(), quantizer)
    prepared(x)
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)

    def at(threads: int) -> Run:
        compiled = torch.compile(copy.deepcopy(converted))
        with config.patch(freezing=True), torch.no_grad():
            compiled(x)  # compiled when it is first called
        return compiled

    return at


@contextmanager
def _plain_attention() -> Iterator[None]:
    """nn.MultiheadAttention as the operators it stands for; torch's one operator for it in eval mode has no ONNX form."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _onnxruntime(model: nn.Module, x: Tensor) -> AtThreads:
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Once(CalibrationDataReader):
        def __init__(self) -> None:
            self.items = iter([{"x": x.numpy()}])

        def get_next(self) -> Any:
            return next(self.items, None)

    ort.set_default_logger_severity(3)
    with tempfile.TemporaryDirectory() as folder:
        float_path, ready, path = (f"{folder}/{name}.onnx" for name in ("float", "ready", "int8"))
        with _plain_attention():
            torch.onnx.export(model, (x,), float_path, input_names=["x"], dynamo=False, opset_version=_OPSET)
        quant_pre_process(float_path, ready, skip_symbolic_shape=True)
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(ready, path, Once(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
        content = Path(path).read_bytes()

    def at(threads: int) -> Run:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # By default its threads spin for 0.2 s behind a call, into the others' turns; inside of one they may.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"x": x.numpy()})

    return at


def _openvino(model: nn.Module, x: Tensor, precision: str | None = None) -> AtThreads:
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    is_transformer = any(isinstance(part, nn.LayerNorm) for part in model.modules())
    converted = openvino.convert_model(model, example_input=x, input=[tuple(x.shape)])
    kind = nncf.ModelType.TRANSFORMER if is_transformer else None
    quantized = nncf.quantize(converted, nncf.Dataset([x.numpy()]), model_type=kind, subset_size=1)

    def at(threads: int) -> Run:
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        if precision is not None:  # by default bf16 where the processor has it
            settings["INFERENCE_PRECISION_HINT"] = precision
        request = openvino.compile_model(quantized, "CPU", settings).create_infer_request()
        return lambda x: request.infer([x.numpy()], share_inputs=True, share_outputs=True)

    return at


class _Both(Peer):
    """A peer of two packages."""

    @property
    def missing(self) -> str | None:
        """Why this peer cannot run here, or None."""
        return super().missing or Peer(self.name, "openvino", self.build).missing


CONTENDERS = {
    "float": Peer("float", "torch", _float),
    "compiled": Peer("compiled", "torch", _compiled),
    "FX x86": Peer("FX x86", "torch", _fx_frozen),
    "PT2E": Peer("PT2E", "torchao", _pt2e_inductor),
    "ORT": Peer("ORT", "onnxruntime", _onnxruntime),
    "OpenVINO": _Both("OpenVINO", "nncf", _openvino),
    "OpenVINO f32": _Both("OpenVINO f32", "nncf", partial(_openvino, precision="f32")),
    "fxquant": Peer("fxquant", "fxquant", _int8),
    "fxquant frozen": Peer("fxquant frozen", "fxquant", partial(_in_runtime, runtime="torch")),
    "fxquant native": Peer("fxquant native", "fxquant", partial(_in_runtime, runtime="native")),
    "fxquant auto": Peer("fxquant auto", "fxquant", partial(_in_runtime, runtime="auto")),
}
ON_REQUEST = ("OpenVINO f32",)
"""Contenders that differ from another in a setting."""
OURS = tuple(name for name, peer in CONTENDERS.items() if peer.package == "fxquant")
"""Contenders that start from ``integer_model`` and not from the float model."""
