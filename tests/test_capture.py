"""Any model is captured: with quantizers off it computes, trains, and keeps its state as the original does."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from size_traps import IfHeight, SizeAsKernel
from state_traps import PythonCounter
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from trap_inputs import ConvNet, Perceptron, Trap, images, normal, rows
from traps import TRAPS
from value_traps import ValueGate, ValueGateInside

import fxquant
from fxquant.capture.islands import graphs_of, islands_of, specializations_of
from fxquant.errors import FxquantError, InputError, LevelError
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.fake_quantize import FakeQuantize

BATCH, OTHER_BATCH = 4, 3
NAMES = list(TRAPS)
MODES = ("eval", "train")
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # a reentrant checkpoint's
IN_BOTH_MODES = [(name, mode) for name in NAMES for mode in MODES if mode == "eval" or TRAPS[name].modes]


@pytest.fixture(autouse=True)
def slow_attention() -> Iterator[None]:
    """The fused kernel of nn.MultiheadAttention rounds otherwise than its parts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def build(trap: Trap, mode: str) -> tuple[nn.Module, nn.Module]:
    """The model, and a copy to compare with."""
    torch.manual_seed(3)
    model = trap.model().train(mode == "train")
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)
    return model, copy.deepcopy(trap.inner(model))


def prepared_in(name: str, mode: str) -> tuple[nn.Module, nn.Module]:
    """The prepared model, and the original to compare with."""
    model, original = build(TRAPS[name], mode)
    return fxquant.prepare(model, TRAPS[name].inputs(BATCH), qat=True), original


def call(module: nn.Module, inputs: Any) -> Any:
    torch.manual_seed(7)
    return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


# Nested values.


def fields(value: Any) -> list[tuple[str, Any]] | None:
    """The parts of a container by name; None for a leaf."""
    if isinstance(value, dict):
        return [(f"[{k!r}]", v) for k, v in value.items()]
    if isinstance(value, (tuple, list)):
        return [(f"[{i}]", v) for i, v in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value)]
    return None


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    parts = fields(value)
    if parts is None:
        yield name, value
    for key, part in parts or ():
        yield from leaves(part, name + key)


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``function`` of its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: mapped(v, function) for k, v in value.items()}
    if hasattr(value, "_fields"):
        return type(value)(*(mapped(v, function) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(v, function) for v in value)
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{k[1:]: mapped(v, function) for k, v in fields(value) or ()})
    return value


def assert_same(got: Any, expected: Any, what: str) -> None:
    """The same containers, and leaves that are equal bit for bit."""
    assert type(got) is type(expected), f"{what}: a {type(got).__name__} instead of a {type(expected).__name__}"
    inner = fields(expected)
    if inner is not None:
        given = fields(got) or []
        assert [k for k, _ in given] == [k for k, _ in inner], f"{what}: other parts"
        for (key, a), (_, b) in zip(given, inner, strict=True):
            assert_same(a, b, what + key)
    elif isinstance(expected, Tensor):
        assert got.dtype == expected.dtype, f"{what}: {got.dtype} instead of {expected.dtype}"
        assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
        assert torch.isfinite(expected.double()).all(), f"{what}: the expected value is not finite"
        gap = float((got.double() - expected.double()).abs().max()) if expected.numel() else 0.0
        assert torch.equal(got, expected), f"{what}: differs by up to {gap:.3g}"
    else:
        assert got == expected, f"{what}: {got!r} instead of {expected!r}"


def assert_same_buffers(got: nn.Module, expected: nn.Module) -> None:
    given = dict(got.named_buffers(remove_duplicate=False))
    for name, buffer in expected.named_buffers(remove_duplicate=False):
        assert name in given, f"buffer {name} is missing"
        assert_same(given[name], buffer, f"buffer {name}")


# Every trap: outputs.


