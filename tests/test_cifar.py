"""A trained ResNet-20 on real images, where the shared data folder is there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from comparisons import assert_same_top1
from torch import nn

import fxquant
from fxquant.export.to_onnx import make_onnx

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
IMAGES = 2000

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (DATA / "cifar10-jpeg-test.zip").exists(), reason="needs the CIFAR-10 images in ../shared/data"
    ),
]


@pytest.fixture(scope="module")
def cifar() -> ModuleType:
    """``benchmarks/cifar.py``, which is no package."""
    spec = importlib.util.spec_from_file_location("cifar", ROOT / "benchmarks" / "cifar.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cifar"] = module
    spec.loader.exec_module(module)
    return module


def top1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * float((logits.argmax(1) == labels).double().mean())


def test_resnet20_in_integers(cifar):
    test = cifar.load_cifar10(DATA, "test").take(torch.linspace(0, 9999, IMAGES).long())
    model = cifar.load_resnet("resnet20", DATA / "resnet20-cifar10.pt")
    batches = cifar.calibration_batches(cifar.load_cifar10(DATA, "train"))
    prepared = fxquant.calibrate(fxquant.prepare(model, batches[0][0]), batches, progress=False)
    frozen = fxquant.freeze(prepared)
    integer = fxquant.convert(frozen)

    def logits(module: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([module(images) for images, _ in test.batches(250)])

    exact, simulated, integers = (logits(m) for m in (model, frozen, integer))
    assert 78 < top1(exact, test.labels) < 84
    assert top1(integers, test.labels) >= top1(exact, test.labels) - 0.5
    assert_same_top1(integers, simulated, 0.995)


@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet44", "resnet56"])
def test_onnx_files_hold_little_but_the_weights(cifar, name):
    pytest.importorskip("onnx")
    model = cifar.load_resnet(name, DATA / f"{name}-cifar10.pt")
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    images = torch.rand(4, 3, 32, 32)
    for target in ("x86", "openvino"):
        prepared = fxquant.calibrate(fxquant.prepare(model, images, target=target), [images], progress=False)
        share = len(make_onnx(prepared).content) / size
        print(f"{name} for {target}: {share:.4f}")
        assert share <= 0.27
