"""What must hold under every rule alike: weights that are not finite, half precision, moves and copies, shared weights."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.calibration import activation_quantizers
from fxquant.errors import CalibrationError, InputError
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.quantizers import RULES

PER_LAYER = ("dorefa", "inq", "kmeans")
TWO_BITS = ("xnor", "bnn", "twn", "ttq")
WITH_WEIGHTS = [name for name, rule in RULES.items() if rule.weight is not None]
WITH_INTEGERS = [name for name in WITH_WEIGHTS if RULES[name].simulates is None]
ESTIMATORS = ["minmax", "mse", "lp:2", "percentile", "moving_average", "auto"]


def weight_scheme(rule: str, **others: Any) -> Scheme:
    usual = {"bits": 2 if rule in TWO_BITS else 4, "per_channel": rule not in PER_LAYER, "quantizer": rule}
    return Scheme.weight(**{**usual, **others})


def prepared_with(model: nn.Module, x: Tensor, scheme: Scheme, activation: Scheme | None = None, **options: Any) -> Any:
    return fxquant.prepare(
        model, x, recipe=Recipe({}, default=Setting(weight=scheme, activation=activation)), **options
    )


def calibrated(model: nn.Module, x: Tensor, scheme: Scheme, activation: Scheme | None = None, **options: Any) -> Any:
    return fxquant.calibrate(prepared_with(model, x, scheme, activation, **options), [x], progress=False)


def first_of(prepared: Any) -> Any:
    """The quantizer of the model's input."""
    return next(iter(activation_quantizers(prepared).values()))


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)), torch.randn(4, 3, 8, 8)


def train(model: Any, inputs: list[Tensor], lr: float = 0.01, after: Any = lambda: None) -> Any:
    optimizer = torch.optim.SGD(fxquant.parameter_groups(model.train()), lr=lr)
    for x in inputs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        after()
    return model


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rule", WITH_WEIGHTS)
def test_a_weight_that_is_not_finite_is_refused_by_name(rule: str, bad: float) -> None:
    """BNN, DoReFa, TQT and WRPN shipped it in silence; the others blamed the quantizer."""
    model, x = small()
    prepared = calibrated(model, x, weight_scheme(rule))
    with torch.no_grad():
        prepared.get_submodule("3").weight[1, 3] = bad
    for verb in (lambda: fxquant.calibrate(prepared, [x], progress=False), lambda: fxquant.convert(prepared)):
        with pytest.raises(CalibrationError, match="weight of 3 holds NaN or infinity"):
            verb()


@pytest.mark.parametrize("name", ["3.bias", "0.bias", "1.running_var", "1.weight", "0.weight_quantizer.step"])
def test_whatever_ships_is_finite(name: str) -> None:
    """A bias of NaN became a weight scale of 1."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)),
        torch.randn(4, 3, 8, 8),
    )
    prepared = calibrated(model, x, weight_scheme("lsq"), qat=True)
    (dict(prepared.named_parameters()) | dict(prepared.named_buffers()))[name].data.view(-1)[0] = float("nan")
    path, _, tensor = name.partition(".")
    with pytest.raises(CalibrationError, match=f"the {tensor} of {path} holds NaN"):
        fxquant.convert(prepared)


def test_a_parameter_of_a_functional_call_is_named_and_a_mask_of_infinities_is_none() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.first = nn.Parameter(torch.randn(5, 5)), nn.Linear(5, 5)
            self.register_buffer("mask", torch.zeros(5).index_fill(0, torch.tensor([2]), float("-inf")))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.first(x), self.w), self.first(x) + self.mask

    torch.manual_seed(0)
    x = torch.randn(4, 5)
    recipe = Recipe({"add": None}, default=Setting(weight=weight_scheme("bnn")))
    prepared = fxquant.calibrate(fxquant.prepare(Own(), x, recipe=recipe), [x], progress=False)
    fxquant.convert(prepared)
    prepared.w.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="the weight of linear holds NaN"):
        fxquant.convert(prepared)


def test_an_integer_model_loads_into_one_whose_weights_are_not_finite(tmp_path: Path) -> None:
    """They may be anything, as those of a model that was only allocated are."""
    model, x = small()
    integer = fxquant.convert(calibrated(model, x, weight_scheme("observed")))
    fxquant.save(integer, tmp_path / "q.pt")
    empty, _ = small()
    for parameter in empty.parameters():
        parameter.data.fill_(float("nan"))
    with torch.no_grad():
        assert torch.equal(fxquant.load(empty, tmp_path / "q.pt")(x), integer(x))
    assert all(bool(parameter.isnan().all()) for parameter in empty.parameters())


def grid_of(prepared: Any, path: str) -> tuple[Tensor, Tensor]:
    """The scales of a layer's weight and its integers, as the frozen model has them."""
    part = fxquant.freeze(prepared).get_submodule(path)
    scale = part.weight_quantizer.scale
    return scale, torch.round(part.weight.float() / scale.reshape(-1, *[1] * (part.weight.ndim - 1)))


