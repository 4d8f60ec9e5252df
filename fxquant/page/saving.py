"""What is shown, written to a file in the form that its ending names."""

from __future__ import annotations

import os
from typing import Any

from fxquant.errors import InputError
from fxquant.onnx.files import checked_path, replacing

__all__ = ["FORMATS", "save_as"]

FORMATS = {".html": "html", ".htm": "html", ".md": "markdown", ".json": "json"}
"""What each ending of a file means."""


def save_as(shown: Any, path: str | os.PathLike[str]) -> str:
    """Write what has ``html``, ``markdown`` and ``to_json`` to ``path``: whole, or not at all.

    Raises:
        InputError: the ending names no form, or there is no such folder.
    """
    path = os.fspath(path)
    ending = os.path.splitext(path)[1]
    form = FORMATS.get(ending.lower())
    if form is None:
        raise InputError(f"{path!r}: the ending names no form of a report. Write one of {', '.join(FORMATS)}.")
    path = checked_path(path, ending)
    text = {"html": shown.html, "markdown": shown.markdown, "json": shown.to_json}[form]()
    with replacing(path) as new, open(new, "w", encoding="utf-8") as file:
        file.write(text)
    return path
