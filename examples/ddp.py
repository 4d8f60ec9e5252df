"""Two processes train a prepared model with DistributedDataParallel, and find what one process finds on the whole batches.

Run: python examples/ddp.py     (starts `torchrun --nproc-per-node 2` on itself)
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fxquant
from fxquant.training import synchronize


def make() -> nn.Module:
    torch.manual_seed(0)
    head = [nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4)]
    return fxquant.prepare(nn.Sequential(nn.Conv2d(1, 8, 3), *head).train(), torch.zeros(2, 1, 8, 8), qat=True)


def run(rank: int, world: int) -> tuple[nn.Module, float]:
    """Train as process ``rank`` of ``world`` on batches of 16 in all; the prepared model, and its last loss here."""
    images = torch.randn(128, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(images, (images.mean((1, 2, 3)) * 20).round().long().clamp(-1, 2) + 1)
    sampler = DistributedSampler(data, num_replicas=world, rank=rank, seed=2)
    prepared = synchronize(make())  # ranges of all processes' samples
    model = nn.parallel.DistributedDataParallel(prepared) if world > 1 else prepared
    optimizer, loss = torch.optim.Adam(model.parameters(), 5e-3), torch.zeros(())
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for x, y in DataLoader(data, batch_size=16 // world, sampler=sampler):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    return prepared, loss.item()


def work() -> None:
    """What each of torchrun's processes does; the first one also trains alone, and compares."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    prepared, _ = run(rank, world)
    dist.destroy_process_group()
    if rank == 0:
        alone, loss = run(0, 1)
        ranges = {name: grid for name, grid in alone.named_buffers() if name.endswith("output_quantizer.scale")}
        off = max(float((prepared.get_buffer(name) / grid - 1).abs().max()) for name, grid in ranges.items())
        print(f"loss of one process alone {loss:.3f}; scales of {world} processes are within {off:.1e} of its own")
        assert off < 0.01
        fxquant.convert(prepared)


def main() -> None:
    if "RANK" in os.environ:
        work()
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*torchrun, __file__], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout.strip())


if __name__ == "__main__":
    main()
