"""A detector with the habits of YOLO code that make such networks hard to trace, and nothing of anyone's source in it.

- The body is a list of layers, each with ``f``, the layers it reads from; outputs that are read later are kept in a list.
- A head overwrites the elements of the list it is given, and keeps its grids in attributes that it builds anew when the
  shape changes; it decodes only in eval mode, by writing into slices.
- ``nms=True`` ends in non-maximum suppression: a loop over images, with sizes that depend on the data.

``head="anchor"`` scales anchors as v3 to v5 do, ``head="dfl"`` predicts a distribution over distances as v8 does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

__all__ = ["HEADS", "Yolo"]

HEADS = ("anchor", "dfl")
ANCHORS = ((10, 13, 16, 30, 33, 23), (30, 61, 62, 45, 59, 119), (116, 90, 156, 198, 373, 326))
"""Width and height in pixels of three anchors a level, as published with YOLOv3."""


class ConvBlock(nn.Module):
    """Convolution without bias, BatchNorm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two 3×3 blocks, around which the input may be added."""

    def __init__(self, channels: int, add: bool) -> None:
        super().__init__()
        self.first = ConvBlock(channels, channels, 3)
        self.second = ConvBlock(channels, channels, 3)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second(self.first(x))
        return x + inner if self.add else inner


class SplitStage(nn.Module):
    """Halves the channels, sends one half through bottlenecks, and joins all that came by (C2f)."""

    def __init__(self, inputs: int, outputs: int, depth: int, add: bool = False) -> None:
        super().__init__()
        half = outputs // 2
        self.enter = ConvBlock(inputs, 2 * half)
        self.inner = nn.ModuleList(Bottleneck(half, add) for _ in range(depth))
        self.leave = ConvBlock((2 + depth) * half, outputs)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.inner)
        return self.leave(torch.cat(parts, 1))


class PoolPyramid(nn.Module):
    """The same max pooling three times in a row, all four scales side by side (SPPF)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter = ConvBlock(channels, channels // 2)
        self.leave = ConvBlock(2 * channels, channels)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        scales = [self.enter(x)]
        scales += [self.pool(scales[-1])]
        scales += [self.pool(scales[-1])]
        scales += [self.pool(scales[-1])]
        return self.leave(torch.cat(scales, 1))


class Join(nn.Module):
    """Concatenation along the channels, of a list."""

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, dim=1)


class AnchorHead(nn.Module):
    """One convolution a level; boxes are anchors, moved and scaled."""

    dynamic = False

    def __init__(self, classes: int, channels: Sequence[int]) -> None:
        super().__init__()
        anchors = torch.tensor(ANCHORS[: len(channels)]).float().view(len(channels), -1, 2)
        self.no = classes + 5
        self.nl, self.na = anchors.shape[:2]
        self.stride = torch.ones(self.nl)
        self.grid = [torch.empty(0)] * self.nl
        self.anchor_grid = [torch.empty(0)] * self.nl
        self.register_buffer("anchors", anchors)
        self.m = nn.ModuleList(nn.Conv2d(count, self.no * self.na, 1) for count in channels)

    def set_stride(self, stride: Tensor) -> None:
        """Know how many pixels a cell has on each level; anchors count in cells from here on."""
        self.stride = stride
        self.anchors /= stride.view(-1, 1, 1)

    def forward(self, x: list[Tensor]) -> Any:
        decoded = []
        for i in range(self.nl):
            x[i] = self.m[i](x[i])
            batch, _, ny, nx = x[i].shape
            x[i] = x[i].view(batch, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2).contiguous()
            if not self.training:
                if self.dynamic or self.grid[i].shape[2:4] != x[i].shape[2:4]:
                    self.grid[i], self.anchor_grid[i] = self._make_grid(nx, ny, i)
                y = x[i].sigmoid()
                y[..., 0:2] = (y[..., 0:2] * 2 + self.grid[i]) * self.stride[i]
                y[..., 2:4] = (y[..., 2:4] * 2) ** 2 * self.anchor_grid[i]
                decoded.append(y.view(batch, -1, self.no))
        return x if self.training else (torch.cat(decoded, 1), x)

    def _make_grid(self, nx: int, ny: int, i: int) -> tuple[Tensor, Tensor]:
        """Corners of the cells, half a cell up and left, and the anchors in pixels, ``(1, na, ny, nx, 2)`` each."""
        like = {"device": self.anchors.device, "dtype": self.anchors.dtype}
        rows, columns = torch.meshgrid(torch.arange(ny, **like), torch.arange(nx, **like), indexing="ij")
        shape = (1, self.na, ny, nx, 2)
        grid = torch.stack((columns, rows), 2).expand(shape) - 0.5
        return grid, (self.anchors[i] * self.stride[i]).view(1, self.na, 1, 1, 2).expand(shape)


