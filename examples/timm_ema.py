"""timm's average of a model (EMA), begun before the first step, on a prepared model: it rounds and converts.

Run: python examples/timm_ema.py     (needs: pip install timm)
"""

from __future__ import annotations

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import fxquant


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def train(model: nn.Module) -> tuple[nn.Module, float]:
    """150 steps; the average of the weights, and its loss."""
    average = ModelEmaV3(model, decay=0.95)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(150):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        average.update(model, step)
    x, y = batch(-1)
    with torch.no_grad():
        loss = nn.functional.mse_loss(average.module.eval()(x), y).item()
    return average.module, loss


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step + 10))
    return x, torch.tanh(x[:, :4] * 2)


def main() -> None:
    _, plain = train(make())
    prepared = fxquant.prepare(make().train(), batch(0)[0][:2], qat=True)
    average, quantized = train(prepared)
    loaded = fxquant.prepare(make(), batch(0)[0][:2], qat=True)
    loaded.load_state_dict(average.state_dict())
    x, y = batch(-1)
    with torch.no_grad():
        same = torch.equal(average(x), loaded.eval()(x))
        int8 = nn.functional.mse_loss(fxquant.convert(average)(x), y).item()
    print(f"loss of the average: float {plain:.3f}, quantized {quantized:.3f}, int8 {int8:.3f}; loads equal: {same}")
    assert same


if __name__ == "__main__":
    main()
