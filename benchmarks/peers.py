"""The other quantizers, each as its own manual says to call it: one function a tool and task.

A PTQ function takes a float model in eval mode and the calibration batches and returns the model to evaluate. A QAT
function takes a float model and an example input and returns a module to train. Imports stay inside the functions, so
a tool that is not installed costs nothing; `Peer.missing` says which package it lacks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PTQ", "QAT", "Batches", "Peer"]

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
