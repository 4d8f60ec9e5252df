"""An extension of Griffe, which reads docstrings for the site.

``name, level: text`` documents both names with that text, and ``Example:`` is the section that Griffe calls Examples, whose
lines are code; under its own name they would be nested quotes without their ``>>>``.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

__all__ = ["EachName"]

_SEVERAL = re.compile(r"^(    )((?:[\w.*]+, )+[\w.*]+): (.*(?:\n {5,}.*)*)", re.M)
"""An entry of a section for several names, with the lines that go on with it."""
_EXAMPLE = re.compile(r"^( *)Example:$", re.M)


class EachName(griffe.Extension):
    """Give each name an entry of its own before the sections of a docstring are parsed."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called for each module, class, function and attribute that was loaded."""
        if obj.docstring is not None:
            obj.docstring.value = _SEVERAL.sub(_apart, _EXAMPLE.sub(r"\1Examples:", obj.docstring.value))


def _apart(entry: re.Match[str]) -> str:
    indent, names, text = entry.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))
