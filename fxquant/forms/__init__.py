"""The integer forms of the package, each with all its faces in one file: see ``nn.form``.

fxquant.forms.register_form(fxquant.forms.Form(arithmetic=MyForm, real=..., torch=..., native=..., operators=...))
"""

from __future__ import annotations

from fxquant.forms import (  # each enters what it holds
    border,
    embedding,
    evaluate,
    linear_map,
    matmul,
    passing,
    products,
    sums,
    table,
    weighted,
)
from fxquant.nn.form import (
    FORMS,
    Computation,
    Form,
    HeldIntegers,
    RealForm,
    TorchKernel,
    form_of,
    register_form,
)

__all__ = [
    "FORMS",
    "Computation",
    "Form",
    "HeldIntegers",
    "RealForm",
    "TorchKernel",
    "border",
    "embedding",
    "evaluate",
    "form_of",
    "linear_map",
    "matmul",
    "passing",
    "products",
    "register_form",
    "sums",
    "table",
    "weighted",
]