@pytest.mark.parametrize(
    ("rule", "estimator"),
    [(rule, None) for rule in WITH_INTEGERS] + [(r, e) for r in ("observed", "lsq", "tqt") for e in ESTIMATORS],
)
@pytest.mark.parametrize(("per_channel", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_half_precision_weight_has_the_grid_of_its_float32_copy(
    rule: str, estimator: str | None, per_channel: bool, dtype: torch.dtype
) -> None:
    """The same numbers, so the same grid to the last bit; no rule but ``observed`` could be converted at all."""
    per_channel = per_channel and rule not in PER_LAYER
    torch.manual_seed(0)
    half, x = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False)).to(dtype), torch.randn(4, 3, 8, 8).to(dtype)
    single = copy.deepcopy(half).float()
    scheme = weight_scheme(rule, per_channel=per_channel, **({} if estimator is None else {"estimator": estimator}))
    activation = Scheme.activation(8, estimator=estimator or "minmax")
    ours, wanted = (calibrated(m, d, scheme, activation) for m, d in ((half, x), (single, x.float())))
    for own, other in zip(grid_of(ours, "0"), grid_of(wanted, "0"), strict=True):
        assert own.dtype == torch.float32 and torch.equal(own, other)
    own, other = (first_of(p).grid for p in (ours, wanted))
    assert torch.equal(own.scale, other.scale) and torch.equal(own.zero_point, other.zero_point)
    integers = [fxquant.convert(p).get_submodule("0").weight for p in (ours, wanted)]
    assert torch.equal(*integers) and integers[0].dtype == torch.int8


@pytest.mark.parametrize("rule", ["lsq", "lsq+", "ewgs", "tqt", "wrpn", "stochastic"])
@pytest.mark.parametrize("bits", [12, 16])
def test_weights_of_up_to_sixteen_bits_convert_under_every_rule_that_has_them(rule: str, bits: int) -> None:
    """A multiple of 2^15 steps is off by more than a thousandth of one in float32, and was refused."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 64, 3)), torch.randn(4, 3, 8, 8)
    with torch.no_grad():  # a scale that is no power of two, and weights at the ends of the grid
        model[0].weight[:, 0, 0, 0] = model[0].weight.abs().amax((1, 2, 3)) * 1.3
    prepared = calibrated(model, x, weight_scheme(rule, bits=bits))
    integer = fxquant.convert(prepared, kernels="reference")
    weight = integer.get_submodule("0").weight
    assert weight.dtype == torch.int16 and int(weight.abs().max()) > 2 ** (bits - 4)
    with torch.no_grad():
        torch.testing.assert_close(integer(x), prepared(x), rtol=1e-4, atol=1e-4)  # float32 sums of 27 products


class Net(nn.Module):
    """A shared grid (max_pool), a depthwise layer, a sum, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.deep, self.fc = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Linear(64, 5)
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = F.max_pool2d(self.deep(x) + x, 2)
        x = torch.relu(self.fc(x.flatten(1)))
        return self.two(torch.relu(self.one(x)))


