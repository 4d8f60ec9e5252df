"""The other quantizers, each as its own manual says to call it: one function a tool and task.

A PTQ function takes a float model in eval mode and the calibration batches and returns the model to evaluate. A QAT
function takes a float model and an example input and returns a module to train. Imports stay inside the functions, so
a tool that is not installed costs nothing; `Peer.missing` says which package it lacks.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PTQ", "QAT", "Batches", "Peer", "fx_fake", "fx_full_range", "fx_per_tensor", "fx_x86", "ort_static"]

Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Peer:
    """One column: the tool's name, the package it needs and the function that runs it."""

    name: str
    package: str
    build: Callable[[nn.Module, Any], Any]

    @property
    def missing(self) -> str | None:
        """Why this peer cannot run here, or None."""
        return None if find_spec(self.package) else f"{self.package} is not installed"


@torch.no_grad()
def _calibrate(prepared: nn.Module, batches: Batches) -> None:
    for images, _ in batches:
        prepared(images)


def _fx_ptq(mapping: Any, model: nn.Module, batches: Batches) -> nn.Module:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(copy.deepcopy(model).eval(), mapping, (batches[0][0],))
    _calibrate(prepared, batches)
    return convert_fx(prepared)


def fx_full_range(model: nn.Module, batches: Batches) -> nn.Module:
    """torch FX, histogram observer over all 8 bits, weights per channel: its most accurate 8-bit setting."""
    from torch.ao.quantization import get_default_qconfig_mapping

    return _fx_ptq(get_default_qconfig_mapping("onednn"), model, batches)


def fx_x86(model: nn.Module, batches: Batches) -> nn.Module:
    """torch FX with its x86 default: the same observers with activations reduced to 7 bits."""
    from torch.ao.quantization import get_default_qconfig_mapping

    return _fx_ptq(get_default_qconfig_mapping("x86"), model, batches)


def fx_per_tensor(model: nn.Module, batches: Batches) -> nn.Module:
    """torch FX, histogram observer over all 8 bits, one scale a weight."""
    from torch.ao.quantization import QConfigMapping, get_default_qconfig

    own = get_default_qconfig("onednn")
    return _fx_ptq(QConfigMapping().set_global(own._replace(weight=_fx_weight(8, per_channel=False))), model, batches)


def _fx_weight(bits: int, *, per_channel: bool) -> Any:
    from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver

    grid = {"dtype": torch.qint8, "quant_min": -(2 ** (bits - 1)), "quant_max": 2 ** (bits - 1) - 1}
    if per_channel:
        return PerChannelMinMaxObserver.with_args(qscheme=torch.per_channel_symmetric, **grid)
    return MinMaxObserver.with_args(qscheme=torch.per_tensor_symmetric, **grid)


def fx_fake(model: nn.Module, batches: Batches, *, weight: int, activation: int) -> nn.Module:
    """torch FX below 8 bits, for which it has no kernels: the same observers on these grids, as fake quantization.

    Prepared as for training, since only there its weights are fake-quantized before ``convert_fx``; nothing is trained.
    """
    from torch.ao.quantization import FakeQuantize, HistogramObserver, QConfig, QConfigMapping, disable_observer
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    rounded = FakeQuantize.with_args(observer=HistogramObserver, quant_min=0, quant_max=2**activation - 1)
    own = QConfig(activation=rounded, weight=_fx_fake_weight(weight))
    prepared = prepare_qat_fx(copy.deepcopy(model).train(), QConfigMapping().set_global(own), (batches[0][0],)).eval()
    prepared.apply(torch.ao.quantization.disable_fake_quant)
    _calibrate(prepared, batches)
    prepared.apply(disable_observer)
    prepared.apply(torch.ao.quantization.enable_fake_quant)
    return prepared


def _fx_fake_weight(bits: int) -> Any:
    from torch.ao.quantization import FakeQuantize, PerChannelMinMaxObserver

    ends = {"quant_min": -(2 ** (bits - 1)), "quant_max": 2 ** (bits - 1) - 1}
    kind = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
    return FakeQuantize.with_args(observer=PerChannelMinMaxObserver, **ends, **kind)


