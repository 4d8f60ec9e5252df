"""Models that are written the way people write them, each awkward in one way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReusedReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.b(self.relu(self.a(x)))) * 0.7


class ReusedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        y = F.relu(self.conv(y) * 3.0)
        return self.fc(y.mean((2, 3)))


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


class DictInOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        y = F.relu(self.fc(batch["x"]))
        return {"logits": y, "pair": (y + batch["y"], y.sum(1))}


class TupleInOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, pair: tuple[Tensor, Tensor], scale: float = 2.0) -> tuple[Tensor, list[Tensor]]:
        a, b = pair
        y = self.fc(a) * scale
        return y, [y + b, b - y]


class Features(NamedTuple):
    low: Tensor
    high: Tensor


class NamedOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Features:
        y = F.relu(self.conv(x))
        return Features(y, F.max_pool2d(y, 2))


class SizeDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = F.relu(self.conv(x)).view(b, 4, (h - 2) * (w - 2))
        y = y.reshape(x.size(0), -1)
        return self.fc(y).view(-1, c - 2, 5)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(3, 3, 3, padding=1)
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn(self.a(x)))
        skip = out
        out = self.b(out)
        out += skip
        again = out
        out = self.relu(out)
        return out + again.mean((2, 3), keepdim=True)


class InPlaceThenInput(nn.Module):
    """What is read after an operation in place has been overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2.0
        z = F.relu(y, inplace=True)
        return z + y


class FunctionalWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3) * 0.2)
        self.bias = nn.Parameter(torch.randn(4))
        self.matrix = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, self.weight, self.bias, stride=2, padding=1))
        return F.linear(F.adaptive_avg_pool2d(y, 1).flatten(1), self.matrix)


class ComputedWeight(nn.Module):
    """A standardized weight: it is made anew in forward, so the convolution stays in float."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.fc = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / 3.0
        return self.fc(F.relu(F.conv2d(x, weight)).mean((2, 3)))


class Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 6), nn.Embedding(7, 6)
        self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.size(1), device=ids.device)
        return self.fc(self.norm(self.words(ids) + self.places(places)))


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mean", torch.tensor([0.1, -0.4, 0.3, 0.2]))
        self.register_buffer("std", torch.tensor(1.7), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((x - self.mean) / self.std) * self.std


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU6()))
        self.body = nn.ModuleList([inner, nn.Sequential(nn.Conv2d(4, 4, 1), nn.Hardswish())])
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 3)})

    def forward(self, x: Tensor) -> list[Tensor]:
        for block in self.body:
            x = block(x)
        x = x.mean((2, 3))
        return [self.heads[name](x) for name in ("a", "b")]


class Scalars(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gain = nn.Linear(4, 4), nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        y = 1.0 - self.fc(x) / 2
        return (y * self.gain + 3) * x.size(1) ** -0.5


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, dim=1)
        c, d, e = torch.split(x, [1, 1, 2], dim=1)
        return torch.cat([a * torch.sigmoid(b), c + d, e], 1)


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(F.relu(self.fc(x)), p=0.4, training=self.training)
        return self.out(F.dropout(y, 0.2, self.training, inplace=True))


class Gate(nn.Module):
    def forward(self, x: Tensor, *, gate: Tensor, gain: float = 1.0) -> Tensor:
        return x * torch.sigmoid(gate) * gain


class CalledWithKeywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gate = nn.Linear(4, 4), Gate()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.gate(self.fc(input=x), gate=y, gain=1.5)


class UnusedParts(nn.Module):
    """A layer that forward does not call, and a result that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.used(x * 2.0)
        return self.used(x)


class OptionalInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.fc(x)
        return y if mask is None else y * mask


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * (c // 2) ** -0.5).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, c)) + x


class Constant(nn.Module):
    """Parameters added, multiplied, joined and read by a layer: their integers are constants of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.gain = nn.Parameter(torch.randn(1, 5, 6)), nn.Parameter(torch.randn(6))
        self.token, self.fc, self.mix = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(6, 3), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.position, alpha=0.5) * self.gain + F.relu(self.mix(self.token))
        return self.fc(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))


@dataclass
class Result:
    scores: Tensor
    features: list[Tensor]


class Structured(nn.Module):
    """Takes a tensor, a dict and a flag; returns a dataclass, a dict or a tuple."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(6, 4), kind

    def forward(self, x: Tensor, extra: dict[str, Tensor], *, double: bool = False) -> Any:
        y = F.relu(self.fc(x) + extra["shift"])
        y = y * 2.0 if double else y
        outputs = {"scores": y, "features": [y + 1.0, y - 1.0]}
        return Result(**outputs) if self.kind == "dataclass" else outputs if self.kind == "dict" else (y, y + 1.0, None)


def images(n: int) -> tuple[Any, ...]:
    return (torch.randn(n, 3, 8, 8),)


def rows(n: int) -> tuple[Any, ...]:
    return (torch.randn(n, 4),)


def ids(n: int) -> tuple[Any, ...]:
    return (torch.randint(0, 11, (n, 7)),)


AWKWARD: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Any, ...]]]] = {
    "reused relu": (ReusedReLU, images),
    "reused conv": (ReusedConv, images),
    "tied weights": (TiedWeights, lambda n: (torch.randn(n, 5),)),
    "tied embedding": (TiedEmbedding, ids),
    "dict in and out": (DictInOut, lambda n: ({"x": torch.randn(n, 4), "y": torch.randn(n, 3)},)),
    "tuple in and out": (TupleInOut, lambda n: ((torch.randn(n, 4), torch.randn(n, 3)), 1.5)),
    "named tuple out": (NamedOut, images),
    "size dependent": (SizeDependent, images),
    "residual in place": (Residual, images),
    "in place then read": (InPlaceThenInput, rows),
    "functional weights": (FunctionalWeights, images),
    "computed weight": (ComputedWeight, images),
    "ids": (Ids, ids),
    "buffers": (Buffers, rows),
    "nested": (Nested, images),
    "scalars": (Scalars, rows),
    "split": (Split, lambda n: (torch.randn(n, 4, 6, 6),)),
    "functional dropout": (FunctionalDropout, rows),
    "called with keywords": (CalledWithKeywords, lambda n: (torch.randn(n, 4), torch.randn(n, 4))),
    "unused parts": (UnusedParts, rows),
    "attention": (Attention, lambda n: (torch.randn(n, 5, 8),)),
}