@pytest.mark.parametrize(("name", "mode"), IN_BOTH_MODES)
def test_outputs_are_the_originals(name, mode):
    """Call by call on one model: twice the example, another batch size, the example again; then the buffers."""
    prepared, original = prepared_in(name, mode)
    trap, sizes = TRAPS[name], (BATCH, BATCH, OTHER_BATCH, BATCH)
    for number, size in enumerate(sizes if trap.batch_free else (BATCH, BATCH)):
        given, also = trap.inputs(size), trap.inputs(size)
        with torch.no_grad():
            expected = call(original, also)
            with fxquant.quantizers_off(prepared):
                got = call(prepared, given)
        assert_same(got, expected, f"output of call {number + 1}, batch size {size}")
        if not trap.overwrites:  # what forward overwrites of its input, a graph leaves as the caller gave it
            assert_same(given, also, f"the caller's input after call {number + 1}")
    assert_same_buffers(prepared, original)


@pytest.mark.parametrize("name", [n for n in NAMES if TRAPS[n].modes])
def test_the_mode_may_change_after_prepare(name):
    """Prepared in train mode, then evaluated, then trained on."""
    prepared, original = prepared_in(name, "train")
    for mode in ("train", "eval", "train"):
        prepared.train(mode == "train"), original.train(mode == "train")
        with torch.no_grad():
            expected = call(original, TRAPS[name].inputs(BATCH))
            with fxquant.quantizers_off(prepared):
                got = call(prepared, TRAPS[name].inputs(BATCH))
        assert_same(got, expected, f"output in {mode} mode")
    assert_same_buffers(prepared, original)


# Every trap: gradients.


