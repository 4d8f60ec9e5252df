"""Targets: that their data fit the op table, what their rules are on real models, and what they refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from comparisons import assert_close_to_scale, assert_ops_agree, assert_same_bits, values_of
from op_cases import mostly_long
from torch import Tensor, fx, nn

import fxquant
from fxquant import Op, Recipe, Scheme, Setting
from fxquant.behaviour import Passing, Rescaling, Weighted
from fxquant.cli import main
from fxquant.errors import InputError, RecipeError, SchemeError
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.text import graph_text
from fxquant.nn.accumulating import IntegerWeighted
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.nn.integer import Quantize
from fxquant.ops.table import TABLE
from fxquant.runtimes.op_groups import MAX_POOLS, MOVES
from fxquant.targets import TARGETS, X86, Target, get

OTHERS = [name for name in TARGETS if name != "x86"]
MODELS = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "googlenet", "densenet121")


class Mixed(nn.Module):
    """What targets treat differently: residuals, activations, averages, joins of prescribed grids, softmax, a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 6, 2, 2, groups=2)
        self.depthwise, self.bn = nn.Conv2d(6, 6, 3, groups=6, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc, self.gain = nn.Linear(6, 4), nn.Parameter(torch.randn(1, 6, 1, 1))

    def forward(self, x: Tensor) -> Any:
        y = self.up(F.silu(self.a(x)))
        y = F.relu(self.bn(self.depthwise(y)) + y)
        y = y * torch.tanh(y) + self.gain
        z = torch.cat([torch.sigmoid(y), y], 1)
        pooled = F.adaptive_avg_pool2d(F.avg_pool2d(y, 2), 1).flatten(1)
        return (
            self.fc(pooled),
            torch.softmax(z.mean((2, 3)), 1),
            F.relu(F.interpolate(y, scale_factor=2, mode="bilinear")),
        )


def prepared_for(target: str | Target, model: nn.Module, x: Tensor, **options: Any) -> Any:
    return fxquant.calibrate(fxquant.prepare(model, x[:2], target=target, **options), [x], progress=False)


def part_of(graph: LeveledModule, node: Any) -> Any:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def parts(graph: LeveledModule) -> Iterator[tuple[fx.Node, Any]]:
    for node in graph.graph.nodes:
        if node.op == "call_module":
            yield node, part_of(graph, node)


def named(graph: LeveledModule, op: str) -> list[tuple[fx.Node, Any]]:
    return [(n, p) for n, p in parts(graph) if getattr(getattr(p, "entry", None), "name", "") == op]


def tensors(graph: nn.Module) -> list[FakeQuantize]:
    return [q for q in graph.modules() if isinstance(q, FakeQuantize) and not isinstance(q, WeightQuantize)]


def weights(graph: nn.Module) -> list[WeightQuantize]:
    return [q for q in graph.modules() if isinstance(q, WeightQuantize)]


# The data


@pytest.mark.parametrize("name", TARGETS)
def test_every_name_is_an_op_of_the_table(name):
    target = TARGETS[name]
    assert target.name == name and (name == "x86" or target.source.startswith("https://"))
    for field, ops in target.named_ops().items():
        assert ops <= set(TABLE), f"{field} names {sorted(ops - set(TABLE))}"
    runs = target.integer_ops or frozenset(TABLE)
    assert target.reads_accumulators <= runs and set(target.fixed_grids) <= runs and not set(target.reasons) & runs
    assert all(isinstance(TABLE[op].behaviour, Rescaling) for op in target.keeps_scale)
    assert all(isinstance(TABLE[op].behaviour, Weighted) for op in target.per_channel or ())


def test_every_op_that_passes_values_on_is_in_a_group():
    """A new one is a decision for every target."""
    passing = {name for name, entry in TABLE.items() if isinstance(entry.behaviour, Passing)}
    assert passing - {"interpolate_nearest"} == MOVES | MAX_POOLS


def test_the_default_is_x86_and_asks_for_nothing():
    assert next(iter(TARGETS)) == "x86" and get("x86") is X86
    assert set(X86.named_ops()) == set() and X86.integer_ops is None
    model, x = Mixed().eval(), torch.randn(2, 3, 8, 8)
    by_default, by_name = fxquant.prepare(model, x), fxquant.prepare(model, x, target="x86")
    assert graph_text(by_default) == graph_text(by_name)
    assert "x86" not in str(fxquant.diff(model, by_default)) and "x86" not in str(fxquant.coverage(by_default))


# Real models


@pytest.mark.parametrize("target", OTHERS)
@pytest.mark.parametrize("name", mostly_long(MODELS, ("mobilenet_v3_small",)))
def test_integers_are_those_of_the_frozen_model(name, target):
    model = zoo.build(name)
    prepared = prepared_for(target, model, zoo.images(4))
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        assert_close_to_scale(prepared(zoo.images(2)), model(zoo.images(2)), 1e-4)
    frozen = fxquant.freeze(prepared)
    integer = fxquant.convert(frozen, kernels="reference")
    share = 0.99 if TARGETS[target].rounding == "double" else 0.999  # two roundings differ from one in 2 of 1000
    if (name, target) == ("densenet121", "tflite"):
        share = 0.87  # averages of 2×2 on their input's own grid: a quarter are ties, half of which floats round away
    assert_ops_agree(frozen, integer, (zoo.images(2, seed=5),), share=share)
    obeys(target, prepared)


def obeys(name: str, graph: LeveledModule) -> None:
    """Hold a calibrated graph against the rules of its target, as they are written down there and not as they are coded."""
    acts, own = tensors(graph), weights(graph)
    assert len(acts) > 3 and own
    for q in own:
        assert not q.zero_point.any() and q.scheme.qmin == -127 and q.scheme.qmax == 127
    bounds = {"onnxruntime": (0, 255), "openvino": (0, 255)}.get(name, (-128, 127))
    for q in acts:
        assert (q.scheme.qmin, q.scheme.qmax) == bounds and q.scale.ndim == 0 and float(q.scale) > 0
        assert name != "tensorrt" or int(q.zero_point) == 0
    for node, part in parts(graph):
        if not hasattr(part, "weight_quantizer"):
            continue
        channels = part.weight.shape[1 if isinstance(part, nn.modules.conv._ConvTransposeNd) else 0]
        wanted = () if name == "tflite" and isinstance(part, nn.Linear) else (channels,)
        assert tuple(part.weight_quantizer.scale.shape) == wanted, node.name
    {"tensorrt": fused, "openvino": fused, "tflite": shared, "xnnpack": shared, "onnxruntime": rounded}[name](graph)


def fused(graph: LeveledModule) -> None:
    """One operand of a residual sum comes wide from a convolution, the other is rounded; activations read wide."""
    for node, _ in named(graph, "add"):
        sources = [part_of(graph, s) for s in node.all_input_nodes]
        wide = [p for p in sources if isinstance(p, nn.Conv2d) and p.output_quantizer is None]
        alone = [s for s in node.all_input_nodes if isinstance(part_of(graph, s), nn.Conv2d) and len(s.users) == 1]
        assert len(wide) == min(1, len(alone)), node.name
        assert sum(getattr(p, "output_quantizer", None) is not None for p in sources) == len(sources) - len(wide)
    for op in ("hardswish", "hardsigmoid", "silu", "sigmoid"):
        for node, _ in named(graph, op):
            source = part_of(graph, node.args[0])
            assert not isinstance(source, nn.Conv2d) or source.output_quantizer is None or len(node.args[0].users) > 1


def shared(graph: LeveledModule) -> None:
    """Averages, pools and joins are on the grid of what they read."""
    found = 0
    for op in ("adaptive_avg_pool2d", "max_pool2d", "cat", "flatten"):
        for node, part in named(graph, op):
            inputs = [part_of(graph, s).output_quantizer for s in node.all_input_nodes]
            assert all(q is part.output_quantizer for q in inputs), node.name
            found += 1
    assert found
    for _, part in parts(graph):
        assert not hasattr(part, "weight_quantizer") or not part.weight_quantizer.scheme.qmin < -127


def rounded(graph: LeveledModule) -> None:
    """Every convolution's result is rounded, by its own module or the last of its chain."""
    for node, part in parts(graph):
        if isinstance(part, nn.Conv2d) and not node.meta.get("continues"):
            assert part.output_quantizer is not None, node.name
    reasons = {op.reason for op in fxquant.coverage(graph).float_ops}
    assert all(reason.startswith("ONNX Runtime has no integer ") for reason in reasons)


@pytest.mark.parametrize("target", OTHERS)
def test_a_model_of_odd_corners(target):
    model, x = Mixed().eval(), torch.randn(8, 3, 8, 8)
    prepared = prepared_for(target, model, x)
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        assert_close_to_scale(prepared(x), model(x), 1e-5)
    frozen = fxquant.freeze(prepared)
    share = 0.98 if TARGETS[target].rounding == "double" else 0.995
    assert_ops_agree(frozen, fxquant.convert(frozen, kernels="reference"), (x,), share=share)
    fast, exact = fxquant.convert(frozen), fxquant.convert(frozen, kernels="reference")
    with torch.no_grad():
        for a, b, c in zip(fast(x), exact(x), model(x), strict=True):
            assert float((a - b).abs().max()) <= 0.05 * float(c.abs().max())
            assert float((b - c).abs().max()) <= 0.1 * float(c.abs().max())


# Rules, one by one


def test_tflite_prescribes_grids_and_keeps_scales():
    prepared = prepared_for("tflite", Mixed().eval(), torch.randn(8, 3, 8, 8))
    grids = {"softmax": (1 / 256, -128), "sigmoid": (1 / 256, -128), "tanh": (1 / 128, 0)}
    for op, grid in grids.items():
        ((_, part),) = named(prepared, op)
        assert (float(part.output_quantizer.scale), int(part.output_quantizer.zero_point)) == grid
    ((cat, part),) = named(prepared, "cat")
    inputs = [part_of(prepared, s).output_quantizer for s in cat.all_input_nodes]
    assert all(q is not part.output_quantizer for q in inputs) and cat.meta["requantizes"]
    assert part.output_quantizer.fixed_range is None and inputs[0].fixed_range is not None
    for op in ("avg_pool2d", "adaptive_avg_pool2d", "interpolate"):
        ((node, part),) = named(prepared, op)
        source = part_of(prepared, node.args[0])
        if op != "interpolate":  # a clamp behind it rounds for both
            assert part.output_quantizer is source.output_quantizer and part.applies and not part.observes
    ((relu, part),) = [(n, p) for n, p in named(prepared, "relu") if "interpolate" in n.args[0].name]
    assert part.output_quantizer is part_of(prepared, relu.args[0].args[0]).output_quantizer


def test_an_average_on_its_inputs_grid_leaves_that_grid_to_its_input():
    class Averaged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(x, 4) * 2.0

    scheme = Scheme(signed=True, estimator="moving_average")
    recipe = Recipe(default=Setting(activation=scheme))
    x = torch.randn(4, 3, 8, 8)
    prepared = prepared_for("tflite", Averaged().eval(), x, recipe=recipe)
    quantizer = next(p for _, p in parts(prepared)).output_quantizer
    alone = FakeQuantize(scheme)
    alone.observe(x)
    alone.update_scale()
    assert torch.equal(quantizer.scale, alone.scale) and torch.equal(quantizer.zero_point, alone.zero_point)


def test_an_average_on_its_inputs_grid_is_the_rounded_mean_of_integers():
    prepared = prepared_for(
        "tflite", nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 2, 1)).eval(), torch.randn(8, 3, 8, 8)
    )
    integer, x = fxquant.convert(prepared, kernels="reference"), torch.randn(4, 3, 8, 8)
    values = values_of(integer, (x,))
    entering = next(n for n, p in parts(integer) if isinstance(p, Quantize))
    ((pooled, _),) = named(integer, "avg_pool2d")
    blocks = values[entering.name].long().reshape(4, 3, 4, 2, 4, 2).sum((3, 5))
    down, rest = blocks // 4, blocks % 4
    expected = down + ((rest == 3) | ((rest == 2) & (down % 2 != int(prepared_zero(prepared)) % 2)))
    assert torch.equal(values[pooled.name].long(), expected)


