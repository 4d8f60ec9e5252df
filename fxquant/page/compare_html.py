"""The page of a comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxquant.page.charts import bar
from fxquant.page.html import document
from fxquant.page.markup import join, table, tag

if TYPE_CHECKING:
    from fxquant.page.compare import Comparison

__all__ = ["page_of_two"]


def page_of_two(found: Comparison) -> str:
    """Numbers, faults, layers and recipes of two models side by side."""
    numbers = [[name, *values] for name, values in found.numbers.items()]
    faults = [[kind, *map(str, counts)] for kind, counts in found.faults.items()]
    bars = {i for i, head in enumerate(found.header()[:-1]) if head.endswith("[dB]")}
    values = [[own for _, name in found.columns() for own in getattr(layer, name)] for layer in found.layers]
    rows = [
        [bar(own[i - 1]) if i in bars else cell for i, cell in enumerate(cells)]
        for own, cells in zip(values, found.cells(), strict=True)
    ]
    recipes = [
        tag("div", tag("h3", title), tag("pre", text)) for title, text in zip(found.titles, found.recipes, strict=True)
    ]
    words = (
        "SQNR against float; gain is what the second has more, accumulated, or in its weight where that is not known of "
        "both. The layers that differ most stand first."
    )
    body = [
        tag("h1", f"{found.titles[0]} | {found.titles[1]}"),
        tag("h2", "In numbers"),
        table(["", *found.titles], numbers),
        tag("h2", "What is wrong"),
        table(["kind", *found.titles], faults) if faults else tag("p", "Nothing was found in either."),
        tag("h2", "Errors by layer"),
        tag("p", words, _class="soft"),
        table(list(found.header()), rows),
        tag("h2", "What they are made of"),
        tag("div", *recipes, _class="pair"),
    ]
    return document(" | ".join(found.titles), join(body))
