"""Tables of integer rows, looked up."""

from __future__ import annotations

from fxquant.nn.form import Computation, Form, Lacking, RealForm, register_form
from fxquant.nn.integer import IntegerEmbedding

__all__ = []


def _computation(part: IntegerEmbedding, input_scale: float) -> Computation:
    return Computation(rows=part.weight)


register_form(
    Form(
        arithmetic=IntegerEmbedding,
        real=RealForm(_computation, ("weight",)),
        torch=Lacking("its rows are looked up, and nothing is computed"),
        native=Lacking("torch looks its rows up, before the plan's first step"),
        operators=Lacking("Gather looks integers up as it looks up floats"),
    )
)
