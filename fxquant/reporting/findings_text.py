"""What capture found out, for people: islands with their causes, and what the graphs hold for given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from fxquant.capture.islands import Specialization
from fxquant.reporting.census import short
from fxquant.reporting.paths import elide
from fxquant.reporting.rows import source_line

__all__ = ["Found", "capture_text", "holds_text", "island_line", "island_name"]

_ISLANDS, _PATHS, _FACTS, _TEXT = 12, 8, 6, 60


class Found(Protocol):
    """An island, as capture or a report tells it."""

    @property
    def path(self) -> str: ...
    @property
    def cause(self) -> str: ...
    @property
    def source(self) -> str | None: ...
    @property
    def advice(self) -> str: ...


class Counted(Found, Protocol):
    """An island with the multiply-accumulates of its own code."""

    @property
    def macs(self) -> int | None: ...


def island_name(path: str) -> str:
    """The path of a module; words for the top one."""
    return path or "the top module"


def island_line(island: Found) -> str:
    """An island in one line: path, cause, source."""
    source = f" ({source_line(island.source)})" if island.source else ""
    return f"island {island_name(island.path)}: {island.cause}{source}"


def capture_text(islands: Sequence[Counted], specializations: Sequence[Specialization]) -> Iterator[str]:
    """The sections on capture: islands of one cause together, then what the graphs hold for given."""
    if not islands:
        yield "capture: whole"
    else:
        together: dict[tuple[str, str | None, str], list[Counted]] = {}
        for island in islands:
            together.setdefault((island.cause, island.source, island.advice), []).append(island)
        blocks = [_block(group) for group in list(together.values())[:_ISLANDS]]
        more = len(together) - len(blocks)
        counted = f"{len(islands)} island{'s' if len(islands) > 1 else ''}"
        title = f"capture: {counted}, where the model's own code runs in float between the graphs"
        yield "\n\n".join([title, *blocks, *([f"and {more} more causes"] if more else [])])
    if specializations:
        title = f"held for given, and checked on every input: {len(specializations)}"
        yield "\n".join([title, *(f"  {line}" for line in holds_text(specializations, limit=_FACTS))])


def _block(group: list[Counted]) -> str:
    first = group[0]
    names = [island_name(island.path) for island in group]
    shown = ", ".join(names[:_PATHS]) + (f" and {len(names) - _PATHS} more" if len(names) > _PATHS else "")
    known = [island.macs for island in group if island.macs is not None]
    macs = f"{short(sum(known))} in its own code" if len(known) == len(group) else "unknown in its own code"
    lines = {"island": shown, "cause": first.cause, "source": source_line(first.source), "change": first.advice}
    lines["MACs"] = macs
    return "\n".join(f"  {name:<7} {text}" for name, text in lines.items() if text)


def holds_text(specializations: Sequence[Specialization], *, limit: int) -> list[str]:
    """A line for each place in the code that asked: the first answer there, and how many there were."""
    places: dict[tuple[str | None, str], list[Specialization]] = {}
    for fact in specializations:
        places.setdefault((fact.source, "" if fact.source else fact.text), []).append(fact)
    lines = []
    for facts in list(places.values())[:limit]:
        path, source = elide(island_name(facts[0].path), 40), source_line(facts[0].source) or "source unknown"
        times = f", {len(facts)} times" if len(facts) > 1 else ""
        lines.append(f"{_brief(facts[0].text)}  in {path} ({source}{times})")
    more = len(places) - len(lines)
    return [*lines, *([f"and at {more} more places"] if more else [])]


def _brief(text: str) -> str:
    """A long expression without its middle: the answer stands at its end."""
    half = _TEXT // 2
    return text if len(text) <= _TEXT else f"{text[: half - 1]}…{text[len(text) - half :]}"