def gradients(module: nn.Module, inputs: Any) -> dict[str, Tensor | None]:
    """Of the sum of all outputs squared: by parameter name, and by input."""
    starts: list[Tensor] = []

    def started(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        starts.append(x.detach().requires_grad_())
        return starts[-1].clone()

    output = call(module, mapped(inputs, started))
    real = [t for _, t in leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    sum(t.double().square().sum() for t in real).backward()
    found = {f"input {i}": t.grad for i, t in enumerate(starts)}
    return {**found, **{n: p.grad for n, p in module.named_parameters(remove_duplicate=False)}}


@pytest.mark.parametrize("name", [n for n in NAMES if TRAPS[n].trains])
def test_gradients_are_the_originals(name):
    prepared, original = prepared_in(name, "train" if TRAPS[name].modes else "eval")
    expected = gradients(original, TRAPS[name].inputs(BATCH))
    with fxquant.quantizers_off(prepared):
        got = gradients(prepared, TRAPS[name].inputs(BATCH))
    assert any(g is not None for g in expected.values()), "the original has no gradient"
    for key, gradient in expected.items():
        if gradient is None:
            assert got.get(key) is None, f"a gradient of {key} that the original has not"
        else:
            assert got.get(key) is not None, f"no gradient of {key}"
            assert_same(got[key], gradient, f"gradient of {key}")


# Every trap: what prepare gives, and what it leaves.

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def described(model: nn.Module) -> dict[str, Any]:
    """What must not change: classes, modes, attributes, hooks, and which tensors and modules are where."""
    facts: dict[str, Any] = {}
    for path, part in model.named_modules(remove_duplicate=False):
        own = vars(part)
        facts[f"{path}: class"] = type(part)
        facts[f"{path}: attributes"] = sorted(own)
        facts[f"{path}: values"] = {k: v for k, v in own.items() if v is None or isinstance(v, (bool, int, float, str))}
        facts[f"{path}: types"] = {k: type(v) for k, v in own.items()}
        facts[f"{path}: lengths"] = {k: len(v) for k, v in own.items() if isinstance(v, (list, dict, tuple, set))}
        facts[f"{path}: hooks"] = [list(own.get(hooks, ())) for hooks in HOOKS]
        for kind in ("_parameters", "_buffers", "_modules"):
            facts[f"{path}: {kind}"] = {k: id(v) for k, v in own[kind].items()}
    return facts


@dataclasses.dataclass
class Case:
    """One prepared model, not called since."""

    prepared: nn.Module
    facts: tuple[dict[str, Any], dict[str, Any]]
    state: tuple[dict[str, Tensor], dict[str, Tensor]]
    inner_state: dict[str, Tensor]
    inputs: tuple[Any, Any]


@cache
def case(name: str) -> Case:
    model, original = build(TRAPS[name], "eval")
    facts, state = described(model), {k: v.clone() for k, v in model.state_dict().items()}
    given, also = TRAPS[name].inputs(BATCH), TRAPS[name].inputs(BATCH)
    prepared = fxquant.prepare(model, given, qat=True)
    return Case(prepared, (facts, described(model)), (state, model.state_dict()), original.state_dict(), (given, also))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_one_graph_where_it_can_be(name):
    prepared, expect = case(name).prepared, TRAPS[name].expect
    islands = islands_of(prepared)
    causes = "; ".join(f"{island.path or 'the model'}: {island.cause} ({island.source})" for island in islands)
    if expect == "whole":
        assert not islands, causes
        assert isinstance(prepared, LeveledModule)
    elif expect == "islands":
        assert islands, "values decide here: one graph cannot hold it"
    for island in islands:
        assert island.cause and island.advice, f"{island.path or 'the model'}: neither cause nor advice"
        assert island.path == "" or prepared.get_submodule(island.path) is not None
    assert all(isinstance(graph, LeveledModule) for graph in graphs_of(prepared).values())


@pytest.mark.parametrize("name", NAMES)
def test_something_is_quantized(name):
    parts = [part for graph in graphs_of(case(name).prepared).values() for part in graph.modules()]
    assert any(isinstance(part, FakeQuantize) for part in parts)


def first_names(module):
    """The first name of each parameter and buffer, by each of its names: a state has a shared tensor under it."""
    seen, first = {}, {}
    for named in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for key, tensor in named:
            first[key] = seen.setdefault(id(tensor), key)
    return first


@pytest.mark.parametrize("name", NAMES)
def test_the_state_dict_keeps_its_keys(name):
    state = case(name).prepared.state_dict()
    first = first_names(case(name).prepared)
    for key, tensor in case(name).inner_state.items():
        assert first.get(key, key) in state, f"{key} is missing"
        assert_same(state[first.get(key, key)], tensor, key)
    own = vars(type(case(name).prepared))
    methods = tuple(f"{path}." for path in graphs_of(case(name).prepared) if path in own)
    added = [k for k in state if k not in case(name).inner_state and "quantizer" not in k]
    added = [k for k in added if not k.startswith(methods) and not k.endswith(".holds_statistics")]
    assert not added, f"keys that are neither the model's nor a quantizer's: {added}"


@pytest.mark.parametrize("name", NAMES)
def test_the_model_given_is_left_as_it_was(name):
    before, after = case(name).facts
    assert sorted(before) == sorted(after), "other modules"
    for key, fact in before.items():
        assert after[key] == fact, key
    before, after = case(name).state
    assert_same(dict(after), dict(before), "state")
    assert_same(*case(name).inputs, "example_inputs")


# Specializations.


def test_a_later_input_may_not_contradict_a_specialization():
    model = IfHeight().eval()
    prepared = fxquant.prepare(model, images(2), qat=True)
    found = specializations_of(prepared)
    assert found and all(s.text for s in found)
    sources = [s.source for s in found if s.source and "traps.py" in s.source]
    assert sources, "the line that specialized is named"
    prepared(normal(5, 3, 8, 7))
    with pytest.raises(FxquantError, match=r"traps\.py") as caught:
        prepared(normal(2, 3, 5, 5))
    assert any(re.search(r"traps\.py\D+\d+", s).group() in str(caught.value) for s in sources)


def test_what_holds_for_every_input_is_no_specialization():
    prepared = fxquant.prepare(ConvNet().eval(), images(2), qat=True)
    assert specializations_of(prepared) == () and islands_of(prepared) == ()


def test_a_size_given_to_torch_stays_a_size():
    model = SizeAsKernel().eval()
    prepared = fxquant.prepare(model, images(2), qat=True).eval()
    assert specializations_of(prepared) == () and islands_of(prepared) == ()
    with fxquant.quantizers_off(prepared):
        for side in (5, 9, 12):
            x = normal(3, 3, side, side + 2)
            assert torch.equal(prepared(x), model(x))


# What is refused.


def test_what_a_layer_of_torch_asks_is_found_in_that_layer_and_costs_no_float_op():
    prepared = fxquant.prepare(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), normal(2, 5, 8))
    asked = specializations_of(prepared)
    assert asked and all("functional.py" in found.source for found in asked)
    assert not any("nested" in found.text for found in asked)
    assert not fxquant.coverage(prepared).float_ops
    nested = torch.nested.nested_tensor([normal(5, 8), normal(3, 8)], layout=torch.jagged)
    with pytest.raises(FxquantError, match="nested"):
        prepared(nested)


def test_a_scripted_model_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(Perceptron())
    with pytest.raises(InputError, match="TorchScript"):
        fxquant.prepare(scripted, rows(2), qat=True)


def test_an_already_quantized_model_is_refused():
    import torch.ao.nn.quantized as already

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = nn.Sequential(nn.ReLU(), already.Linear(4, 4))
    with pytest.raises(InputError, match="already quantized"):
        fxquant.prepare(quantized, rows(2), qat=True)


@pytest.mark.parametrize("name", ["containers", "value gate inside"])
def test_an_example_that_does_not_fit_is_refused(name):
    model = TRAPS[name].model().eval()
    for example in ((torch.randn(2, 7, 3, 3),), (), (*TRAPS[name].inputs(2), torch.randn(2))):
        with pytest.raises(InputError):
            fxquant.prepare(model, example, qat=True)


# Leaves and islands.


@pytest.mark.parametrize("leaf", ["gate", ValueGate, "stem", ConvNet], ids=str)
def test_leaves_stay_untouched(leaf):
    torch.manual_seed(3)
    model = ValueGateInside().eval()
    prepared = fxquant.prepare(model, images(4), qat=True, leaves=(leaf,))
    path = leaf if isinstance(leaf, str) else {ValueGate: "gate", ConvNet: "stem"}[leaf]
    part, given = prepared.get_submodule(path), model.get_submodule(path)
    assert type(part) is type(given)
    assert [(n, type(m)) for n, m in part.named_modules()] == [(n, type(m)) for n, m in given.named_modules()]
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        assert_same(prepared(*images(4)), model(*images(4)), "output")


def test_leaves_that_match_nothing_are_refused():
    with pytest.raises(FxquantError, match="nowhere"):
        fxquant.prepare(ConvNet().eval(), images(2), qat=True, leaves=("nowhere",))


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("value gate inside", ("gate.lin", "stem.conv", "head.a")),
        ("if sum positive", ("conv", "a")),
        ("detector", ("backbone.0", "head")),
        ("nonzero rows", ("body.a", "fc")),
        ("masked tokens", ("embed", "fc")),
    ],
)
def test_layers_in_and_around_islands_are_quantized(name, inside):
    prepared = case(name).prepared
    for island in islands_of(prepared):
        assert "traps.py" in (island.source or ""), f"the user's line is not named: {island.source}"
    owners = [n for n, m in prepared.named_modules() if hasattr(m, "weight_quantizer")]
    for path in inside:
        assert any(n == path or n.startswith(f"{path}.") for n in owners), f"{path} is not quantized"


