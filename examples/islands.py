"""A model that torch.fx cannot trace whole: what runs as its author wrote it, and what is quantized all the same.

Run: python examples/islands.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import nms

import fxquant


class Detector(nn.Module):
    """One box and one score a position; the best boxes are found by a loop that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 3, 2, 1)
        )
        self.head = Head()

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        return self.head(self.backbone(images))


class Head(nn.Module):
    """Boxes (corner and size, made corners) and scores, then one list a picture, as detectors give them."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.scores = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        found = []
        for box, score in zip(self.boxes(x), self.scores(x), strict=True):
            corner, size = box.flatten(1).T.split(2, dim=1)
            box, score = torch.cat([corner, corner + size.exp()], dim=1), score.flatten().sigmoid()
            kept = nms(box, score, 0.5)
            found.append({"boxes": box[kept], "scores": score[kept]})
        return found


def main() -> None:
    torch.manual_seed(0)
    model, images = Detector().eval(), torch.rand(2, 3, 32, 32)
    prepared = fxquant.prepare(model, images)
    fxquant.calibrate(prepared, [images], progress=False)
    int8 = fxquant.convert(prepared)

    print(fxquant.coverage(prepared))
    for number, (float_boxes, int8_boxes) in enumerate(zip(model(images), int8(images), strict=True)):
        print(f"picture {number}: {len(float_boxes['boxes'])} boxes in float, {len(int8_boxes['boxes'])} in integers")
    print(f"three pictures at once: {len(int8(torch.rand(3, 3, 32, 32)))} lists")


if __name__ == "__main__":
    main()
