"""No verb touches the model that it is given: bytes, attributes, classes, hooks and outputs are what they were."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from awkward import AWKWARD
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from trap_inputs import images, normal, rows, tokens
from traps import TRAPS

import fxquant
from fxquant.errors import FxquantError
from fxquant.nn.fake_quantize import FakeQuantize

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_HOOKS = tuple(name for name in nn.Module().__dict__ if name.endswith("hooks"))


def _plain(value: Any) -> Any:
    """What can be told of an attribute's value: who it is, and for tensors and containers what they hold."""
    if isinstance(value, Tensor):
        numbers = (value.data_ptr(), value.detach().clone()) if value.layout is torch.strided else ()
        grad = _plain(value.grad) if value.is_leaf else None
        return (id(value), type(value), value.dtype, tuple(value.shape), value.requires_grad, grad, *numbers)
    if isinstance(value, (list, tuple, set)):
        return (id(value) if isinstance(value, list) else None, type(value), [_plain(v) for v in value])
    if isinstance(value, dict):
        return (id(value), type(value), [(k, _plain(v)) for k, v in value.items()])
    return (id(value), type(value))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a verb could have changed in ``model``, by where it stands."""
    found: dict[str, Any] = {}
    for path, part in model.named_modules(remove_duplicate=False):
        found[f"{path} itself"] = (id(part), type(part))
        found[f"{path} mode"] = part.training
        for kind in type(part).__mro__:
            if not kind.__module__.startswith("torch.nn.modules"):
                own = {name: id(value) for name, value in vars(kind).items() if name != "__slotnames__"}  # deepcopy's
                found[f"{path} class {kind.__name__}"] = own
        for name, value in part.__dict__.items():
            held = {k: id(v) for k, v in value.items()} if name in _HOOKS and value is not None else _plain(value)
            found[f"{path}.{name}"] = held
    return found


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """The places where two snapshots differ."""
    if type(before) is not type(after):
        yield where
    elif isinstance(before, Tensor):
        if not (before.shape == after.shape and before.dtype == after.dtype and bool(_same(before, after))):
            yield where
    elif isinstance(before, dict):
        yield from (f"{where} {key}" for key in before.keys() ^ after.keys())
        for key in before.keys() & after.keys():
            yield from differences(before[key], after[key], f"{where} {key}")
    elif isinstance(before, (list, tuple)):
        if len(before) != len(after):
            yield where
        for i, (a, b) in enumerate(zip(before, after, strict=False)):
            yield from differences(a, b, f"{where}[{i}]")
    elif before != after:
        yield where


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))


def outputs(model: nn.Module, inputs: Any) -> Any:
    """What a copy of ``model`` gives, or the class of what it raises; generators stand where they stood."""
    state = torch.get_rng_state()
    torch.manual_seed(11)
    try:
        kept = [v for part in model.modules() for v in part.__dict__.values() if isinstance(v, Tensor) and v.grad_fn]
        taken = copy.deepcopy(model, {id(t): t.detach().clone() for t in kept})
        given = copy.deepcopy(inputs)
        with torch.no_grad():
            result = taken(**given) if isinstance(given, dict) else taken(*given)
        return _numbers(result)
    finally:
        torch.set_rng_state(state)


def _numbers(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {str(k): _numbers(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers(v) for v in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: _numbers(getattr(value, name)) for name in value.__dataclass_fields__}
    return str(value)


def all_verbs(model: nn.Module, inputs: Any, check: Callable[[str], None], tmp_path: Any) -> None:
    """Run every verb on ``model``; ``check`` is told of each that has run."""
    forward = lambda m, given: m(**given) if isinstance(given, dict) else m(*given)  # noqa: E731
    for qat in (False, True):
        kind = "qat" if qat else "ptq"
        prepared = fxquant.prepare(model, inputs, qat=qat, verify=True)
        check(f"prepare, {kind}")
        fxquant.calibrate(prepared, [copy.deepcopy(inputs)], forward=forward, progress=False)
        check(f"calibrate, {kind}")
        integer = fxquant.convert(prepared)
        check(f"convert, {kind}")
        with torch.no_grad():
            forward(integer, copy.deepcopy(inputs))
        check(f"a call, {kind}")
        str(fxquant.coverage(integer))
        fxquant.save(prepared, tmp_path / "prepared.pt")
        fxquant.load(model, tmp_path / "prepared.pt")
        check(f"save and load, {kind}")
    str(fxquant.diff(model, prepared))
    check("diff")
    for parameter in prepared.parameters():
        if parameter.is_floating_point():
            parameter.grad = torch.ones_like(parameter)
    if list(prepared.parameters()):
        torch.optim.SGD(prepared.parameters(), lr=0.1).step()
    check("a step of training")
    fxquant.quantize(model, [copy.deepcopy(inputs)], example_inputs=inputs, forward=forward, progress=False)
    check("quantize")


def assert_untouched(model: nn.Module, inputs: Any, tmp_path: Any, *, may_refuse: bool = False) -> None:
    """Compare after every verb; where one may refuse, with an error of ours, after that too."""
    before, given = snapshot(model), snapshot_of_inputs(inputs)
    expected = outputs(model, inputs)

    def check(verb: str) -> None:
        changed = list(differences(before, snapshot(model))) + list(differences(given, snapshot_of_inputs(inputs)))
        assert not changed, f"{verb} has changed {changed[:5]}"
        assert not list(differences(expected, outputs(model, inputs))), f"after {verb} the model gives something else"

    try:
        all_verbs(model, inputs, check, tmp_path)
    except FxquantError:
        check("the verb that refused")
        if not may_refuse:
            raise


def snapshot_of_inputs(inputs: Any) -> Any:
    return _plain(inputs)


class Parametrized(nn.Module):
    """One layer under ``wrap``, one plain, and one class of parametrized layer twice."""

    def __init__(self, wrap: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.conv = wrap(nn.Conv2d(3, 6, 3))
        self.a, self.b = wrap(nn.Linear(6, 6)), wrap(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(torch.relu(self.conv(x)).mean((2, 3)))))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def _own(layer: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    return layer


def _old(wrap: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def quietly(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and models still have it
            return wrap(layer)

    return quietly


def _pruned(layer: nn.Module) -> nn.Module:
    prune.random_unstructured(layer, "weight", 0.3)
    return prune.ln_structured(layer, "weight", 0.2, n=2, dim=0)


class RunsOfItsOwn(nn.Module):
    """Keeps what it sees: in a buffer, in a plain tensor, in a private dict, in a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("past", torch.zeros(4))
        self.plain, self._cache, self.calls = torch.zeros(4), dict[str, Tensor](), 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) + self.past + self.plain
        self.past.copy_(y[0].detach())
        self.plain.mul_(0.5).add_(y[0].detach())
        self._cache["last"] = y.detach()
        self.calls += 1
        return y