def inputs(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(8, 3, 8, 8, generator=generator) for _ in range(count)]


def trained_net(rule: str) -> tuple[Any, Any]:
    """A prepared model after some steps, and the average of it."""
    torch.manual_seed(0)
    weights, tensors = (getattr(RULES[rule], kind) is not None for kind in ("weight", "tensor"))
    activation = Scheme.activation(8, quantizer=rule if tensors else "observed")
    scheme = weight_scheme(rule if weights else "observed")
    prepared = prepared_with(Net().train(), inputs(1)[0], scheme, activation, qat=True)
    average = AveragedModel(prepared, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    train(prepared, inputs(4), after=lambda: average.update_parameters(prepared))
    return prepared.eval(), average.module.eval()


def numbers_of(model: nn.Module) -> dict[str, Tensor]:
    """Every number that a quantizer keeps."""
    return {
        f"{path}.{name}": value.detach().clone()
        for path, part in model.named_modules()
        if isinstance(part, FakeQuantize)
        for name, value in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "rule", ["observed", "xnor", "twn", "dorefa", "wrpn", "lsq", "lsq+", "pact", "tqt", "stochastic"]
)
def test_a_move_to_another_type_leaves_grids_and_integers(rule: str, dtype: torch.dtype) -> None:
    """Weights are rounded to the type first: what is left to differ is the grids', which were rounded too."""
    for model in trained_net(rule):
        with torch.no_grad():
            for name, value in (*model.named_parameters(), *model.named_buffers()):
                if "quantizer" not in name and value.is_floating_point():
                    value.copy_(value.to(dtype))
        before = numbers_of(copy.deepcopy(model).to(torch.float32))  # settled, as what a move leaves is
        moved = copy.deepcopy(model).to(dtype)
        for name, value in numbers_of(moved).items():
            assert value.dtype == before[name].dtype, name
            assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name
        assert moved(inputs(1)[0].to(dtype)).dtype == dtype
        wanted = fxquant.convert(model).state_dict()
        for other in (moved, copy.deepcopy(moved).float(), pickle.loads(pickle.dumps(moved))):
            found = fxquant.convert(other).state_dict()
            for name, value in wanted.items():
                if value.dtype == torch.int8:
                    assert torch.equal(found[name], value), name


def test_a_learned_range_is_learned_in_a_model_in_half_precision() -> None:
    """Its parameter stays float32, where a step of the optimizer is not lost to rounding."""
    torch.manual_seed(0)
    prepared = prepared_with(
        Net().train(), inputs(1)[0], weight_scheme("lsq"), Scheme.activation(8, quantizer="lsq"), qat=True
    )
    prepared.to(torch.bfloat16)
    steps = {name: value for name, value in prepared.named_parameters() if name.endswith(".step")}
    train(prepared, [x.to(torch.bfloat16) for x in inputs(2)], lr=1e-3)
    before = {name: value.detach().clone() for name, value in steps.items()}
    train(prepared, [x.to(torch.bfloat16) for x in inputs(2)], lr=1e-3)
    assert steps and all(value.dtype == torch.float32 for value in steps.values())
    assert all(not torch.equal(value, before[name]) for name, value in steps.items())


def holders(model: nn.Module) -> list[list[str]]:
    """The names of each quantizer that has several."""
    found: dict[int, list[str]] = {}
    for path, part in model.named_modules(remove_duplicate=False):
        if isinstance(part, FakeQuantize):
            found.setdefault(id(part), []).append(path)
    return sorted(names for names in found.values() if len(names) > 1)


def test_copies_and_moves_share_what_the_model_shares() -> None:
    prepared, average = trained_net("lsq")
    shared = holders(prepared)
    assert ["one.weight_quantizer", "two.weight_quantizer"] in shared and len(shared) > 1
    copies = [copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared)), copy.deepcopy(prepared).half(), average]
    for other in copies:
        assert holders(other) == shared
        one, two = other.one, other.two
        assert one.weight is two.weight and one.weight_quantizer is two.weight_quantizer


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.a(F.relu(self.a(x)))))


