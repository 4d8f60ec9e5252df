"""Models that ask for sizes, and compute with them."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trap_inputs import (
    EITHER,
    Trap,
    ids,
    images,
    maps,
    normal,
    odd_images,
    rows,
    tokens,
)


class IfChannels(nn.Module):
    """A branch on the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.gray = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 3:
            return F.relu(self.rgb(x))
        return F.relu(self.gray(x[:, :1]))


class IfHeight(nn.Module):
    """A branch on the height, which a later input contradicts."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 6:
            return self.large(x)
        return self.small(x)


class RankOfInput(nn.Module):
    """len(x.shape) decides on an unsqueeze; an assertion with an f-string."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if len(x.shape) == 3:
            x = x.unsqueeze(0)
        assert x.dim() == 4, f"expected (B, C, H, W), got {tuple(x.shape)}"
        assert x.shape[1] == self.conv.in_channels, f"{x.size(1)} channels, not {self.conv.in_channels}"
        return self.conv(x)


class IsTensorOrList(nn.Module):
    """isinstance(x, Tensor), or a list of feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor | list[Tensor]) -> list[Tensor]:
        feats = [x] if isinstance(x, torch.Tensor) else x
        if not isinstance(feats, (list, tuple)):
            raise TypeError(f"unexpected {type(feats)}")
        outs = []
        for t in feats:
            outs.append(self.conv(t))
        return outs


class HalfSize(nn.Module):
    """int(x.shape[2] * 0.5) as a size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = int(x.shape[2] * 0.5), int(x.shape[3] * 0.5)
        return F.interpolate(self.conv(x), size=(h, w), mode="bilinear", align_corners=False)


class Positions(nn.Module):
    """Positions by torch.arange on the input's device."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.fc = nn.Embedding(11, 6), nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.size(1), device=ids.device).unsqueeze(0).expand_as(ids)
        return self.fc(self.words(ids) + self.places(positions))


class ZerosOfBatch(nn.Module):
    """torch.zeros(b, c, device=, dtype=) and x.new_zeros, full_like."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape
        state = torch.zeros(b, c, device=x.device, dtype=x.dtype)
        start = x.new_zeros(b, 2)
        return self.fc(torch.cat([x, state, start, torch.full_like(x[:, :2], 0.5)], dim=1))


class ResizeToInput(nn.Module):
    """x.shape[-2:] as the size of an interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.head = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        input_shape = x.shape[-2:]
        y = self.head(F.relu(self.down(x)))
        y = F.interpolate(y, size=input_shape, mode="bilinear", align_corners=False)
        return OrderedDict(out=y)


class PadToMultiple(nn.Module):
    """Padding to a multiple, computed from the size."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 4, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        _, _, h, w = x.shape
        x = F.pad(x, (0, (4 - w % 4) % 4, 0, (4 - h % 4) % 4))
        return self.patch(x)


class PadIfNeeded(nn.Module):
    """Padding to a multiple only where it is needed, and cut off again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        pad_h, pad_w = (4 - h % 4) % 4, (4 - w % 4) % 4
        if pad_h > 0 or pad_w > 0:
            x = F.pad(x, (0, pad_w, 0, pad_h), mode="reflect")
        x = F.relu(self.conv(x))
        if pad_h or pad_w:
            x = x[:, :, :h, :w].contiguous()
        return x


class SizeAsKernel(nn.Module):
    """A size as the kernel of a pool and as a length of a pad, which torch reads as integers before it sees the proxy."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.conv(x), (0, x.size(2) % 3, 0, 0))
        return self.fc(F.avg_pool2d(y, (y.size()[2], y.size()[3])).flatten(1))


class LargerSide(nn.Module):
    """max and min of sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        side, short = max(h, w), min(x.size(2), x.size(3))
        x = F.pad(x, (0, side - w, 0, side - h))
        return self.conv(x)[..., :short] / math.sqrt(side * short)


class TokensToGrid(nn.Module):
    """The side of a grid from the number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.conv = nn.Linear(8, 6), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        side = int(math.sqrt(n))
        assert side * side == n, f"{n} tokens are no square"
        x = self.proj(x).transpose(1, 2).reshape(b, -1, side, side)
        return self.conv(x)


