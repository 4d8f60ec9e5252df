"""An integer form that an export does not know whole is refused there, and never written without its parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import COMPUTING, example_of, rounded
from torch import Tensor, nn

import fxquant
from fxquant import Op, Recipe
from fxquant.errors import ExportError, LevelError
from fxquant.export.qdq_model import QdqModel
from fxquant.forms.weighted import real_scales
from fxquant.nn.accumulating import IntegerWeighted
from fxquant.nn.form import FORMS as ENTERED
from fxquant.nn.form import Computation, Form, RealForm, computation_of, lost_state
from fxquant.nn.integer import IntegerEvaluate, IntegerLinearMap, IntegerOp, IntegerPass, IntegerTable, Site
from fxquant.ops.table import TABLE
from fxquant.passes.levels import check
from fxquant.passes.to_decomposed import to_decomposed
from fxquant.passes.to_qdq import to_qdq


class Inside(IntegerOp):
    """Its parameters are in a module of its own."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.inside = IntegerEvaluate(site)

    def forward(self, *operands: Any, **more: Any) -> Any:
        return self.inside(*operands, **more)


class Doubled(IntegerEvaluate):
    """Computes something else than its base class."""

    def forward(self, *operands: Any, **more: Any) -> Any:
        return self.emit(2 * (super().forward(*operands, **more).to(torch.int32) - self.zero_point))


