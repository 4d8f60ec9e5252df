"""Which kernel of torch's computes an integer form, as its face in ``nn.form`` says."""

from __future__ import annotations

from typing import Any

from fxquant.errors import Refusal
from fxquant.kernels.operators import operators
from fxquant.kernels.place import Place, Step
from fxquant.kernels.quantized import REFERENCE
from fxquant.nn.form import NOT_WRITTEN, TorchKernel, form_of
from fxquant.nn.integer import IntegerOp

__all__ = ["REFERENCE", "expected_kernel", "step_of", "without_kernel"]


def step_of(place: Place) -> Step | Refusal:
    """The fast step of a node; where it is refused the node runs as it is."""
    form = form_of(place.part)
    if form is None:
        return Refusal(f"no kernel is written for the form {type(place.part).__name__}", where=place.node.name)
    if isinstance(form.torch, Refusal):
        return form.torch.at(place.node.name)
    try:
        return form.torch.step(place)
    except Refusal as refusal:
        return refusal.at(place.node.name)


def without_kernel(part: IntegerOp) -> str:
    """What is reported of a form that runs as it is; of one that no kernel knows, that too."""
    form = form_of(part)
    if form is None or form.torch is NOT_WRITTEN:
        return f"{REFERENCE}: no kernel is written for the form {type(part).__name__}"
    return REFERENCE


def expected_kernel(part: Any) -> str:
    """The kernel of an integer form before it has run: what it asks for, where shapes and machine allow it."""
    found, form = operators(), form_of(part)
    if found is None or not isinstance(part, IntegerOp):
        return REFERENCE
    if form is None or not isinstance(form.torch, TorchKernel):
        return without_kernel(part)
    return form.torch.expected(part, found)
