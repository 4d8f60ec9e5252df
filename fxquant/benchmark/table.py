"""What ``bench`` found: rows of numbers, and the table that people read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

__all__ = ["Benchmark", "Row"]


@dataclass(frozen=True)
class Row:
    """One contender at one batch size and number of threads.

    Attributes:
        contender: ``float``, ``float compiled`` or ``int8``.
        runtime: what computes it.
        batch: rows of the first input.
        threads: how many the runtime may use; None for its own choice.
        milliseconds: the median of a call; None where there is none, and ``note`` says why.
        spread: half of the interval that holds the middle half of the rounds, in milliseconds.
        speedup: how many times as fast as eager float in the same rounds.
        size: bytes on disk: the float state dict, what ``save`` writes, or the ONNX file.
        memory: bytes that a process of its own needs at most, above what it needs without the model.
        sqnr: signal to quantization noise of the outputs against float, in decibels.
        agreement: how well an int8 row's outputs agree with the exact integers', in decibels.
        note: why a number is missing.
    """

    contender: str
    runtime: str
    batch: int
    threads: int | None
    milliseconds: float | None = None
    spread: float | None = None
    speedup: float | None = None
    size: int | None = None
    memory: int | None = None
    sqnr: float | None = None
    agreement: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Benchmark:
    """What ``bench`` measured; prints as a table.

    Attributes:
        name: the model's class.
        rows: one per contender, batch size and number of threads.
        notes: what has to be known to read them.
    """

    name: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return {"model": self.name, "notes": list(self.notes), "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        shown = {
            "": [f"{row.contender}, {row.runtime}" for row in self.rows],
            "batch": [str(row.batch) for row in self.rows],
            "threads": [_text(row.threads, "{}") or "auto" for row in self.rows],
            "ms": [_text(row.milliseconds, "{:.3g}") for row in self.rows],
            "±": [_text(row.spread, "{:.2g}") for row in self.rows],
            "× float": [_text(row.speedup, "{:.2f}") for row in self.rows],
            "size MB": [_mega(row.size) for row in self.rows],
            "memory MB": [_mega(row.memory) for row in self.rows],
            "SQNR dB": [_text(row.sqnr, "{:.1f}") for row in self.rows],
            "agrees dB": [_text(row.agreement, "{:.0f}") for row in self.rows],
            "note": [row.note for row in self.rows],
        }
        kept = {title: cells for title, cells in shown.items() if any(cells)}
        left = [title in ("", "note") for title in kept]
        table = tabulate(kept, headers="keys", disable_numparse=True, colalign=["left" if x else "right" for x in left])
        return "\n".join([self.name, "", *(line.rstrip() for line in table.splitlines()), "", *self.notes])


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _mega(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.3g}"
