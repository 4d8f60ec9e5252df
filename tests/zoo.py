"""Models of torchvision without downloads: random weights, and statistics and gains away from their defaults."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor, nn

NAMES = (
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet", "densenet121", "squeezenet1_1",
    "efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "vgg11_bn", "mnasnet0_5",
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {"googlenet": {"aux_logits": False, "init_weights": False}}
SIZE = 64


def build(name: str) -> nn.Module:
    """The model in eval mode, the same each time."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **OPTIONS.get(name, {}))
    if name == "vgg11_bn":  # its classifier alone has 120 million weights
        model.classifier = nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10))
    generator = torch.Generator().manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            with torch.no_grad():
                part.running_mean.normal_(0, 0.1, generator=generator)
                part.running_var.uniform_(0.5, 1.5, generator=generator)
                part.weight.uniform_(-1.5, 1.5, generator=generator)
                part.bias.uniform_(-0.5, 0.5, generator=generator)
    return model.eval()


def images(count: int, seed: int = 2) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
