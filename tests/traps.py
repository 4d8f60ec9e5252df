"""Small models written the way people write them, each with one trap for a tool that captures graphs."""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchvision.ops import nms


def _itself(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class Trap:
    """One row of the table.

    Args:
        model: builds the model.
        inputs: batch size → example inputs, a tuple of positional arguments or a dict of keyword arguments.
        expect: whether one graph holds the whole model, or some of it stays the user's code.
        batch_free: the original takes another batch size.
        trains: the original has gradients.
        modes: checked in train mode too.
        overwrites: the original writes into its input.
        inner: the part of the model to compare with, where the model itself is only a wrapper.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    expect: Literal["whole", "islands", "either"] = "whole"
    batch_free: bool = True
    trains: bool = True
    modes: bool = True
    overwrites: bool = False
    inner: Callable[[nn.Module], nn.Module] = _itself


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(n: int) -> tuple[Any, ...]:
    return (normal(n, 3, 8, 8),)


def odd_images(n: int) -> tuple[Any, ...]:
    return (normal(n, 3, 6, 7),)


def maps(n: int) -> tuple[Any, ...]:
    return (normal(n, 4, 8, 8),)


def rows(n: int) -> tuple[Any, ...]:
    return (normal(n, 4),)


def tokens(n: int) -> tuple[Any, ...]:
    return (normal(n, 4, 8),)


def ids(n: int) -> tuple[Any, ...]:
    return (torch.randint(0, 11, (n, 5), generator=torch.Generator().manual_seed(1)),)


class ConvNet(nn.Module):
    """No trap: the part that others are built on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class Perceptron(nn.Module):
    """No trap: two linear layers."""

    def __init__(self, width: int = 4, out: int = 4) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 8), nn.Linear(8, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


# Sizes.


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


# Values.


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


# Recurrent networks.


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


# Parameters and containers.


class RawParameters(nn.Module):
    """F.conv2d, F.linear and torch.matmul with raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.bias = nn.Parameter(normal(4, 3, 3, 3) * 0.2), nn.Parameter(normal(4))
        self.matrix, self.mix = nn.Parameter(normal(5, 4)), nn.Parameter(normal(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, self.kernel, self.bias, padding=1)).mean((2, 3))
        return torch.matmul(F.linear(y, self.matrix).tanh(), self.mix)


class TransposedLinear(nn.Module):
    """GPT-2's linear layer: a weight of (in, out), torch.addmm, and views around it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(normal(8, 10) * 0.4), nn.Parameter(normal(10))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return F.gelu(flat.view(*x.size()[:-1], 10))


class Einsum(nn.Module):
    """torch.einsum with a parameter, and an ellipsis."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.fc = nn.Parameter(normal(8, 2, 3)), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.einsum("bnc,chd->bhnd", x, self.weight)
        scores = torch.einsum("...id,...jd->...ij", heads, heads).softmax(-1)
        return self.fc(scores @ heads)


class Normed(nn.Module):
    """A weight that a parametrization computes."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.conv, self.fc = norm(nn.Conv2d(3, 4, 3)), norm(nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.leaky_relu(self.conv(x), 0.2).mean((2, 3)))


class TiedHead(nn.Module):
    """The head is the embedding, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)).tanh())


class TwoResolutions(nn.Module):
    """One conv at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = F.relu(self.stem(x))
        coarse = F.max_pool2d(fine, 2)
        return [self.head(t) for t in (fine, coarse)]


class Containers(nn.Module):
    """ModuleList, ModuleDict, ParameterList and ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.acts = nn.ModuleDict({"relu": nn.ReLU(), "gelu": nn.GELU()})
        self.gains = nn.ParameterList([nn.Parameter(normal(4, seed=i)) for i in range(3)])
        self.shifts = nn.ParameterDict({"in": nn.Parameter(normal(4)), "out": nn.Parameter(normal(4, seed=3))})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shifts["in"]
        for i, layer in enumerate(self.layers):
            x = self.acts["relu" if i % 2 else "gelu"](layer(x)) * self.gains[i]
        return x + self.shifts["out"]


class SlicedLayers(nn.Module):
    """self.layers[i], self.layers[:2] and a nested Sequential by index."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), inner, nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[:2](x)
        y = self.layers[2][0](y) + self.layers[2][1][-1](y)
        return self.layers[len(self.layers) - 1](y)


# Inputs and outputs.


class KeywordOnly(nn.Module):
    """Inputs that are taken by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, *, hidden: Tensor, gate: Tensor, gain: float = 2.0) -> Tensor:
        return self.fc(hidden) * torch.sigmoid(gate) * gain


class OptionalMask(nn.Module):
    """An optional input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, return_features: bool = False) -> Any:
        if mask is not None:
            x = x * mask
        y = self.fc(x)
        return (y, x) if return_features else y


