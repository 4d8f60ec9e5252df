"""Integer forms: every one has every face or a reason, and one from outside the package works wherever it has faces."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from op_cases import COMPUTING, example_of, rounded
from torch import Tensor, nn

import fxquant
import fxquant.nn
from fxquant import Recipe
from fxquant.capture.islands import graphs_of
from fxquant.errors import ExportError, LevelError, Refusal
from fxquant.export import finding
from fxquant.export.qdq_model import QdqModel
from fxquant.export.to_onnx import make_onnx
from fxquant.forms import FORMS, Form, RealForm, TorchKernel, register_form
from fxquant.kernels.audit import audit
from fxquant.kernels.native import library
from fxquant.kernels.native.lines import tabulated
from fxquant.kernels.native.model import NativeModel
from fxquant.kernels.place import Step
from fxquant.kernels.quantized import in_float32, taken_by
from fxquant.kernels.quantized import rounded as rounded_on_torch
from fxquant.nn.form import FACES, Computation, own_function
from fxquant.nn.integer import Dequantize, IntegerEvaluate, IntegerOp, Multipliers, Quantize, Site
from fxquant.numerics.requantize import requantize
from fxquant.ops.table import TABLE
from fxquant.passes.levels import check
from fxquant.passes.to_decomposed import to_decomposed
from fxquant.passes.to_qdq import to_qdq

needs_native = pytest.mark.skipif(library.missing() is not None, reason=f"no native kernels: {library.missing()}")


def forms_of_the_package() -> set[type]:
    for module in pkgutil.iter_modules(fxquant.nn.__path__, "fxquant.nn."):
        importlib.import_module(module.name)
    found, left = {Quantize, Dequantize}, [IntegerOp]
    while left:
        for form in left.pop().__subclasses__():
            left.append(form)
            if form.__module__.startswith("fxquant."):
                found.add(form)
    return found


def test_every_form_has_every_face_or_a_reason():
    known = {arithmetic: form for arithmetic, form in FORMS.items() if arithmetic.__module__.startswith("fxquant.")}
    assert set(known) == forms_of_the_package()
    for form in known.values():
        assert form.arithmetic.__doc__ and isinstance(form.real, RealForm)
        assert all(reason.count(" ") > 4 for reason in form.lacks().values()), form


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if i == 3 else pytest.mark.long) for i, name in enumerate(COMPUTING[::9])]
)
def test_a_file_on_integers_has_no_other_operators_than_its_forms_say(name):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    example = example_of(name)
    prepared = fxquant.prepare(example.module.eval(), example.inputs, recipe=rounded(name), target="onnxruntime")
    integer = fxquant.convert(fxquant.calibrate(prepared, [example.inputs], progress=False))
    told = [form.operators for part in integer.modules() if (form := FORMS.get(type(part))) is not None]
    allowed = {operator for one in told if isinstance(one, tuple) for operator in one}
    graph = onnx.load_from_string(make_onnx(integer, example.inputs, form="qoperator").content).graph
    found = {
        node.op_type for node in graph.node if node.op_type.startswith("QLinear") or node.op_type.endswith("Integer")
    }
    assert found <= allowed


def test_a_process_that_only_imports_the_package_has_every_form():
    code = "import fxquant; from fxquant.nn.form import FORMS; print(*sorted(form.__name__ for form in FORMS))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == sorted(form.__name__ for form in forms_of_the_package() - {IntegerOp})


# --- a form from outside -----------------------------------------------------------------------------------------------


class Squares(IntegerOp):
    """(q - z)^2 · M: the square of a tensor, exactly, and rounded once."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        assert site.output is not None
        self._set_multiplier(site.first().scale.double() ** 2 / site.output.scale.double())

    def forward(self, q: Tensor, **_: Any) -> Tensor:
        return self.emit(requantize(self.centred(q) ** 2, self.multiplier, self.shift, rounding=self.rounding))


def squares_step(place: Any) -> Step:
    """torch has no square of quint8: in float32, which holds it exactly."""
    taken, given = place.input_form(0), place.output_form()
    run = rounded_on_torch(place, lambda q, **_: q.dequantize() ** 2, given)
    return Step(run, given, "squares in float32", taken_by(place, taken))


SQUARES = Form(
    arithmetic=Squares,
    real=RealForm(own_function, ("multiplier", "shift")),
    torch=TorchKernel(squares_step, in_float32),
    native=tabulated,
    operators=Refusal("the standard has no square of integers"),
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.square(self.first(x)))


X = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))


def converted(
    monkeypatch: pytest.MonkeyPatch, op: str, integer: Any, form: Form | None, model: nn.Module, **how: Any
) -> Any:
    """``model`` in integers, with another form for one op."""
    monkeypatch.setitem(TABLE[op].__dict__, "integer", integer)
    if form is not None:
        monkeypatch.setitem(FORMS, form.arithmetic, None)
        register_form(form)
    torch.manual_seed(5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.6)
    prepared = fxquant.prepare(model.eval(), X, recipe=Recipe([(fxquant.Op(op), fxquant.Setting())]))
    return fxquant.convert(fxquant.calibrate(prepared, [X], progress=False), **how)


def kernel_of(integer: Any) -> str:
    integer(X)
    (path,) = (path for path, part in integer.named_modules() if type(part) is Squares)
    return fxquant.coverage(integer).kernels[path]


def test_a_form_from_outside_computes_what_its_op_does(monkeypatch):
    exact = converted(monkeypatch, "square", Squares, SQUARES, Net(), kernels="reference")
    (part,) = (part for part in exact.modules() if type(part) is Squares)
    q = torch.arange(256, dtype=torch.uint8)
    real = (q.double() - part.offset[0]) * (part.multiplier.double() * 2.0 ** (part.shift - 31) * part.scale).sqrt()
    wanted = torch.round(real**2 / part.scale.double()) + part.zero_point
    assert torch.equal(part(q).double(), wanted.clamp(int(part.low), int(part.high)))


@needs_native
def test_a_form_from_outside_runs_natively_and_on_torch(monkeypatch):
    exact = converted(monkeypatch, "square", Squares, SQUARES, Net(), kernels="reference")
    with torch.no_grad():
        assert torch.equal(NativeModel(exact)(X), exact(X))
    assert kernel_of(converted(monkeypatch, "square", Squares, None, Net())) == "native"
    on_torch = converted(monkeypatch, "square", Squares, None, Net(), kernels="torch")
    assert kernel_of(on_torch) == "squares in float32"
    assert (on_torch(X) - exact(X)).abs().max() < 0.02 * exact(X).abs().max()


def test_a_form_from_outside_is_written(monkeypatch):
    exact = converted(monkeypatch, "square", Squares, SQUARES, Net(), kernels="reference")
    largest = exact(X).abs().max()
    for write in (to_qdq, to_decomposed):
        made = check(write(exact), by=write.__name__)
        assert (made(X) - exact(X)).abs().max() < 1e-2 * largest, write.__name__
    program = fxquant.export.export_program(exact, X, form="decomposed").module()
    assert (program(X) - exact(X)).abs().max() < 1e-2 * largest
    pytest.importorskip("onnxscript")
    session = fxquant.compile(exact, X, runtime="onnxruntime")
    assert (session(X) - exact(X)).abs().max() < 1e-2 * largest


@pytest.mark.parametrize("lacking", ["torch", "native", "real"])
def test_a_face_that_a_form_lacks_is_said(monkeypatch, lacking):
    reason = "nobody has written it so far, sorry"
    integer = converted(monkeypatch, "square", Squares, replace(SQUARES, **{lacking: Refusal(reason)}), Net())
    if lacking == "real":
        for write in (to_qdq, to_decomposed, QdqModel):
            with pytest.raises(ExportError, match=rf"Squares of op 'square' cannot be written(.|\n)*{reason}"):
                write(integer)
    else:
        assert lacking in FORMS[Squares].lacks()
    reference = converted(monkeypatch, "square", Squares, None, Net(), kernels="reference")
    step = reference(X).abs().max() / 100
    assert (integer(X) - reference(X)).abs().max() <= step, "it runs all the same"
    if lacking == "torch":
        assert kernel_of(converted(monkeypatch, "square", Squares, None, Net(), kernels="torch")).startswith(
            "reference"
        )
    if lacking == "native" and library.missing() is None:
        with pytest.raises(Refusal):
            NativeModel(reference)(X)


class Halved(Squares):
    """A square that says of its multiplier what becomes of the result without it."""

    multiplies = "tensors"

    def requantized_by(self) -> Multipliers:
        own = super().requantized_by()
        assert own is not None
        return replace(own, without="it is dark")