def prepared_zero(prepared: LeveledModule) -> Tensor:
    """The zero point that the input is counted from: halves round to integers an even number of steps away from it."""
    return next(p for _, p in parts(prepared)).output_quantizer.zero_point


def test_tensorrt_takes_the_first_convolution_of_a_sum():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Any:
            y = self.c(x)
            return F.relu(self.a(x) + self.b(x)) * (y + y)

    prepared = prepared_for("tensorrt", Twice().eval(), torch.randn(4, 3, 6, 6))
    assert prepared.a.output_quantizer is None and prepared.b.output_quantizer is not None
    assert prepared.c.output_quantizer is not None  # read twice by one sum
    told = str(fxquant.diff(Twice().eval(), prepared))
    assert "float → prepared for tensorrt" in told and "not rounded; add reads its accumulator" in told


def test_what_only_float_ops_read_stays_wide_where_the_target_wants_it():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Softmax(1)).eval(), torch.randn(4, 3, 5, 5)
    by_target = {name: prepared_for(name, model, x) for name in ("tensorrt", "xnnpack", "x86")}
    assert getattr(by_target["tensorrt"], "0").output_quantizer is None
    assert getattr(by_target["xnnpack"], "0").output_quantizer is not None
    assert fxquant.coverage(by_target["tensorrt"]).float_ops[0].reason == "TensorRT computes softmax in float"
    assert not fxquant.coverage(by_target["x86"]).float_ops


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
@pytest.mark.parametrize("target", ["xnnpack", "tflite"])
def test_requantization_multipliers_are_within_xnnpacks_bounds(name, target):
    integer = fxquant.convert(prepared_for(target, zoo.build(name), zoo.images(2)))
    found = [m for m in integer.modules() if isinstance(m, IntegerWeighted) and m.output_dtype is not None]
    assert len(found) > 15
    for part in found:
        multiplier = torch.ldexp(part.multiplier.double(), part.shift - 31)
        assert bool((multiplier < 256).all() and (multiplier >= 2.0**-32).all())


