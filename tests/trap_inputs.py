"""One row of the table of traps, the inputs that they take, and two models without a trap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _itself(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class Trap:
    """One row of the table.

    Args:
        model: builds the model.
        inputs: batch size → example inputs, a tuple of positional arguments or a dict of keyword arguments.
        expect: whether one graph holds the whole model, or some of it stays the user's code.
        batch_free: the original takes another batch size.
        trains: the original has gradients.
        modes: checked in train mode too.
        overwrites: the original writes into its input.
        inner: the part of the model to compare with, where the model itself is only a wrapper.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    expect: Literal["whole", "islands", "either"] = "whole"
    batch_free: bool = True
    trains: bool = True
    modes: bool = True
    overwrites: bool = False
    inner: Callable[[nn.Module], nn.Module] = _itself


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(n: int) -> tuple[Any, ...]:
    return (normal(n, 3, 8, 8),)


def odd_images(n: int) -> tuple[Any, ...]:
    return (normal(n, 3, 6, 7),)


def maps(n: int) -> tuple[Any, ...]:
    return (normal(n, 4, 8, 8),)


def rows(n: int) -> tuple[Any, ...]:
    return (normal(n, 4),)


def tokens(n: int) -> tuple[Any, ...]:
    return (normal(n, 4, 8),)


def ids(n: int) -> tuple[Any, ...]:
    return (torch.randint(0, 11, (n, 5), generator=torch.Generator().manual_seed(1)),)


class ConvNet(nn.Module):
    """No trap: the part that others are built on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class Perceptron(nn.Module):
    """No trap: two linear layers."""

    def __init__(self, width: int = 4, out: int = 4) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 8), nn.Linear(8, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


WHOLE, ISLANDS, EITHER = "whole", "islands", "either"
