"""Two reports side by side: of two recipes, of before and after training, of two targets."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxquant.errors import InputError
from fxquant.onnx.files import checked_path, replacing
from fxquant.page.compare_html import page_of_two
from fxquant.page.numbers import summary_numbers
from fxquant.reporting.tabled import Tabled, decibels

if TYPE_CHECKING:
    from fxquant.page.report import Report

__all__ = ["ComparedLayer", "Comparison", "compared_with"]


@dataclass(frozen=True)
class ComparedLayer:
    """One layer in both models, SQNR in dB; None where one has no such layer, or does not round it.

    Attributes:
        path: where it is.
        alone: by its own roundings, in the first model and in the second.
        accumulated: with everything before it, likewise.
        bits: of its result's grid, likewise.
    """

    path: str
    alone: tuple[float | None, float | None]
    accumulated: tuple[float | None, float | None]
    bits: tuple[int | None, int | None]

    @property
    def gain(self) -> float:
        """What the second has more, accumulated, in dB; 0 where that cannot be told."""
        first, second = self.accumulated
        return 0.0 if first is None or second is None or first == second else second - first


@dataclass(frozen=True)
class Comparison(Tabled):
    """What ``Report.compare`` found; prints as a table, the layers that differ most first.

    Attributes:
        titles: what the two are called.
        numbers: the numbers at the top of both reports, by name; empty where one has none.
        faults: how many of each kind, likewise.
        layers: one entry per layer of either.
        recipes: the calls that make them.
    """

    titles: tuple[str, str]
    numbers: dict[str, tuple[str, str]]
    faults: dict[str, tuple[int, int]]
    layers: tuple[ComparedLayer, ...]
    recipes: tuple[str, str]

    def header(self) -> Sequence[str]:
        return [
            "layer",
            "bits",
            "",
            *(f"{part} {i} [dB]" for part in ("alone", "accumulated") for i in (1, 2)),
            "gain [dB]",
        ]

    def cells(self) -> Sequence[Sequence[str]]:
        return [
            [
                layer.path,
                *("" if bits is None else str(bits) for bits in layer.bits),
                *map(decibels, (*layer.alone, *layer.accumulated)),
                _gain(layer.gain),
            ]
            for layer in self.layers
        ]

    def title(self) -> str:
        return f"1: {self.titles[0]}; 2: {self.titles[1]}"

    def notes(self) -> Sequence[str]:
        lines = [f"{name}: {first or '–'} | {second or '–'}" for name, (first, second) in self.numbers.items()]
        return [*lines, *(f"{kind}: {first} | {second} found" for kind, (first, second) in self.faults.items())]

    def records(self) -> list[dict[str, Any]]:
        return [
            {
                "layer": layer.path,
                "gain": layer.gain,
                **{f"alone_{i + 1}": layer.alone[i] for i in (0, 1)},
                **{f"accumulated_{i + 1}": layer.accumulated[i] for i in (0, 1)},
            }
            for layer in self.layers
        ]

    def html(self) -> str:
        """The page of the comparison."""
        return page_of_two(self)

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write it to ``path``: ``.html``, ``.md`` or ``.json``; whole, or not at all.

        Raises:
            InputError: the ending names none of these, or there is no such folder.
        """
        path = os.fspath(path)
        writers = {".html": self.html, ".htm": self.html, ".md": self.markdown, ".json": self.to_json}
        writer: Any = writers.get(os.path.splitext(path)[1].lower())
        if writer is None:
            raise InputError(f"{path!r}: the ending names no form of a comparison. Write one of {', '.join(writers)}.")
        path = checked_path(path, os.path.splitext(path)[1])
        with replacing(path) as new, open(new, "w", encoding="utf-8") as file:
            file.write(writer())
        return path


def _gain(gain: float) -> str:
    """``+3.2``; an arrow where one of the two is exact or lost, so that there is no number."""
    if math.isinf(gain):
        return "↑" if gain > 0 else "↓"
    return f"{gain:+.1f}" if gain else ""


def compared_with(first: Report, second: Report) -> Comparison:
    """``first`` beside ``second``."""
    numbers = [{name: value for name, value, _ in summary_numbers(own)} for own in (first, second)]
    names = dict.fromkeys([*numbers[0], *numbers[1]])
    kinds = dict.fromkeys(fault.kind for own in (first, second) for fault in own.faults)
    found = [{layer.path: layer for layer in own.errors.layers} for own in (first, second)]
    layers = []
    for path in dict.fromkeys([*found[0], *found[1]]):
        both = [own.get(path) for own in found]
        sqnr: list[Any] = [
            tuple(None if own is None or getattr(own, name) is None else getattr(own, name).sqnr for own in both)
            for name in ("alone", "accumulated")
        ]
        bits: Any = tuple(None if own is None else own.bits for own in both)
        layers.append(ComparedLayer(path, sqnr[0], sqnr[1], bits))
    return Comparison(
        titles=(first.title, second.title),
        numbers={name: (numbers[0].get(name, ""), numbers[1].get(name, "")) for name in names},
        faults={
            kind: (sum(f.kind == kind for f in first.faults), sum(f.kind == kind for f in second.faults))
            for kind in kinds
        },
        layers=tuple(sorted(layers, key=lambda layer: -abs(layer.gain))),
        recipes=(first.recipe, second.recipe),
    )