def test_only_the_smallest_part_is_an_island():
    prepared = case("value gate inside").prepared
    assert [island.path for island in islands_of(prepared)] == ["gate"]
    assert isinstance(prepared, LeveledModule), "the model around it is a graph"


def test_an_island_keeps_the_users_class_and_attributes():
    prepared = case("python counter").prepared
    fresh = copy.deepcopy(prepared)
    assert fresh.calls == 0
    fresh(*rows(4)), fresh(*rows(4))
    assert fresh.calls == 2 and isinstance(fresh, PythonCounter)


def test_a_recording_hook_records_each_call():
    seen: list[Tensor] = []
    model = ConvNet().eval()
    handle: RemovableHandle = model.conv.register_forward_hook(lambda module, args, output: seen.append(output))
    prepared = fxquant.prepare(model, images(2), qat=True)
    assert all(type(t) is Tensor for t in seen), "the hook was given something other than a tensor"
    seen.clear()
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        for count in (1, 2, 3):
            prepared(*images(2))
            assert len(seen) == count
    recorded = seen[-1]
    handle.remove()
    with torch.no_grad():
        assert_same(recorded, model.conv(*images(2)), "what was recorded")


def test_one_tensor_twice_stays_one_tensor():
    prepared, _ = prepared_in("constants beside", "eval")
    (x,) = rows(2)
    output = prepared(x)
    assert output["y"] is output["again"] and output["input"] is x


