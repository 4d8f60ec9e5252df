"""Models with contexts, hooks, attention, and code for one mode."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from trap_inputs import (
    EITHER,
    ConvNet,
    Perceptron,
    Trap,
    ids,
    images,
    normal,
    rows,
    tokens,
)


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


def _padded_ids(n: int) -> tuple[Any, ...]:
    (given,) = ids(n)
    given[:, -1] = 0
    given[:, 0] = 5
    return (given,)


TRAPS: dict[str, Trap] = {
    "checkpoint": Trap(lambda: Checkpointed(use_reentrant=False), rows, EITHER),
    "checkpoint reentrant": Trap(lambda: Checkpointed(use_reentrant=True), rows, EITHER),
    "checkpoint sequential": Trap(CheckpointSequential, rows, EITHER),
    "autocast block": Trap(AutocastBlock, rows, EITHER),
    "frozen backbone": Trap(FrozenBackbone, images, EITHER),
    "no grad helper": Trap(NoGradHelper, tokens, EITHER),
    "hooks that change": Trap(HooksThatChange, images, EITHER),
    "hook that records": Trap(HookThatRecords, images, EITHER),
    "backward hook": Trap(BackwardHook, rows, EITHER),
    "self attention": Trap(lambda: SelfAttention(False, False), tokens, EITHER),
    "self attention weights": Trap(lambda: SelfAttention(True, True), tokens, EITHER),
    "encoder": Trap(Encoder, _padded_ids, EITHER),
    "sequence to sequence": Trap(Seq2Seq, lambda n: (normal(n, 4, 8), normal(n, 3, 8, seed=2)), EITHER),
    "decoder": Trap(Decoder, images, EITHER),
    "auxiliary head": Trap(AuxiliaryHead, images, EITHER),
    "positional training": Trap(PositionalTraining, rows),
    "stochastic blocks": Trap(StochasticBlocks, rows, EITHER),
    "skipped block": Trap(SkippedBlock, rows, EITHER),
    "own batch norm": Trap(WithOwnBatchNorm, images, EITHER),
    "clipped conv": Trap(WithClippedConv, images, EITHER),
}
