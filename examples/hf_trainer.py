"""Hugging Face's Trainer on a prepared model, unchanged: it trains, saves to safetensors, resumes bit for bit, converts.

Run: python examples/hf_trainer.py     (needs: pip install transformers accelerate safetensors)
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fxquant

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def run(model: nn.Module, data: list[dict[str, Any]], folder: str, resume: str | None = None) -> float:
    """Four epochs; the loss of the last steps."""
    arguments = TrainingArguments(
        folder, num_train_epochs=4, per_device_train_batch_size=32, learning_rate=3e-3, seed=1, use_cpu=True,
        report_to=[], logging_steps=3, save_steps=6, disable_tqdm=True, log_level="error",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return float([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1])


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertForSequenceClassification(config).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(0, 50, (96, 12))
    mask, labels = torch.ones_like(ids), ids[:, 0] % 3
    data = [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids, mask, labels, strict=True)]
    example = {"input_ids": ids[:2], "attention_mask": mask[:2], "labels": labels[:2]}

    prepared = fxquant.prepare(model, example, qat=True)
    resumed = fxquant.prepare(model, example, qat=True)
    with tempfile.TemporaryDirectory() as folder:
        quantized = run(prepared, data, folder)
        run(resumed, data, folder, resume=f"{folder}/checkpoint-6")
    same = all(torch.equal(value, resumed.state_dict()[name]) for name, value in prepared.state_dict().items())

    model.load_state_dict(state)
    with tempfile.TemporaryDirectory() as folder:
        print(f"loss: float {run(model, data, folder):.3f}, quantized {quantized:.3f}; resumed bit for bit: {same}")
    assert same

    int8 = fxquant.convert(prepared)
    with torch.no_grad():
        expected = prepared.eval()(input_ids=ids, attention_mask=mask, labels=labels).logits
        actual = int8(input_ids=ids, attention_mask=mask, labels=labels).logits
    print(f"int8 agrees with the trained model in {(expected.argmax(1) == actual.argmax(1)).float().mean():.1%}")


if __name__ == "__main__":
    main()