@pytest.mark.parametrize(
    "name", ["scratch", "hook that records", "carried state", "cached grid", "spectral norm by hook"]
)
def test_a_model_that_has_run_can_be_prepared(name):
    """Attributes that hold results of an earlier call, with their gradients."""
    trap = TRAPS[name]
    model, again = build(trap, "train")
    for module in (model, again):
        call(module, trap.inputs(BATCH))
    prepared = fxquant.prepare(model, trap.inputs(BATCH), qat=True)
    with fxquant.quantizers_off(prepared), torch.no_grad():
        got, expected = call(prepared, trap.inputs(BATCH)), call(again, trap.inputs(BATCH))
    assert_same(got, expected, "output")


# Copies, and the whole way to integers.

WITH_ISLANDS = ["value gate inside", "if sum positive", "detector", "nonzero rows", "helper methods"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", [*WITH_ISLANDS, "python counter", "auxiliary head", "self attention"])
def test_a_copy_runs_alone(name, how):
    trap = TRAPS[name]
    prepared, _ = prepared_in(name, "eval")
    other = how(prepared)
    assert [i.path for i in islands_of(other)] == [i.path for i in islands_of(prepared)]
    assert list(graphs_of(other)) == list(graphs_of(prepared))
    with torch.no_grad():
        assert_same(call(other, trap.inputs(3)), call(prepared, trap.inputs(3)), "output of the copy")
    mine = {id(t) for t in prepared.state_dict(keep_vars=True).values()}
    assert not mine & {id(t) for t in other.state_dict(keep_vars=True).values()}, "tensors are shared"


def test_a_copy_trains_alone():
    prepared, _ = prepared_in("value gate inside", "train")
    other = copy.deepcopy(prepared)
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    call(other, images(BATCH)).square().sum().backward()
    optimizer.step()
    for key, tensor in prepared.state_dict().items():
        assert torch.equal(tensor, before[key]), f"the first one's {key} changed"
    assert not torch.equal(other.state_dict()["gate.lin.weight"], before["gate.lin.weight"])


def signal_to_noise(got: Tensor, expected: Tensor) -> float:
    """In decibels."""
    noise = (got.double() - expected.double()).square().sum().clamp_min(1e-30)
    return float(10 * torch.log10(expected.double().square().sum() / noise))


@pytest.mark.parametrize("name", ["value gate inside", "if sum positive", "helper methods"])
def test_islands_go_the_whole_way_to_integers(name):
    trap = TRAPS[name]
    model, original = build(trap, "eval")
    data = [(normal(16, 3, 8, 8, seed=s),) for s in range(4)]
    prepared = fxquant.prepare(model, data[0])
    assert islands_of(prepared)
    fxquant.calibrate(prepared, data, progress=False)
    integer = fxquant.convert(prepared)
    assert any(t.dtype == torch.int8 for t in integer.state_dict().values()), "no weight became an integer"
    with torch.no_grad():
        for batch in data:
            quality = signal_to_noise(integer(*batch), original(*batch))
            assert quality > 15, f"{quality:.1f} dB"


@pytest.mark.parametrize("name", ["value gate inside", "if sum positive"])
def test_training_with_islands_lowers_the_loss(name):
    model, _ = build(TRAPS[name], "train")
    x = normal(16, 3, 8, 8)
    prepared = fxquant.prepare(model, x, qat=True)
    fxquant.calibrate(prepared, [(x,)], progress=False)
    optimizer = torch.optim.Adam(prepared.parameters(), lr=0.02)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (prepared(x) - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


INDEXING: dict[str, Callable[..., Any]] = {
    "length": lambda body, x: body(x) * len(body),
    "first": lambda body, x: body(x) + body[0](x),
    "last": lambda body, x: body[-1](body(x)),
    "slice": lambda body, x: body[1:](body[:1](x)) + body(x),
    "loop": lambda body, x: body(x) + sum(layer(x) for layer in body),
    "inner": lambda body, x: body(x) + body[2][0](x),
}


class Indexed(nn.Module):
    """An island that calls a ``Sequential`` as a whole, and goes at its layers too."""

    def __init__(self, way: str) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.body, self.way = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), inner, nn.Linear(6, 6)), way

    def forward(self, x):
        if float(x.sum()) > 1e9:
            return x
        return INDEXING[self.way](self.body, x)


