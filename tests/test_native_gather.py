"""Functions that move numbers and are no views, natively: each against the reference, and what they are found to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_kernels import needs_native

import fxquant
from fxquant.errors import Refusal
from fxquant.kernels.native.gather import Gathering, Reordering, gathering_of
from fxquant.kernels.native.model import NativeModel
from fxquant.kernels.runner import by_reference
from fxquant.numerics.scheme import Scheme

pytestmark = needs_native

MOVES = {
    "twice as large": lambda x: F.interpolate(x, scale_factor=2),
    "to a size": lambda x: F.interpolate(x, size=(11, 9)),
    "smaller": lambda x: F.interpolate(x, size=(4, 3)),
    "exact": lambda x: F.interpolate(x, scale_factor=(1.5, 3.0), mode="nearest-exact"),
    "rolled": lambda x: torch.roll(x, (-3, 2), (2, 3)),
    "rolled over channels": lambda x: torch.roll(x, 3, 1),
    "padded": lambda x: F.pad(x, (1, 2, 0, 3)),
    "cropped": lambda x: F.pad(x, (-1, -1, 2, 1)),
    "mirrored": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "tiled": lambda x: x.repeat(1, 2, 1, 2),
}


class Moving(nn.Module):
    def __init__(self, move: Any, channels: int) -> None:
        super().__init__()
        self.first, self.move, self.second = nn.Conv2d(3, 8, 3, padding=1), move, nn.Conv2d(channels, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.move(self.first(x)))


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("name", MOVES)
def test_what_moves_numbers_axis_by_axis_has_the_reference_s_bits(name, signed):
    torch.manual_seed(0)
    move = MOVES[name]
    model, x = Moving(move, move(torch.zeros(1, 8, 8, 7)).shape[1]).eval(), torch.randn(3, 3, 8, 7)
    own = fxquant.Setting(activation=Scheme(symmetric=True, signed=True)) if signed else fxquant.Setting()
    prepared = fxquant.prepare(model, x, recipe=fxquant.Recipe(default=own))
    integer = fxquant.convert(fxquant.calibrate(prepared, [x], progress=False))
    assert fxquant.coverage(integer).macs.integer == fxquant.coverage(integer).macs.total
    native = NativeModel(integer)
    for call in (x, x[:1], torch.randn(2, 3, 9, 12)):
        with by_reference(integer):
            assert torch.equal(native(call), integer(call))


def test_what_is_found_of_a_function():
    double = gathering_of(lambda x: x.repeat_interleave(2, dim=1), (2, 5), torch.uint8)
    assert isinstance(double, Gathering)
    assert [len(pieces) for pieces in double.axes] == [1, 1] and double.shape == (2, 10) and not double.fills
    padded = gathering_of(lambda x: F.pad(x, (1, 0), value=7), (2, 5), torch.uint8)
    assert not isinstance(padded, Refusal) and padded.fills and padded.filling == 7


@pytest.mark.parametrize(
    "function, shape",
    [
        (lambda x: F.pixel_shuffle(x, 2), (2, 12, 3, 5)),
        (lambda x: F.pixel_unshuffle(x, 3), (1, 4, 6, 9)),
        (lambda x: F.channel_shuffle(x, 3), (2, 12, 3, 5)),
        (lambda x: x.reshape(2, 3, 4, 5, 6).permute(3, 1, 0, 4, 2).flatten(1, 2), (6, 20, 6)),
        (lambda x: x.t().reshape(2, 500), (2, 500)),
        (lambda x: x[1:, ::3].permute(2, 0, 1).reshape(4, -1), (3, 7, 4)),
    ],
)
@pytest.mark.parametrize("order", ["contiguous", "channels last"])
def test_other_orders_are_found(function, shape, order):
    found = gathering_of(function, shape, torch.uint8)
    assert isinstance(found, (Gathering, Reordering))
    x = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if order == "channels last" else x
    y = torch.zeros(found.shape, dtype=torch.uint8)
    for source, target in found.views(x, y):
        target.copy_(source)
    assert torch.equal(y, function(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sort(dim=1).values,
        lambda x: x.flip(1),
        lambda x: x.max(dim=1).values,
        lambda x: torch.where(x > 40, x, torch.zeros_like(x)),
    ],
    ids=["sorted", "flipped", "reduced", "chosen by value"],
)
def test_what_moves_in_neither_way_is_refused(function):
    assert isinstance(gathering_of(function, (2, 500), torch.uint8), Refusal)


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 1, 3), (1, 2, 3), (2, 1, 3), (2, 3, 2)])
def test_a_maximum_of_few_numbers_is_no_move(shape):
    """The numbers that were tried may happen to have theirs where it would be a move."""
    for function in (lambda x: x.sort(dim=-1).values, lambda x: F.adaptive_max_pool1d(x.double(), 1).to(x.dtype)):
        assert isinstance(gathering_of(function, shape, torch.uint8), Refusal)
    model = nn.Sequential(nn.Conv1d(shape[1], shape[1], 1), nn.Hardtanh(-1, 1), nn.AdaptiveMaxPool1d(1))
    integer = fxquant.quantize(model.eval(), [torch.randn(64, *shape[1:])], progress=False)
    for seed in range(8):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        got = integer(x)
        with by_reference(integer):
            assert torch.equal(got, integer(x))