@pytest.mark.parametrize(("target", "rounding"), [(name, TARGETS[name].rounding) for name in TARGETS])
def test_convert_rounds_as_the_target_does(target, rounding):
    prepared = prepared_for(target, Mixed().eval(), torch.randn(4, 3, 8, 8))
    assert fxquant.convert(prepared).settings["rounding"] == rounding
    assert fxquant.convert(prepared, rounding="single").settings["rounding"] == "single"


@pytest.mark.parametrize("target", ["tensorrt", "tflite"])
def test_training_for_a_target(target):
    torch.manual_seed(1)
    prepared = fxquant.prepare(Mixed(), torch.randn(2, 3, 8, 8), qat=True, target=target)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    for _ in range(3):
        sum(y.square().mean() for y in prepared(torch.randn(8, 3, 8, 8))).backward()
        optimizer.step()
    with torch.no_grad():
        prepared.bn.weight[::2] *= -1
    prepared.eval()
    assert all(q.scheme.estimator == "moving_average" for q in tensors(prepared))
    frozen, x = fxquant.freeze(prepared), torch.randn(4, 3, 8, 8)
    assert_ops_agree(frozen, fxquant.convert(frozen, kernels="reference"), (x,), share=0.98)
    assert (prepared.bn.output_quantizer is None) == (target == "tensorrt")


