"""Images in a folder, flat or in subfolders of classes, as batches for calibration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import InputError

__all__ = ["ImageFolder"]

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


class ImageFolder:
    """Batches of normalized images ``(n, channels, crop, crop)`` from the pictures below a folder.

    Labels play no part in calibration, so that subfolders are only looked into. Where there are more than ``limit``
    images, every k-th in the order of their paths is taken: all classes take part, and every run sees the same ones.
    Files and folders whose names begin with a dot are left out. Pictures of 16 bits are scaled to 8.

    Args:
        folder: where the images are.
        limit: how many to use; None for all.
        resize: the length that the shorter side is scaled to.
        crop: the side of the square cut from the middle.
        channels: 3 for colour, 1 for grey.
        mean, std: per channel, of images in [0, 1], std above 0; of three, the first counts where ``channels`` is 1.
        batch_size: images in a batch.

    Raises:
        InputError: the folder does not exist or holds no image, or mean and std are no such numbers; while iterating, that a
            file cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        limit: int | None = None,
        resize: int = 256,
        crop: int = 224,
        channels: int = 3,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        batch_size: int = 32,
    ) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            is_file = f"{str(folder)!r} is a file: give the folder that holds the images."
            raise InputError(is_file if folder.exists() else f"there is no folder {str(folder)!r}.")
        for name, values in (("mean", mean), ("std", std)):
            fits = len(values) in (channels, 3) and all(math.isfinite(v) and (v > 0 or name == "mean") for v in values)
            if not fits:
                above = " above 0" if name == "std" else ""
                raise InputError(f"{name}={tuple(values)}: give one number{above} for each of {channels} channels.")
        found = sorted(path for path in folder.rglob("*") if _is_image(path, folder))
        if not found:
            raise InputError(f"{str(folder)!r} holds no image ({', '.join(e.lstrip('.') for e in ENDINGS)}).")
        step = 1 if limit is None else max(len(found) / limit, 1.0)
        self.paths = [found[int(i * step)] for i in range(int(len(found) / step))]
        self.batch_size = batch_size
        self._transform = _transform(resize, crop, mean[:channels], std[:channels])
        self._mode = "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        return -(-len(self.paths) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.paths), self.batch_size):
            yield torch.stack([self._read(path) for path in self.paths[start : start + self.batch_size]])

    def _read(self, path: Path) -> Tensor:
        from PIL import Image

        try:
            with Image.open(path) as image:
                tensor: Tensor = self._transform(_in_eight_bits(image, path).convert(self._mode))
        except InputError:
            raise
        except Exception as error:  # PIL's readers raise whatever a broken file makes them
            reason = " ".join(str(error).split()).replace(f" {str(path)!r}", "")
            raise InputError(
                f"{str(path)!r} cannot be read as an image: {reason or type(error).__name__}. Remove it, or save it anew."
            ) from error
        return tensor


def _is_image(path: Path, folder: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in ENDINGS and not is_hidden and path.is_file()


def _in_eight_bits(image: Any, path: Path) -> Any:
    """``image``, where it has 16 bits with its values scaled: PIL's own conversion cuts them off at 255."""
    import numpy as np
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise InputError(
            f"{str(path)!r} holds numbers of 32 bits, of which none is known to be white. Save it with 8 or 16 bits."
        )
    return Image.fromarray((values / 257).round().astype("uint8"))


def _transform(resize: int, crop: int, mean: Sequence[float], std: Sequence[float]) -> Any:
    from torchvision import transforms

    steps = [transforms.Resize(resize), transforms.CenterCrop(crop), transforms.ToTensor()]
    return transforms.Compose([*steps, transforms.Normalize(list(mean), list(std))])
