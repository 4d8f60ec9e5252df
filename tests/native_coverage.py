"""Which ops and shapes have a native kernel, and why the others have none: held against a table, so that a test of "right or
refused" cannot pass by refusing.

To change the table, which is then part of what is reviewed:

    FXQUANT_REGENERATE=1 .venv/bin/python -m pytest -n 0 tests/test_native_graphs.py tests/test_native_ops.py
    git diff tests/golden/native.txt
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from fxquant.nn.integer import IntegerOp

__all__ = ["NATIVE", "covered", "table"]

FILE = Path(__file__).parent / "golden" / "native.txt"
NATIVE = "native"


@cache
def table() -> dict[str, str]:
    """By case: its integer forms, and ``native`` or the reason why not."""
    if not FILE.exists():
        return {}
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines)


def covered(case: str, integer: Any, reasons: set[str]) -> None:
    """Hold what became of a case against the table: natively computed where ``reasons`` is empty."""
    forms = sorted({type(part).__name__ for part in integer.modules() if isinstance(part, IntegerOp)})
    found = f"{', '.join(forms)}\t{'; '.join(sorted(reasons)) or NATIVE}"
    if os.environ.get("FXQUANT_REGENERATE"):
        table()[case] = found
        FILE.write_text("".join(f"{name}\t{what}\n" for name, what in sorted(table().items())), encoding="utf-8")
    assert table().get(case) == found, f"{case} is not as {FILE.name} has it: see native_coverage.py"