class NoneOutputs(nn.Module):
    """None among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.aux = nn.Linear(4, 3), None

    def forward(self, x: Tensor) -> tuple[Tensor, None, list[Tensor | None]]:
        y = self.fc(x)
        aux = self.aux(x) if self.aux is not None else None
        return y, aux, [None, y.sum(1)]


class StarArguments(nn.Module):
    """forward(*args, **kwargs)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = OptionalMask()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(*args, **kwargs)


class ConcatInputs(nn.Module):
    """Any number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, *xs: Tensor) -> Tensor:
        return self.fc(torch.cat(xs, dim=1))


class ConfigKwargs(nn.Module):
    """**kwargs looked into, and passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> dict[str, Any]:
        scale = kwargs.pop("scale", 1.0)
        y = self.fc(hidden_states) * scale
        if "residual" in kwargs:
            y = y + kwargs["residual"]
        return {"y": y, "left": sorted(kwargs)}


class DictOfDicts(nn.Module):
    """A nested dict in, a nested dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        image = self.conv(batch["image"]).mean((2, 3))
        meta = [self.fc(t) for t in batch["meta"]["rows"]]
        return {"logits": image, "parts": {"rows": meta, "all": (image + sum(meta),)}}


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


OldPair = namedtuple("OldPair", ["first", "second"])


class NamedTuples(nn.Module):
    """A named tuple in and another kind out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, pair: Pair) -> Any:
        y = self.fc(pair.left)
        return OldPair(first=y, second=Pair(y + self.fc(pair.right), pair[1]))


@dataclass
class Sample:
    """What a loader of dataclasses gives."""

    x: Tensor
    weight: Tensor
    name: str = "sample"


@dataclass
class Prediction:
    """What such a model returns."""

    logits: Tensor
    features: list[Tensor]
    count: int = 0


class DataclassOut(nn.Module):
    """A dataclass out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Perceptron()

    def forward(self, x: Tensor) -> Prediction:
        y = self.body(x)
        return Prediction(logits=y, features=[x, y.sum(1)], count=2)


class DataclassInOut(nn.Module):
    """A dataclass in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Perceptron()

    def forward(self, sample: Sample) -> Prediction:
        y = self.body(sample.x) * sample.weight
        return Prediction(y, [y], count=len(sample.name))


class HuggingFaceOut(nn.Module):
    """A ModelOutput of transformers out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Perceptron(), nn.Linear(4, 2)

    def forward(self, x: Tensor, return_dict: bool = True) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        hidden = self.body(x)
        logits = self.head(hidden)
        if not return_dict:
            return logits, hidden
        return SequenceClassifierOutput(loss=None, logits=logits, hidden_states=(x, hidden))


class ConstantsBeside(nn.Module):
    """Constants, the input itself and one tensor twice among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.fc(x)
        return {"y": y, "again": y, "input": x, "stride": 4, "name": "fc", "sizes": (x.shape[1], 0.5), "flag": True}


# State.


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


# In place.


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


# Contexts and hooks.


