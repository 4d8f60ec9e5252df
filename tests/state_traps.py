"""Models that keep state, and that write in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trap_inputs import (
    EITHER,
    ISLANDS,
    Trap,
    images,
    odd_images,
    rows,
    tokens,
)


class CountingBuffer(nn.Module):
    """A buffer that each call raises by one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.fc(x) / self.count


class RunningMean(nn.Module):
    """A moving average, written in place in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(y.mean(0), alpha=0.1)
        return y - self.mean


class AssignedBuffer(nn.Module):
    """A buffer that is assigned anew."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("running", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        self.running = self.running * 0.9 + y.detach().abs().mean(0) * 0.1
        return y / self.running


class PythonCounter(nn.Module):
    """An int that counts calls and decides what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.a(x)
        return y if self.calls < 2 else self.b(y) * self.calls


class CarriedState(nn.Module):
    """A state that the next call reads."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rec, self.hidden = nn.Linear(4, 6), nn.Linear(6, 6), None

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        if self.hidden is not None:
            h = h + self.rec(self.hidden)
        self.hidden = torch.tanh(h).detach()
        return h


class Scratch(nn.Module):
    """Written by one method and read by another in the same call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2), nn.Linear(8, 3)

    def encode(self, x: Tensor) -> None:
        self.pyramid = [F.relu(self.stem(x))]
        self.pyramid.append(F.relu(self.down(self.pyramid[-1])))

    def decode(self) -> Tensor:
        return self.head(torch.cat([t.mean((2, 3)) for t in self.pyramid], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        self.encode(x)
        return self.decode()


class CachedGrid(nn.Module):
    """A cache that is made again where the size changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grid = nn.Conv2d(4, 4, 3, padding=1), None

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None or self.grid.shape[-2:] != x.shape[-2:]:
            h, w = x.shape[-2:]
            self.grid = torch.linspace(-1, 1, h * w, device=x.device).view(1, 1, h, w)
        return self.conv(torch.cat([x, self.grid.expand(x.size(0), -1, -1, -1)], dim=1))


class LazyLayer(nn.Module):
    """A layer and a buffer that the first call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.proj = nn.Linear(4, 6), None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.fc(x))
        if self.proj is None:
            self.proj = nn.Linear(y.shape[-1], 3).to(x.device)
            with torch.no_grad():
                self.proj.weight.copy_(torch.linspace(-1, 1, 18).view(3, 6))
                self.proj.bias.fill_(0.1)
            self.register_buffer("offset", torch.arange(3.0))
        return self.proj(y) + self.offset


class AddInPlace(nn.Module):
    """x.add_(y), then x; the caller's input is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x * 2.0)
        x.add_(y)
        y.mul_(0.5)
        return x + y


class AssignColumn(nn.Module):
    """x[:, 0] = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, 0] = 0
        y[:, 1:3] += 0.5
        return self.b(y)


class AliasedSkip(nn.Module):
    """out += skip, where skip and out are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(x)
        skip = out
        out += 1.0
        out = self.b(out)
        out += skip
        also = out
        out -= skip.mean()
        return out + also


class WriteThroughView(nn.Module):
    """A write through a view, then a read of the base."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = x.view(x.size(0), 4, -1)
        y.mul_(2)
        y[:, 0].add_(1)
        return self.head(x)


class Rotary(nn.Module):
    """Rotary positions, written to even and odd places."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        angle = torch.arange(x.size(1), device=x.device)[:, None] / 10 ** torch.linspace(0, 2, 4)
        a, b = q[..., ::2] * angle.cos(), q[..., 1::2] * angle.sin()
        y = torch.empty_like(q)
        y[..., ::2] = a - b
        y[..., 1::2] = a + b
        return self.out(y)


class ReluInPlaceBranch(nn.Module):
    """F.relu(inplace=True) and torch.relu_ on what is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = F.relu(y, inplace=True)
        w = self.b(y)
        torch.relu_(w)
        return z + y + w


class OutArgument(nn.Module):
    """out= into a tensor made before, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        buf = torch.empty_like(y)
        torch.mul(y, 2.0, out=buf)
        torch.add(buf, x, out=buf)
        return buf + y


class CopyAndFill(nn.Module):
    """tensor.copy_ and masked_fill_."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        out = y.new_empty(y.size(0), 2, 4)
        out[:, 0].copy_(y)
        out[:, 1].copy_(x)
        out.masked_fill_(out < 0, 0.0)
        return self.b(out)


TRAPS: dict[str, Trap] = {
    "counting buffer": Trap(CountingBuffer, rows, EITHER),
    "running mean": Trap(RunningMean, rows, EITHER),
    "assigned buffer": Trap(AssignedBuffer, rows, EITHER),
    "python counter": Trap(PythonCounter, rows, ISLANDS),
    "carried state": Trap(CarriedState, rows, ISLANDS, batch_free=False),
    "scratch": Trap(Scratch, images, EITHER),
    "cached grid": Trap(CachedGrid, odd_images, EITHER),
    "lazy layer": Trap(LazyLayer, rows, EITHER),
    "add in place": Trap(AddInPlace, rows, EITHER, overwrites=True),
    "assign column": Trap(AssignColumn, rows, EITHER),
    "aliased skip": Trap(AliasedSkip, images),
    "write through view": Trap(WriteThroughView, images, EITHER),
    "rotary": Trap(Rotary, tokens, EITHER),
    "relu in place": Trap(ReluInPlaceBranch, images),
    "out argument": Trap(OutArgument, rows, EITHER, trains=False),
    "copy and fill": Trap(CopyAndFill, rows, EITHER),
}