@pytest.mark.parametrize("way", INDEXING)
def test_an_island_may_count_and_index_what_it_also_calls(way):
    """A captured ``Sequential`` has neither length nor items: it has to stay one."""
    torch.manual_seed(0)
    model, x = Indexed(way).eval(), torch.randn(9, 6)
    with torch.no_grad():
        wanted = model(x)
        prepared = fxquant.calibrate(fxquant.prepare(model, x), [x], progress=False)
        with fxquant.quantizers_off(prepared):
            assert torch.equal(prepared(x), wanted)
        integer = fxquant.convert(prepared)
        assert 10 * torch.log10(wanted.pow(2).mean() / (integer(x) - wanted).pow(2).mean()) > 28
    assert fxquant.coverage(integer).weights_share == 1.0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.gain = nn.Linear(6, 6), nn.Linear(6, 6), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.second(F.relu(self.first(x))) * self.gain


READING: dict[str, Callable[..., Any]] = {
    "layer": lambda own, x: own.layer(x) / own.layer.weight.norm() + own.layer.bias,
    "inner layer": lambda own, x: own.block(x) * own.block.first.weight[0, 0],
    "dtype": lambda own, x: own.block(x) * torch.tensor(2).to(own.block.second.weight.dtype) / 4,
    "parameter": lambda own, x: own.block(x) + own.block.gain,
    "call": lambda own, x: own.block(x) + own.block.first(x),
    "tied": lambda own, x: F.linear(own.layer(x), own.layer.weight) + own.block(x),
    "in a list": lambda own, x: own.several[1](own.several[0](x)) * own.several[-1].weight.abs().sum(),
}


class Reading(nn.Module):
    """An island whose code reads parameters of the parts that it calls, and calls what is in them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer, self.block, self.way = nn.Linear(6, 6), Block(), way
        self.several = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x):
        if float(x.sum()) > 1e9:
            return x
        return READING[self.way](self, x)


@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.parametrize("way", READING)
def test_an_island_reads_the_float_parameters_of_what_it_calls(way, qat, tmp_path):
    """Integer models lacked them, or had int8 weights; what was called inside a part took floats for integers."""
    torch.manual_seed(0)
    model, x = Reading(way).eval(), torch.randn(9, 6)
    with torch.no_grad():
        wanted = model(x)
    prepared = fxquant.prepare(model, x, qat=qat)
    if qat:
        optimizer = torch.optim.SGD(prepared.train().parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            (prepared(x) - wanted).square().mean().backward()
            optimizer.step()
        prepared.eval()
    else:
        fxquant.calibrate(prepared, [x], progress=False)
    with torch.no_grad():
        found, frozen = prepared(x), fxquant.freeze(prepared)
        assert 10 * torch.log10(wanted.pow(2).mean() / (found - wanted).pow(2).mean()) > (15 if qat else 30)
        integer = fxquant.convert(prepared)
        fxquant.save(integer, tmp_path / "q.pt")
        for other in (frozen, integer, fxquant.load(model, tmp_path / "q.pt")):
            assert 10 * torch.log10(found.pow(2).mean() / (other(x) - found).pow(2).mean()) > 60
    assert fxquant.coverage(integer).macs_share > 0.5


def test_an_integer_layer_is_not_called_with_real_numbers():
    """It took them for integers, without a word."""
    torch.manual_seed(0)
    x = torch.randn(9, 6)
    integer = fxquant.quantize(Block().eval(), [x], progress=False)
    with pytest.raises(
        LevelError, match="linear takes the integers that its graph hands it, and was given real numbers"
    ):
        integer.first(x)


def test_a_layer_that_two_parts_of_an_island_share_stays_in_both_graphs():
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Block(), Block()
            self.other.first = self.one.first

        def forward(self, x):
            return x if float(x.sum()) > 1e9 else self.one(x) + self.other(x)

    torch.manual_seed(0)
    prepared = fxquant.prepare(Sharing().eval(), torch.randn(4, 6))
    assert set(graphs_of(prepared)) == {"one", "other"}