class Tied(nn.Module):
    """Two layers with one weight, and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


class Mixed(Twice):
    """A layer whose weight a functional call reads too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(F.linear(F.relu(self.a(x)), self.a.weight)))


@pytest.mark.parametrize("kind", [Twice, Tied, Mixed])
@pytest.mark.parametrize("rule", WITH_WEIGHTS)
def test_a_shared_weight_is_rounded_once(rule: str, kind: type[nn.Module]) -> None:
    """Two layers with one weight learned two grids, and stochastic rounding drew twice: two integer tensors for one."""
    torch.manual_seed(0)
    prepared = prepared_with(kind(), torch.rand(8, 6), weight_scheme(rule), qat=True)
    seen: list[Tensor] = []
    for part in {part for part in prepared.modules() if isinstance(part, WeightQuantize)}:
        part.register_forward_hook(lambda _, args, y: seen.append(y.detach()) if y.shape == (6, 6) else None)
    generator = torch.Generator().manual_seed(2)
    train(prepared, [torch.rand(8, 6, generator=generator) for _ in range(4)], lr=0.1)
    assert len(seen) == 8 and all(torch.equal(seen[i], seen[i + 1]) for i in range(0, 8, 2))
    if rule == "stochastic":
        assert not torch.equal(seen[0], seen[2])
    for part in prepared.modules():
        part._forward_hooks.clear()
    if RULES[rule].simulates is None:
        integers = [
            b for b in fxquant.convert(prepared.eval()).buffers() if b.dtype == torch.int8 and b.shape == (6, 6)
        ]
        assert integers and all(torch.equal(other, integers[0]) for other in integers)


def test_layers_with_one_weight_and_two_schemes_keep_both() -> None:
    torch.manual_seed(0)
    recipe = Recipe({"b": Setting(weight=Scheme.weight(8))}, default=Setting(weight=Scheme.weight(4)))
    prepared = fxquant.calibrate(
        fxquant.prepare(Tied(), torch.rand(8, 6), recipe=recipe), [torch.rand(8, 6)], progress=False
    )
    assert [prepared.a.weight_quantizer.scheme.bits, prepared.b.weight_quantizer.scheme.bits] == [4, 8]
    fxquant.convert(prepared)


def test_gradients_of_a_shared_stochastic_weight_are_those_of_one_rounding() -> None:
    """∂L/∂w of both calls, with the rounded weight held: the straight-through sum, by plain torch in float64."""
    torch.manual_seed(0)
    prepared = prepared_with(Twice(), torch.rand(8, 6), weight_scheme("stochastic"), qat=True)
    x, seen = torch.rand(8, 6), list[Tensor]()
    own = next(part for part in prepared.modules() if isinstance(part, WeightQuantize) and part.is_shared)
    hook = own.register_forward_hook(lambda _, args, y: seen.append(y.detach()))
    with fxquant.quantizers_off(prepared):
        own.enabled = True
        prepared.train()(x).square().mean().backward()
    hook.remove()
    w = seen[0].double().requires_grad_()
    a, b, out = (
        prepared.a.bias.detach().double(),
        prepared.out.weight.detach().double(),
        prepared.out.bias.detach().double(),
    )
    F.linear(F.relu(F.linear(F.relu(F.linear(x.double(), w, a)), w, a)), b, out).square().mean().backward()
    inside = (prepared.a.weight / own.scale[:, None]).abs() <= own.scheme.qmax + 0.5
    torch.testing.assert_close(prepared.a.weight.grad.double(), w.grad * inside, rtol=1e-4, atol=1e-6)


