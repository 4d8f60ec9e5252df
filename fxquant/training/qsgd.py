"""QSGD: gradients that processes send each other in a few bits, rounded at random so that their mean is right.

    Q(v_i) = ‖v‖ · sign(v_i) · ξ_i / s,     ξ_i = floor(s·|v_i| / ‖v‖ + u),  u uniform in [0, 1),   s = 2^(bits - 1) - 1
    E[Q(v)] = v,     E‖Q(v) - v‖² ≤ min(n / s², √n / s) · ‖v‖²

for each piece v of n numbers of a bucket, ‖v‖ its Euclidean norm. A hook for ``DistributedDataParallel``: each process sends
signs and levels, packed into bytes, and one float32 a piece; everyone adds up what all have sent. It saves bytes where
the network between processes is the bottleneck, and costs accuracy, never time to train alone.
Source: Alistarh et al., QSGD, 1610.02132, §3.1, lemma 3.1 and §5 (pieces of a bucket).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.errors import InputError

__all__ = ["QSGD"]


class QSGD:
    """What sends gradients, and counts the bytes: ``QSGD(bits=4).register(ddp)``.

    Args:
        bits: of one number, its sign included: 2, 4 or 8.
        piece: how many numbers have one norm.
        group: the processes; None for all.

    Attributes:
        bytes_sent: what this process has sent so far.
        bytes_saved: what gradients in their own type would have taken beyond that.

    Example:
        >>> fxquant.training.QSGD(bits=4).register(ddp)

    Raises:
        InputError: bits that do not fill bytes, or a piece without numbers.
    """

    def __init__(self, *, bits: int = 4, piece: int = 512, group: Any = None) -> None:
        if bits not in (2, 4, 8) or piece < 1:
            raise InputError(f"QSGD(bits={bits!r}, piece={piece!r}): bits are 2, 4 or 8, and a piece has numbers.")
        self.bits, self.piece, self.group = bits, piece, group
        self.bytes_sent = self.bytes_saved = 0

    @property
    def levels(self) -> int:
        """s."""
        return int(2 ** (self.bits - 1)) - 1

    def encode(self, v: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What is sent of ``v``: bytes, uint8, and the norms, float32 ``(pieces,)``; ``noise``: u of each number, drawn if
        left out."""
        rows = _in_pieces(v.flatten().float(), self.piece)
        norms = rows.norm(dim=1)
        safe = torch.where(norms > 0, norms, torch.ones_like(norms))[:, None]
        u = torch.rand_like(rows) if noise is None else _in_pieces(noise.flatten(), self.piece)
        level = torch.floor(rows.abs() / safe * self.levels + u).clamp_(max=self.levels)
        whole = (level * rows.sign() + self.levels).to(torch.uint8).flatten()
        each = 8 // self.bits
        padded = _in_pieces(whole, each)
        shifts = torch.arange(0, 8, self.bits, device=v.device)
        return (padded.int() << shifts).sum(1).to(torch.uint8), norms

    def decode(self, sent: Tensor, norms: Tensor, count: int) -> Tensor:
        """Q(v) of ``count`` numbers, float32."""
        shifts = torch.arange(0, 8, self.bits, device=sent.device)
        whole = ((sent.int()[:, None] >> shifts) & (2**self.bits - 1)).flatten()[: norms.numel() * self.piece]
        rows = (whole.reshape(norms.numel(), self.piece) - self.levels).float()
        return (rows * (norms / self.levels)[:, None]).flatten()[:count]

    def register(self, ddp: torch.nn.parallel.DistributedDataParallel) -> None:
        """Let ``ddp`` send its gradients so."""
        ddp.register_comm_hook(None, lambda _, bucket: self._average(bucket))  # DDP reads a hook's annotations

    def _average(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """The mean over all processes of what they have sent of this bucket."""
        v: Tensor = bucket.buffer()
        own = self.encode(v)
        world = torch.distributed.get_world_size(self.group)
        gathered = [[torch.empty_like(part) for _ in range(world)] for part in own]
        works = [
            torch.distributed.all_gather(parts, part, group=self.group, async_op=True)
            for parts, part in zip(gathered, own, strict=True)
        ]
        sent = sum(part.numel() * part.element_size() for part in own)
        self.bytes_sent += sent
        self.bytes_saved += v.numel() * v.element_size() - sent

        def mean(done: Any) -> Tensor:
            for one in done.value():
                one.wait()  # raises what went wrong
            total = torch.zeros_like(v, dtype=torch.float32)
            for sent_by, norms in zip(*gathered, strict=True):
                total += self.decode(sent_by, norms, v.numel())
            result: Tensor = v.copy_(total / world)
            return result

        every: Any = torch.futures.collect_all([work.get_future() for work in works])
        made: torch.futures.Future[Tensor] = every.then(mean)
        return made


def _in_pieces(v: Tensor, piece: int) -> Tensor:
    """``(pieces, piece)``, zeros behind."""
    return torch.cat([v, v.new_zeros(-v.numel() % piece)]).reshape(-1, piece)
