"""A learned range beside the moving average on real images: the same network, batches, steps and learning rate."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fxquant
from fxquant import Recipe, Scheme, Setting

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
STEPS, BATCH, IMAGES = 60, 100, 1000

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (DATA / "resnet20-cifar10-jpeg.pt").exists(),
        reason="needs CIFAR-10 and a trained ResNet-20 in ../shared/data",
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


def trained(cifar: ModuleType, rule: str, bits: int) -> tuple[float, float]:
    """Top-1 of the prepared and of the integer model after ``STEPS`` steps."""
    data = cifar.load_cifar10(DATA, "train")
    own: dict[str, Any] = {"estimator": "moving_average"} if rule == "observed" else {}
    setting = Setting(
        weight=Scheme.weight(bits, quantizer=rule), activation=Scheme.activation(bits, quantizer=rule, **own)
    )
    model = cifar.load_resnet("resnet20", DATA / "resnet20-cifar10-jpeg.pt").train()
    example = next(data.batches(8))[0]
    prepared = fxquant.prepare(model, example, qat=True, recipe=Recipe(default=setting))
    optimizer = torch.optim.SGD(fxquant.parameter_groups(prepared), lr=0.02, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[: STEPS * BATCH]
    prepared.train()
    for images, labels in data.take(order).batches(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(prepared(images), labels).backward()
        optimizer.step()
        schedule.step()
    fxquant.reestimate_batchnorm(prepared, data.take(order[:1000]).batches(BATCH))
    test = cifar.load_cifar10(DATA, "test").take(torch.linspace(0, 9999, IMAGES).long())
    found = []
    for module in (prepared.eval(), fxquant.convert(prepared)):
        with torch.no_grad():
            right = [module(images).argmax(1) == labels for images, labels in test.batches(250)]
        found.append(100 * float(torch.cat(right).double().mean()))
    return found[0], found[1]


@pytest.mark.parametrize(("bits", "better_by"), [(4, 0.5), (2, 25.0)])
def test_a_learned_range_beats_the_moving_average(cifar, bits, better_by):
    observed, learned = trained(cifar, "observed", bits), trained(cifar, "lsq", bits)
    print(f"W{bits}A{bits}: moving average {observed[0]:.1f}, lsq {learned[0]:.1f}")
    assert learned[0] >= observed[0] + better_by
    assert abs(learned[1] - learned[0]) <= 0.2