def test_recovered_roundings_of_layers_with_one_weight_leave_each_its_bias() -> None:
    """One quantizer pins one bias: of two layers with different ones, the second had the first's."""
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.rand(64, 6)
    with torch.no_grad():
        model.b.bias.add_(3.0)
    prepared = fxquant.recover(calibrated(model, x, Scheme.weight(4)), [x], progress=False)
    with torch.no_grad():
        for verb in (lambda m: m, fxquant.freeze, fxquant.convert):
            exact, found = model(x).double(), verb(prepared)(x).double()
            assert float(10 * torch.log10(exact.square().mean() / (exact - found).square().mean())) > 25.0
    assert prepared.a.weight_quantizer.integers is not None


def test_a_file_from_before_layers_shared_a_quantizer_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.rand(64, 6)
    prepared = calibrated(model, x, weight_scheme("lsq"))
    fxquant.save(prepared, tmp_path / "new.pt")
    content = torch.load(tmp_path / "new.pt", weights_only=True)
    for name in [name for name in content["state"] if name.startswith("a.weight_quantizer")]:
        content["state"][name.replace("a.", "b.", 1)] = content["state"][name].clone()
    torch.save(content, tmp_path / "old.pt")
    with torch.no_grad():
        assert torch.equal(fxquant.load(model, tmp_path / "old.pt")(x), prepared(x))
    again = prepared_with(model, x, weight_scheme("lsq"))
    again.load_state_dict(content["state"])
    with torch.no_grad():
        assert torch.equal(again.eval()(x), prepared(x))


@pytest.mark.parametrize("rule", ["lsq", "lsq+", "tqt", "ewgs"])
def test_auto_chooses_where_a_learned_range_of_a_weight_starts(rule: str) -> None:
    """Of each channel the loss of the start, in float64 by plain torch, is the least among the candidates' starts."""
    from fxquant.numerics.affine import scale_and_zero_point
    from fxquant.numerics.ranges import ESTIMATOR

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False)), torch.randn(16, 3, 8, 8).pow(3)
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.sign() * model[0].weight.abs().pow(3) * 60)
    weight, scheme = model[0].weight.detach(), weight_scheme(rule, estimator="auto")
    own = calibrated(model, x, scheme, processor="vnni").get_submodule("0").weight_quantizer

    def loss(scale: Tensor) -> Tensor:
        s = scale.double().reshape(-1, 1, 1, 1)
        rounded = (weight.double() / s).round().clamp(scheme.qmin, scheme.qmax) * s
        return F.conv2d(x.double(), weight.double() - rounded).square().movedim(1, 0).flatten(1).sum(1)

    losses = []
    for name in ("minmax", "mse", "lp:2", "lp:4"):
        state = ESTIMATOR[name].initial_state(8)
        ESTIMATOR[name].update(state, weight, axis=0)
        scale, _ = scale_and_zero_point(*ESTIMATOR[name].range(state, scheme), scheme)
        losses.append(loss(torch.exp2(torch.log2(scale).ceil()) if rule == "tqt" else scale))
    found, table = loss(own.scale), torch.stack(losses)
    assert bool((found <= table.amin(0) * (1 + 1e-4)).all())  # float32 adds up what is float64 here
    if rule != "tqt":  # most candidates have one power of two
        assert bool((found < table[1] * (1 - 1e-3)).any())  # it is not the default, mse, everywhere


@pytest.mark.parametrize("rule", ["lsq", "lsq+", "pact", "tqt", "ewgs"])
def test_auto_chooses_where_a_learned_range_of_a_tensor_starts(rule: str) -> None:
    """The input of one layer: its output loses no more than with any other estimator, and less than with the default."""
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(16, 3, 8, 8).pow(3).abs()
    weight = model[0].weight.detach().double()
    losses = {}
    for name in ("auto", "minmax", "mse", "lp:2", "lp:4", "percentile:99.99", "percentile:99.9", "kl"):
        activation = Scheme.activation(4, quantizer=rule, estimator=name)
        own = first_of(calibrated(model, x, Scheme.weight(8), activation))
        with torch.no_grad():
            losses[name] = float(F.conv2d((x - own(x)).double(), weight).square().sum())
    others = [loss for name, loss in losses.items() if name != "auto"]
    assert losses["auto"] <= min(others) * (1 + 1e-4)  # float32 adds up what is float64 here
    assert losses["auto"] < max(others) * 0.99


