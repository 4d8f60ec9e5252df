"""Rows of long benchmarks are told apart by all of their settings: no row goes on from another's epochs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def qat(monkeypatch) -> Iterator[Any]:
    """``benchmarks/qat_cifar.py``, which is no package."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("qat_cifar")
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


class Images:
    """Random images with labels, in the form of ``cifar.Cifar10``."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Tensor) -> Images:
        return Images(self.images[chosen], self.labels[chosen])

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.images.split(size), self.labels.split(size), strict=True)


def some_images() -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images(torch.rand(32, 3, 32, 32, generator=generator), torch.randint(0, 4, (32,), generator=generator))


def arguments(folder: Path, **changed: Any) -> argparse.Namespace:
    usual = {"epochs": 2, "steps": 1, "lr": 0.1, "range_lr": None, "work": folder, "weights": Path("net.pt")}
    rows = {"presets": ["deploy"], "bits": [4], "rules": ["lsq"], "seeds": [0]}
    return argparse.Namespace(**{**usual, **rows, **changed})


def trained(qat: Any, args: argparse.Namespace) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3, stride=8), nn.Flatten(), nn.Linear(32, 4))
    qat.train(model, some_images(), args, 0, qat.state_of(("deploy", 4, "lsq", 0), args))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


OTHERS = [{"lr": 0.4}, {"range_lr": 0.01}, {"epochs": 3}, {"steps": None}, {"weights": Path("other.pt")}]


@pytest.mark.parametrize("changed", OTHERS, ids=lambda changed: next(iter(changed)))
def test_a_row_goes_on_from_its_own_epochs_alone(qat, tmp_path, changed):
    folder, fresh = tmp_path / "used", tmp_path / "fresh"
    folder.mkdir()
    fresh.mkdir()
    trained(qat, arguments(folder))
    key = ("deploy", 4, "lsq", 0)
    assert qat.state_of(key, arguments(folder, **changed)) != qat.state_of(key, arguments(folder))
    found = trained(qat, arguments(folder, **changed))
    assert torch.equal(found, trained(qat, arguments(fresh, **changed)))


def test_the_same_row_goes_on_and_ends_where_it_would_have(qat, tmp_path, monkeypatch):
    args, seen = arguments(tmp_path), []
    whole = trained(qat, args)
    for path in tmp_path.iterdir():
        path.unlink()
    plain = qat.augmented

    def stopped(data: Images, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        seen.append(seed)
        if len(seen) == 2:
            raise KeyboardInterrupt
        yield from plain(data, seed)

    monkeypatch.setattr(qat, "augmented", stopped)
    with pytest.raises(KeyboardInterrupt):
        trained(qat, args)
    assert torch.equal(trained(qat, args), whole) and seen == [0, 1, 1]


def test_rows_of_other_settings_are_neither_done_nor_compared(qat, tmp_path):
    args = arguments(tmp_path)
    settings = dict(zip(qat.SETTINGS, qat.settings_of(args), strict=True))
    rows = [
        {"preset": "float", "bits": 32, "rule": "float", "seed": 0, "top-1": 90.0, **settings},
        {"preset": "deploy", "bits": 4, "rule": "lsq", "seed": 0, "top-1": 88.0, **settings},
    ]
    assert list(qat.wanted(args, rows)) == []
    assert len(list(qat.wanted(arguments(tmp_path, lr=0.4), rows))) == 2
    assert [row["drop"] for row in qat.with_drops(rows)] == [0.0, 2.0]
    assert qat.with_drops([rows[0], {**rows[1], "lr": 0.4}])[1]["drop"] is None
    old = [{name: value for name, value in row.items() if name not in ("lr", "range_lr")} for row in rows]
    held = qat.rows_of({"rows": old, "settings": {"lr": 0.1, "range_lr": None, "seeds": [0]}})
    assert list(qat.wanted(args, held)) == []


def test_a_table_of_recovered_models_is_of_one_number_of_images(qat, tmp_path):
    low = importlib.import_module("ptq_low_bits")
    old = {"settings": {"calibration": 512}, "rows": [{}]}
    args = argparse.Namespace(output=tmp_path / "rows.json", calibration=512)
    low.require_same(old, args)
    args.calibration = 64
    low.require_same({}, args)
    with pytest.raises(SystemExit, match="rows of 512 calibration images"):
        low.require_same(old, args)