class Checkpointed(nn.Module):
    """torch.utils.checkpoint in train mode."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.stem, self.use_reentrant = nn.Linear(4, 4), use_reentrant
        self.blocks = nn.ModuleList(Perceptron() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if self.training:  # noqa: SIM108
                x = x + checkpoint(block, x, use_reentrant=self.use_reentrant)
            else:
                x = x + block(x)
        return x


class CheckpointSequential(nn.Module):
    """checkpoint_sequential over a nn.Sequential, in both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Dropout(0.2), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.net, 2, x, use_reentrant=False)


class AutocastBlock(nn.Module):
    """bfloat16 around one child."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.a(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.b(x)
        return self.c(y.float()), y


class FrozenBackbone(nn.Module):
    """torch.no_grad() around a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = ConvNet(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.backbone(x)
        return self.head(y) + x.mean()


class NoGradHelper(nn.Module):
    """A helper under @torch.no_grad()."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    @torch.no_grad()
    def positions(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        return torch.sin(steps[:, None] * torch.exp(-torch.arange(8, device=x.device) / 8.0)) + x.mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + self.positions(x))


def _doubled_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * 2, *args[1:])


def _shifted_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + 1.0


def _halved_gradient(module: nn.Module, grads: Any, out_grads: Any) -> Any:
    return tuple(None if g is None else g * 0.5 for g in grads)


class HooksThatChange(nn.Module):
    """A pre-hook that changes the input and a hook that changes the output, on torch's layers and on a user's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.body = nn.Conv2d(3, 4, 3), Perceptron()
        self.conv.register_forward_pre_hook(_doubled_input)
        self.conv.register_forward_hook(_shifted_output)
        self.body.register_forward_hook(_shifted_output)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.relu(self.conv(x)).mean((2, 3)))


class HookThatRecords(nn.Module):
    """A hook that keeps features, which forward then reads."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head, self.seen = ConvNet(), nn.Linear(4, 2), []
        self.net.bn.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        y = self.net(x)
        return y, self.head(self.seen[-1].mean((2, 3))), len(self.seen)


class BackwardHook(nn.Module):
    """A full backward hook that changes the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.b.register_full_backward_hook(_halved_gradient)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


# Attention.


class SelfAttention(nn.Module):
    """nn.MultiheadAttention."""

    def __init__(self, need_weights: bool, mask: bool) -> None:
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True), nn.Linear(8, 4)
        self.need_weights, self.mask = need_weights, mask

    def forward(self, x: Tensor) -> Any:
        mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).triu(1) if self.mask else None
        y, weights = self.attn(x, x, x, attn_mask=mask, need_weights=self.need_weights)
        return (self.fc(x + y), weights) if self.need_weights else self.fc(x + y)


class Encoder(nn.Module):
    """nn.TransformerEncoder with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.embed, self.fc = nn.Embedding(11, 8, padding_idx=0), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.encoder(self.embed(ids), src_key_padding_mask=ids.eq(0))[:, 0])


class Seq2Seq(nn.Module):
    """nn.Transformer with its own causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.fc = nn.Transformer(8, 2, 1, 1, 16, dropout=0.1, batch_first=True), nn.Linear(8, 3)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        mask = self.transformer.generate_square_subsequent_mask(tgt.size(1))
        return self.fc(self.transformer(src, tgt, tgt_mask=mask))


class Decoder(nn.Module):
    """nn.TransformerDecoderLayer on a memory of conv features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.queries = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(normal(3, 8))
        self.decoder = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.conv(x).flatten(2).transpose(1, 2)
        return self.decoder(self.queries.unsqueeze(0).repeat(x.shape[0], 1, 1), memory)


# Modes.


class AuxiliaryHead(nn.Module):
    """Train mode returns another structure."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Conv2d(3, 4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.body(x)).mean((2, 3))
        if self.training:
            return {"out": self.head(y), "aux": self.aux(y)}
        return self.head(y)