def ort_static(
    model: nn.Module, batches: Batches, *, per_channel: bool, method: str = "MinMax", weight_bits: int = 8
) -> Callable[[Tensor], Tensor]:
    """ONNX Runtime's static quantization after its own pre-processing: QDQ, unsigned activations and signed weights.

    Args:
        method: of calibration, ``"MinMax"``, ``"Entropy"`` or ``"Percentile"``.
        weight_bits: 8 or 4. It has no activations of 4 bits.
    """
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.items = iter([{"x": images.numpy()} for images, _ in batches])

        def get_next(self) -> Any:
            return next(self.items, None)

    ort.set_default_logger_severity(3)
    with tempfile.TemporaryDirectory() as folder:
        float_path, ready, path = (f"{folder}/{name}.onnx" for name in ("float", "ready", "int8"))
        options: dict[str, Any] = {"dynamo": False, "opset_version": 17}
        names: dict[str, Any] = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
        torch.onnx.export(model, (batches[0][0][:1],), float_path, **names, **options)
        quant_pre_process(float_path, ready, skip_symbolic_shape=True)
        kinds = {"activation_type": QuantType.QUInt8}
        kinds["weight_type"] = QuantType.QInt8 if weight_bits == 8 else QuantType.QInt4
        how = {"per_channel": per_channel, "calibrate_method": CalibrationMethod[method]}
        # Histograms are taken batch by batch; min-max keeps two numbers a tensor, and finds none with this option.
        extra = {} if method == "MinMax" else {"CalibMaxIntermediateOutputs": 1}
        quantize_static(ready, path, Reader(), extra_options=extra, **how, **kinds)
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(Path(path).read_bytes(), settings, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def _x86_quantizer(*, is_qat: bool) -> Any:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    return quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=is_qat))


def pt2e_ptq(model: nn.Module, batches: Batches) -> nn.Module:
    """torchao PT2E with the x86 Inductor quantizer, run as its reference (quantize, dequantize) graph."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (batches[0][0],), dynamic_shapes=dynamic).module()
    prepared = prepare_pt2e(exported, _x86_quantizer(is_qat=False))
    _calibrate(prepared, batches)
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    return converted


def nncf_ptq(model: nn.Module, batches: Batches) -> nn.Module:
    """NNCF's default preset, one image an item (its statistics are means over items); runs as fake quantization."""
    import nncf

    items = [image[None] for images, _ in batches for image in images]
    return nncf.quantize(copy.deepcopy(model).eval(), nncf.Dataset(items), subset_size=len(items))


def _fx_qat(backend: str, model: nn.Module, example: Tensor) -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping(backend), (example,))


def fx_qnnpack_qat(model: nn.Module, example: Tensor) -> nn.Module:
    """torch FX with its qnnpack QAT default: weights per tensor, all 8 bits."""
    return _fx_qat("qnnpack", model, example)


def fx_x86_qat(model: nn.Module, example: Tensor) -> nn.Module:
    """torch FX with its x86 QAT default: weights per channel, activations reduced to 7 bits."""
    return _fx_qat("x86", model, example)


def pt2e_qat(model: nn.Module, example: Tensor) -> nn.Module:
    """torchao PT2E with the x86 Inductor quantizer (strict export: it fails on the resnets without)."""
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    exported = torch.export.export(model.train(), (example,), strict=True).module()
    prepared = prepare_qat_pt2e(exported, _x86_quantizer(is_qat=True))
    allow_exported_model_train_eval(prepared)
    prepared.train()  # patched by the line above; unlike nn.Module.train it returns None
    return prepared


def nncf_qat(model: nn.Module, example: Tensor) -> nn.Module:
    """NNCF: its PTQ result is what one trains."""
    import nncf

    return nncf.quantize(model.eval(), nncf.Dataset([example]), subset_size=1).train()


PTQ = (
    Peer("FX", "torch", fx_full_range),
    Peer("FX x86", "torch", fx_x86),
    Peer("PT2E", "torchao", pt2e_ptq),
    Peer("NNCF", "nncf", nncf_ptq),
)
QAT = (
    Peer("FX qnnpack", "torch", fx_qnnpack_qat),
    Peer("FX x86", "torch", fx_x86_qat),
    Peer("PT2E", "torchao", pt2e_qat),
    Peer("NNCF", "nncf", nncf_qat),
)
