"""Tables of integer rows, looked up."""

from __future__ import annotations

from fxquant.errors import Refusal
from fxquant.nn.form import Computation, Form, RealForm, register_form
from fxquant.nn.integer import IntegerEmbedding

__all__ = []


def _computation(part: IntegerEmbedding, input_scale: float) -> Computation:
    return Computation(rows=part.weight)


register_form(
    Form(
        arithmetic=IntegerEmbedding,
        real=RealForm(_computation, ("weight",)),
        torch=Refusal("its rows are looked up, and nothing is computed"),
        native=Refusal("torch looks its rows up, before the plan's first step"),
        operators=Refusal("Gather looks integers up as it looks up floats"),
    )
)