class PositionalTraining(nn.Module):
    """F.dropout with self.training, by name and by position."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(F.relu(self.a(x)), 0.3, self.training)
        return F.dropout(self.b(y), p=0.1, training=self.training)


class DropPath(nn.Module):
    """Stochastic depth, as timm writes it."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        if self.drop == 0.0 or not self.training:
            return x
        keep = 1 - self.drop
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        random = x.new_empty(shape).bernoulli_(keep)
        if keep > 0.0:
            random.div_(keep)
        return x * random


class StochasticBlocks(nn.Module):
    """DropPath with and without a rate, and a whole block skipped by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Perceptron() for _ in range(2))
        self.paths = nn.ModuleList(DropPath(p) for p in (0.0, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        for block, path in zip(self.blocks, self.paths, strict=True):
            x = x + path(block(x))
        return x


class SkippedBlock(nn.Module):
    """A block that train mode skips by chance: a branch on a random value."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(4, 4), Perceptron()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.training and torch.rand(1).item() < 0.5:
            return x
        return x + self.block(x)


class OwnBatchNorm(nn.BatchNorm2d):
    """A subclass of BatchNorm with its own forward."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            mean, var = input.mean((0, 2, 3)), input.var((0, 2, 3), unbiased=False)
            with torch.no_grad():
                self.running_mean += self.momentum * (mean - self.running_mean)
                self.running_var += self.momentum * (var - self.running_var)
                self.num_batches_tracked += 1
        else:
            mean, var = self.running_mean, self.running_var
        y = (input - mean[None, :, None, None]) * torch.rsqrt(var[None, :, None, None] + self.eps)
        return y * self.weight[:, None, None] + self.bias[:, None, None]


class WithOwnBatchNorm(nn.Module):
    """A subclass of torch's BatchNorm, with its own arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), OwnBatchNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class ClippedConv(nn.Conv2d):
    """A subclass of torch's conv that calls super().forward."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clamp(-1, 1)) * 0.5


class WithClippedConv(nn.Module):
    """A subclass of torch's conv, with more arithmetic around."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ClippedConv(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


# How models are put together.


class PlainTensor(nn.Module):
    """A tensor that is an attribute and no buffer, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.mean = nn.Linear(4, 4), torch.tensor([0.1, 0.2, 0.3, 0.4])
        self.register_buffer("std", torch.full((4,), 1.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((x - self.mean.to(x.device)) / self.std)


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


def checked(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(args[0], Tensor):
            raise TypeError(f"{type(self).__name__} takes a tensor")
        return forward(self, *args, **kwargs)

    return wrapper


class DecoratedForward(nn.Module):
    """A forward behind functools.wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    @checked
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.fc(x) * scale


class Inherited(ConvNet):
    """super().forward(), and a method of the parent that is overridden."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(5, 2)

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) * 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(super().forward(x))


class PropertyWeight(nn.Module):
    """A weight that a property computes."""

    def __init__(self) -> None:
        super().__init__()
        self.raw, self.fc = nn.Parameter(normal(4, 3, 3, 3)), nn.Linear(4, 3)

    @property
    def weight(self) -> Tensor:
        return self.raw / self.raw.flatten(1).norm(dim=1)[:, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(F.conv2d(x, self.weight)).mean((2, 3)))


class Delegating(nn.Module):
    """A wrapper that looks its attributes up in the model within."""

    def __init__(self) -> None:
        super().__init__()
        self.module = ConvNet()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).amax((2, 3)))


class OptionalParts(nn.Module):
    """nn.Identity, and layers that may be None."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.Identity(), nn.Linear(4, 4)
        self.proj, self.shortcut = None, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.shortcut(x) if self.shortcut is not None else x
        y = self.norm(self.fc(x))
        return skip + (self.proj(y) if self.proj is not None else y)


