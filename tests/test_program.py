"""torch.export programs: every op in both forms, real models, calls and structures, and what Inductor makes of them."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from awkward import Attention, Constant, DictInOut, NamedOut, Structured
from comparisons import assert_same_bits, tensors_of
from digits import DigitsNet
from op_cases import (
    COMPUTING,
    SCHEMES,
    WEIGHTS,
    calibrated,
    example_of,
    frozen_example,
    inputs_like,
    prepared_of,
    recipe_with,
    rows_for,
    run,
)
from torch import Tensor, nn

import fxquant
from fxquant.capture.islands import islands_of, map_graphs
from fxquant.errors import ExportError, InputError, LevelError
from fxquant.export import export_program
from fxquant.nn import decomposed
from fxquant.nn.decomposed import Coding, Decode, Encode
from fxquant.passes.to_decomposed import to_decomposed

ELEMENTS = 4_000
DECOMPOSED = torch.ops.quantized_decomposed
FORMS = ("integer", "decomposed")


def decomposed_of(frozen: Any, signed: bool | None = None) -> Any:
    return map_graphs(fxquant.convert(frozen), lambda graph: to_decomposed(graph, signed=signed)).eval()


def calls_of(program: torch.export.ExportedProgram, *targets: Any) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function" and node.target in targets]


def output_steps(form: Any, count: int) -> list[float | None]:
    """The step of each output's grid in a decomposed form; None where an output is not rounded."""
    (output,) = (node for node in form.graph.nodes if node.op == "output")
    value = output.args[0]
    parts = [form.get_submodule(str(n.target)) for n in (value if isinstance(value, (list, tuple)) else [value])]
    steps = [part.coding.scale if isinstance(part, Decode) else None for part in parts]
    return steps if len(steps) == count else [None] * count


@pytest.mark.parametrize("name", COMPUTING)
def test_the_decomposed_form_of_every_op_is_the_frozen_one(name):
    example, frozen = example_of(name), frozen_example(name)
    inputs = inputs_like(example, rows_for(example, ELEMENTS), 6, gain=1.4)
    expected = list(tensors_of(run(frozen, inputs)))
    for signed in (None, True):
        form = decomposed_of(frozen, signed)
        found, scales = list(tensors_of(run(form, inputs))), output_steps(form, len(expected))
        for actual, other, scale in zip(found, expected, scales, strict=True):
            steps = torch.round((actual - other) / (scale or float(other.abs().max()) * 1e-6)).abs()
            assert steps.max() <= 1 and float((steps == 0).float().mean()) >= 0.999, f"{name}: {steps.max():.0f} LSB"


@pytest.mark.parametrize("name", COMPUTING)
def test_every_op_exports_with_the_bits_of_the_integer_model(name):
    example, frozen = example_of(name), frozen_example(name)
    program = export_program(frozen, inputs_like(example, 2, 5), dynamic=None)
    inputs = inputs_like(example, 2, 6, gain=1.4)
    assert_same_bits(run(program.module(), inputs), run(fxquant.convert(frozen, kernels="reference"), inputs), name)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_tensors_of_other_widths(scheme):
    frozen = fxquant.freeze(prepared_of(DigitsNet().eval(), torch.rand(8, 1, 8, 8), recipe_with(activation=scheme)))
    x = torch.rand(33, 1, 8, 8)
    expected, integer = run(frozen, (x,)), run(fxquant.convert(frozen, kernels="reference"), (x,))
    (step,) = output_steps(decomposed_of(frozen), 1)
    for signed in (None, True, False):
        module = decomposed_of(frozen, signed)
        assert (run(module, (x,)) - expected).abs().max() <= 1.01 * step
        (kind,) = {part.coding.dtype for part in module.modules() if isinstance(part, Encode)}
        wanted = scheme.signed if signed is None else signed
        assert kind == getattr(torch, f"{'' if wanted else 'u'}int{16 if scheme.bits > 8 else 8}")
    for form, same in (("integer", integer), ("decomposed", run(decomposed_of(frozen), (x,)))):
        assert_same_bits(run(export_program(frozen, x, form=form, dynamic=None).module(), (x,)), same)


