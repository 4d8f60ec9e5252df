"""Models that ask for values, and recurrent networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torchvision.ops import nms
from trap_inputs import (
    EITHER,
    ISLANDS,
    ConvNet,
    Perceptron,
    Trap,
    ids,
    images,
    normal,
    rows,
    tokens,
)


class IfSumPositive(nn.Module):
    """A branch on the values of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x)).mean((2, 3))
        if x.sum() > 0:
            return self.a(y)
        return self.b(y)


class ValueGate(nn.Module):
    """A branch on values in a child; everything beside it could be a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 1e3:
            x = x / x.abs().max()
        return F.relu(self.lin(x))


class ValueGateInside(nn.Module):
    """An untraceable child between traceable layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = ConvNet(), ValueGate(), Perceptron()
        self.mid = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(self.mid(self.stem(x))))


class ItemScale(nn.Module):
    """.item() as a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.detach().abs().max().item()
        return self.fc(x / (scale + 1e-6)) * scale


class MaskedTokens(nn.Module):
    """A boolean mask picks rows for a linear layer, and puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Linear(8, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.embed(x)
        keep = y.mean(-1) > 0
        out = torch.zeros_like(y)
        out[keep] = self.fc(y[keep])
        return out, keep


class NonzeroRows(nn.Module):
    """torch.nonzero and index_select."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = Perceptron(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        index = torch.nonzero(y[:, 0] > y[:, 0].mean()).squeeze(1)
        return self.fc(y.index_select(0, index))


class Suppress(nn.Module):
    """Non-maximum suppression: as many rows as the values leave."""

    def forward(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        keep = nms(boxes, scores, iou_threshold=0.3)
        return boxes[keep], scores[keep]


class Detector(nn.Module):
    """A conv backbone, and nms in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head, self.post = nn.Conv2d(4, 5, 1), Suppress()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.head(self.backbone(x)).permute(0, 2, 3, 1).flatten(0, 2)
        centers, sizes = torch.sigmoid(y[:, :2]), torch.exp(y[:, 2:4])
        boxes, scores = self.post(torch.cat([centers - sizes, centers + sizes], 1), y[:, 4].sigmoid())
        return {"boxes": boxes, "scores": scores}


class WhileLarge(nn.Module):
    """A while loop on values."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, steps = self.fc(x), 0
        while y.norm() > 1.0 and steps < 5:
            y = y * 0.5 + self.fc(x) * 0.1
            steps += 1
        return y


class UniqueIds(nn.Module):
    """torch.unique with the inverse, as sparse embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        values, inverse = torch.unique(ids, return_inverse=True)
        return self.fc(self.embed(values))[inverse]


class SplitByList(nn.Module):
    """.tolist() gives the sizes of a split."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> list[Tensor]:
        return [part.mean(0) for part in torch.split(self.fc(x), lengths.tolist())]


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class StraightThrough(nn.Module):
    """A custom autograd.Function: sign with a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(_Sign.apply(self.a(x)))


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * grad, None


class GradientReversal(nn.Module):
    """A domain head behind a gradient reversal."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.label, self.domain = Perceptron(), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x)
        return self.label(y), self.domain(_Reverse.apply(y, 0.3))


class LSTMTagger(nn.Module):
    """nn.LSTM between linear layers; its state is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Linear(8, 6), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.embed(x))
        return self.head(y)


class ConvGRU(nn.Module):
    """nn.GRU behind a conv frontend, from an initial state of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gru, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.GRU(32, 5, 2), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.conv(x)).permute(3, 0, 1, 2).flatten(2)
        hidden = torch.zeros(self.gru.num_layers, x.size(0), self.gru.hidden_size, device=x.device)
        y, hidden = self.gru(y, hidden)
        return self.fc(y), hidden


class PackedLSTM(nn.Module):
    """A bidirectional LSTM over packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Linear(8, 6), nn.Linear(10, 3)
        self.lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        y, _ = self.lstm(packed)
        y, _ = pad_packed_sequence(y, batch_first=True, total_length=x.size(1))
        return self.fc(y)


def _lengths(n: int) -> tuple[Any, ...]:
    return normal(n, 4, 8), torch.arange(n) % 4 + 1


class HelperMethods(nn.Module):
    """Helpers that hold the convs of a forward that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Conv2d(3, 4, 3, padding=1), nn.Parameter(normal(3, 4, 3, 3) * 0.2)

    def encode(self, x: Tensor) -> Tensor:
        return F.relu(self.enc(x))

    def decode(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.dec, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        if z.max().item() > 100.0:
            z = z / z.max()
        return self.decode(z)


TRAPS: dict[str, Trap] = {
    "if sum positive": Trap(IfSumPositive, images, ISLANDS),
    "value gate inside": Trap(ValueGateInside, images, ISLANDS),
    "item scale": Trap(ItemScale, rows, EITHER),
    "masked tokens": Trap(MaskedTokens, tokens, EITHER),
    "nonzero rows": Trap(NonzeroRows, rows, EITHER),
    "detector": Trap(Detector, images, EITHER),
    "while large": Trap(WhileLarge, rows, ISLANDS),
    "unique ids": Trap(UniqueIds, ids, EITHER),
    "split by list": Trap(SplitByList, lambda n: (normal(n, 4), torch.tensor([1, n - 1])), ISLANDS),
    "straight through": Trap(StraightThrough, rows, EITHER),
    "gradient reversal": Trap(GradientReversal, rows, EITHER),
    "helper methods": Trap(HelperMethods, images, ISLANDS),
    "lstm": Trap(LSTMTagger, tokens, EITHER),
    "conv and gru": Trap(ConvGRU, images, EITHER),
    "packed lstm": Trap(PackedLSTM, _lengths, EITHER),
}