def _script(function: Callable[..., Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated, and models still have it
        return torch.jit.script(function)


@_script
def scripted_swish(x: Tensor, beta: float = 1.5) -> Tensor:
    return x * torch.sigmoid(beta * x)


class Activations(nn.Module):
    """Activations as a partial, a lambda, a function of torch and a name looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.acts = [functools.partial(F.leaky_relu, negative_slope=0.2), lambda x: x * torch.sigmoid(x), torch.tanh]

    def forward(self, x: Tensor) -> Tensor:
        for layer, act in zip(self.layers, [*self.acts, getattr(F, "gelu")], strict=True):  # noqa: B009
            x = act(layer(x))
        return x


class ScriptedActivation(nn.Module):
    """A scripted function as the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(scripted_swish(self.a(x)))


class Appending(nn.Module):
    """Appends its output to the caller's list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, feats: list[Tensor]) -> Tensor:
        x = F.relu(self.conv(x))
        feats.append(x)
        return x


class SharedList(nn.Module):
    """A list handed to children, which append to it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Appending() for _ in range(2)), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        feats: list[Tensor] = []
        for block in self.blocks:
            x = block(x, feats)
        return self.head(torch.cat(feats, dim=1))


class Holder(nn.Module):
    """Holds a module that is another's too."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared, self.own = shared, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.shared(x))


class SharedByTwo(nn.Module):
    """One module under two parents."""

    def __init__(self) -> None:
        super().__init__()
        shared = Perceptron()
        self.left, self.right = Holder(shared), Holder(shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) - self.right(x)


class OtherMethod(nn.Module):
    """A child called by a method other than forward."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = ConvNet(), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block.features(x))


class Iterating(nn.Module):
    """A generator, zip, enumerate and reversed over layers and features."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.up = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))

    def pyramid(self, x: Tensor) -> Iterator[Tensor]:
        for i, layer in enumerate(self.down):
            x = F.relu(layer(F.max_pool2d(x, 2) if i else x))
            yield x

    def forward(self, x: Tensor) -> Tensor:
        feats = list(self.pyramid(x))
        y = None
        for lateral, feat in zip(reversed(self.up), reversed(feats), strict=True):
            top = lateral(feat)
            y = top if y is None else top + F.interpolate(y, size=top.shape[-2:], mode="nearest")
        return y


class FeaturePyramid(nn.Module):
    """A dict of features by name, as in a feature pyramid network."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(OrderedDict(c1=nn.Conv2d(3, 4, 3, padding=1), c2=nn.Conv2d(4, 4, 3, 2, 1)))
        self.lateral = nn.ModuleDict({"c1": nn.Conv2d(4, 4, 1), "c2": nn.Conv2d(4, 4, 1)})
        self.returned = {"c1": "0", "c2": "1"}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feats: dict[str, Tensor] = OrderedDict()
        for name, layer in self.body.items():
            x = F.relu(layer(x))
            if name in self.returned:
                feats[self.returned[name]] = x
        names = list(self.returned.keys())
        outs = {new: self.lateral[old](feats[new]) for old, new in zip(names, feats, strict=True)}
        outs["pool"] = F.max_pool2d(list(outs.values())[-1], 1, 2, 0)
        return outs


class ScriptingBranches(nn.Module):
    """Branches on torch.jit.is_scripting(), is_tracing() and torch.compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return self.fc(x)
        if not torch.jit.is_scripting() and isinstance(x, Tensor) and x.requires_grad and not x.is_floating_point():
            raise RuntimeError("no gradient for integers")
        return self.fc(x) * 2


class ImageToTokens(nn.Module):
    """Views in the order of memory of a channels_last input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        return self.fc(y.permute(0, 2, 3, 1).reshape(x.size(0), -1, 4))


class HardCodedBatch(nn.Module):
    """A view with the batch size written in."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).view(4, 2, 3).transpose(1, 2)


def _in_channels_last(n: int) -> tuple[Any, ...]:
    return (images(n)[0].to(memory_format=torch.channels_last),)


def _as_graph_module() -> nn.Module:
    return fx.symbolic_trace(ConvNet())


def _compiled() -> nn.Module:
    return torch.compile(ConvNet())


def _lengths(n: int) -> tuple[Any, ...]:
    return normal(n, 4, 8), torch.arange(n) % 4 + 1


def _padded_ids(n: int) -> tuple[Any, ...]:
    (given,) = ids(n)
    given[:, -1] = 0
    given[:, 0] = 5
    return (given,)


def _batch(n: int) -> tuple[Any, ...]:
    meta = {"rows": [normal(n, 4, seed=2), normal(n, 4, seed=3)]}
    return ({"image": normal(n, 3, 6, 6), "meta": meta, "name": "batch"},)


WHOLE, ISLANDS, EITHER = "whole", "islands", "either"

TRAPS: dict[str, Trap] = {
    # Sizes.
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
    # Values.
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
    # Recurrent networks.
    "lstm": Trap(LSTMTagger, tokens, EITHER),
    "conv and gru": Trap(ConvGRU, images, EITHER),
    "packed lstm": Trap(PackedLSTM, _lengths, EITHER),
    # Parameters and containers.
    "raw parameters": Trap(RawParameters, images),
    "transposed linear": Trap(TransposedLinear, tokens),
    "einsum": Trap(Einsum, tokens),
    "weight norm": Trap(lambda: Normed(parametrizations.weight_norm), images, EITHER),
    "spectral norm": Trap(lambda: Normed(parametrizations.spectral_norm), images, EITHER),
    "spectral norm by hook": Trap(lambda: Normed(nn.utils.spectral_norm), images, EITHER),
    "tied head": Trap(TiedHead, ids),
    "two resolutions": Trap(TwoResolutions, images),
    "containers": Trap(Containers, rows, EITHER),
    "sliced layers": Trap(SlicedLayers, rows),
    # Inputs and outputs.
    "keyword only": Trap(KeywordOnly, lambda n: {"hidden": normal(n, 4), "gate": normal(n, 4, seed=2)}),
    "optional left out": Trap(OptionalMask, rows),
    "optional given": Trap(OptionalMask, lambda n: (normal(n, 4), normal(n, 4, seed=2).sign())),
    "optional by keyword": Trap(OptionalMask, lambda n: {"x": normal(n, 4), "return_features": True}),
    "none outputs": Trap(NoneOutputs, rows),
    "star arguments": Trap(StarArguments, lambda n: (normal(n, 4), normal(n, 4, seed=2)), EITHER),
    "star keywords": Trap(StarArguments, lambda n: {"x": normal(n, 4), "mask": normal(n, 4, seed=2)}, EITHER),
    "concat inputs": Trap(ConcatInputs, lambda n: (normal(n, 4), normal(n, 3, seed=2), normal(n, 1, seed=3)), EITHER),
    "config kwargs": Trap(
        ConfigKwargs, lambda n: {"hidden_states": normal(n, 4), "residual": normal(n, 4, seed=2), "scale": 0.5}, EITHER
    ),
    "dict of dicts": Trap(DictOfDicts, _batch),
    "named tuples": Trap(NamedTuples, lambda n: (Pair(normal(n, 4), normal(n, 4, seed=2)),)),
    "dataclass out": Trap(DataclassOut, rows, EITHER),
    "dataclass in and out": Trap(DataclassInOut, lambda n: (Sample(normal(n, 4), normal(n, 1)),), EITHER),
    "constants beside": Trap(ConstantsBeside, rows),
    # State.
    "counting buffer": Trap(CountingBuffer, rows, EITHER),
    "running mean": Trap(RunningMean, rows, EITHER),
    "assigned buffer": Trap(AssignedBuffer, rows, EITHER),
    "python counter": Trap(PythonCounter, rows, ISLANDS),
    "carried state": Trap(CarriedState, rows, ISLANDS, batch_free=False),
    "scratch": Trap(Scratch, images, EITHER),
    "cached grid": Trap(CachedGrid, odd_images, EITHER),
    "lazy layer": Trap(LazyLayer, rows, EITHER),
    # In place.
    "add in place": Trap(AddInPlace, rows, EITHER, overwrites=True),
    "assign column": Trap(AssignColumn, rows, EITHER),
    "aliased skip": Trap(AliasedSkip, images),
    "write through view": Trap(WriteThroughView, images, EITHER),
    "rotary": Trap(Rotary, tokens, EITHER),
    "relu in place": Trap(ReluInPlaceBranch, images),
    "out argument": Trap(OutArgument, rows, EITHER, trains=False),
    "copy and fill": Trap(CopyAndFill, rows, EITHER),
    # Contexts and hooks.
    "checkpoint": Trap(lambda: Checkpointed(use_reentrant=False), rows, EITHER),
    "checkpoint reentrant": Trap(lambda: Checkpointed(use_reentrant=True), rows, EITHER),
    "checkpoint sequential": Trap(CheckpointSequential, rows, EITHER),
    "autocast block": Trap(AutocastBlock, rows, EITHER),
    "frozen backbone": Trap(FrozenBackbone, images, EITHER),
    "no grad helper": Trap(NoGradHelper, tokens, EITHER),
    "hooks that change": Trap(HooksThatChange, images, EITHER),
    "hook that records": Trap(HookThatRecords, images, EITHER),
    "backward hook": Trap(BackwardHook, rows, EITHER),
    # Attention.
    "self attention": Trap(lambda: SelfAttention(False, False), tokens, EITHER),
    "self attention weights": Trap(lambda: SelfAttention(True, True), tokens, EITHER),
    "encoder": Trap(Encoder, _padded_ids, EITHER),
    "sequence to sequence": Trap(Seq2Seq, lambda n: (normal(n, 4, 8), normal(n, 3, 8, seed=2)), EITHER),
    "decoder": Trap(Decoder, images, EITHER),
    # Modes.
    "auxiliary head": Trap(AuxiliaryHead, images, EITHER),
    "positional training": Trap(PositionalTraining, rows),
    "stochastic blocks": Trap(StochasticBlocks, rows, EITHER),
    "skipped block": Trap(SkippedBlock, rows, EITHER),
    "own batch norm": Trap(WithOwnBatchNorm, images, EITHER),
    "clipped conv": Trap(WithClippedConv, images, EITHER),
    # How models are put together.
    "plain tensor": Trap(PlainTensor, rows),
    "decorated forward": Trap(DecoratedForward, rows),
    "inherited": Trap(Inherited, images),
    "property weight": Trap(PropertyWeight, images),
    "delegating": Trap(Delegating, images),
    "optional parts": Trap(OptionalParts, rows),
    "activations": Trap(Activations, rows),
    "scripted activation": Trap(ScriptedActivation, rows, EITHER),
    "shared list": Trap(SharedList, maps),
    "shared by two": Trap(SharedByTwo, rows),
    "other method": Trap(OtherMethod, images),
    "iterating": Trap(Iterating, maps),
    "feature pyramid": Trap(FeaturePyramid, images),
    "scripting branches": Trap(ScriptingBranches, rows, EITHER),
    "channels last": Trap(lambda: ImageToTokens().to(memory_format=torch.channels_last), _in_channels_last),
    "bfloat16": Trap(lambda: Perceptron().bfloat16(), lambda n: (normal(n, 4).bfloat16(),)),
    "float16": Trap(lambda: ImageToTokens().half(), lambda n: (images(n)[0].half(),)),
    "graph module": Trap(_as_graph_module, images),
    "data parallel": Trap(lambda: nn.DataParallel(ConvNet()), images, inner=lambda m: m.module),
    "compiled": Trap(_compiled, images, inner=lambda m: m._orig_mod),
}
if importlib.util.find_spec("transformers") is not None:
    TRAPS["model output"] = Trap(HuggingFaceOut, rows, EITHER)
