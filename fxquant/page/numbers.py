"""The few numbers that stand at the top of a report, whatever form it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxquant.export.agreement import OutputAgreement
from fxquant.reporting.tabled import in_decibels, megabytes

if TYPE_CHECKING:
    from fxquant.page.report import Report

__all__ = ["agreement_words", "percent", "summary_numbers"]


def percent(share: float) -> str:
    """``99.3 %``; only all of it is 100 %."""
    value = 100 * share
    return "100 %" if value >= 100 else f"{min(value, 99.9):.3g} %"


def agreement_words(own: OutputAgreement) -> str:
    """How an output of the integer model agrees with the float one's."""
    top1 = "" if own.top1 is None else f", the same largest class in {percent(own.top1)} of {own.rows} rows"
    largest = f"largest difference {own.difference:.2g} of the largest value"
    return f"{own.name}: {in_decibels(own.sqnr)} against float, {largest}{top1}"


def summary_numbers(report: Report) -> list[tuple[str, str, str]]:
    """Each number with its name and a word about it."""
    found: list[tuple[str, str, str]] = []
    if report.accuracy:
        shown = " → ".join(f"{value:.4g}" for value in report.accuracy.values())
        found.append(("accuracy", shown, " → ".join(report.accuracy)))
    least = min(report.outputs, key=lambda own: own.sqnr, default=None)
    if least is not None:
        found.append(("agreement with float", in_decibels(least.sqnr), "SQNR of the worst output"))
        if least.top1 is not None:
            found.append(("same top-1", percent(least.top1), f"of {least.rows} rows"))
    covered = report.coverage
    if covered.macs is not None:
        found.append(("MACs in integers", percent(covered.macs.fraction), ""))
    found.append(("weights in integers", percent(covered.weights.fraction), ""))
    found.append(
        ("ops in float", str(len(covered.float_ops)), f"{len(covered.islands)} islands" if covered.islands else "")
    )
    if "integer" in report.bytes:
        ratio = report.bytes["float"] / max(report.bytes["integer"], 1)
        size = f"{megabytes(report.bytes['float'])} → {megabytes(report.bytes['integer'])}"
        found.append(("parameters", size, f"{ratio:.1f} times smaller"))
    worst = report.errors.layers[0] if report.errors.layers else None
    if worst is not None and worst.alone is not None:
        found.append(("worst layer alone", in_decibels(worst.alone.sqnr), worst.path))
    return found
