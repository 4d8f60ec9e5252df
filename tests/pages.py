"""The pages of ``docs/`` as programs: the blocks of one page run from top to bottom, in one namespace and an empty folder.

    ```python   is run
    ```text     is what the blocks since the last one printed, but for numbers; or the error that the last block raised
    ```bash     of each line that begins with ``fxquant``, the command is run; what else it may hold is in ``SHELL``
    ```py       is code of another tool; it has to compile

``...`` in a text block stands for anything: for any lines where it is a line of its own.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxquant.cli import main
from fxquant.errors import FxquantError

__all__ = ["DOCS", "PAGES", "Block", "blocks_of", "run_page", "shape_of"]

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SHELL = ("pip install", "python3 -m venv", "cd ", "scripts/", "#", "fxquant demo", "fxquant bench", "trtexec")
"""How lines of bash begin that are not run here."""

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", flags=re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page where it begins."""

    language: str
    text: str
    line: int


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page, in order; those inside lists without their indentation."""
    found = []
    for match in _FENCE.finditer(text):
        indent, language, body = match.groups()
        plain = "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
        found.append(Block(language, plain, text[: match.start()].count("\n") + 2))
    return found


def shape_of(text: str) -> list[str]:
    """Printed lines without their numbers, whose last digits are the machine's, and without the width of columns."""
    spaced = (
        re.sub(r"\s+", " ", re.sub(r"[-–+]?\d[\d.]*(e[-+]?\d+)?|-{2,}|\binf\b", "#", line))
        for line in text.splitlines()
    )
    return [line.strip() for line in spaced if line.strip()]


def matches(shown: str, printed: str) -> bool:
    """Whether what is shown is what was printed, as ``shape_of`` sees both."""
    lines = [re.escape(line).replace(re.escape("..."), ".*") for line in shape_of(shown)]
    pattern = "".join(r"(?:.*\n)*" if line == ".*" else f"{line}\n" for line in lines)
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in shape_of(printed))) is not None


def run_page(path: Path, namespace: dict[str, Any] | None = None) -> None:
    """Run one page in the current folder.

    Raises:
        AssertionError: a block prints or raises something else than the page shows.
    """
    names: dict[str, Any] = {} if namespace is None else namespace
    printed, raised = "", None
    for block in blocks_of(path.read_text(encoding="utf-8")):
        where = f"{path.relative_to(DOCS)}:{block.line}"
        if block.language == "text":
            given = printed if raised is None else f"{type(raised).__name__}: {raised}"
            assert matches(block.text, given), f"{where} shows\n{block.text}\nand there was\n{given}"
            printed, raised = "", None
            continue
        assert raised is None, f"{where}: the block before raised {raised!r}, which the page does not show"
        with _caught() as out:
            raised = _run(block, where, names)
        printed += out.getvalue()
    assert raised is None, f"{path}: the last block raised {raised!r}"


@contextlib.contextmanager
def _caught() -> Iterator[io.StringIO]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        yield out


def _run(block: Block, where: str, names: dict[str, Any]) -> FxquantError | None:
    if block.language == "python":
        padded = "\n" * (block.line - 1) + block.text
        try:
            exec(compile(padded, where.rpartition(":")[0], "exec"), names)
        except FxquantError as error:
            return error
    elif block.language == "bash":
        _run_commands(block.text.replace("\\\n", " "), where)
    elif block.language == "py":
        compile(block.text, where, "exec")
    else:
        raise AssertionError(f"{where}: nothing runs blocks of {block.language!r}")
    return None


def _run_commands(text: str, where: str) -> None:
    for line in filter(None, (line.strip() for line in text.splitlines())):
        if line.startswith(SHELL):
            continue
        words = shlex.split(line, comments=True)
        assert words[0] == "fxquant", f"{where}: {line}"
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            assert main(words[1:]) == 0, f"{where}: {line}\n{errors.getvalue()}"
