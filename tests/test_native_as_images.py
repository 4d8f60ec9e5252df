"""Layers over lines and volumes, transposed ones and other paddings natively, against the reference bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from native_oracle import Function, integers_of, require_same, signal
from native_parts import SIGNED
from torch import Tensor, nn

from fxquant import Recipe
from fxquant.errors import InputError, Refusal
from fxquant.kernels.native import library
from fxquant.kernels.native.model import NativeModel

REASON = library.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels here: {REASON}")

RECIPES = {"unsigned": Recipe(quantize_outputs=True), "signed": SIGNED}
IMAGES, LINES, VOLUMES = ((2, 6, 9, 8), (1, 6, 7, 11)), ((2, 6, 19), (1, 6, 31)), ((2, 6, 7, 9, 8), (1, 6, 6, 7, 11))
SMALL_VOLUMES = (2, 6, 3, 4, 5), (1, 6, 4, 3, 3)
"""Shapes of the calibration and of another call."""

PADDED: dict[str, dict[str, Any]] = {
    "same": {"kernel_size": 3, "padding": "same"},
    "same, even": {"kernel_size": (2, 4), "padding": "same"},
    "same, dilated": {"kernel_size": (4, 5), "padding": "same", "dilation": (3, 2)},
    "valid": {"kernel_size": 3, "padding": "valid", "stride": 2},
    "reflected": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "replicated": {"kernel_size": 3, "padding": (3, 0), "padding_mode": "replicate", "stride": 2},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 3},
    "same, circular": {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
}
TRANSPOSED: dict[str, dict[str, Any]] = {
    "2, stride 2": {"kernel_size": 2, "stride": 2},
    "4, stride 2": {"kernel_size": 4, "stride": 2, "padding": 1},
    "3, stride 2, one more": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "3": {"kernel_size": 3},
    "3, padded by all": {"kernel_size": 3, "padding": 2},
    "3, dilated": {"kernel_size": 3, "padding": 1, "dilation": 2},
    "1, stride 2": {"kernel_size": 1, "stride": 2},
    "2, stride 3, two more": {"kernel_size": 2, "stride": 3, "output_padding": 2},
    "5, stride 2, padded by 4": {"kernel_size": 5, "stride": 2, "padding": 4},
    "7, stride 4": {"kernel_size": 7, "stride": 4, "padding": 3, "output_padding": 3},
}
OVER_LINES: dict[str, dict[str, Any]] = {
    "3": {"kernel_size": 3},
    "5, strided, groups": {"kernel_size": 5, "stride": 2, "padding": 2, "groups": 2},
    "3, depthwise": {"kernel_size": 3, "padding": 1, "groups": 6},
    "same, even, dilated": {"kernel_size": 4, "padding": "same", "dilation": 2},
    "reflected": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
}
OVER_VOLUMES: dict[str, dict[str, Any]] = {
    "3": {"kernel_size": 3},
    "3, padded": {"kernel_size": 3, "padding": 1},
    "planes alone": {"kernel_size": (1, 3, 3), "padding": (0, 1, 1)},
    "through planes alone": {"kernel_size": (3, 1, 1), "padding": (1, 0, 0)},
    "through planes, strided, padded by more": {"kernel_size": (3, 1, 1), "padding": (4, 0, 0), "stride": (2, 1, 1)},
    "through planes, circular": {"kernel_size": (3, 1, 1), "padding": "same", "padding_mode": "circular"},
    "3, stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated, groups": {
        "kernel_size": 3,
        "stride": (2, 1, 2),
        "dilation": (2, 1, 1),
        "padding": (3, 1, 0),
        "groups": 2,
    },
    "padded by more than it covers": {"kernel_size": (2, 3, 3), "padding": (4, 3, 1), "stride": (3, 1, 1)},
    "depthwise": {"kernel_size": 3, "groups": 6, "padding": 1},
    "same, even": {"kernel_size": (2, 3, 4), "padding": "same"},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "1, every other plane": {"kernel_size": 1, "stride": (2, 1, 1)},
    "1": {"kernel_size": 1},
}


def _require(layer: nn.Module, shapes: tuple[tuple[int, ...], ...], signs: str = "unsigned") -> None:
    """The layer behind others, whose memory is the plan's, and as the first and last one."""
    x, *others = (signal(*shape, seed=i, offset=0.3) for i, shape in enumerate(shapes))
    for model in (layer, nn.Sequential(nn.Hardtanh(-1, 2), layer, nn.ReLU())):
        require_same(integers_of(model, x, recipe=RECIPES[signs]), (x,), *((other,) for other in others))


