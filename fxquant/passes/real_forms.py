"""What each integer form computes on real numbers, as its face in ``nn.form`` says: a view of that one registry.

``REAL_FORMS[MyForm] = RealForm(...)`` enters a form of your own, or changes that face of one; ``register_form`` of
``fxquant.forms`` enters all faces at once.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import replace

from torch import nn

from fxquant.forms.weighted import real_scales
from fxquant.nn.form import FORMS, Computation, Form, HeldIntegers, RealForm, computation_of, lost_state, register_form

__all__ = ["REAL_FORMS", "Computation", "HeldIntegers", "RealForm", "computation_of", "lost_state", "real_scales"]


class _RealForms(MutableMapping[type[nn.Module], RealForm]):
    def __getitem__(self, arithmetic: type[nn.Module]) -> RealForm:
        real = FORMS[arithmetic].real
        if not isinstance(real, RealForm):
            raise KeyError(arithmetic)
        return real

    def __setitem__(self, arithmetic: type[nn.Module], real: RealForm) -> None:
        known = FORMS.get(arithmetic)
        register_form(Form(arithmetic=arithmetic, real=real) if known is None else replace(known, real=real))

    def __delitem__(self, arithmetic: type[nn.Module]) -> None:
        del FORMS[arithmetic]

    def __iter__(self) -> Iterator[type[nn.Module]]:
        return (arithmetic for arithmetic, form in FORMS.items() if isinstance(form.real, RealForm))

    def __len__(self) -> int:
        return sum(1 for _ in self)


REAL_FORMS: MutableMapping[type[nn.Module], RealForm] = _RealForms()
"""Every form that can be written, by its class."""
