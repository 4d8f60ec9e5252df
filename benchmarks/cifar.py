"""CIFAR-10 as one uint8 tensor, and the CIFAR ResNets (He et al., 1512.03385, section 4.2) that run on it.

Images come from ``cifar10-jpeg-{train,test}.zip`` (``class/NNNN.jpg``) where the data folder has them, otherwise from
``torchvision.datasets.CIFAR10`` in that folder. Decoding the zips takes about 20 s, so the tensor is kept under
``~/.cache/fxquant`` (``$XDG_CACHE_HOME`` if set).
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

__all__ = [
    "DATA",
    "DEPTHS",
    "Cifar10",
    "CifarResNet",
    "NetworkInNetwork",
    "calibration_batches",
    "load_cifar10",
    "load_resnet",
]

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
DEPTHS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}
CALIBRATION_SEED = 0

_MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)


@dataclass(frozen=True)
class Cifar10:
    """One split: ``images`` uint8 ``(N, 3, 32, 32)`` and ``labels`` int64 ``(N,)``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor | slice) -> Cifar10:
        """The images at ``indices``, in that order."""
        return Cifar10(self.images[indices], self.labels[indices])

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalized float batches ``(B, 3, 32, 32)`` with their labels, in order, without augmentation."""
        for images, labels in zip(self.images.split(size), self.labels.split(size), strict=True):
            yield (images.float() / 255 - _MEAN) / _STD, labels


def load_cifar10(folder: Path, split: str) -> Cifar10:
    """The ``split`` (``train`` or ``test``) of CIFAR-10 found in ``folder``, decoded once and then cached."""
    archive = folder / f"cifar10-jpeg-{split}.zip"
    if not archive.exists():
        return _from_torchvision(folder, split)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fxquant"
    cached = cache / f"{archive.stem}-{archive.stat().st_size}.pt"
    if not cached.exists():
        data = _decode(archive)
        cache.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}")
        torch.save({"images": data.images, "labels": data.labels}, partial)
        partial.replace(cached)
    return Cifar10(**torch.load(cached, weights_only=True))


def _decode(archive: Path) -> Cifar10:
    with zipfile.ZipFile(archive) as files:
        names = sorted(name for name in files.namelist() if name.endswith(".jpg"))
        classes = sorted({name.split("/")[0] for name in names})
        images = torch.empty(len(names), 32, 32, 3, dtype=torch.uint8)
        for index, name in enumerate(tqdm(names, desc=f"decoding {archive.name}", unit="image")):
            with Image.open(io.BytesIO(files.read(name))) as image:
                images[index] = torch.from_numpy(np.array(image.convert("RGB")))
    labels = torch.tensor([classes.index(name.split("/")[0]) for name in names])
    return Cifar10(images.permute(0, 3, 1, 2).contiguous(), labels)


def _from_torchvision(folder: Path, split: str) -> Cifar10:
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(str(folder), train=split == "train")
    except RuntimeError as error:
        raise SystemExit(f"--data has neither {split} zip nor torchvision's CIFAR-10: {error}") from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Cifar10(images, torch.tensor(data.targets))


def calibration_batches(train: Cifar10, images: int = 512, batch: int = 64) -> list[tuple[Tensor, Tensor]]:
    """The calibration set of every tool: the first ``images`` of a seeded permutation of the training set."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(CALIBRATION_SEED))
    return list(train.take(order[:images]).batches(batch))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (option A: subsample, then pad the channels)."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.widens, self.pad = in_planes != planes, planes // 4

    def shortcut(self, x: Tensor) -> Tensor:
        """``x`` itself, or its every second pixel with ``pad`` zero channels on either side."""
        if not self.widens:
            return x
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad), "constant", 0)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class CifarResNet(nn.Module):
    """ResNet-(6n+2) for 32×32 images: three stages of ``blocks`` basic blocks with 16, 32 and 64 channels."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(in_planes: int, planes: int, stride: int, blocks: int) -> nn.Sequential:
        rest = [BasicBlock(planes, planes, 1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(in_planes, planes, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


class NetworkInNetwork(nn.Module):
    """Lin et al., 1312.4400, with a batch norm behind each convolution, as the articles that quantize it have it."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_mlpconv(3, (192, 160, 96), 5),
            nn.MaxPool2d(3, 2, 1),
            *_mlpconv(96, (192, 192, 192), 5),
            nn.AvgPool2d(3, 2, 1),
            *_mlpconv(192, (192, 192, classes), 3),
            nn.AvgPool2d(8),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(1)


def _mlpconv(inputs: int, widths: tuple[int, int, int], kernel: int) -> Iterator[nn.Module]:
    """A convolution and two of 1 × 1, each with batch norm and ReLU."""
    for width in widths:
        yield nn.Conv2d(inputs, width, kernel, padding=kernel // 2, bias=False)
        yield nn.BatchNorm2d(width)
        yield nn.ReLU()
        inputs, kernel = width, 1


def load_resnet(name: str, weights: Path) -> CifarResNet:
    """The CIFAR ResNet ``name`` (a key of `DEPTHS`) with the trained weights in the file ``weights``, in eval mode."""
    model = CifarResNet(DEPTHS[name])
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()