@pytest.mark.parametrize("signs", RECIPES)
@pytest.mark.parametrize("name", PADDED)
def test_paddings(name, signs):
    _require(nn.Conv2d(6, 9, **PADDED[name]), IMAGES, signs)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions(name, groups):
    _require(nn.ConvTranspose2d(6, 12, groups=groups, bias=groups != 2, **TRANSPOSED[name]), IMAGES)


@pytest.mark.parametrize("signs", RECIPES)
@pytest.mark.parametrize("name", ["4, stride 2", "3, stride 2, one more", "3"])
def test_transposed_convolutions_over_lines(name, signs):
    _require(nn.ConvTranspose1d(6, 9, **TRANSPOSED[name]), LINES, signs)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions_over_volumes(name, groups):
    _require(nn.ConvTranspose3d(6, 9, groups=groups, bias=groups == 1, **TRANSPOSED[name]), SMALL_VOLUMES)


def test_sides_of_a_transposed_window_over_volumes():
    layer = nn.ConvTranspose3d(6, 9, (1, 2, 3), stride=(1, 3, 2), padding=(0, 0, 1), output_padding=(0, 1, 1))
    _require(layer, SMALL_VOLUMES, "signed")


@pytest.mark.parametrize("name", ["2, stride 2", "3, stride 2, one more", "3", "7, stride 4"])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_transposed_convolution_that_leaves_as_floats(name, groups):
    x = signal(*IMAGES[0])
    integer = integers_of(nn.ConvTranspose2d(6, 9, groups=groups, **TRANSPOSED[name]), x, recipe=None)
    require_same(integer, (x,), (signal(*IMAGES[1]),))


@pytest.mark.parametrize("signs", RECIPES)
@pytest.mark.parametrize("name", OVER_LINES)
def test_convolutions_over_lines(name, signs):
    _require(nn.Conv1d(6, 12, **OVER_LINES[name]), LINES, signs)


@pytest.mark.parametrize("signs", RECIPES)
@pytest.mark.parametrize("name", OVER_VOLUMES)
def test_convolutions_over_volumes(name, signs):
    _require(nn.Conv3d(6, 12, **OVER_VOLUMES[name]), VOLUMES, signs)


FEW_CHANNELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "a wave": (nn.Conv1d(1, 20, 16, stride=4), (2, 1, 90)),
    "lines of two": (nn.Conv1d(2, 9, 5, padding=2), (2, 2, 19)),
    "same of three": (nn.Conv2d(3, 9, 4, padding="same"), (2, 3, 9, 8)),
    "reflected, of one": (nn.Conv2d(1, 9, 3, padding=1, padding_mode="reflect"), (2, 1, 9, 8)),
    "transposed, of three": (nn.ConvTranspose2d(3, 9, 4, stride=2, padding=1), (2, 3, 9, 8)),
    "planes of one": (nn.Conv3d(1, 9, (1, 3, 3), padding=(0, 1, 1)), (2, 1, 4, 9, 8)),
    "volumes of one": (nn.Conv3d(1, 9, 3, padding=1), (2, 1, 4, 9, 8)),
    "through planes, of two": (nn.Conv3d(2, 9, (3, 1, 1), padding=(1, 0, 0)), (2, 2, 5, 6, 7)),
    "to one": (nn.ConvTranspose2d(6, 1, 2, stride=2), (2, 6, 5, 4)),
}
"""Of these, windows are read by whole lines behind a border."""


@pytest.mark.parametrize("signs", RECIPES)
@pytest.mark.parametrize("name", FEW_CHANNELS)
def test_few_channels(name, signs):
    layer, shape = FEW_CHANNELS[name]
    _require(layer, (shape, (1, *shape[1:-1], shape[-1] + 5)), signs)


@pytest.mark.parametrize("shape, layer", [((2, 6, 19), nn.Conv1d), ((2, 6, 7, 9, 8), nn.Conv3d)])
def test_floats_that_leave_lines_and_volumes(layer, shape):
    x = signal(*shape)
    require_same(integers_of(layer(6, 9, 3, padding=1), x, recipe=None), (x,))


