"""What a report may use of the place that it is printed to: colour, and how many columns there are."""

from __future__ import annotations

import os
import re
import shutil
import sys

__all__ = ["paint", "terminal_width", "visible_length", "wants_color"]

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def wants_color() -> bool:
    """Whether stdout is a terminal that takes colours and ``NO_COLOR`` is not set (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def terminal_width() -> int | None:
    """The columns of the terminal that stdout is; None for a file or a pipe, where lines may be of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def paint(text: str, style: str | None) -> str:
    """``text`` in bold, dim, red, green, yellow or cyan; unchanged where it is empty or ``style`` is None."""
    return f"\033[{_CODES[style]}m{text}\033[0m" if style and text else text


def visible_length(text: str) -> int:
    """The columns that ``text`` takes, colours not counted."""
    return len(re.sub("\033\\[[0-9]*m", "", text))
