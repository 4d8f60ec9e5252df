"""scikit-learn's bundled digits, and a small network with what makes real ones hard: trained in a few seconds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRAINING = 1297
BATCH = 64


@cache
def data() -> tuple[Tensor, Tensor]:
    """Images ``(1797, 1, 8, 8)`` between 0 and 1, and labels, in a fixed random order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(digits.target)[order]


def training_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = data()
    order = torch.randperm(TRAINING, generator=torch.Generator().manual_seed(seed))
    for chosen in order.split(BATCH):
        yield images[chosen], labels[chosen]


def test_images() -> tuple[Tensor, Tensor]:
    images, labels = data()
    return images[TRAINING:], labels[TRAINING:]


test_images.__test__ = False  # type: ignore[attr-defined]


class DigitsNet(nn.Module):
    """Functional relu and max_pool, a grouped convolution, a residual add and a cat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.grouped, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(16)
        self.side, self.fc = nn.Conv2d(16, 8, 1), nn.Linear(24 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.stem(x))), 2)
        y = F.relu(self.bn2(self.grouped(x)) + x)
        y = torch.cat([y, torch.sigmoid(self.side(y))], 1)
        return self.fc(F.max_pool2d(y, 2).flatten(1))


def train(model: nn.Module, *, epochs: int, rate: float) -> list[float]:
    """The mean loss of each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses = []
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for images, labels in training_batches(epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(labels)
        losses.append(total / TRAINING)
    return losses


@cache
def _trained() -> nn.Module:
    torch.manual_seed(0)
    model = DigitsNet()
    train(model, epochs=4, rate=0.05)
    return model.eval()


def trained() -> nn.Module:
    """The float model after four epochs, a copy of its own for each caller."""
    return copy.deepcopy(_trained())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(test_images()[0])


def accuracy(model: nn.Module) -> float:
    """The share of the 500 test images that are classified right, in percent."""
    return 100 * float((logits(model).argmax(1) == test_images()[1]).double().mean())
