"""Quantization-aware training in an ordinary loop, at 4 bits: train, re-estimate batch norms, convert, save, load.

Run: python examples/qat.py            (needs scikit-learn: pip install 'fxquant[demo]')
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxquant


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def train(model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, lr: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model.eval()(x).argmax(1) == y).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    (x_train, x_test), (y_train, y_test) = x.split([1400, len(x) - 1400]), y.split([1400, len(y) - 1400])

    model = Net()
    train(model, x_train, y_train, epochs=8, lr=0.1)
    print(f"float:          {accuracy(model, x_test, y_test):.3f}")

    four = fxquant.Setting(
        weight=fxquant.Scheme(
            bits=4, symmetric=True, signed=True, per_channel=True, narrow_range=True, estimator="mse"
        ),
        activation=fxquant.Scheme(bits=4, estimator="moving_average"),
    )
    recipe = fxquant.Recipe([("conv1", fxquant.Setting()), ("fc", fxquant.Setting())], default=four)
    prepared = fxquant.prepare(model, x_train[:2], qat=True, recipe=recipe)
    train(prepared, x_train, y_train, epochs=6, lr=0.02)
    fxquant.reestimate_batchnorm(prepared, x_train.split(64))
    int4 = fxquant.convert(prepared)
    print(f"4-bit integers: {accuracy(int4, x_test, y_test):.3f}")

    with tempfile.TemporaryDirectory() as folder:
        fxquant.save(int4, Path(folder) / "int4.pt")
        again = fxquant.load(Net(), Path(folder) / "int4.pt")
    assert torch.equal(again(x_test), int4(x_test))


if __name__ == "__main__":
    main()
