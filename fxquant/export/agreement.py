"""How well a file that another runtime runs agrees with the model that it was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "GOOD_SQNR",
    "NodeAgreement",
    "OutputAgreement",
    "compare_nodes",
    "compare_output",
    "other_batch",
    "together",
]

GOOD_SQNR = 40.0
"""Decibels below which an agreement with the exact integers is worth a word: noise of 1 % of the signal."""
_LEAST_EQUAL = 0.99
"""For outputs that are no real numbers (classes, masks): the share of elements that have to be equal."""


@dataclass(frozen=True)
class OutputAgreement:
    """One output of one run.

    Attributes:
        name: the output.
        rows: the batch size of the run.
        difference: the largest difference, over the largest magnitude.
        lsb: the largest difference in steps of the output's grid; None where the output is no rounded tensor.
        equal: the share of elements that are equal (for floats, to a millionth of the largest).
        sqnr: signal to difference in decibels, infinite where nothing differs.
        top1: the share of rows with the same largest entry; None where rows are no scores.
    """

    name: str
    rows: int
    difference: float
    lsb: float | None
    equal: float
    sqnr: float
    top1: float | None

    def __str__(self) -> str:
        steps = "" if self.lsb is None else f" ({self.lsb:.0f} LSB)"
        top1 = "" if self.top1 is None else f", top-1 agrees on {self.top1:.1%}"
        return (
            f"{self.name}, batch {self.rows}: largest difference {self.difference:.2g}{steps}, "
            f"equal {self.equal:.2%}, SQNR {self.sqnr:.1f} dB{top1}"
        )


@dataclass(frozen=True)
class NodeAgreement:
    """One rounded tensor inside the model: the largest difference in LSB, and the share of equal integers.

    Each node gets what the runtime computed before it, so differences of earlier nodes add up.
    """

    name: str
    lsb: int
    equal: float

    def __str__(self) -> str:
        return f"{self.name}: {self.lsb} LSB, equal {self.equal:.3%}"


def compare_output(name: str, actual: Tensor, expected: Tensor, scale: float | None) -> OutputAgreement:
    """``actual`` beside ``expected``, of the same shape; ``scale`` is the step of its grid, if it has one.

    Where both are the same infinity, as masked scores are, or both NaN, they are equal, and no signal.
    """
    own, other = actual.detach().double(), expected.detach().double()
    is_finite, alike = torch.isfinite(other), (own == other) | (torch.isnan(own) & torch.isnan(other))
    apart, real = torch.where(alike, 0.0, own - other), torch.where(is_finite, other, 0.0)
    difference, largest = _largest(apart.abs()), _largest(real.abs())
    noise, signal = float(apart.square().sum()), float(real.square().sum())
    is_score = expected.ndim == 2 and expected.shape[1] > 1 and expected.is_floating_point()
    tolerance = 1e-6 * largest if scale is None else scale / 2
    same = apart.abs() <= tolerance
    return OutputAgreement(
        name=name,
        rows=int(expected.shape[0]) if expected.ndim else 1,
        difference=difference / largest if largest else difference,
        lsb=None if scale is None else difference / scale,
        equal=float(same.double().mean()) if same.numel() else 1.0,
        sqnr=math.inf if not noise else 10 * math.log10(signal / noise) if signal and noise < math.inf else -math.inf,
        top1=float((own.argmax(1) == other.argmax(1)).double().mean()) if is_score else None,
    )


def together(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """How well all outputs agree: the least of their SQNR in decibels; -inf where some output is another one altogether."""
    if [y.shape for y in actual] != [y.shape for y in expected]:
        return -math.inf
    found = [math.inf]
    for own, other in zip(actual, expected, strict=True):
        if other.is_floating_point():
            found.append(_decibels(own, other))
        else:
            found.append(math.inf if compare_output("", own, other, None).equal >= _LEAST_EQUAL else -math.inf)
    return min(found)


def _decibels(actual: Tensor, expected: Tensor) -> float:
    """SQNR where ``expected`` is finite; -inf where the others are not what they should be, or some should not be there."""
    finite = torch.isfinite(expected)
    same = (actual == expected) | (torch.isnan(actual) & torch.isnan(expected))
    if not bool(same[~finite].all()) or not bool(torch.isfinite(actual[finite]).all()):
        return -math.inf
    return compare_output("", actual[finite], expected[finite], None).sqnr


def compare_nodes(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[NodeAgreement]:
    """Integers by name, in the order of ``expected``; what only one side has is left out."""
    found = []
    for name, q in expected.items():
        if name in actual and actual[name].shape == q.shape and q.numel():
            apart = (actual[name].long() - q.long()).abs()
            found.append(NodeAgreement(name, int(apart.max()), float((apart == 0).double().mean())))
    return found


def other_batch(tensors: Sequence[Tensor], is_free: Callable[[int], bool]) -> list[Tensor] | None:
    """The tensors with one row more where their first axis is free; None where no axis is."""
    changed = [torch.cat([x, x[:1].flip(-1)]) if is_free(i) and x.ndim else x for i, x in enumerate(tensors)]
    return changed if any(a.shape != b.shape for a, b in zip(changed, tensors, strict=True)) else None


def _largest(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0