@pytest.mark.parametrize("level", ["prepared", "frozen", "integer"])
@pytest.mark.parametrize("target", [*OTHERS, "own"])
def test_a_saved_model_keeps_its_target(target, level, tmp_path):
    model, x = Mixed().eval(), torch.randn(4, 3, 8, 8)
    own = dataclasses.replace(get("tflite"), name="own", title="Mine", keeps_scale=frozenset({"mean"}))
    prepared = prepared_for(own if target == "own" else target, model, x)
    made = {"prepared": lambda m: m, "frozen": fxquant.freeze, "integer": fxquant.convert}[level](prepared)
    fxquant.save(made, tmp_path / "m.pt")
    loaded = fxquant.load(Mixed().eval(), tmp_path / "m.pt")
    assert loaded.settings["target"] == made.settings["target"] and fxquant.coverage(loaded).target == target
    assert graph_text(loaded) == graph_text(made)
    with torch.no_grad():
        assert_same_bits(loaded(x), made(x))


def test_a_file_from_before_targets_loads(tmp_path):
    model, x = Mixed().eval(), torch.randn(4, 3, 8, 8)
    integer = fxquant.convert(prepared_for("x86", model, x))
    fxquant.save(integer, tmp_path / "m.pt")
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    del content["target"]
    content["recipe"]["default"] = {name: dataclasses.asdict(getattr(X86, name)) for name in ("weight", "activation")}
    torch.save(content, tmp_path / "old.pt")
    with torch.no_grad():
        assert_same_bits(fxquant.load(Mixed().eval(), tmp_path / "old.pt")(x), integer(x))


# Recipes


def test_a_recipe_overrides_what_the_target_leaves_free():
    wide, four = Scheme(bits=16), Scheme(bits=4, symmetric=True, signed=True, per_channel=True, narrow_range=True)
    recipe = Recipe([(Op("add"), Setting(activation=wide)), (nn.Conv2d, Setting(weight=four)), ("fc", None)])
    prepared = prepared_for("onnxruntime", Mixed().eval(), torch.randn(4, 3, 8, 8), recipe=recipe)
    assert {p.weight_quantizer.scheme for n, p in parts(prepared) if isinstance(p, nn.Conv2d)} == {four}
    assert {p.output_quantizer.scheme.bits for _, p in named(prepared, "mul")} == {8}
    assert 16 in {q.scheme.bits for q in tensors(prepared)}
    assert prepared.fc.__class__ is nn.Linear


U8, S16 = Scheme(bits=8), Scheme(bits=16, signed=True, symmetric=True)
WIDE = Scheme(symmetric=True, signed=True, per_channel=True)
NARROW = dataclasses.replace(WIDE, narrow_range=True)


