"""Every contender of latency.py: one function each, from a float model and an example to a callable on such inputs.

Each peer is called as its own manual says, in the form that is fastest here. Imports stay inside the functions, so that
a peer that is not installed costs nothing. A model has one input: images, or token ids.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peers import Peer, fx_x86
from torch import Tensor, nn

__all__ = ["CONTENDERS", "ON_REQUEST", "OURS", "Run", "integer_model", "new_row"]

Run = Callable[[Tensor], Any]
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


def _float(model: nn.Module, x: Tensor, threads: int) -> Run:
    return model


def _compiled(model: nn.Module, x: Tensor, threads: int) -> Run:
    return torch.compile(model, options={"freezing": True})


def integer_model(model: nn.Module, x: Tensor, threads: int) -> Any:
    """fxquant's int8 model, called as it is."""
    import fxquant

    prepared = fxquant.prepare(model, (x,))
    return fxquant.convert(fxquant.calibrate(prepared, [x], progress=False))


def _frozen(model: nn.Module, x: Tensor, threads: int) -> Run:
    import fxquant

    return fxquant.compile(integer_model(model, x, threads), (x,), runtime="torch", threads=threads)


def _auto(model: nn.Module, x: Tensor, threads: int) -> Run:
    import fxquant

    return fxquant.compile(integer_model(model, x, threads), (x,), runtime="auto", threads=threads)


def _fx_frozen(model: nn.Module, x: Tensor, threads: int) -> Run:
    converted = fx_x86(model, [(x, torch.zeros(len(x)))])
    frozen = torch.jit.freeze(torch.jit.trace(converted.eval(), x, check_trace=False))
    for _ in range(_WARM_UP):
        frozen(x)
    return frozen


def _pt2e_inductor(model: nn.Module, x: Tensor, threads: int) -> Run:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torch._inductor import config
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (x,), strict=True).module(), quantizer)
    prepared(x)
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    compiled = torch.compile(converted)
    with config.patch(freezing=True), torch.no_grad():
        compiled(x)  # compiled when it is first called
    return compiled


def _onnxruntime(model: nn.Module, x: Tensor, threads: int) -> Run:
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
        torch.onnx.export(model, (x,), float_path, input_names=["x"], dynamo=False, opset_version=_OPSET)
        quant_pre_process(float_path, ready, skip_symbolic_shape=True)
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(ready, path, Once(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})


def _openvino(model: nn.Module, x: Tensor, threads: int, precision: str | None = None) -> Run:
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    is_transformer = any(isinstance(part, nn.LayerNorm) for part in model.modules())
    converted = openvino.convert_model(model, example_input=x, input=[tuple(x.shape)])
    kind = nncf.ModelType.TRANSFORMER if is_transformer else None
    quantized = nncf.quantize(converted, nncf.Dataset([x.numpy()]), model_type=kind, subset_size=1)
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if precision is not None:  # by default bf16 where the processor has it
        settings["INFERENCE_PRECISION_HINT"] = precision
    request = openvino.compile_model(quantized, "CPU", settings).create_infer_request()
    return lambda x: request.infer([x.numpy()], share_inputs=True, share_outputs=True)


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
    "fxquant": Peer("fxquant", "fxquant", integer_model),
    "fxquant frozen": Peer("fxquant frozen", "fxquant", _frozen),
    "fxquant auto": Peer("fxquant auto", "fxquant", _auto),
}
ON_REQUEST = ("OpenVINO f32",)
"""Contenders that differ from another in a setting."""
OURS = tuple(name for name, peer in CONTENDERS.items() if peer.package == "fxquant")
