"""Bad input: each kind has its own error that says what, where and what to do, and leaves everything as it was."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxquant
from fxquant import FxquantError, Op, Recipe, Scheme, Setting
from fxquant.capture.islands import islands_of
from fxquant.errors import (
    CalibrationError,
    CaptureError,
    CheckpointError,
    ExportError,
    InputError,
    LevelError,
    MissingPackageError,
    RecipeError,
    SchemeError,
    SpecializationError,
)
from fxquant.graph.text import graph_text
from fxquant.nn.fake_quantize import WeightQuantize


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(x).mean((2, 3)))


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def state_of(module: nn.Module) -> dict[str, Any]:
    """All that an error leaves alone; grids of weights aside, which are read off the weights whenever they are needed."""
    kept: dict[str, Any] = {k: v.clone() for k, v in module.state_dict().items() if "weight_quantizer" not in k}
    kept["modes"] = [m.training for m in module.modules()]
    flags = ("ready", "observing", "enabled", "tracking")
    kept["flags"] = [
        [getattr(m, f, None) for f in flags] for m in module.modules() if not isinstance(m, WeightQuantize)
    ]
    kept["text"] = graph_text(module) if isinstance(module, fx.GraphModule) else repr(module)
    return kept


def assert_same_state(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert now.keys() == before.keys()
    for key, value in before.items():
        same = torch.equal(now[key], value) if isinstance(value, Tensor) else now[key] == value
        assert same, f"{key} changed"


@contextmanager
def refused(error: type[Exception], *says: str, unchanged: nn.Module | None = None) -> Iterator[None]:
    """The block raises exactly ``error`` with all of ``says`` in its message, and ``unchanged`` is as it was."""
    before = None if unchanged is None else state_of(unchanged)
    with pytest.raises(FxquantError) as caught:
        yield
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {caught.value}"
    for part in says:
        assert re.search(part, str(caught.value)), f"{part!r} is not said in: {caught.value}"
    if unchanged is not None and before is not None:
        assert_same_state(state_of(unchanged), before)


# Schemes and recipes.


SCHEMES = {
    "17 bits": ({"bits": 17}, "bits=17", "2…16"),
    "1 bit": ({"bits": 1}, "bits=1", "2…16"),
    "8.0 bits": ({"bits": 8.0}, r"bits=8\.0", "int"),
    "True bits": ({"bits": True}, "bits=True", "int"),
    "affine per channel": ({"per_channel": True}, "per_channel=True with symmetric=False", "Set symmetric=True"),
    "narrow unsigned": ({"narrow_range": True}, "narrow_range=True with signed=False", "Set signed=True"),
    "unknown estimator": ({"estimator": "max"}, "estimator='max'", "minmax, moving_average, percentile, mse"),
}


@pytest.mark.parametrize("case", SCHEMES.values(), ids=SCHEMES.keys())
def test_a_scheme_that_cannot_be(case):
    given, *says = case
    with refused(SchemeError, *says):
        Scheme(**given)
    with pytest.raises(ValueError):
        Scheme(**given)


SETTINGS = {
    "affine weight": (lambda: Setting(weight=Scheme()), "zero point 0", "symmetric=True"),
    "unsigned weight": (lambda: Setting(weight=Scheme(symmetric=True)), "both signs", "signed=True"),
    "activation per channel": (
        lambda: Setting(activation=Scheme(symmetric=True, signed=True, per_channel=True)),
        "one scale",
        "per_channel=False",
    ),
    "no scheme": (lambda: Setting(weight=8), "weight=8", r"fxquant\.Scheme"),
    "selector": (lambda: Recipe([(3, None)]), "^3: a selector is", r"fxquant\.Op"),
    "pair": (lambda: Recipe([("fc",)]), "each setting is a pair"),
    "setting": (lambda: Recipe([("fc", Scheme())]), "'fc'", r"neither a fxquant\.Setting nor None"),
    "default": (lambda: Recipe(default=8), "default=8", "None"),
}


@pytest.mark.parametrize("case", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_recipe_that_cannot_be(case):
    build, *says = case
    with refused(RecipeError, *says):
        build()


NOTHING = {
    "path": ("layr1.0", "'layr1.0' matches nothing", "Did you mean 'layer1.0'"),
    "glob": ("fcc*", r"'fcc\*' matches nothing", "Did you mean 'fc'"),
    "op": (Op("conv2"), "conv2", "Did you mean 'conv2d'"),
    "class": (nn.Conv1d, "Conv1d", "Did you mean 'Conv2d'"),
}


@pytest.mark.parametrize("case", NOTHING.values(), ids=NOTHING.keys())
@pytest.mark.parametrize("qat", [False, True], ids=["ptq", "qat"])
def test_a_setting_that_matches_nothing_is_an_error_with_the_nearest_name(case, qat):
    selector, *says = case
    model = Net()
    with refused(RecipeError, *says, unchanged=model):
        fxquant.prepare(model, X, qat=qat, recipe=Recipe([("layer1", None), (selector, None)]))


def test_a_setting_that_is_always_overtaken_is_told():
    """It selects something, but an earlier one always comes first: a recipe that reads otherwise than it works."""
    prepared = fxquant.prepare(Net().eval(), X, recipe=Recipe([("layer1.*", None), ("fc", None), ("*", Setting())]))
    assert "Conv2d[layer1.0]" in graph_text(prepared) and "QuantConv2d" not in graph_text(prepared)


# Models.


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Positive()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * 2.0)


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # a branch on values
            return x
        return -x


class Loops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for row in x:
            x = x + row
        return x


class Sorts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 1).round()


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(2, 2))


MODELS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "a class": (lambda: Net, InputError, ("the class Net", r"Net\(\.\.\.\)")),
    "a function": (lambda: F.relu, InputError, ("takes an nn.Module, not function",)),
    "scripted": (scripted, InputError, ("TorchScript", "Give fxquant the nn.Module it was scripted from")),
    "prepared": (
        lambda: fxquant.prepare(Net(), X),
        InputError,
        ("already prepared", "the float model it was made from"),
    ),
    "captured": (lambda: integer_of(Net()), InputError, ("already integer",)),
    "loops over a tensor": (
        Loops,
        CaptureError,
        (r"the top module \(Loops\)", r"test_errors\.py:\d+", "cause: it loops over", "what to do"),
    ),
    "nothing to quantize": (
        Sorts,
        InputError,
        ("Sorts has no op that fxquant can quantize", "cumsum is not in the op table", "round"),
    ),
    "empty": (nn.Sequential, InputError, ("has no op that fxquant can quantize", "calls no op")),
}


def integer_of(model: nn.Module) -> Any:
    return fxquant.convert(fxquant.calibrate(fxquant.prepare(model, X), [X], progress=False))


@pytest.mark.parametrize("qat", [False, True], ids=["ptq", "qat"])
@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS.keys())
def test_a_model_that_cannot_be_used(case, qat):
    build, error, says = case
    model = build()
    with refused(error, *says, unchanged=model if isinstance(model, nn.Module) else None):
        fxquant.prepare(model, qat=qat)


def test_the_line_that_cannot_be_traced_is_named():
    (island,) = islands_of(fxquant.prepare(Branches(), torch.ones(2, 3)))
    assert island.path == "inner" and ".sum() > 0, which depends on data" in island.cause
    with open(__file__, encoding="utf-8") as source:
        assert "a branch on values" in source.read().splitlines()[int(island.source.rpartition(":")[2]) - 1]


def test_a_recipe_that_leaves_everything_in_float_still_prepares():
    prepared = fxquant.prepare(Net().eval(), X, recipe=Recipe(default=None))
    assert "Quant" not in graph_text(prepared)


# Example inputs and options.


EXAMPLES = {
    "channels": (
        torch.randn(2, 4, 8, 8),
        (
            r"float32\[2, 4, 8, 8\] on cpu",
            "expected input.* to have 3 channels",
            r"where: .*test_errors\.py:\d+",
            "what to do",
        ),
    ),
    "dimensions": (torch.randn(3), (r"float32\[3\] on cpu", "usual shape")),
    "dtype": (torch.ones(2, 3, 8, 8, dtype=torch.int64), (r"int64\[2, 3, 8, 8\]", "dtype")),
    "device": (torch.randn(2, 3, 8, 8, device="meta"), ("on meta", r"device\s+of its parameters \(cpu\)")),
    "count": ((X, X), ("too many positional arguments", "signature of the model's forward", "what to do")),
    "no tensor": ("image.png", ("str", "what to do")),
}


@pytest.mark.parametrize("case", EXAMPLES.values(), ids=EXAMPLES.keys())
@pytest.mark.parametrize("qat", [False, True], ids=["ptq", "qat"])
def test_an_example_that_does_not_fit(case, qat):
    example, says = case
    model = Net()
    with refused(InputError, "not (run on example_inputs|fit)", "example_inputs", *says, unchanged=model):
        fxquant.prepare(model, example, qat=qat)


def test_options_that_are_not_known():
    model = Net()
    with refused(InputError, "batch_norm='fold'", "late, whitepaper, frozen", unchanged=model):
        fxquant.prepare(model, X, qat=True, batch_norm="fold")
    with refused(InputError, "verify=True", "give example_inputs", unchanged=model):
        fxquant.prepare(model, verify=True)
    prepared = fxquant.calibrate(fxquant.prepare(model, X), [X], progress=False)
    with refused(InputError, "rounding='up'", "single, double, float", unchanged=prepared):
        fxquant.convert(prepared, rounding="up")


# Calibration.


def calibrated() -> Any:
    return fxquant.calibrate(fxquant.prepare(Net(), X), [X], progress=False)


@pytest.mark.parametrize("start", [lambda: fxquant.prepare(Net(), X), calibrated], ids=["fresh", "calibrated"])
@pytest.mark.parametrize("estimator", ["minmax", "moving_average", "percentile", "mse"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"])
def test_values_that_are_not_finite(start, value, estimator):
    setting = Setting(activation=Scheme(estimator=estimator))
    prepared = fxquant.prepare(Net(), X, recipe=Recipe(default=setting))
    if start is calibrated:
        fxquant.calibrate(prepared, [X], progress=False)
    bad = X.clone()
    bad[1, 2, 3, 4] = value
    with refused(
        CalibrationError,
        "calibration batch 2",
        "NaN or infinite",
        "'x_quantizer'",
        "as they were before",
        "what to do",
        unchanged=prepared,
    ):
        fxquant.calibrate(prepared, [X * 5, bad, X], progress=False)
    if start is not calibrated:
        with refused(CalibrationError, "have no range yet"):
            fxquant.convert(prepared)


def test_infinity_that_arises_inside_is_placed_there():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).eval()
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    prepared = fxquant.prepare(model, torch.ones(2, 3))
    with refused(CalibrationError, "batch 1", "first at '1'", unchanged=prepared):
        fxquant.calibrate(prepared, [torch.ones(2, 3) * 9], progress=False)


@pytest.mark.parametrize("loader", [[], iter([]), (x for x in [])], ids=["list", "iterator", "generator"])
def test_an_empty_loader(loader):
    prepared = calibrated()
    with refused(CalibrationError, "empty loader", "data set is not empty", "generator", unchanged=prepared):
        fxquant.calibrate(prepared, loader, progress=False)
    with refused(CalibrationError, "empty loader"):
        fxquant.quantize(Net(), [], progress=False)


def test_a_batch_that_fails_leaves_ranges_as_they_were():
    prepared = calibrated()
    before = state_of(prepared)
    with pytest.raises(RuntimeError):
        fxquant.calibrate(prepared, [X * 9, torch.randn(2, 4, 8, 8)], progress=False)
    assert_same_state(state_of(prepared), before)


def test_a_loader_that_fails_leaves_ranges_as_they_were():
    def loader() -> Iterator[Tensor]:
        yield X * 9
        raise KeyboardInterrupt

    prepared = calibrated()
    before = state_of(prepared)
    with pytest.raises(KeyboardInterrupt):
        fxquant.calibrate(prepared, loader(), progress=False)
    assert_same_state(state_of(prepared), before)


def test_batches_that_the_model_cannot_take():
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * y

    prepared = fxquant.prepare(Two(), (torch.ones(2), torch.ones(2)))
    with refused(InputError, "1 parts, and the model takes 2 inputs", r"\(x, y\)", unchanged=prepared):
        fxquant.calibrate(prepared, [(torch.ones(2),)], progress=False)


@pytest.mark.parametrize("batch", [X, (X, torch.zeros(4)), [X, torch.zeros(4)], {"x": X, "label": 1}],
                         ids=["tensor", "tuple", "list", "dict"])  # fmt: skip
def test_batches_of_every_usual_form_are_taken(batch):
    fxquant.convert(fxquant.calibrate(fxquant.prepare(Net(), X), [batch], progress=False))
    fxquant.quantize(Net(), [batch], progress=False)


def test_converting_before_calibrating_names_the_quantizers():
    prepared = fxquant.prepare(Net(), X)
    for verb in (fxquant.convert, fxquant.freeze):
        with refused(
            CalibrationError, "have no range yet", "x_quantizer", r"layer1\.2", "mean", "calibrate", unchanged=prepared
        ):
            verb(prepared)


def test_many_missing_ranges_are_counted_not_listed():
    prepared = fxquant.prepare(
        nn.Sequential(*[m for _ in range(20) for m in (nn.Linear(3, 3), nn.ReLU())]), torch.ones(2, 3)
    )
    with refused(CalibrationError, r"20 of the model's quantizers", "and 12 more"):
        fxquant.convert(prepared)


def test_a_branch_that_no_batch_reached_is_named():
    prepared = fxquant.prepare(Net(), X)
    other = calibrated()
    prepared.load_state_dict(other.state_dict())
    prepared.get_submodule("x_quantizer").output_quantizer.ready = False
    with refused(CalibrationError, "1 of the model's quantizers", ": x_quantizer", "keeps it in float"):
        fxquant.convert(prepared)


# Verbs and levels.


VERBS: dict[str, Callable[[Any], Any]] = {
    "calibrate": lambda m: fxquant.calibrate(m, [X], progress=False),
    "freeze": fxquant.freeze,
    "convert": fxquant.convert,
}
WRONG = {
    "calibrate": ("float", "frozen", "integer"),
    "freeze": ("float", "frozen", "integer"),
    "convert": ("float", "integer"),
}


def at(level: str) -> Any:
    if level == "float":
        return Net()
    prepared = calibrated()
    return {"frozen": fxquant.freeze, "integer": fxquant.convert}[level](prepared)


@pytest.mark.parametrize(("verb", "level"), [(v, level) for v, levels in WRONG.items() for level in levels])
def test_a_verb_at_the_wrong_level(verb, level):
    module = at(level)
    given = "a Net" if level == "float" else f"a model at level '{level}'"
    with refused(
        LevelError, f"^{verb} takes a model at level", f"was given {given}", r"fxquant\.prepare\(", unchanged=module
    ):
        VERBS[verb](module)


# Files.


def saved(tmp_path: Any, level: str = "prepared") -> Any:
    module = calibrated() if level == "prepared" else at(level)
    fxquant.save(module, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_a_file_that_is_not_there(tmp_path):
    with refused(CheckpointError, "no file", "nothing.pt"):
        fxquant.load(Net(), tmp_path / "nothing.pt")


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    with refused(CheckpointError, "text.pt", "cannot be read"):
        fxquant.load(Net(), tmp_path / "text.pt")
    torch.save(Net().state_dict(), tmp_path / "float.pt")
    with refused(CheckpointError, "float.pt", r"not written by this version of fxquant\.save"):
        fxquant.load(Net(), tmp_path / "float.pt")


class Other(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(super().forward(x))


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)


class Narrower(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layer1[0] = nn.Conv2d(1, 4, 3)


@pytest.mark.parametrize("level", ["prepared", "frozen", "integer"])
@pytest.mark.parametrize("other", [Other, Wider, Narrower])
def test_a_file_of_another_model(tmp_path, level, other):
    path = saved(tmp_path, level)
    model = other()
    with refused(
        CheckpointError, "model.pt", "Net", other.__name__, "as it was built when it was saved", unchanged=model
    ):
        fxquant.load(model, path)


def test_saving_what_is_not_ours(tmp_path):
    with refused(InputError, "save takes what prepare, freeze, convert or compile returned, not a Net"):
        fxquant.save(Net(), tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_quantizers_off_comes_back_on_after_an_error():
    prepared = calibrated()
    before = state_of(prepared)
    with pytest.raises(ZeroDivisionError), fxquant.quantizers_off(prepared):
        raise ZeroDivisionError
    assert_same_state(state_of(prepared), before)
    with fxquant.quantizers_off(prepared), fxquant.quantizers_off(prepared):
        pass
    assert_same_state(state_of(prepared), before)


def test_an_alias_of_what_is_written_in_place_is_refused():
    class Aliased(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2.0
            part = y[:, :2]
            y.add_(1.0)
            return part + 1.0

    model = Aliased()
    with refused(
        CaptureError, "read after its memory was written", r"test_errors\.py:\d+", "out of place", unchanged=model
    ):
        fxquant.prepare(model, torch.ones(2, 4))


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        y = F.linear(x, self.weight)
        if x.shape[1] > 4:  # a question about a size
            y = y.flip(1)
        return y if shift is None else y + shift


def test_an_input_that_contradicts_what_was_captured():
    prepared = fxquant.prepare(Sized(), torch.ones(2, 3, 4))
    with refused(
        SpecializationError, r"x.shape\[1\] > 4 is False", r"test_errors\.py:\d+", "leaves", unchanged=prepared
    ):
        prepared(torch.ones(2, 5, 4))
    with refused(SpecializationError, "shift = None", "a tensor of shape", "what to do", unchanged=prepared):
        prepared(torch.ones(2, 3, 4), torch.ones(3))


# Files for other runtimes; test_onnx.py has the rest.


def test_a_model_without_an_onnx_form(tmp_path):
    pytest.importorskip("onnxscript")
    pool = nn.AvgPool2d(3, 2, ceil_mode=True, divisor_override=4)
    prepared = fxquant.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), pool).eval(), X)
    fxquant.calibrate(prepared, [X], progress=False)
    with refused(ExportError, "divisor_override and ceil_mode", "what to do", unchanged=prepared):
        fxquant.export_onnx(prepared, tmp_path / "model.onnx", verify=False)


def test_a_package_that_is_not_installed(tmp_path, monkeypatch):
    prepared = calibrated()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused(MissingPackageError, "not installed", r"pip install 'fxquant\[onnx\]'", unchanged=prepared):
        fxquant.export_onnx(prepared, tmp_path / "model.onnx")


def test_every_error_of_the_tree_is_raised_here_with_a_message_of_its_own():
    import fxquant.errors as tree

    kinds = {getattr(tree, name) for name in tree.__all__} - {FxquantError, tree.Refusal}  # an answer
    with open(__file__, encoding="utf-8") as source:
        text = source.read()
    assert all(re.search(rf"refused\(\s*{kind.__name__}|\b{kind.__name__},\s*\(", text) for kind in kinds)
    assert all(issubclass(kind, FxquantError) and kind.__doc__ for kind in kinds)
    assert copy.deepcopy(InputError("x")).args == ("x",)