def test_an_audit_and_a_finding_ask_the_form_itself(monkeypatch):
    """A form from outside is audited as it says; one that sums products of tensors is named where those saturate."""
    for form, repair in ((Squares, "its result is the zero point"), (Halved, "it is dark")):
        integer = converted(monkeypatch, "square", form, None, Net(), kernels="reference")
        assert not audit(graphs_of(integer).values()).findings
        (path,) = [path for path, part in integer.named_modules() if type(part) is form]
        integer.get_submodule(path).multiplier.zero_()
        (found,) = audit(graphs_of(integer).values()).findings
        assert (found.path, found.kind, found.repair) == (path, "scale", repair)
        for part in integer.modules():
            if isinstance(part, Quantize):
                part.scheme = replace(part.scheme, signed=True)
        assert finding._signed_products(integer) == ([path] if form is Halved else [])


# --- what would be lost ------------------------------------------------------------------------------------------------


class Gained(IntegerEvaluate):
    """Layer norm with a gain of its own, in a buffer."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.register_buffer("gain", torch.full((), 1.5))

    def forward(self, *operands: Any, **more: Any) -> Any:
        return self.emit(torch.round((super().forward(*operands, **more).double() - self.zero_point) * self.gain))


class Trained(IntegerEvaluate):
    """With a parameter."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.slope = nn.Parameter(torch.full((), 0.5))

    def forward(self, *operands: Any, **more: Any) -> Any:
        return self.emit(torch.round((super().forward(*operands, **more).double() - self.zero_point) * self.slope))


class Nested(IntegerOp):
    """With all it has in a module of its own."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.inside = IntegerEvaluate(site)

    def forward(self, *operands: Any, **more: Any) -> Any:
        return self.inside(*operands, **more)


LOST = {Gained: "gain", Trained: "slope", Nested: "inside"}


def norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8))


@pytest.mark.parametrize("form", LOST)
def test_what_an_unknown_form_holds_is_never_lost(monkeypatch, form):
    integer = converted(monkeypatch, "layer_norm", form, None, norm_net())
    for write in (to_qdq, to_decomposed, QdqModel):
        with pytest.raises(ExportError, match=f"{form.__name__} of op 'layer_norm' cannot be written"):
            write(integer)


@pytest.mark.parametrize("form", LOST)
def test_a_face_that_forgets_what_its_form_holds_breaks_the_law(monkeypatch, form):
    known = FORMS[IntegerEvaluate].real
    with pytest.raises(LevelError, match=rf"state_can_be_written(.|\n)*{form.__name__} holds .*{LOST[form]}"):
        converted(monkeypatch, "layer_norm", form, Form(arithmetic=form, real=known), norm_net())


def test_a_face_that_takes_all_over_is_right(monkeypatch):
    def computation(part: Any, input_scale: float) -> Computation:
        inside = FORMS[IntegerEvaluate].real.computation(part, input_scale)
        function = inside.function or part.entry.function
        return replace(
            inside,
            function=lambda *args, gain, **more: function(*args, **more) * gain,
            parameters={**inside.parameters, "gain": part.gain},
        )

    form = Form(arithmetic=Gained, real=RealForm(computation, ("gain", "input_scale", "output_scale")))
    integer = converted(monkeypatch, "layer_norm", Gained, form, norm_net(), kernels="reference")
    for write in (to_qdq, to_decomposed):
        made = check(write(integer), by=write.__name__)
        assert (made(X) - integer(X)).abs().max() < 0.05 * integer(X).abs().max(), write.__name__


class Loose(nn.Module):
    """A form that is none: a module beside the root of all forms."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.inside = IntegerEvaluate(site)

    def forward(self, *operands: Any, **more: Any) -> Any:
        return self.inside(*operands, **more)


def test_a_module_that_is_no_form_is_refused(monkeypatch):
    """Nothing would know it for a form, and files would have its integers as real numbers."""
    with pytest.raises(LevelError, match=r"form of op 'layer_norm' is a Loose, which is no IntegerOp.\n  what to do"):
        converted(monkeypatch, "layer_norm", Loose, None, norm_net())


@pytest.mark.parametrize(
    ("face", "value"), [("real", own_function), ("torch", squares_step), ("native", "table"), ("operators", "Mul")]
)
def test_a_face_of_another_kind_is_refused(face, value):
    with pytest.raises(LevelError, match=rf"Squares has .* for its face '{face}'.\n  what to do: give"):
        register_form(replace(SQUARES, **{face: value}))
    assert face in FACES and Squares not in FORMS
    with pytest.raises(LevelError, match="arithmetic is a class of modules"):
        register_form(Form(arithmetic=abs))