class Shifted(IntegerTable):
    """A table with another function in it, of no parameter at all."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.table = self.table.flip(0)


class Recoded(IntegerPass):
    """Moves values and changes them on the way."""

    def forward(self, *operands: Any, **more: Any) -> Any:
        return super().forward(*operands, **more).clamp(min=130)


def with_a_gain(site: Site) -> IntegerOp:
    """A known form that was given more to hold."""
    form = IntegerEvaluate(site)
    form.register_buffer("gain", torch.ones(3))
    return form


def retabulated(site: Site) -> IntegerOp:
    """A known form with other numbers."""
    form = IntegerTable(site)
    form.table = form.table.flip(0)
    return form


class Net(nn.Module):
    def __init__(self, what: nn.Module) -> None:
        super().__init__()
        self.first, self.what, self.last = nn.Linear(8, 8), what, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.what(self.first(x))))


class Flatten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


NORM, GELU = lambda: nn.LayerNorm(8), nn.GELU
FORMS: dict[str, tuple[str, Any, Any]] = {
    "a module inside": ("layer_norm", Inside, NORM),
    "a subclass that computes otherwise": ("layer_norm", Doubled, NORM),
    "a table of its own": ("gelu", Shifted, GELU),
    "a move that changes values": ("flatten", Recoded, Flatten),
}


def integer(monkeypatch: pytest.MonkeyPatch, op: str, form: Any, module: nn.Module) -> tuple[Any, Tensor]:
    monkeypatch.setitem(TABLE[op].__dict__, "integer", form)
    torch.manual_seed(0)
    model, x = Net(module).eval(), torch.randn(64, 8)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 2.0)
    frozen = fxquant.freeze(fxquant.calibrate(fxquant.prepare(model, x), [x], progress=False))
    return fxquant.convert(frozen), x


@pytest.mark.parametrize("name", FORMS)
def test_an_unknown_form_is_refused_wherever_it_would_be_written(monkeypatch, tmp_path, name):
    op, form, module = FORMS[name]
    converted, x = integer(monkeypatch, op, form, module())
    for write in (to_qdq, to_decomposed, QdqModel):
        with pytest.raises(ExportError, match=rf"{form.__name__} of op '{op}' cannot be written") as caught:
            write(converted)
        assert "what to do: register it" in str(caught.value)
    for kind in ("qdq", "qoperator"):
        with pytest.raises(ExportError, match=form.__name__):
            fxquant.export_onnx(converted, tmp_path / "model.onnx", x, form=kind)
    assert not list(tmp_path.iterdir())
    path = next(path for path, part in converted.named_modules() if type(part) is form)
    told = f"reference: no kernel is written for the form {form.__name__}"
    for _ in range(2):  # before a program was made, and after
        assert fxquant.coverage(converted).kernels[path].startswith(told)
        converted(x)


def test_a_registered_form_is_written_with_its_parameters(monkeypatch):
    def computation(part: Inside, input_scale: float) -> Computation:
        return computation_of(part.inside, input_scale)

    monkeypatch.setitem(ENTERED, Inside, Form(arithmetic=Inside, real=RealForm(computation, ("inside",))))
    converted, x = integer(monkeypatch, "layer_norm", Inside, nn.LayerNorm(8))
    step = float(next(p for p in converted.modules() if type(p) is Inside).scale)
    expected = converted(x)
    for write in (to_qdq, to_decomposed):
        made = check(write(converted), by=write.__name__)
        assert (made(x) - expected).abs().max() < 3 * step, write.__name__


@pytest.mark.parametrize(("op", "form", "module"), [("layer_norm", with_a_gain, NORM)])
def test_a_known_form_with_more_state_breaks_the_law(monkeypatch, op, form, module):
    with pytest.raises(LevelError, match=r"state_can_be_written(.|\n)*IntegerEvaluate holds gain"):
        integer(monkeypatch, op, form, module())


def test_a_table_of_another_function_is_not_written_as_its_op(monkeypatch):
    converted, _ = integer(monkeypatch, "gelu", retabulated, nn.GELU())
    for write in (to_qdq, to_decomposed):
        with pytest.raises(ExportError, match="'gelu' does not hold the values of its function"):
            write(converted)


def test_a_form_that_takes_no_parameters_is_given_none(monkeypatch):
    with pytest.raises(LevelError, match="IntegerLinearMap of op 'layer_norm' would lose its bias, weight"):
        integer(monkeypatch, "layer_norm", IntegerLinearMap, nn.LayerNorm(8))


@pytest.mark.parametrize("name", COMPUTING[::7])
def test_every_form_of_the_table_holds_what_it_is_written_with(name):
    example = example_of(name)
    prepared = fxquant.prepare(example.module.eval(), example.inputs, recipe=rounded(name))
    made = fxquant.convert(fxquant.calibrate(prepared, [example.inputs], progress=False))
    forms = [part for part in made.modules() if isinstance(part, IntegerOp)]
    assert forms and all(isinstance(ENTERED[type(part)].real, RealForm) and not lost_state(part) for part in forms)


@pytest.mark.parametrize(("rounding", "off"), [("single", 1.5 * 2**-23), ("double", 0.0), ("float", 0.0)])
@pytest.mark.parametrize("outputs", [True, False])
def test_weight_scales_come_back_as_the_docstring_says(rounding, off, outputs):
    """``forms.weighted``: exact with 31 bits, within 1.5 · 2^-23 with odd 24, within 2^-23 with none."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 1))
    x = torch.randn(4, 3, 16, 16)
    prepared = fxquant.prepare(
        model.eval(), x, recipe=Recipe([(Op("relu"), fxquant.Setting())], quantize_outputs=outputs)
    )
    frozen = fxquant.freeze(fxquant.calibrate(prepared, [x], progress=False))
    made = fxquant.convert(frozen, rounding=rounding)
    x_scale, checked = float(made.get_submodule("input_1_quantizer").scale), 0
    for name, part in made.named_modules():
        if not isinstance(part, IntegerWeighted):
            continue
        wanted = frozen.get_submodule(name).weight_quantizer.scale
        bound = off if part.output_dtype is not None else 2.0**-23
        found, bias = real_scales(part, x_scale)
        assert bool(((found.double() - wanted.double()).abs() <= bound * wanted.double()).all()), name
        assert torch.allclose(bias, wanted.double() * x_scale, rtol=2**-22, atol=0)
        x_scale, checked = float(getattr(part, "scale", 1.0)), checked + 1
    assert checked == 3
