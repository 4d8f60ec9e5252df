"""``fxquant demo``: scikit-learn's digits from training to integers, in less than a minute."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm.auto import tqdm

from fxquant.errors import InputError
from fxquant.flow import calibrate, convert, prepare
from fxquant.reporting.diff import diff

__all__ = ["DigitNet", "run"]


class DigitNet(nn.Module):
    """A network for 8×8 digits as anybody might write it: functional calls, a grouped conv, an add and a cat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.wide = nn.Conv2d(32, 64, 3, padding=1)
        self.left = nn.Conv2d(64, 32, 1)
        self.right = nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(96 * 2 * 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        x = F.relu(x + self.bn2(self.grouped(x)))
        x = F.max_pool2d(x, 2)
        x = F.relu(self.wide(x))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], dim=1)
        x = F.max_pool2d(x, 2)
        y: Tensor = self.head(x.flatten(1))
        return y


@dataclass(frozen=True)
class Digits:
    """Images ``(n, 1, 8, 8)`` in [0, 1] and their labels; a quarter is held out for the test."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """The training set in shuffled batches."""
        images, labels = self.train
        return [(images[i], labels[i]) for i in torch.split(torch.randperm(len(labels)), size)]


def load_digits() -> Digits:
    """scikit-learn's digits, split by a fixed permutation.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise InputError(
            "the demo needs scikit-learn, which has the digits.\n  what to do: pip install 'fxquant[demo]'"
        ) from error
    raw: Any = datasets.load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[: len(order) // 4], order[len(order) // 4 :]
    return Digits((images[rest], labels[rest]), (images[held_out], labels[held_out]))


def train(model: nn.Module, data: Digits, *, epochs: int, lr: float) -> None:
    """An ordinary training loop: nothing in it knows of quantization."""
    torch.manual_seed(0)
    steps = epochs * -(-len(data.train[1]) // 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    model.train()
    with tqdm(total=steps, unit="step", leave=False, disable=None) as bar:
        for _ in range(epochs):
            for images, labels in data.batches(64):
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                bar.update()
    model.eval()


@torch.no_grad()
def predictions(model: nn.Module, data: Digits) -> Tensor:
    """The classes that a model gives the test images."""
    found: Tensor = model(data.test[0]).argmax(1)
    return found


def saved_size(model: nn.Module) -> int:
    """Bytes of the model's state dict as a file."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def compare(models: Iterable[tuple[str, nn.Module]], data: Digits) -> list[dict[str, Any]]:
    """Accuracy, size, and agreement with the first model, on the test images; shares of 1."""
    labels = data.test[1]
    rows: list[dict[str, Any]] = []
    reference: Tensor | None = None
    for name, model in models:
        found = predictions(model, data)
        agreement = None if reference is None else _share(found == reference)
        reference = found if reference is None else reference
        size = saved_size(model)
        rows.append({"model": name, "accuracy": _share(found == labels), "bytes": size, "agreement": agreement})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What ``compare`` found, as text."""
    lines = [
        [row["model"], _percent(row["accuracy"]), f"{row['bytes'] / 1000:.0f} kB", _percent(row["agreement"])]
        for row in rows
    ]
    header = ["model", "test accuracy", "size", "agrees with float"]
    return str(tabulate(lines, header, tablefmt="simple", colalign=["left", *["right"] * 3], disable_numparse=True))


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


@contextmanager
def one_thread() -> Iterator[None]:
    """Work on one thread: on tensors as small as these, threads wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(*, epochs: int = 12, qat_epochs: int = 6) -> list[dict[str, Any]]:
    """Train, prepare, calibrate, convert, train with quantizers, convert, compare; print each step, and give the last."""
    start = time.perf_counter()
    data = load_digits()
    torch.manual_seed(0)
    model = DigitNet()
    with one_thread():
        print(f"1  train a float network on {len(data.train[1])} digits, {epochs} epochs", flush=True)
        train(model, data, epochs=epochs, lr=5e-3)
        print("2  prepare and calibrate it (PTQ)\n", flush=True)
        example = data.train[0][:1]
        prepared = prepare(model, example)
        calibrate(prepared, data.batches(64), progress=False)
        ptq = convert(prepared)
        print(diff(model, prepared))
        print(f"\n3  train on with quantizers (QAT), {qat_epochs} epochs", flush=True)
        trained = prepare(model, example, qat=True)
        train(trained, data, epochs=qat_epochs, lr=1e-3)
        qat = convert(trained)
        print(f"4  compare on {len(data.test[1])} digits held out; both int8 models compute in integers\n", flush=True)
        found = compare([("float", model), ("int8, PTQ", ptq), ("int8, QAT", qat)], data)
        print(table(found))
    print(f"\n{time.perf_counter() - start:.0f} s")
    return found
