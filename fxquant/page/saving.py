"""What is shown, written to a file in the form that its ending names."""

from __future__ import annotations

import html
import os
from collections.abc import Callable

from fxquant.errors import InputError
from fxquant.onnx.files import checked_path, replacing

__all__ = ["FORMATS", "Page", "Savable"]

FORMATS = {".html": "html", ".htm": "html", ".md": "markdown", ".json": "json"}
"""What each ending of a file means."""


class Savable:
    """What has ``html``, ``markdown`` and ``to_json``."""

    html: Callable[..., str]
    markdown: Callable[..., str]
    to_json: Callable[..., str]

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write it to ``path`` in the form that the ending names: ``.html``, ``.md`` or ``.json``; whole, or not at all.

        Raises:
            InputError: the ending names none of these, or there is no such folder.
        """
        path = os.fspath(path)
        ending = os.path.splitext(path)[1]
        form = FORMATS.get(ending.lower())
        if form is None:
            raise InputError(f"{path!r}: the ending names no form of a report. Write one of {', '.join(FORMATS)}.")
        path = checked_path(path, ending)
        text = {"html": self.html, "markdown": self.markdown, "json": self.to_json}[form]()
        with replacing(path) as new, open(new, "w", encoding="utf-8") as file:
            file.write(text)
        return path


class Page(Savable):
    """What notebooks show as the page that it is."""

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self.html())}" style="width:100%;height:80vh;border:0"></iframe>'
