"""The model of the golden diffs: one of everything that a diff has to tell."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.bn1 = nn.BatchNorm2d(8, eps=1e-3)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.conv2(y)
        y += x
        return self.relu(y)


class Sample(nn.Module):
    """Every weight is a small binary fraction, so that the printed numbers do not depend on the machine."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.block = Block()
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.25)
        self.fc = nn.Linear(64, 4)
        for parameter in self.parameters():
            steps = torch.arange(parameter.numel()) * 37 % 17 - 8
            parameter.data = (steps / 16).reshape(parameter.shape)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        gate = torch.sigmoid(self.norm(x))
        x = torch.cat([F.max_pool2d(x, 2), F.max_pool2d(gate, 2)], 1)
        x = torch.cumsum(x, 1)
        x = self.drop(x).reshape(x.size(0), -1)
        return self.fc(x)


def example() -> Tensor:
    """A batch that calibrates ``Sample``; its numbers are binary fractions too."""
    return ((torch.arange(2 * 3 * 8 * 8) * 29 % 31 - 15) / 16).reshape(2, 3, 8, 8)
