"""Integers of fewer than 8 bits in files: what was packed comes back, in as few bytes as its bits are worth."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.checkpoint import read
from fxquant.numerics.packing import packed, unpacked


@pytest.mark.parametrize("dtype, least", [(torch.int8, -128), (torch.uint8, 0)])
@pytest.mark.parametrize("shape", [(64,), (65,), (7, 11, 3), (2, 3, 4, 5)])
@pytest.mark.parametrize("bits", range(9))
def test_numbers_come_back(bits: int, shape: tuple[int, ...], dtype: torch.dtype, least: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    numbers = torch.randint(0, 2**bits, shape, generator=generator).flatten()
    numbers[:2] = torch.tensor([0, 2**bits - 1])
    for low in {least, least + 256 - 2**bits, least + (256 - 2**bits) // 2}:
        value = (numbers + low).to(dtype).reshape(shape)
        held = packed(value)
        assert isinstance(held, Tensor) if bits == 8 else len(held["bytes"]) == -(-value.numel() * bits // 8)
        found = unpacked(held)
        assert torch.equal(found, value) and found.dtype == dtype


def test_bytes_are_the_digits_by_hand() -> None:
    """Numbers 0 to 7 in three bits, lowest first: 000 100 010 110 001 101 011 111."""
    held = packed(torch.arange(64, dtype=torch.uint8) % 8)
    digits = "".join(format(number, "03b")[::-1] for number in range(8)) * 8
    assert held["bytes"].tolist() == [int(digits[i : i + 8][::-1], 2) for i in range(0, len(digits), 8)]


def test_what_gains_nothing_stays() -> None:
    for value in (torch.zeros(63, dtype=torch.int8), torch.zeros(99), torch.zeros(99, dtype=torch.int32), "text", None):
        assert packed(value) is value and unpacked(value) is value


def made(bits: int) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 256), nn.Linear(256, 5)
    ).eval()
    x = torch.randn(4, 3, 8, 8)
    prepared = fxquant.prepare(model, x, recipe=fxquant.Setting(weight=fxquant.Scheme.weight(bits)), processor="vnni")
    return model, fxquant.calibrate(prepared, [x], progress=False), x


@pytest.mark.parametrize("bits, share", [(8, 1.0), (4, 0.52), (3, 0.395), (2, 0.27)])
def test_files_take_the_bits_that_weights_have(bits: int, share: float, tmp_path: Any) -> None:
    """Of 296,000 weights, beside a few thousand bytes of grids and names."""
    model, prepared, x = made(bits)
    integer = fxquant.convert(prepared)
    fxquant.save(integer, tmp_path / "q.pt")
    weights = sum(b.numel() for b in integer.buffers() if b.dtype == torch.int8)
    assert weights > 290_000 and (tmp_path / "q.pt").stat().st_size <= share * weights + 30_000
    other = copy.deepcopy(model)
    nn.init.zeros_(other[0].weight)
    loaded = fxquant.load(other, tmp_path / "q.pt")
    with torch.no_grad():
        assert torch.equal(loaded(x), integer(x))
    for (name, value), found in zip(integer.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(value, found) and value.dtype == found.dtype, name


@pytest.mark.long
def test_pinned_roundings_are_packed_and_trained_on(tmp_path: Any) -> None:
    model, prepared, x = made(4)
    fxquant.recover(prepared, [x], progress=False)
    fxquant.save(prepared, tmp_path / "p.pt")
    content = torch.load(tmp_path / "p.pt", weights_only=True)
    assert content["state"]["3.weight_quantizer.integers"]["bits"] == 4
    loaded = fxquant.load(model, tmp_path / "p.pt")
    with torch.no_grad():
        assert torch.equal(loaded(x), prepared(x))


def test_a_file_of_format_2_loads(tmp_path: Any) -> None:
    """What was written before: every integer in a byte."""
    model, prepared, x = made(2)
    integer = fxquant.convert(prepared)
    fxquant.save(integer, tmp_path / "new.pt")
    torch.save({**read(tmp_path / "new.pt"), "fxquant": 2}, tmp_path / "old.pt")
    with torch.no_grad():
        assert torch.equal(fxquant.load(model, tmp_path / "old.pt")(x), integer(x))
