"""How right a quantized classifier is: top-1 and top-5 where labels are known, and agreement with float where not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fxquant.analysis.measures import divergence
from fxquant.errors import InputError
from fxquant.export.agreement import compare_output
from fxquant.reporting.tabled import Tabled, in_decibels

__all__ = ["Evaluation", "evaluate"]

Run = Callable[[Any], Tensor]
"""Logits ``(n, classes)`` for a batch."""


@dataclass(frozen=True)
class Evaluation(Tabled):
    """What ``evaluate`` found; prints as a table.

    Attributes:
        rows: how many samples.
        top1, top5: shares of right answers, in float and quantized; None without labels, or with fewer than six classes.
        same_top1: the share of samples with the float model's class.
        sqnr: of the logits in dB.
        kl: mean over samples of KL(float || quantized) of the softmax, in nats.
        note: why there is no accuracy, where labels were given.
    """

    rows: int
    top1: tuple[float, float] | None
    top5: tuple[float, float] | None
    same_top1: float
    sqnr: float
    kl: float
    note: str = ""

    def header(self) -> Sequence[str]:
        return ["", "float [%]", "quantized [%]", "difference [points]"]

    def cells(self) -> Sequence[Sequence[str]]:
        return [
            [name, f"{100 * both[0]:.2f}", f"{100 * both[1]:.2f}", f"{100 * (both[1] - both[0]):+.2f}"]
            for name, both in (("top-1", self.top1), ("top-5", self.top5))
            if both is not None
        ]

    def notes(self) -> Sequence[str]:
        agreement = f"the float model's class in {100 * self.same_top1:.2f} % of {self.rows} images"
        lines = [f"{agreement}; logits {in_decibels(self.sqnr)} against float, KL {self.kl:.2g} nats"]
        return [*lines, *([self.note] if self.note else [])]

    def records(self) -> list[dict[str, Any]]:
        right = {
            f"{name}_{which}": None if both is None else both[i]
            for name, both in (("top1", self.top1), ("top5", self.top5))
            for i, which in enumerate(("float", "quantized"))
        }
        return [{"rows": self.rows, **right, "same_top1": self.same_top1, "sqnr": self.sqnr, "kl": self.kl}]


def evaluate(
    run_float: Run,
    run_quantized: Run,
    batches: Iterable[Any],
    labels: Sequence[int] | None,
    *,
    classes: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Run two classifiers on the same batches.

    Args:
        run_float, run_quantized: give logits ``(n, classes)`` for a batch.
        batches: of samples, in the order of ``labels``.
        labels: the right class of each sample; None where they are not known.
        classes: how many the labels tell apart; where the models have another number of them, labels say nothing.
        progress: show a progress bar.

    Raises:
        InputError: the models give no logits, or there are not as many labels as samples, or a label is no class.
    """
    results: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for batch in tqdm(batches, desc="evaluate", unit="batch", disable=not progress or None):
            results.append((_logits(run_float(batch)), _logits(run_quantized(batch))))
    if not results:
        raise InputError("evaluate was given no data.")
    for exact, rounded in results:
        if exact.shape != rounded.shape:
            raise InputError(
                f"the quantized model gives {list(rounded.shape)} for a batch, and the float one {list(exact.shape)}: "
                "it was not made of this model. Give the model that it was made of."
            )
    exact, rounded = (torch.cat([both[i] for both in results]).double() for i in (0, 1))
    note = ""
    if labels is not None and classes not in (None, exact.shape[1]):
        note = f"no accuracy: there are {classes} classes of samples, and the model has {exact.shape[1]}"
    right = None if labels is None or note else _labels(labels, exact)
    return Evaluation(
        rows=len(exact),
        top1=None if right is None else (_top(exact, right, 1), _top(rounded, right, 1)),
        top5=None if right is None or exact.shape[1] < 6 else (_top(exact, right, 5), _top(rounded, right, 5)),
        same_top1=float((exact.argmax(1) == rounded.argmax(1)).double().mean()),
        sqnr=compare_output("", rounded, exact, None).sqnr,
        kl=divergence(rounded, exact) / len(exact),
        note=note,
    )


def _logits(result: Any) -> Tensor:
    value = getattr(result, "logits", result)
    if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] < 2:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"evaluate needs a classifier, which gives logits (n, classes); this model gives {shape}.")
    return value.detach()


def _labels(labels: Sequence[int], logits: Tensor) -> Tensor:
    if len(labels) != len(logits):
        raise InputError(f"there are {len(labels)} labels for {len(logits)} samples.")
    if not 0 <= min(labels) <= max(labels) < logits.shape[1]:
        raise InputError(
            f"labels lie between {min(labels)} and {max(labels)}, and the model has {logits.shape[1]} classes."
        )
    return torch.tensor(labels)


def _top(logits: Tensor, right: Tensor, k: int) -> float:
    return float((logits.topk(k, 1).indices == right[:, None]).any(1).double().mean())