class CausalAttention(nn.Module):
    """A causal mask made in forward, filled with torch.finfo(x.dtype).min."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(8, 24), nn.Linear(8, 8), 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        shape = x.size()[:-1] + (self.heads, x.size(-1) // self.heads)  # noqa: RUF005
        q, k, v = (t.view(*shape).transpose(1, 2) for t in (q, k, v))
        n = x.size(1)
        mask = torch.tril(torch.ones(n, n, device=x.device)).view(1, 1, n, n)
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))
        scores = scores.masked_fill(mask == 0, torch.finfo(x.dtype).min)
        y = F.softmax(scores, dim=-1) @ v
        return self.out(y.transpose(1, 2).contiguous().view(*x.size()[:-1], -1))


class CoordinateGrid(nn.Module):
    """Coordinates by torch.meshgrid, stacked on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        ys = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype)
        xs = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype)
        grid = torch.stack(torch.meshgrid(ys, xs, indexing="ij")).expand(b, -1, -1, -1)
        return self.conv(torch.cat([x, grid], dim=1))


class SlicedPositions(nn.Module):
    """A slice of a buffer, as long as the input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("pos", normal(1, 10, 8), persistent=False)
        self.cls_token = nn.Parameter(normal(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        x = torch.cat([self.cls_token.expand(b, -1, -1), x + self.pos[:, :n]], dim=1)
        return self.fc(x)[:, 0]


class LoopOverBatch(nn.Module):
    """A loop over the samples of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.fc(t) for t in x]) / len(x)


class UnbindBatch(nn.Module):
    """x.unbind(0) over the batch, joined by torch.cat."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for sample in x.unbind(0):
            outs.append(self.conv(sample.unsqueeze(0)))
        return torch.cat(outs, dim=0)


class CellOverTime(nn.Module):
    """A loop over time with a cell."""

    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.cell, self.head = cell(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        state, outs = None, []
        for t in range(x.size(1)):
            state = self.cell(x[:, t], state)
            outs.append(self.head(state[0] if isinstance(state, tuple) else state))
        return torch.stack(outs, dim=1)


class LinearOverTime(nn.Module):
    """A recurrence of linear layers over time, from a state of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rec = nn.Linear(8, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, steps, _ = x.shape
        h = torch.zeros(b, 6, device=x.device)
        for t in range(steps):
            h = torch.tanh(self.inp(x[:, t, :]) + self.rec(h))
        return h


class TryOrElse(nn.Module):
    """A try around an operation that some shapes do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        z = self.b(y)
        try:
            return y + z
        except RuntimeError:
            return F.interpolate(z, size=y.shape[-2:]) + y


class HardCodedBatch(nn.Module):
    """A view with the batch size written in."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).view(4, 2, 3).transpose(1, 2)


TRAPS: dict[str, Trap] = {
    "if channels": Trap(IfChannels, images),
    "if height": Trap(IfHeight, images),
    "rank of input": Trap(RankOfInput, images),
    "is tensor": Trap(IsTensorOrList, maps),
    "is list": Trap(IsTensorOrList, lambda n: ([normal(n, 4, 4, 4), normal(n, 4, 2, 2)],), EITHER),
    "half size": Trap(HalfSize, images, EITHER),
    "positions": Trap(Positions, ids),
    "zeros of batch": Trap(ZerosOfBatch, rows),
    "resize to input": Trap(ResizeToInput, images),
    "pad to multiple": Trap(PadToMultiple, odd_images),
    "pad if needed": Trap(PadIfNeeded, odd_images),
    "pad not needed": Trap(PadIfNeeded, images),
    "size as kernel": Trap(SizeAsKernel, odd_images),
    "larger side": Trap(LargerSide, odd_images),
    "tokens to grid": Trap(TokensToGrid, tokens),
    "causal attention": Trap(CausalAttention, tokens),
    "coordinate grid": Trap(CoordinateGrid, odd_images),
    "sliced positions": Trap(SlicedPositions, tokens),
    "loop over batch": Trap(LoopOverBatch, rows, EITHER),
    "unbind batch": Trap(UnbindBatch, images, EITHER),
    "lstm cell over time": Trap(lambda: CellOverTime(nn.LSTMCell), tokens, EITHER),
    "gru cell over time": Trap(lambda: CellOverTime(nn.GRUCell), tokens, EITHER),
    "linear over time": Trap(LinearOverTime, tokens, EITHER),
    "try or else": Trap(TryOrElse, images, EITHER),
    "hard coded batch": Trap(HardCodedBatch, rows, batch_free=False),
}
