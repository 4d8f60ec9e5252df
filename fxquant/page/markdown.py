"""The report as Markdown for pull requests: the numbers, what is wrong, and the worst of each table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from fxquant.page.numbers import agreement_words, summary_numbers
from fxquant.reporting.rows import source_line
from fxquant.reporting.tabled import Tabled

if TYPE_CHECKING:
    from fxquant.page.report import Report

__all__ = ["markdown_of"]

_ROWS = 12


def markdown_of(report: Report) -> str:
    """The short form of a report."""
    numbers = [[name, value, more] for name, value, more in summary_numbers(report)]
    parts = [f"# {report.title}", _table(["", "", ""], numbers)]
    parts += [f"- {agreement_words(own)}" for own in report.outputs] + [f"- {note}" for note in report.notes]
    faults = [
        f"{i}. **{fault.kind}** `{fault.path}`: {fault.what}. {fault.repair}."
        for i, fault in enumerate(report.faults, 1)
    ]
    more = [f"\nand {len(faults) - _ROWS} more"] if len(faults) > _ROWS else []
    parts += ["## What is wrong", "\n".join([*faults[:_ROWS], *more]) or "Nothing was found."]
    parts += ["## Errors by layer", _first(report.errors)]
    if report.sensitivity is not None and (report.sensitivity.layers or report.sensitivity.left_out):
        parts += ["## Sensitivity", _first(report.sensitivity)]
    if report.coverage.float_ops:
        rows = [[op.path, op.op, op.reason, source_line(op.source)] for op in report.coverage.float_ops]
        parts += ["## What stays in float", _table(["layer", "op", "why", "source"], rows)]
    parts += [f"## {name}\n\n```\n{text}\n```" for name, text in report.sections.items()]
    parts += ["## Recipe", f"```python\n{report.recipe}\n```"]
    parts.append(", ".join(f"{name} {version}" for name, version in report.versions.items()))
    return "\n\n".join(parts) + "\n"


def _first(found: Tabled) -> str:
    """The worst of a table, and what was not measured; faults have a section of their own."""
    rows = found.cells()
    notes = [f"- {note}" for note in found.notes() if not note.startswith("wrong: ")]
    shown = [*notes[:_ROWS], *([f"- and {len(notes) - _ROWS} more"] if len(notes) > _ROWS else [])]
    return "\n\n".join(part for part in (_table(list(found.header()), rows) if rows else "", "\n".join(shown)) if part)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    shown = [[cell.replace("|", "\\|") for cell in row] for row in rows[:_ROWS]]
    more = f"\n\nand {len(rows) - _ROWS} more" if len(rows) > _ROWS else ""
    return tabulate(shown, header, tablefmt="github", disable_numparse=True) + more