@pytest.mark.parametrize(
    ("target", "recipe", "words"),
    [
        ("tensorrt", Recipe(default=Setting(activation=U8)), ["the recipe's default", "u8 affine", "signed", "https"]),
        ("tensorrt", Recipe(default=Setting(activation=Scheme(signed=True))), ["zero point 0", "symmetric=True"]),
        ("tensorrt", Recipe([("fc", Setting(activation=Scheme(bits=4)))]), ["'fc'", "8 bits", "u4 affine"]),
        ("openvino", Recipe([(Op("add"), Setting(activation=S16))]), ["Op(name='add')", "OpenVINO", "8 bits"]),
        ("onnxruntime", Recipe(default=Setting(activation=Scheme(bits=4))), ["8 or 16 bits"]),
        ("onnxruntime", Recipe(default=Setting(weight=dataclasses.replace(NARROW, bits=9))), ["2 to 8 bits", "weight"]),
        ("tflite", Recipe(default=Setting(weight=WIDE)), ["narrow_range=True"]),
        ("tflite", Recipe(default=Setting(weight=NARROW)), ["fc", "linear", "one scale", "per_channel=False"]),
        ("tensorrt", Recipe([(Op("softmax"), Setting())]), ["Op(name='softmax')", "computes softmax in float"]),
        ("xnnpack", Recipe([(Op("silu"), Setting())]), ["XNNPACK has no integer silu"]),
    ],
)
def test_what_a_target_cannot_do_is_refused(target, recipe, words):
    model = Mixed().eval()
    with pytest.raises(RecipeError) as refused:
        fxquant.prepare(model, torch.randn(2, 3, 8, 8), target=target, recipe=recipe)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert type(model.a) is nn.Conv2d and "what to do" in str(refused.value)


def test_names_and_targets_that_cannot_be():
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(InputError, match=r"Did you mean 'tensorrt'\?"):
        fxquant.prepare(Mixed().eval(), x, target="tensort")
    with pytest.raises(InputError, match="x86, onnxruntime"):
        fxquant.prepare(Mixed().eval(), x, target=None)
    odd = dataclasses.replace(get("onnxruntime"), integer_ops=frozenset({"conv2", "relu"}))
    with pytest.raises(InputError, match=r"'conv2' in integer_ops.*\n?.*Did you mean 'conv"):
        fxquant.prepare(Mixed().eval(), x, target=odd)
    with pytest.raises(SchemeError, match="contradicts itself"):
        Target(name="t", title="T", activation_signs=(True,))
    with pytest.raises(SchemeError, match="tanh is in keeps_scale"):
        Target(name="t", title="T", keeps_scale=frozenset({"tanh"}), fixed_grids={"tanh": (1 / 128, 0)})
    with pytest.raises(SchemeError, match="rounding='up'"):
        Target(name="t", title="T", rounding="up")


def test_a_target_of_ones_own():
    own = dataclasses.replace(get("onnxruntime"), name="own", title="Mine", integer_ops=frozenset({"conv2d", "relu"}))
    prepared = prepared_for(own, zoo.build("resnet18"), zoo.images(2))
    floats = {op.op for op in fxquant.coverage(prepared).float_ops}
    assert floats == {"add", "MaxPool2d", "AdaptiveAvgPool2d", "Linear"} or floats >= {"add", "Linear"}
    assert fxquant.coverage(prepared).target == "own" and "prepared for own" in str(fxquant.coverage(prepared))


class Branches(nn.Module):
    """An island around a part that every target places as it does the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(y) if y.sum() > 1e9 else self.head(-y)


def test_graphs_inside_islands_are_placed_likewise(tmp_path):
    x = torch.randn(4, 3, 6, 6)
    prepared = prepared_for("tensorrt", Branches().eval(), x)
    assert all(q.scheme.signed and not q.zero_point.any() for q in tensors(prepared))
    assert fxquant.coverage(prepared).target == "tensorrt" and fxquant.coverage(prepared).islands
    fxquant.save(prepared, tmp_path / "m.pt")
    with torch.no_grad():
        assert_same_bits(fxquant.load(Branches().eval(), tmp_path / "m.pt")(x), prepared(x))


def test_the_command_line_takes_a_target(capsys):
    arguments = ["diff", "torchvision:squeezenet1_1", "--shape", "1,3,64,64", "--target", "tensorrt", "--coverage"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "SqueezeNet: float → prepared for tensorrt, not calibrated" in told and "s8 symmetric" in told
    with pytest.raises(SystemExit):
        main(["diff", "torchvision:squeezenet1_1", "--target", "tensort"])
