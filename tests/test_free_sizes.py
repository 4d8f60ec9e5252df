"""Which sizes of an image a file leaves free, where the model's own code fixes some."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import mostly_long, prepared_of
from torch import Tensor, nn
from torchvision.models import maxvit, vision_transformer

import fxquant
from fxquant.export.free_sizes import refused_axes


class Windows(nn.Module):
    """Windows of four, as many as at 16 by 16 along the axes that are ``fixed``."""

    def __init__(self, *fixed: str) -> None:
        super().__init__()
        self.conv, self.fixed = nn.Conv2d(3, 4, 3, padding=1), fixed

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        n, c, h, w = y.shape
        rows, columns = 4 if "height" in self.fixed else h // 4, 4 if "width" in self.fixed else w // 4
        return y.reshape(n, c, rows, 4, columns, 4).amax((3, 5))


class Pooled(nn.Module):
    """Half an image of 8 has no fourth pool; twice as large a one has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.max_pool2d(x, 2)
        return self.conv(x)


class Flattened(nn.Module):
    """The head takes what sides of 16 and of 17 leave, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 8 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.max_pool2d(self.conv(x), 2).flatten(1))


def small_vit() -> nn.Module:
    return vision_transformer.VisionTransformer(16, 4, 1, 2, 8, 16, num_classes=3)


def small_maxvit() -> nn.Module:
    return maxvit.MaxVit(
        (32, 32), stem_channels=8, partition_size=4, block_channels=[8, 8], block_layers=[2, 1], head_dim=4,
        stochastic_depth_prob=0.0, num_classes=3,
    )  # fmt: skip


MODELS = {
    "free": (Windows, 16, set()),
    "height": (lambda: Windows("height"), 16, {-2}),
    "width": (lambda: Windows("width"), 16, {-1}),
    "both": (lambda: Windows("height", "width"), 16, {-2, -1}),
    "no smaller": (Pooled, 8, set()),
    "one more": (Flattened, 16, set()),
    "vit": (small_vit, 16, {-2, -1}),
    "maxvit": (small_maxvit, 32, {-2, -1}),
}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:rounding to 8 bits leaves")  # random weights
@pytest.mark.parametrize("name", mostly_long(MODELS, ("free", "height", "width")))
def test_the_sizes_that_the_model_refuses_are_fixed_and_no_others(name, tmp_path):
    build, side, refused = MODELS[name]
    model, x = build().eval(), torch.randn(1, 3, side, side)
    assert refused_axes(model, (x,), {}) == refused
    assert refused_axes(model, (), {next(iter(model.forward.__annotations__)): x}) == refused
    report = fxquant.export_onnx(prepared_of(model, x), tmp_path / "m.onnx", x)
    (shape,) = report.inputs.values()
    assert shape[:2] == ["batch", 3] and not report.notes
    assert [isinstance(size, int) for size in shape[2:]] == [-2 in refused, -1 in refused]
    assert [own.rows for own in report.agreement] == [1, 2]


def test_other_inputs_are_not_resized():
    tokens = torch.randint(0, 9, (2, 5))
    assert refused_axes(nn.Embedding(9, 4), (tokens,), {}) == set()
    assert refused_axes(nn.Linear(5, 4), (torch.randn(2, 5),), {}) == set()
    assert refused_axes(nn.Linear(5, 4), (torch.randn(2, 3, 4, 5),), {}) == {-1}