WRAPPED: dict[str, Callable[..., nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own parametrization": _own,
    "old weight norm": _old(nn.utils.weight_norm),
    "old spectral norm": _old(nn.utils.spectral_norm),
    "pruned": _pruned,
}
MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    **{name: (functools.partial(Parametrized, wrap), images(2)) for name, wrap in WRAPPED.items()},
    "state of its own": (RunsOfItsOwn, rows(2)),
}
FEW = ("nested",)
FEW_TRAPS = ("carried state", "hook that records", "value gate inside")
MODELS |= {name: (AWKWARD[name][0], AWKWARD[name][1](2)) for name in FEW}
MODELS |= {f"trap: {name}": (TRAPS[name].model, TRAPS[name].inputs(4)) for name in FEW_TRAPS}
REFUSED = ("if sum positive", "split by list", "packed lstm", "named tuples", "dataclass in and out",
           "self attention weights")  # fmt: skip
"""``load`` knows inputs by shape and dtype alone; scores masked with -inf in ``baddbmm`` have no range."""
SLOW = ("spectral norm", "orthogonal", "old weight norm")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in SLOW else n for n in MODELS])
def test_no_verb_touches_the_users_model(name, tmp_path):
    torch.manual_seed(5)
    build, inputs = MODELS[name]
    assert_untouched(build().eval(), inputs, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", [n for n in AWKWARD if n not in FEW])
def test_no_verb_touches_an_awkward_model(name, tmp_path):
    torch.manual_seed(5)
    build, inputs = AWKWARD[name]
    assert_untouched(build().train(), inputs(2), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", [n for n in TRAPS if n not in FEW_TRAPS and not TRAPS[n].overwrites])
def test_no_verb_touches_a_trap(name, tmp_path):
    torch.manual_seed(5)
    assert_untouched(TRAPS[name].model().eval(), TRAPS[name].inputs(4), tmp_path, may_refuse=name in REFUSED)


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_tiny"])
def test_no_verb_touches_a_model_of_the_zoo(name, tmp_path):
    assert_untouched(zoo.build(name).train(), (zoo.images(2),), tmp_path)


def test_the_comparison_sees_each_kind_of_change():
    model = MODELS["old weight norm"][0]()
    changes: dict[str, Callable[[], Any]] = {
        "a byte": lambda: model.b.bias.data.view(-1)[0].add_(1),
        "an attribute": lambda: setattr(model, "extra", 1),
        "a mode": lambda: model.conv.eval(),
        "a class": lambda: setattr(model.a, "__class__", type("Linear", (nn.Linear,), {})),
        "a hook": lambda: model.conv.register_forward_hook(lambda *_: None),
        "a gradient": lambda: setattr(model.conv.bias, "grad", torch.ones(6)),
        "a flag": lambda: model.conv.bias.requires_grad_(False),
        "another tensor": lambda: setattr(model.b, "bias", nn.Parameter(model.b.bias.detach().clone())),
        "a method of its class": lambda: setattr(Parametrized, "more", 1),
    }
    for name, change in changes.items():
        before = snapshot(model)
        change()
        assert list(differences(before, snapshot(model))), name
    del Parametrized.more


@pytest.mark.parametrize("name", WRAPPED)
def test_computed_weights_are_quantized_and_the_float_models(name):
    torch.manual_seed(5)
    model, x = Parametrized(WRAPPED[name]).eval(), images(8)[0]
    prepared = fxquant.prepare(model, x, verify=True)
    with fxquant.quantizers_off(prepared), torch.no_grad():
        torch.testing.assert_close(prepared(x), model(x), rtol=1e-5, atol=1e-6)
    assert fxquant.coverage(prepared).require(1.0).macs_share == 1.0
    fxquant.calibrate(prepared, [x], progress=False)
    with torch.no_grad():
        wanted, got = model(x), fxquant.convert(prepared)(x)
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()


# State that the model keeps while it runs.


def stream() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return RunsOfItsOwn().eval(), [normal(2, 4, seed=seed) for seed in range(3)]


def state_of(prepared: nn.Module) -> dict[str, Any]:
    """The state that is not a quantizer's, and what the model keeps beside its state dict."""
    kept = {k: v.clone() for k, v in prepared.state_dict().items() if "quantizer" not in k}
    return {**kept, "plain": prepared.plain.clone(), "cache": dict(prepared._cache), "calls": prepared.calls}


def test_calibrate_leaves_the_models_state():
    model, batches = stream()
    prepared = fxquant.prepare(model, batches[0])
    before = state_of(prepared)
    fxquant.calibrate(prepared, batches, progress=False)
    assert not list(differences(before, state_of(prepared)))
    assert all(q.ready for q in fxquant.calibration.activation_quantizers(prepared).values())
    integer = fxquant.convert(prepared)
    with torch.no_grad():
        first, wanted = integer(batches[0]), copy.deepcopy(model)(batches[0])
    assert (first - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_calibrate_leaves_the_models_state_where_a_batch_fails():
    model, batches = stream()
    prepared = fxquant.prepare(model, batches[0])
    before = state_of(prepared)
    with pytest.raises(RuntimeError):
        fxquant.calibrate(prepared, [*batches, torch.zeros(2, 5)], progress=False)
    assert not list(differences(before, state_of(prepared)))


class Leaking(nn.Module):
    """A sum of all that it was given, read before and after it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("sum", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        before = self.fc(x) * self.sum
        self.sum.add_(x[0].detach())
        return self.fc(x + self.sum) - before


def test_state_runs_on_while_calibrating():
    """Batches are one stream: ranges are those of a model that remembers."""
    torch.manual_seed(0)
    x, model = torch.ones(1, 4), Leaking().eval()
    prepared = fxquant.calibrate(fxquant.prepare(model, x), [x] * 4, progress=False)
    highs = [float(q.range_state()["high"].max()) for q in prepared.modules()
             if isinstance(q, FakeQuantize) and q.range_state() and q.range_state()["high"].ndim == 0]  # fmt: skip
    assert max(highs) == 5.0 and not prepared.sum.any()


def test_a_buffer_is_read_as_it_stands():
    """One that is read before and after it is written has two values in one call."""
    torch.manual_seed(0)
    model, batches = Leaking().eval(), [normal(2, 4, seed=seed) for seed in range(4)]
    prepared = fxquant.calibrate(fxquant.prepare(model, batches[0], verify=True), batches, progress=False)
    frozen, integer = fxquant.freeze(prepared), fxquant.convert(prepared)
    with torch.no_grad():
        for x in batches:
            wanted, exact, got = model(x), frozen(x), integer(x)
            assert (exact - wanted).abs().max() < 0.05 * wanted.abs().max()
            assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert (integer.sum - model.sum).abs().max() < 0.05 * model.sum.abs().max()


class Streaming(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 5)
        self.register_buffer("past", torch.zeros(1, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.past, x], -1)
        self.past.copy_(y[..., -4:])
        return self.conv(y)


class Counting(nn.Module):
    """A graph whose batch norm, momentum statistics and counter are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        self.seen += 1
        self.mean.lerp_(y.detach().mean((0, 1)), 0.5)
        return torch.relu(y - self.mean)


class ListOfStates(nn.Module):
    """Keys and values of the past in a list of tensors, written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.cache = [torch.zeros(4, 8), torch.zeros(4, 8)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        for kept in self.cache:
            kept.copy_(kept.roll(1, 0) + y[0].detach())
        return y + self.cache[1]


@pytest.mark.parametrize(
    ("build", "inputs"),
    [(Streaming, (normal(1, 4, 16),)), (Counting, tokens(2)), (ListOfStates, tokens(2))],
    ids=["streaming", "counting", "list of states"],
)
def test_the_first_chunk_is_the_float_models(build, inputs):
    torch.manual_seed(0)
    model = build().eval()
    pristine = copy.deepcopy(model)
    prepared = fxquant.calibrate(fxquant.prepare(model, inputs, verify=True), [inputs] * 4, progress=False)
    integer = fxquant.convert(prepared)
    for path, buffer in pristine.named_buffers():
        assert torch.equal(integer.get_buffer(path), buffer), path
    with torch.no_grad():
        wanted, got = pristine(*inputs), integer(*inputs)
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()
