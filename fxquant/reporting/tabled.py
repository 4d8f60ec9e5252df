"""Findings in every form that they are read in: a table of text, HTML for notebooks, JSON for scripts, a pandas frame."""

from __future__ import annotations

import html
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from tabulate import tabulate

from fxquant.errors import MissingPackageError

__all__ = ["Tabled", "decibels", "in_decibels", "megabytes", "plain", "versions"]


class Tabled:
    """Mixin of dataclasses that print as one table.

    A subclass gives ``header`` and ``cells``, one sequence of texts a row, and may give lines around the table.
    """

    def header(self) -> Sequence[str]:
        """The names of the columns; those of numbers end in a unit in brackets."""
        raise NotImplementedError

    def cells(self) -> Sequence[Sequence[str]]:
        """The rows."""
        raise NotImplementedError

    def title(self) -> str:
        """The line above the table."""
        return ""

    def notes(self) -> Sequence[str]:
        """The lines below it."""
        return ()

    def records(self) -> list[dict[str, Any]]:
        """The rows as dictionaries of numbers, texts and None."""
        raise NotImplementedError

    def to_json(self, *, indent: int | None = None) -> str:
        """All of it as JSON. A number that is not finite, such as the SQNR of what lost nothing, is null."""
        return json.dumps(plain(self), indent=indent, ensure_ascii=False)

    def to_pandas(self) -> Any:
        """The rows as a ``pandas.DataFrame``.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingPackageError(
                "to_pandas needs the package pandas, which is not installed.\n  what to do: pip install 'fxquant[report]'"
            ) from error
        return pandas.DataFrame(self.records())

    def markdown(self) -> str:
        """The table in GitHub's Markdown, with the lines around it."""
        rows = [[cell.replace("|", "\\|") for cell in row] for row in self.cells()]
        align = _sides(self.header())
        table = tabulate(rows, list(self.header()), tablefmt="github", disable_numparse=True, colalign=align)
        return "\n\n".join(part for part in (self.title(), table if rows else "", *self.notes()) if part)

    def __str__(self) -> str:
        rows = self.cells()
        align = _sides(self.header())
        table = tabulate(rows, list(self.header()), tablefmt="simple", disable_numparse=True, colalign=align)
        lines = [line.rstrip() for line in table.split("\n")] if rows else []
        return "\n\n".join(part for part in (self.title(), "\n".join(lines), "\n".join(self.notes())) if part)

    def _repr_html_(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        body = "".join(row(cells, "td") for cells in self.cells())
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes())
        title = f"<p>{html.escape(self.title())}</p>" if self.title() else ""
        return f"{title}<table><thead>{row(self.header(), 'th')}</thead><tbody>{body}</tbody></table>{notes}"


def _sides(header: Sequence[str]) -> tuple[str, ...]:
    """Numbers, whose columns name a unit, stand to the right."""
    return tuple("right" if name.endswith("]") else "left" for name in header)


def decibels(value: float | None) -> str:
    """``41.3``; ``exact`` where nothing was lost; empty where nothing was measured."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:.1f}" if math.isfinite(value) else "exact" if value > 0 else "lost"


def in_decibels(value: float) -> str:
    """``41.3 dB``; ``exact`` where nothing was lost."""
    return f"{decibels(value)} dB" if math.isfinite(value) else decibels(value)


def megabytes(size: int) -> str:
    """``44.6 MB``, ``12 kB``."""
    return f"{size / 1e6:.3g} MB" if size >= 1e5 else f"{size / 1e3:.3g} kB"


def plain(value: Any) -> Any:
    """Dataclasses and containers as what JSON holds."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(held) for held in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def versions() -> dict[str, str]:
    """Of what takes part in everything."""
    try:
        own = importlib.metadata.version("fxquant")
    except importlib.metadata.PackageNotFoundError:
        own = "from source"
    return {"fxquant": own, "torch": torch.__version__, "python": platform.python_version()}
