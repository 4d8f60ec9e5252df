"""A loop written with accelerate on a prepared model, unchanged: gradients accumulated, state saved, resumed bit for bit.

Run: python examples/accelerate_loop.py     (needs: pip install accelerate safetensors)
"""

from __future__ import annotations

import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxquant


def make() -> nn.Module:
    torch.manual_seed(0)
    head = [nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4)]
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), *head)


def run(model: nn.Module, folder: str, *, epochs: range) -> tuple[nn.Module, float]:
    """Train for ``epochs``, from the state in ``folder`` where they do not begin at 0; the last epoch's loss."""
    images = torch.randn(128, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = (images.mean((1, 2, 3)) * 20).round().long().clamp(-1, 2) + 1
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    loader = DataLoader(TensorDataset(images, labels), batch_size=16)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 5e-3), loader)
    if epochs.start:
        accelerator.load_state(f"{folder}/{epochs.start}")
    total = 0.0
    for epoch in epochs:
        total = 0.0
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.item() / len(loader)
        accelerator.save_state(f"{folder}/{epoch + 1}")
    return accelerator.unwrap_model(model), total


def main() -> None:
    example = torch.randn(2, 1, 8, 8)
    with tempfile.TemporaryDirectory() as folder:
        _, plain = run(make(), f"{folder}/float", epochs=range(6))
        prepared, quantized = run(fxquant.prepare(make(), example, qat=True), folder, epochs=range(6))
        resumed, _ = run(fxquant.prepare(make(), example, qat=True), folder, epochs=range(3, 6))
    same = all(torch.equal(value, resumed.state_dict()[name]) for name, value in prepared.state_dict().items())
    print(f"loss: float {plain:.3f}, quantized {quantized:.3f}; resumed bit for bit: {same}")
    assert same
    fxquant.convert(prepared)


if __name__ == "__main__":
    main()
