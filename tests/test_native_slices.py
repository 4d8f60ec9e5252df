"""Native plans whose first steps are computed for some images at a time: the reference's bits, in less memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from native_oracle import integers_of, require_same, signal
from torch import Tensor, nn

from fxquant.kernels.native import library, slices
from fxquant.kernels.native.model import NativeModel

REASON = library.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels here: {REASON}")


@pytest.fixture
def always(monkeypatch):
    """Slices wherever they are possible."""
    monkeypatch.setattr(slices, "_worth", lambda steps, slices: len(steps))


def plan_of(integer, x: Tensor):
    native = NativeModel(integer)
    native(x)
    return native._plan([x])


SLICED = {
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "googlenet", "densenet121", "squeezenet1_1", "efficientnet_b0",
    "regnet_y_400mf",
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("batch", [3, 8])
@pytest.mark.parametrize("name", sorted(SLICED))
def test_models_in_slices(name, batch, always):
    x = signal(batch, 3, 48, 40)
    integer = integers_of(zoo.build(name), x, recipe=None)
    whole = plan_of(integer, x[:1]).count
    assert plan_of(integer, x).count > 1.5 * whole
    require_same(integer, (x,), (x[:2],), (signal(5, 3, 40, 48),))


class Odd(nn.Module):
    """A convolution, something that not all images take alone, and a convolution."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), between

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        return self.second(self.between(y)) + y


BETWEEN = {
    "images turned into channels": lambda y: y.transpose(0, 1).contiguous(),
    "images turned into channels, as a view": lambda y: y.transpose(0, 1),
    "images in another order": lambda y: torch.cat([y[2:], y[:2]]),
    "half of the images": lambda y: torch.cat([y[:2], y[:2]]),
    "channels in another order": lambda y: y.view(4, 2, 2, 6, 6).transpose(1, 2).reshape(4, 4, 6, 6),
    "lines and columns exchanged": lambda y: y.transpose(2, 3),
    "channels apart and together": lambda y: torch.cat([y[:, 2:], F.max_pool2d(y[:, :2], 3, 1, 1)], 1),
    "a sum with one image": lambda y: y + y[:1],
    "a product with one number an image": lambda y: y * y.mean((2, 3), keepdim=True),
    "averaged": lambda y: F.avg_pool2d(y, 3, 1, 1),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_is_not_done_image_by_image(name, always):
    """As many images as channels, so that no shape tells them apart."""
    x = signal(4, 4, 6, 6)
    integer = integers_of(Odd(BETWEEN[name]), x)
    require_same(integer, (x,))


def test_slices_take_less_memory_and_come_when_tensors_are_large():
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(4), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
    )
    small, large = signal(2, 3, 160, 160), signal(7, 3, 160, 160)
    integer = integers_of(model, small)
    alone, many = plan_of(integer, small), plan_of(integer, large)
    assert alone.count < many.count <= 4 * alone.count
    assert many.memory < 2 * alone.memory
    require_same(integer, (large,), (small,))
