"""Lightning's Trainer with its average of weights on a prepared model: it trains, resumes, and the average converts.

Run: python examples/lightning_trainer.py     (needs: pip install lightning)
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxquant


class Task(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.losses = model, list[float]()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def run(model: nn.Module, folder: str, *, epochs: int, resume: str | None = None) -> Task:
    x = torch.randn(128, 8, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, torch.tanh(x[:, :4] * 2)), batch_size=32)
    callbacks = [EMAWeightAveraging(decay=0.9), ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)]
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=callbacks, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    task = Task(model)
    trainer.fit(task, loader, ckpt_path=resume)
    return task


def main() -> None:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    example = torch.randn(2, 8)
    with tempfile.TemporaryDirectory() as folder:
        plain = run(make(), f"{folder}/float", epochs=6)
        task = run(fxquant.prepare(make(), example, qat=True), f"{folder}/all", epochs=6)
        again = run(
            fxquant.prepare(make(), example, qat=True), f"{folder}/again", epochs=6, resume=f"{folder}/all/epoch=2.ckpt"
        )
    same = all(torch.equal(v, again.model.state_dict()[name]) for name, v in task.model.state_dict().items())
    print(f"loss: float {plain.losses[-1]:.3f}, quantized {task.losses[-1]:.3f}; resumed bit for bit: {same}")
    assert same
    x = torch.randn(64, 8)  # Lightning puts the average of the weights into the model at the end
    int8, averaged = fxquant.convert(task.model), task.model.eval()
    with torch.no_grad():
        distance = ((int8(x) - averaged(x)).abs().max() / averaged(x).abs().max()).item()
        losses = [nn.functional.mse_loss(run(x), torch.tanh(x[:, :4] * 2)).item() for run in (averaged, int8)]
    print(f"averaged model: loss {losses[0]:.4f}, int8 {losses[1]:.4f}; largest difference of outputs {distance:.1e}")
    assert distance < 1e-5, "the integer model computes what was trained"


if __name__ == "__main__":
    main()
