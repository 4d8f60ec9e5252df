"""Two reports side by side: of two recipes, of before and after training, of two targets, of files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fxquant.analysis.faults import Fault
from fxquant.analysis.measures import Error
from fxquant.errors import InputError
from fxquant.page.compare_html import page_of_two
from fxquant.page.saving import Savable
from fxquant.reporting.tabled import Tabled, decibels

__all__ = ["ComparedLayer", "Comparison", "Side", "SideLayer", "compared_with", "sqnr_of"]

Two = tuple[Any, Any]
"""A number of the first and of the second; None where one has none."""


@dataclass
class SideLayer:
    """One layer of one side; SQNR in dB, None where it was not measured."""

    alone: float | None = None
    accumulated: float | None = None
    bits: int | None = None
    weight: float | None = None
    weight_bits: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Side:
    """What one report brings into a comparison: its title, the numbers at its top, faults, layers by path, and how it is
    made."""

    title: str
    numbers: dict[str, str]
    faults: tuple[Fault, ...]
    layers: dict[str, SideLayer]
    recipe: str


@dataclass(frozen=True)
class ComparedLayer:
    """One layer in both, SQNR in dB; None where one has no such layer, or does not round it, or was not measured.

    Attributes:
        path: where it is.
        alone: by its own roundings, in the first and in the second.
        accumulated: with everything before it, likewise.
        bits: of its result's grid, likewise.
        weight: of its weight, likewise.
        weight_bits: of its weight's grid, likewise.
        bytes: that its weight takes in a file, likewise.
    """

    path: str
    alone: Two
    accumulated: Two
    bits: Two
    weight: Two = (None, None)
    weight_bits: Two = (None, None)
    bytes: Two = (None, None)

    @property
    def gain(self) -> float:
        """What the second has more, in dB: accumulated, or of the weight where that is not known; 0 where neither is."""
        for first, second in (self.accumulated, self.weight):
            if first is not None and second is not None:
                return 0.0 if first == second else float(second - first)
        return 0.0


@dataclass(frozen=True)
class Comparison(Savable, Tabled):
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

    def columns(self) -> list[tuple[str, str]]:
        """The header and the attribute of each pair of columns that has anything in it."""
        named = [("bits", "[1]"), ("weight_bits", "[1]"), ("bytes", "[B]")]
        named += [("weight", "[dB]"), ("alone", "[dB]"), ("accumulated", "[dB]")]
        kept = [(name, unit) for name, unit in named if any(getattr(own, name) != (None, None) for own in self.layers)]
        return [(f"{name.replace('_', ' ')} {{}} {unit}", name) for name, unit in kept]

    def header(self) -> Sequence[str]:
        return ["layer", *(head.format(i) for head, _ in self.columns() for i in (1, 2)), "gain [dB]"]

    def cells(self) -> Sequence[Sequence[str]]:
        columns = [name for _, name in self.columns()]
        return [
            [layer.path, *(_cell(name, own) for name in columns for own in getattr(layer, name)), _gain(layer.gain)]
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
                **{f"{name}_{i + 1}": getattr(layer, name)[i] for _, name in self.columns() for i in (0, 1)},
            }
            for layer in self.layers
        ]

    def html(self) -> str:
        """The page of the comparison."""
        return page_of_two(self)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    return str(value) if name in ("bits", "weight_bits", "bytes") else decibels(value)


def _gain(gain: float) -> str:
    """``+3.2``; an arrow where one of the two is exact or lost, so that there is no number."""
    if math.isinf(gain):
        return "↑" if gain > 0 else "↓"
    return f"{gain:+.1f}" if abs(gain) >= 0.05 else ""


def sqnr_of(error: Error | None) -> float | None:
    """In dB; None where nothing was measured."""
    return None if error is None else error.sqnr


def compared_with(own: Any, other: Any) -> Comparison:
    """One report beside another one.

    Raises:
        InputError: ``other`` is none.
    """
    if not hasattr(other, "side"):
        raise InputError(f"compare takes what fxquant.report gave; it was given a {type(other).__name__}.")
    first, second = own.side(), other.side()
    kinds = dict.fromkeys(fault.kind for side in (first, second) for fault in side.faults)
    layers = []
    for path in dict.fromkeys([*first.layers, *second.layers]):
        both = [side.layers.get(path, SideLayer()) for side in (first, second)]
        values: dict[str, Any] = {
            name: tuple(getattr(layer, name) for layer in both) for name in SideLayer.__dataclass_fields__
        }
        layers.append(ComparedLayer(path, **values))
    return Comparison(
        titles=(first.title, second.title),
        numbers={
            name: (first.numbers.get(name, ""), second.numbers.get(name, ""))
            for name in dict.fromkeys([*first.numbers, *second.numbers])
        },
        faults={
            kind: (sum(f.kind == kind for f in first.faults), sum(f.kind == kind for f in second.faults))
            for kind in kinds
        },
        layers=tuple(sorted(layers, key=lambda layer: -abs(layer.gain))),
        recipes=(first.recipe, second.recipe),
    )