class Residual(nn.Module):
    """Two layers with a sum, a join and a norm around them."""

    def __init__(self, conv: type[nn.Module], norm: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second, self.norm = conv(6, 6, 3, padding=1), conv(6, 6, 3, padding=1), norm(12)
        self.last = conv(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return self.last(F.relu(self.norm(torch.cat([self.second(y) + y, x], 1))))


@pytest.mark.parametrize(
    "conv, norm, shapes", [(nn.Conv1d, nn.BatchNorm1d, LINES), (nn.Conv3d, nn.BatchNorm3d, VOLUMES)]
)
def test_networks_over_lines_and_volumes(conv, norm, shapes):
    x, other = (signal(*shape) for shape in shapes)
    require_same(integers_of(Residual(conv, norm), x), (x,), (other,))


POOLS: dict[str, nn.Module] = {
    "maxima": nn.MaxPool1d(3),
    "maxima, padded, ceil": nn.MaxPool1d(3, 2, 1, ceil_mode=True),
    "maxima, dilated": nn.MaxPool1d(2, 1, dilation=3),
    "averages": nn.AvgPool1d(3, 2, 1, count_include_pad=False),
    "averages with padding": nn.AvgPool1d(4, 3, 2),
    "an average of all": nn.AdaptiveAvgPool1d(1),
    "averages of parts": nn.AdaptiveAvgPool1d(4),
}


@pytest.mark.parametrize("signs", RECIPES)
@pytest.mark.parametrize("name", POOLS)
def test_pools_over_lines(name, signs):
    x, other = (signal(*shape) for shape in LINES)
    model = nn.Sequential(nn.Conv1d(6, 20, 3), nn.Hardtanh(-1, 2), POOLS[name])
    require_same(integers_of(model, x, recipe=RECIPES[signs]), (x,), (other,))


@pytest.mark.parametrize("signs", RECIPES)
@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool3d(2),
        nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        nn.MaxPool3d(3, stride=(2, 1, 2), padding=1, ceil_mode=True),
        nn.MaxPool3d((3, 1, 2), stride=1, dilation=(2, 1, 3)),
    ],
)
def test_maxima_over_volumes(pool, signs):
    x, other = (signal(*shape) for shape in VOLUMES)
    for model in (
        nn.Sequential(nn.Conv3d(6, 20, 1), nn.Hardtanh(-1, 2), pool),
        nn.Sequential(pool, nn.Conv3d(6, 4, 1)),
    ):
        require_same(integers_of(model, x, recipe=RECIPES[signs]), (x,), (other,))


def test_the_average_of_a_volume():
    x, other = (signal(*shape) for shape in VOLUMES)
    model = nn.Sequential(nn.Conv3d(6, 20, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(20, 3))
    require_same(integers_of(model, x), (x,), (other,))


def test_a_u_net():
    """What goes up is joined with what went down: the results of a transposed convolution are copied into the join."""
    parts = {"down": nn.Conv2d(6, 8, 3, 2, 1), "up": nn.ConvTranspose2d(8, 5, 2, 2), "last": nn.Conv2d(11, 3, 1)}
    x = signal(2, 6, 8, 12)
    model = Function(lambda m, x: m.last(torch.cat([F.relu(m.up(F.relu(m.down(x)))), x], 1)), **parts)
    require_same(integers_of(model, x), (x,), (signal(1, 6, 4, 6),))


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(4, 32), (3, 33), (2, 5, 7), (2, 5, 1), (2, 1, 7), (2, 5, 4, 3), (2, 3, 4, 5, 6)])
def test_floats_are_rounded_into_a_join(shape, axis):
    """Two tensors of floats become bytes side by side, a part of a tensor each."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.last(torch.cat([x.cos(), x.sin()], axis))

    joined = torch.cat([signal(*shape)] * 2, axis).shape
    integer = integers_of(Function(forward, last=nn.Linear(joined[-1], 5)), signal(*shape))
    require_same(integer, (signal(*shape, seed=4),))


def test_a_sum_is_not_taken_into_a_layer_whose_results_move():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return F.relu(m.up(x) + x)

    x = signal(2, 6, 8, 12)
    integer = integers_of(Function(forward, up=nn.ConvTranspose2d(6, 6, 3, padding=1)), x)
    require_same(integer, (x,), (signal(1, 6, 4, 6),))


def test_wrong_inputs_are_named():
    x = signal(2, 6, 7, 9, 8)
    integer = integers_of(nn.Sequential(nn.Conv3d(6, 9, 3), nn.ReLU()), x)
    native = NativeModel(integer)
    with pytest.raises(InputError, match="6 channels"):
        native(signal(2, 5, 7, 9, 8))
    with pytest.raises(InputError, match="window"):
        native(signal(2, 6, 2, 9, 8))
    with pytest.raises(Refusal, match="4 axes"):
        native(signal(6, 7, 9, 8))