class Expectation(nn.Module):
    """The mean of the distance that a distribution over ``bins`` whole distances gives: a convolution that stays."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.conv = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(bins, dtype=torch.float).view(1, bins, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, cells = x.shape
        return self.conv(x.view(batch, 4, self.bins, cells).transpose(2, 1).softmax(1)).view(batch, 4, cells)


class DistributionHead(nn.Module):
    """A branch for boxes and one for classes a level; boxes are four distances from a cell's centre."""

    dynamic = False
    shape: Any = None

    def __init__(self, classes: int, channels: Sequence[int], bins: int = 16) -> None:
        super().__init__()
        self.nc, self.bins, self.nl = classes, bins, len(channels)
        self.no = classes + 4 * bins
        self.stride = torch.ones(self.nl)
        self.centres, self.strides = torch.empty(0), torch.empty(0)
        own = max(16, channels[0] // 2)
        self.box = nn.ModuleList(self._branch(count, own, 4 * bins) for count in channels)
        self.cls = nn.ModuleList(self._branch(count, own, classes) for count in channels)
        self.dfl = Expectation(bins)

    @staticmethod
    def _branch(inputs: int, own: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(ConvBlock(inputs, own, 3), ConvBlock(own, own, 3), nn.Conv2d(own, outputs, 1))

    def set_stride(self, stride: Tensor) -> None:
        """Know how many pixels a cell has on each level."""
        self.stride = stride

    def forward(self, x: list[Tensor]) -> Any:
        shape = x[0].shape
        for i in range(self.nl):
            x[i] = torch.cat((self.box[i](x[i]), self.cls[i](x[i])), 1)
        if self.training:
            return x
        if self.dynamic or self.shape != shape:
            self.centres, self.strides = self._make_centres(x)
            self.shape = shape
        flat = torch.cat([level.view(shape[0], self.no, -1) for level in x], 2)
        boxes, scores = flat.split((4 * self.bins, self.nc), 1)
        near, far = self.dfl(boxes).chunk(2, 1)
        centre = self.centres.unsqueeze(0) + (far - near) / 2
        boxes = torch.cat((centre, near + far), 1) * self.strides
        return torch.cat((boxes, scores.sigmoid()), 1).transpose(1, 2), x

    def _make_centres(self, x: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The centres of all cells in cells, ``(2, cells)``, and the pixels a cell has, ``(1, cells)``."""
        centres, strides = [], []
        for level, stride in zip(x, self.stride, strict=True):
            height, width = level.shape[2:]
            rows = torch.arange(height, device=level.device, dtype=level.dtype) + 0.5
            columns = torch.arange(width, device=level.device, dtype=level.dtype) + 0.5
            rows, columns = torch.meshgrid(rows, columns, indexing="ij")
            centres.append(torch.stack((columns.flatten(), rows.flatten())))
            strides.append(torch.full((1, height * width), float(stride), device=level.device, dtype=level.dtype))
        return torch.cat(centres, 1), torch.cat(strides, 1)


class Suppression(nn.Module):
    """Of boxes that overlap, the one with the best score; one ``(n, 6)`` tensor an image: corners, score, class."""

    def __init__(self, objectness: bool, confidence: float = 0.25, overlap: float = 0.45, most: int = 50) -> None:
        super().__init__()
        self.objectness, self.confidence, self.overlap, self.most = objectness, confidence, overlap, most

    def forward(self, prediction: Tensor) -> list[Tensor]:
        found = [prediction.new_zeros((0, 6))] * prediction.shape[0]
        for number, rows in enumerate(prediction):
            scores = rows[:, 5:] * rows[:, 4:5] if self.objectness else rows[:, 4:]
            score, kind = scores.max(1)
            chosen = score > self.confidence
            if not chosen.any():
                continue
            boxes, score, kind = rows[chosen, :4], score[chosen], kind[chosen].to(rows.dtype)
            half = boxes[:, 2:] / 2
            corners = torch.cat((boxes[:, :2] - half, boxes[:, :2] + half), 1)
            apart = kind[:, None] * 4096  # boxes of different classes never meet
            kept = torchvision.ops.nms(corners + apart, score, self.overlap)[: self.most]
            found[number] = torch.cat((corners, score[:, None], kind[:, None]), 1)[kept]
        return found


class Yolo(nn.Module):
    """Backbone, a neck that goes up and down again, and a head on three levels.

    In training it gives the levels' raw outputs; in eval ``(decoded, raw)``, decoded being ``(batch, boxes, numbers)``
    with centre, size and scores; with ``nms`` what is left of that, one tensor an image.

    Args:
        classes: how many kinds of objects there are.
        width: channels after the first convolution; the deepest level has 16 times as many.
        depth: bottlenecks a stage.
        head: ``anchor`` or ``dfl``.
        nms: end in non-maximum suppression in eval mode.
        confidence: the least score that suppression lets pass.
    """

    def __init__(
        self,
        classes: int = 8,
        width: int = 16,
        depth: int = 1,
        head: str = "anchor",
        nms: bool = False,
        confidence: float = 0.25,
    ) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = (width * 2**power for power in range(5))
        self.model = nn.ModuleList()
        self.save: set[int] = set()
        self._add(ConvBlock(3, c1, 3, 2))
        for inputs, outputs in ((c1, c2), (c2, c3), (c3, c4), (c4, c5)):
            self._add(ConvBlock(inputs, outputs, 3, 2))
            level = self._add(SplitStage(outputs, outputs, depth, add=True))
        deep = self._add(PoolPyramid(c5))
        self._add(nn.Upsample(scale_factor=2, mode="nearest"))
        self._add(Join(), [-1, level - 2])
        middle = self._add(SplitStage(c5 + c4, c4, depth))
        self._add(nn.Upsample(scale_factor=2, mode="nearest"))
        self._add(Join(), [-1, level - 4])
        fine = self._add(SplitStage(c4 + c3, c3, depth))
        self._add(ConvBlock(c3, c3, 3, 2))
        self._add(Join(), [-1, middle])
        half = self._add(SplitStage(c3 + c4, c4, depth))
        self._add(ConvBlock(c4, c4, 3, 2))
        self._add(Join(), [-1, deep])
        coarse = self._add(SplitStage(c4 + c5, c5, depth))
        kind = {"anchor": AnchorHead, "dfl": DistributionHead}[head]
        self._add(kind(classes, (c3, c4, c5)), [fine, half, coarse])
        self.nms = Suppression(head == "anchor", confidence) if nms else None
        self._measure_strides(classes)

    def _add(self, layer: nn.Module, f: int | list[int] = -1) -> int:
        """Append a layer that reads from ``f`` (-1: the one before); gives its number."""
        layer.f, layer.i = f, len(self.model)
        self.save.update(number for number in ([f] if isinstance(f, int) else f) if number != -1)
        self.model.append(layer)
        return layer.i

    def _measure_strides(self, classes: int) -> None:
        """Run once in training mode, on zeros, to see how far each level shrinks; start with few objects expected."""
        side = 64
        state = {name: value.clone() for name, value in self.named_buffers()}
        with torch.no_grad():
            levels = self._forward_once(torch.zeros(1, 3, side, side))
        for name, value in self.named_buffers():
            value.data.copy_(state[name])
        cells = [level.shape[2] for level in levels]
        head = self.model[-1]
        head.set_stride(torch.tensor([side / count for count in cells]))
        if isinstance(head, DistributionHead):
            for branch in head.cls:
                nn.init.constant_(branch[-1].bias, -math.log(classes))

    def _forward_once(self, x: Tensor) -> Any:
        y: list[Any] = []
        for m in self.model:
            if m.f != -1:
                x = y[m.f] if isinstance(m.f, int) else [x if j == -1 else y[j] for j in m.f]
            x = m(x)
            y.append(x if m.i in self.save else None)
        return x

    def forward(self, x: Tensor) -> Any:
        out = self._forward_once(x)
        if self.training or self.nms is None:
            return out
        return self.nms(out[0])