@pytest.mark.parametrize("bits", WEIGHTS)
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d", "linear", "conv1d"])
def test_weights_of_other_widths(name, bits):
    example = example_of(name)
    frozen = fxquant.freeze(calibrated(example, recipe_with(weight=WEIGHTS[bits])))
    inputs = inputs_like(example, 7, 2)
    (step,) = output_steps(decomposed_of(frozen), 1)
    program = export_program(frozen, inputs, form="decomposed")
    assert (run(program.module(), inputs) - run(frozen, inputs)).abs().max() <= 1.01 * step
    (read,) = calls_of(program, DECOMPOSED.dequantize_per_channel.default)
    largest = 2 ** (bits - 1) - 1
    assert read.args[3:] == ({"conv_transpose2d": 1}.get(name, 0), -largest, largest, frozen_weight_dtype(bits))


def frozen_weight_dtype(bits: int) -> torch.dtype:
    return torch.int16 if bits > 8 else torch.int8


class Small(nn.Module):
    """A conv net with all that Inductor has an integer kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.wide = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, stride=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        return self.head(F.relu6(self.wide(y)).mean((2, 3)))


class Transformer(nn.Module):
    """A vision transformer in small, of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 10)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 65, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True, activation="gelu")
        self.layers = nn.ModuleList([layer, Attention8()])
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class Attention8(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)


