"""HTML and SVG as text that is escaped where it came from a model."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["Markup", "anchor", "join", "table", "tag"]

_VOID = frozenset(("br", "input", "meta", "line", "rect", "path", "circle"))


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def _text(value: Any) -> str:
    return str(value) if isinstance(value, Markup) else html.escape(str(value))


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. Attributes that are None are left out; ``_`` before a name of Python's is dropped, others become ``-``."""
    shown = "".join(
        f' {key.strip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = join(children)
    if name in _VOID and not inside:
        return Markup(f"<{name}{shown}/>")
    return Markup(f"<{name}{shown}>{inside}</{name}>")


def join(parts: Iterable[Any]) -> Markup:
    """Parts one behind the other; texts are escaped, None is nothing."""
    return Markup("".join(_text(part) for part in parts if part is not None))


def anchor(kind: str, *names: object) -> str:
    """An id that is the same wherever it is made of the same names, and is one that HTML and URLs take as it is."""
    plain = "-".join("".join(c if c.isalnum() and c.isascii() else f"_{ord(c):x}" for c in str(n)) for n in names)
    return f"{kind}-{plain}"


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    ids: Sequence[str | None] | None = None,
    classes: Sequence[str | None] | None = None,
) -> Markup:
    """A table that a click on a header sorts; columns whose header ends in a unit in brackets stand to the right."""
    sides = ["number" if name.endswith("]") else None for name in header]
    head = tag("tr", *(tag("th", name, _class=side, scope="col") for name, side in zip(header, sides, strict=True)))
    body = [
        tag(
            "tr",
            *(tag("td", cell, _class=side) for cell, side in zip(row, sides, strict=True)),
            id=ids[i] if ids else None,
            _class=classes[i] if classes else None,
        )
        for i, row in enumerate(rows)
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body), _class="sortable"), _class="scroll")