def test_a_range_that_was_trained_is_not_chosen_anew() -> None:
    """A weight's learned range belongs to the optimizer once it has started; a second ``calibrate`` leaves it."""
    model, x = small()
    prepared = calibrated(model, x, weight_scheme("lsq", estimator="auto"), qat=True)
    train(prepared, [x, x])
    before = [prepared.get_submodule(name).weight_quantizer.step.detach().clone() for name in ("0", "3")]
    fxquant.calibrate(prepared, [x], progress=False)
    for name, step in zip(("0", "3"), before, strict=True):
        assert torch.equal(prepared.get_submodule(name).weight_quantizer.step, step)


@pytest.mark.parametrize("rule", ["observed", "lsq"])
def test_the_choice_of_auto_is_saved_by_name_and_averaged(rule: str, tmp_path: Path) -> None:
    """An average of numbers of estimators is the number of another: 6, six times 0.9 and so on, was cut to 5."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.randn(16, 3, 9, 9).pow(3)
    schemes = weight_scheme(rule, estimator="auto"), Scheme.activation(4, quantizer=rule, estimator="auto")
    prepared = calibrated(model, x, *schemes)
    state = prepared.state_dict()
    votes = {name: value for name, value in state.items() if name.endswith("range_auto")}
    assert len(votes) == 4 and all(torch.equal(value.sum(0), torch.ones_like(value[0])) for value in votes.values())
    assert any(int(value.argmax(0).max()) > 1 for value in votes.values())
    fresh = prepared_with(model, x, *schemes)
    fresh.load_state_dict(state)
    old = {name: value for name, value in state.items() if not name.endswith("range_auto")}
    old |= {name.replace("range_auto", "range_choice"): value.argmax(0) for name, value in votes.items()}
    older = prepared_with(model, x, *schemes)
    older.load_state_dict(old)
    fxquant.save(prepared, tmp_path / "auto.pt")
    content = torch.load(tmp_path / "auto.pt", weights_only=True)
    torch.save({**content, "state": old}, tmp_path / "old.pt")
    average = AveragedModel(prepared, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(5):
        average.update_parameters(prepared)
    others = [fresh, older, fxquant.load(model, tmp_path / "auto.pt"), fxquant.load(model, tmp_path / "old.pt")]
    for other in (*others, average.module):
        for name, value in other.state_dict().items():
            if name in votes:
                assert torch.equal(value.argmax(0), votes[name].argmax(0)), name
    with torch.no_grad():
        assert all(torch.equal(other.eval()(x), prepared(x)) for other in others)


def test_a_state_of_another_estimator_is_an_error_that_names_the_choice() -> None:
    model, x = small()
    saved = calibrated(model, x, weight_scheme("observed")).state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*range_auto"):
        prepared_with(model, x, weight_scheme("observed", estimator="auto")).load_state_dict(saved)


def test_sensitivity_rounds_by_the_rule_and_says_which_bits_it_cannot_hold() -> None:
    """It took any rule at other bits for ``observed``: DoReFa at 3 bits had 19.8 dB, and has -18.6."""
    model, x = small()
    prepared = calibrated(model, x, weight_scheme("dorefa", bits=2))
    found = fxquant.sensitivity(prepared, [x], bits=(2, 3, 5, 8), progress=False)
    layer = found["3"]
    assert set(layer.sqnr) == {2, 3, 5} and "'dorefa' of its weight has no 8 bits" in found.left_out["3 at 8 bits"]
    assert "'dorefa' of its weight has no 8 bits" in str(found) and "sqnr_8" in found.records()[0]
    hidden = F.relu(model[0](x)).flatten(1).double().detach()
    weight, bias = model[3].weight.detach().double(), model[3].bias.detach().double()
    exact = F.linear(hidden, weight, bias)
    for bits in (2, 3, 5):
        r = torch.tanh(weight) / (2 * torch.tanh(weight).abs().max()) + 0.5
        levels = 2**bits - 1
        y = F.linear(hidden, 2 * (r * levels).round() / levels - 1, bias)
        wanted = 10 * torch.log10(exact.square().sum() / (exact - y).square().sum())
        assert layer.sqnr[bits] == pytest.approx(float(wanted), abs=0.05)
    learned = calibrated(
        model, x, weight_scheme("lsq", bits=8), Scheme.activation(8, quantizer="lsq"), processor="vnni"
    )
    table = fxquant.sensitivity(learned, [x], bits=range(2, 17), progress=False)
    sqnr = [table["3"].sqnr[bits] for bits in range(2, 17)]
    assert sqnr == sorted(sqnr) and sqnr[-1] > 60 and not table.left_out
    binary = fxquant.sensitivity(calibrated(model, x, weight_scheme("xnor")), [x], bits=(8, 4), progress=False)
    for bits in (8, 4):
        assert "the quantizer rule 'xnor' of its weight" in binary.left_out[f"3 at {bits} bits"]
    assert all(layer.sqnr[4] > 0 for layer in binary.layers)


@pytest.mark.parametrize("rule", ["observed", "lsq", "tqt", "midrise", "twn"])
def test_gradients_of_torch_func_are_those_of_backward(rule: str) -> None:
    """In training mode too, where each call reads its own ranges and statistics; all buffers are afterwards as before."""
    prepared = trained_net(rule)[0].train()
    x, parameters = inputs(6)[-1], {name: value.detach() for name, value in prepared.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(prepared, values, (x,)).square().mean()

    def backward(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        model(x).square().mean().backward()
        return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    with pytest.warns(UserWarning, match="they stay as they are"):
        ways = [torch.func.grad(loss)(parameters)]
    for part in prepared.modules():
        if isinstance(part, FakeQuantize) and not isinstance(part, WeightQuantize):
            part.tracking = False
    fxquant.freeze_batchnorm(prepared)
    still = [torch.func.grad(loss)(parameters), torch.func.jacrev(loss)(parameters)]
    after = prepared.state_dict()
    changed = ("holds_statistics", "follows")
    assert all(torch.equal(value, after[name]) for name, value in before.items() if not name.endswith(changed))
    wanted = backward(prepared)
    assert len(wanted) > 4
    for found in still:
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    fxquant.freeze_batchnorm(prepared, False)
    prepared.load_state_dict(before)
    for name, gradient in backward(copy.deepcopy(prepared)).items():
        torch.testing.assert_close(ways[0][name], gradient, rtol=1e-4, atol=1e-6)


def test_other_transforms_say_the_way_out_and_it_is_right() -> None:
    prepared, x = trained_net("observed")[0].eval(), inputs(6)[-1]
    with pytest.raises(InputError, match=r"not vmap or jvp[\s\S]*quantizers_off"):
        torch.func.vmap(lambda image: prepared(image[None]))(x)
    with fxquant.quantizers_off(prepared):
        each = torch.func.vmap(lambda image: prepared(image[None])[0])(x)
        torch.testing.assert_close(each, prepared(x), rtol=1e-4, atol=1e-6)


def test_functional_call_leaves_a_quantizer_that_layers_share_as_it_was() -> None:
    """torch put its own argument back where one module has two names, and the optimizer trained another tensor."""
    prepared = trained_net("lsq")[0].train()
    before = dict(prepared.named_parameters())
    values = {name: value.detach().clone() for name, value in before.items()}
    torch.func.functional_call(prepared, values, (inputs(6)[-1],))
    after = dict(prepared.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is value for name, value in before.items())