def model_named(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Transformer().eval() if name == "transformer" else zoo.build(name)


@pytest.mark.long
@pytest.mark.parametrize("name", ["transformer", "resnet18", "mobilenet_v2", "mobilenet_v3_small"])
def test_models_at_other_batch_sizes_from_one_program(name):
    prepared = prepared_of(model_named(name), zoo.images(4))
    frozen, exact = fxquant.freeze(prepared), fxquant.convert(prepared, kernels="reference")
    program = export_program(fxquant.convert(prepared), zoo.images(1), dynamic="batch")
    pairs = export_program(frozen, zoo.images(1), form="decomposed")
    signed = decomposed_of(frozen, signed=True)
    for rows in (1, 5):
        x = zoo.images(rows, seed=rows)
        assert_same_bits(run(program.module(), (x,)), run(exact, (x,)), name)
        actual, expected = run(pairs.module(), (x,)), run(frozen, (x,))
        noise, signal = float((actual - expected).square().sum()), float(expected.square().sum())
        assert noise < 10**-2.5 * signal, f"{name}: batch {rows}"  # 25 dB: a rounding that falls otherwise goes on
        assert_same_bits(run(signed, (x,)), actual, name)


def test_sizes_are_free_too_where_the_model_leaves_them():
    one, two, larger = torch.randn(1, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.randn(3, 3, 21, 18)
    prepared = prepared_of(Small().eval(), two)
    integer = fxquant.convert(prepared, kernels="reference")
    free, batch, fixed = (export_program(integer, one, dynamic=which) for which in ("auto", "batch", None))
    for program, taken, refused in (
        (free, [one, two, larger], []),
        (batch, [one, two], [larger]),
        (fixed, [one], [two]),
    ):
        for x in taken:
            assert_same_bits(run(program.module(), (x,)), run(integer, (x,)))
        for x in refused:
            with pytest.raises(AssertionError, match="Guard failed"):
                run(program.module(), (x,))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_torch_export_itself_takes_a_converted_model(kernels):
    x = torch.rand(4, 1, 8, 8)
    prepared = prepared_of(DigitsNet().eval(), x)
    integer = fxquant.convert(prepared, kernels=kernels)
    integer(x)
    program = torch.export.export(integer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    other = torch.rand(7, 1, 8, 8)
    assert_same_bits(run(program.module(), (other,)), run(fxquant.convert(prepared, kernels="reference"), (other,)))


def test_what_pads_with_another_integer_after_loading_pads_with_it_when_exported(tmp_path):
    class Padded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(F.hardswish(x), (1, 2, 0, 1))

    low, high = torch.rand(2, 3, 4, 5) - 3.0, torch.rand(2, 3, 4, 5) + 1.0
    saved, other = (fxquant.convert(prepared_of(Padded(), x, recipe_with())) for x in (low, high))
    fxquant.save(saved, tmp_path / "int8.pt")
    loaded = fxquant.load(Padded(), tmp_path / "int8.pt")
    assert_same_bits(run(export_program(loaded, low).module(), (low,)), run(saved, (low,)))
    other.load_state_dict(saved.state_dict())
    assert_same_bits(run(other, (low,)), run(saved, (low,)))


def test_a_program_is_the_pattern_that_pt2e_ends_in():
    prepared = prepared_of(zoo.build("resnet18"), zoo.images(2))
    program = export_program(prepared, form="decomposed")
    quantize, dequantize = DECOMPOSED.quantize_per_tensor.default, DECOMPOSED.dequantize_per_tensor.default
    layers = calls_of(program, torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
    assert len(layers) == 21
    buffers = {**program.state_dict, **program.constants}
    names = {**program.graph_signature.inputs_to_buffers, **program.graph_signature.inputs_to_parameters}
    for node in layers:
        x, weight, bias = node.args[:3]
        assert x.target is dequantize and list(x.users) == [node]
        assert weight.target is DECOMPOSED.dequantize_per_channel.default and list(weight.users) == [node]
        assert buffers[names[weight.args[0].name]].dtype == torch.int8
        assert buffers[names[bias.name]].dtype == torch.float32
        if node is not layers[-1]:
            assert [user.target for user in node.users] == [quantize]
    kinds = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert set(kinds) == {
        "quantized_decomposed.quantize_per_tensor.default",
        "quantized_decomposed.dequantize_per_tensor.default",
        "quantized_decomposed.dequantize_per_channel.default",
        *(f"aten.{name}" for name in ("conv2d.default", "linear.default", "add.Tensor", "max_pool2d.default")),
        *("aten.adaptive_avg_pool2d.default", "aten.flatten.using_ints"),
    }
    assert kinds["quantized_decomposed.dequantize_per_tensor.default"] == 21 + 2 * 8 + 3


def test_clamps_that_a_runtime_may_not_know_of_stand_in_front():
    """Runtimes saturate at the bounds of the stored type, whatever ``quant_min`` says."""
    recipe = recipe_with(activation=fxquant.Scheme(bits=8, symmetric=True, signed=True, narrow_range=True))
    x = torch.randn(3, 4)
    program = export_program(
        prepared_of(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), x, recipe), form="decomposed"
    )
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("aten.hardtanh.default") == 1 and targets.count("aten.relu.default") == 1
    for node in calls_of(program, DECOMPOSED.quantize_per_tensor.default):
        assert node.args[3:] == (-128, 127, torch.int8)


def test_coding_moved_and_back_is_the_same():
    own = Coding.of(0.1, 3, fxquant.Scheme(), None)
    assert own == Coding(0.1, 3, torch.uint8) and own.moved() == Coding(0.1, -125, torch.int8, -128)
    assert own.moved().moved() == own
    q = torch.arange(256).to(torch.uint8)
    assert_same_bits(own.moved().decode(own.moved().from_own(q)), own.decode(q))


@pytest.mark.long
def test_programs_are_saved_and_loaded(tmp_path):
    prepared = prepared_of(DigitsNet().eval(), torch.rand(64, 1, 8, 8))
    x = torch.rand(9, 1, 8, 8)
    for form in FORMS:
        program = export_program(prepared, torch.rand(1, 1, 8, 8), form=form)
        torch.export.save(program, tmp_path / "program.pt2")
        loaded = torch.export.load(tmp_path / "program.pt2")
        assert_same_bits(run(loaded.module(), (x,)), run(program.module(), (x,)))
        assert {v.dtype for k, v in loaded.state_dict.items() if k.endswith(("weight", "integers"))} == {torch.int8}


class Nested(nn.Module):
    """Keyword arguments that hold dicts and tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, *, inputs: dict[str, Any], weights: tuple[Tensor, dict[str, Tensor]]) -> dict[str, Any]:
        x = F.relu(self.fc(inputs["x"] * weights[0]))
        return {"y": x, "both": (x + weights[1]["shift"], x - inputs["inner"]["z"])}


def nested_example(rows: int, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    x, gain = torch.randn(rows, 6, generator=g), torch.randn(rows, 6, generator=g)
    shift, z = torch.randn(rows, 4, generator=g), torch.randn(rows, 4, generator=g)
    return {"inputs": {"x": x, "inner": {"z": z}}, "weights": (gain, {"shift": shift})}


def test_nested_keyword_arguments_are_one_call_everywhere(tmp_path):
    model, example, other = Nested().eval(), nested_example(3), nested_example(5, seed=1)
    prepared = fxquant.prepare(model, example, verify=True)
    with fxquant.quantizers_off(prepared), torch.no_grad():
        assert_same_bits(prepared(**other), model(**other))
    fxquant.calibrate(prepared, [example, nested_example(4, seed=2)], progress=False)
    for form in (prepared, fxquant.freeze(prepared), fxquant.convert(prepared)):
        fxquant.save(form, tmp_path / "model.pt")
        loaded = fxquant.load(Nested().eval(), tmp_path / "model.pt")
        with torch.no_grad():
            assert_same_bits(loaded(**other), form(**other))
    trained = fxquant.prepare(Nested(), example, qat=True, verify=True)
    assert_same_bits(trained(**other), trained(**other))
    integer = fxquant.convert(prepared, kernels="reference")
    for given in (example, None):
        program = export_program(integer, given)
        with torch.no_grad():
            assert_same_bits(program.module()(**other), integer(**other))


@dataclasses.dataclass
class Unknown:
    x: Tensor


class TakesUnknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, given: Unknown) -> Tensor:
        return self.fc(given.x)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_calls_and_results_have_the_models_own_structure(form):
    def check(model: nn.Module, example: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        prepared = prepared_of(model.eval(), example)
        exact = fxquant.convert(prepared, kernels="reference")
        expected = (exact if form == "integer" else decomposed_of(fxquant.freeze(prepared)))(*args, **kwargs)
        with torch.no_grad():
            assert_same_bits(export_program(prepared, example, form=form).module()(*args, **kwargs), expected)

    x, shift = torch.randn(3, 6), torch.randn(3, 4)
    example = {"x": torch.randn(5, 6), "extra": {"shift": torch.randn(5, 4)}, "double": True}
    for kind in ("dict", "tuple"):
        check(Structured(kind), example, (), {"x": x, "extra": {"shift": shift}, "double": True})
    inner = {"x": torch.randn(2, 4), "y": torch.randn(2, 3)}
    check(DictInOut(), (inner,), ({"x": torch.randn(7, 4), "y": torch.randn(7, 3)},), {})
    check(NamedOut(), torch.randn(2, 3, 8, 8), (torch.randn(5, 3, 8, 8),), {})
    check(Constant(), torch.randn(2, 5, 6), (torch.randn(4, 5, 6),), {})
    check(Attention(), torch.randn(2, 6, 8), (torch.randn(3, 6, 8),), {})
    with pytest.raises(ExportError, match=r"torch.export cannot follow the model: .*Unknown"):
        model, given = TakesUnknown().eval(), Unknown(torch.randn(2, 4))
        export_program(
            fxquant.calibrate(fxquant.prepare(model, (given,)), [given], forward=lambda m, b: m(b)), (given,)
        )


class Asks(nn.Module):
    """Its Python depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y * 2 if y.sum() > 0 else y


@pytest.mark.parametrize("form", FORMS)
def test_an_island_runs_as_it_is_or_is_named(form):
    x = torch.randn(3, 6)
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 2)).eval()
    prepared = fxquant.calibrate(fxquant.prepare(model, x, leaves=["1"]), [x], progress=False)
    expected = fxquant.convert(prepared, kernels="reference") if form == "integer" else fxquant.freeze(prepared)
    actual = run(export_program(prepared, x, form=form).module(), (x,))
    torch.testing.assert_close(actual, run(expected, (x,)), rtol=1e-5, atol=1e-5)

    model = nn.Sequential()
    for name, part in (("first", nn.Linear(6, 6)), ("asks", Asks()), ("last", nn.Linear(6, 2))):
        model.add_module(name, part)
    prepared = prepared_of(model.eval(), x)
    assert [island.path for island in islands_of(prepared)] == ["asks"]
    with pytest.raises(ExportError, match=r"torch.export cannot follow(.|\n)*where: asks(.|\n)*what to do"):
        export_program(prepared, x, form=form)


def test_wrong_arguments_are_told(monkeypatch):
    x = torch.rand(4, 1, 8, 8)
    prepared = prepared_of(DigitsNet().eval(), x)
    with pytest.raises(InputError, match="form='qdq'"):
        export_program(prepared, x, form="qdq")
    with pytest.raises(InputError, match="dynamic='sizes'"):
        export_program(prepared, x, dynamic="sizes")
    with pytest.raises(InputError, match="signed= is how the decomposed form"):
        export_program(prepared, x, signed=True)
    with pytest.raises(LevelError, match="was given a DigitsNet"):
        export_program(DigitsNet(), x)
    without = fxquant.calibrate(fxquant.prepare(DigitsNet().eval()), [x], progress=False)
    with pytest.raises(InputError, match="example_inputs are missing"):
        export_program(without)
    before = {key: value.clone() for key, value in prepared.state_dict().items()}
    export_program(prepared, x, form="decomposed")
    assert all(torch.equal(value, before[key]) for key, value in prepared.state_dict().items())
    monkeypatch.setattr(decomposed, "_OPERATORS", ("quantize_per_moon",))
    with pytest.raises(ExportError, match="has no operators quantized_decomposed"):
        export_program(prepared, x, form="decomposed")


needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler"
)


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("default")
def test_aot_inductor_packages_run_at_any_batch(form, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    prepared = prepared_of(model, torch.randn(4, 3, 8, 8))
    program = export_program(prepared, torch.randn(1, 3, 8, 8), form=form, dynamic="batch")
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "small.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for rows in (1, 3):
        x = torch.randn(rows, 3, 8, 8)
        if form == "integer":
            assert_same_bits(compiled(x), run(fxquant.convert(prepared, kernels="reference"), (x,)))
        else:
            torch.testing.assert_close(compiled(x), run(fxquant.freeze(prepared), (x,)), rtol=1e-4, atol=1e-5)


@pytest.mark.long
@needs_compiler
@pytest.mark.filterwarnings("default")
def test_inductor_lowers_the_decomposed_form_to_integer_kernels():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    from torch._dynamo.utils import counters
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    prepared = prepared_of(Small().eval(), torch.randn(4, 3, 16, 16))
    program, x = export_program(prepared, form="decomposed", dynamic="batch"), torch.randn(2, 3, 16, 16)
    counters.clear()
    with config.patch(freezing=True), torch.no_grad():
        actual, code = run_and_get_code(torch.compile(program.module()), x)
    torch.testing.assert_close(actual, run(fxquant.freeze(prepared), (x,)), rtol=1e-4, atol=1e-5)
    assert (
        counters["inductor"]["qconv_unary_lower_count"] == 2 and counters["inductor"]["qlinear_unary_lower_count"] == 1
    )
    assert "".join(code).count("onednn.qconv_pointwise.tensor(") == 2
    assert "".join(code).count("onednn.qlinear_pointwise.tensor(") == 1
    assert "extern_kernels.convolution" not in "".join(code)
