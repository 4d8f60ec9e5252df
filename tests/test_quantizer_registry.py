"""Quantizer rules and range estimators of a user's own: entered from outside, used everywhere, or refused with a reason."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.errors import CheckpointError, LevelError, RecipeError, Refusal, SchemeError
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.numerics.gradients import fake_quantize
from fxquant.numerics.ranges import ESTIMATOR, MinMax
from fxquant.numerics.scheme import ESTIMATORS, QUANTIZERS
from fxquant.quantizers import RULES, register, register_estimator, rule_of
from fxquant.quantizers.learned import LearnedTensor, LearnedWeight
from fxquant.tuning.placing import place_again

X = torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What a test registers is gone after it."""
    kept = [dict(RULES), dict(QUANTIZERS), dict(ESTIMATOR)]
    names = list(ESTIMATORS)
    yield
    for registry, before in zip((RULES, QUANTIZERS, ESTIMATOR), kept, strict=True):
        registry.clear()
        registry.update(before)
    ESTIMATORS[:] = names


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.second, self.free = nn.Conv2d(8, 8, 1), nn.Parameter(torch.randn(5, 8, 1, 1) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.bn(self.first(x))), 2)
        x = torch.sigmoid(self.second(x)) + x
        return F.conv2d(x, self.free).flatten(1)


class ThreeSigmaTensor(FakeQuantize):
    """Follows three standard deviations of what passes: a rule with state of its own and no gradient."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.register_buffer("spread", torch.zeros(()))

    def forward(
        self,
        x: Tensor,
        lower: float | None = None,
        upper: float | None = None,
        inplace: bool = False,
        observes: bool = True,
    ) -> Tensor:
        if observes and self.enabled and (self.observing or (self.training and self.tracking)):
            with torch.no_grad():
                self.spread.copy_(3 * x.float().square().mean().sqrt())
                if not self.observing:
                    self.update_scale()
        if not self.active:
            return x
        return fake_quantize(
            x, self.scale, self.zero_point, self.scheme.qmin, self.scheme.qmax, lower=lower, upper=upper
        )

    def update_scale(self) -> None:
        if bool(self.spread > 0):
            self.set_range(-self.spread, self.spread)


class RoundedUp(WeightQuantize):
    """Rounds weights away from zero."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        self.refresh(x)
        scale = self.scale.reshape(-1, *[1] * (x.ndim - 1))
        q = torch.clamp(x.abs().div(scale).sub(1e-4).ceil(), max=self.scheme.qmax) * x.sign()
        return q.detach() * scale + (x - x.detach())


class RoundedUpByHook(WeightQuantize):
    """The same, in the one method that says how numbers come on the grid."""

    def rounded(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return RoundedUp.forward(self, x)


class HalfLearned(LearnedWeight):
    """Another parametrization of a learned range."""

    def encode(self, scale: Tensor) -> Tensor:
        return scale.log()

    def decode(self, step: Tensor) -> Tensor:
        return step.exp()


class HalfLearnedTensor(LearnedTensor):
    encode, decode = HalfLearned.encode, HalfLearned.decode


def recipe(tensor: str, weight: str, bits: int = 6, **others: Any) -> Recipe:
    return Recipe(
        default=Setting(
            weight=Scheme.weight(bits, quantizer=weight), activation=Scheme.activation(bits, quantizer=tensor, **others)
        )
    )


def model() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def train(prepared: Any, steps: int = 4) -> None:
    optimizer = torch.optim.SGD(prepared.parameters(), 0.02)
    prepared.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (prepared(X) - 1).square().mean().backward()
        optimizer.step()


def decibels(found: Tensor, wanted: Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum().clamp(min=1e-30)))


OWN = {
    "sigma": {"tensor": ThreeSigmaTensor, "weight": RoundedUp},
    "half": {"tensor": HalfLearnedTensor, "weight": HalfLearned},
}


@pytest.mark.parametrize("name", OWN)
def test_a_rule_from_outside_is_used_everywhere(name, tmp_path):
    register(name, **OWN[name])
    prepared = fxquant.prepare(model(), X, qat=True, recipe=recipe(name, name))
    kinds = [type(q) for q in prepared.modules() if isinstance(q, FakeQuantize) and q.fixed_range is None]
    assert set(kinds) == set(OWN[name].values()), kinds
    assert f" {name}" in str(fxquant.diff(model(), prepared)) and name in str(prepared.first.weight_quantizer)
    train(prepared)
    fxquant.reestimate_batchnorm(prepared, [X])
    prepared.eval()
    with torch.no_grad():
        wanted = prepared(X)
        frozen, integer = fxquant.freeze(prepared), fxquant.convert(prepared)
        assert decibels(frozen(X), wanted) > 60 and decibels(integer(X), wanted) > 60
        assert decibels(wanted, prepared(X)) > 200
        for copied in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
            assert torch.equal(copied(X), wanted)
        again = fxquant.prepare(model(), X, qat=True, recipe=recipe(name, name))
        again.load_state_dict(prepared.state_dict())
        assert torch.equal(again.eval()(X), wanted)
        for kept, file in ((prepared, "prepared.pt"), (frozen, "frozen.pt"), (integer, "integer.pt")):
            fxquant.save(kept, tmp_path / file)
            loaded = fxquant.load(model(), tmp_path / file)
            assert torch.equal(loaded.eval()(X), kept(X)), file
        placed = place_again(prepared, recipe(name, name)).eval()
        assert torch.equal(placed(X), wanted)


@pytest.mark.parametrize("name", OWN)
def test_a_rule_from_outside_calibrates_and_averages(name):
    register(name, **OWN[name])
    prepared = fxquant.prepare(model().eval(), X, recipe=recipe(name, name))
    fxquant.calibrate(prepared, [X[:8], X[8:]], progress=False)
    with torch.no_grad():
        wanted = prepared(X)
        assert decibels(fxquant.convert(prepared)(X), wanted) > 60
        assert decibels(wanted, model().eval()(X)) > 8
    trained = fxquant.prepare(model(), X, qat=True, recipe=recipe(name, name))
    averaged = torch.optim.swa_utils.AveragedModel(
        trained, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    for _ in range(3):
        train(trained, 1)
        averaged.update_parameters(trained)
    averaged.eval()
    with torch.no_grad():
        assert decibels(fxquant.freeze(averaged.module)(X), averaged(X)) > 60


@pytest.mark.long
@pytest.mark.parametrize("name", OWN)
def test_a_rule_from_outside_in_onnx_runtime(name, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    register(name, **OWN[name])
    prepared = fxquant.prepare(model(), X, qat=True, recipe=recipe(name, name, bits=8), target="onnxruntime")
    train(prepared)
    prepared.eval()
    fxquant.export_onnx(prepared, tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0])
    with torch.no_grad():
        wanted = prepared(X)
    assert torch.equal(found.argmax(1), wanted.argmax(1)) and decibels(found, wanted) > 35


class Doubled(MinMax):
    """Twice the range."""

    def range(self, state: dict[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
        low, high = super().range(state, scheme)
        return 2 * low, 2 * high


def test_an_estimator_from_outside_is_used_everywhere(tmp_path):
    register_estimator("doubled", Doubled())
    chosen = Recipe(
        default=Setting(
            weight=Scheme.weight(6, estimator="doubled"), activation=Scheme.activation(6, estimator="doubled")
        )
    )
    prepared = fxquant.calibrate(fxquant.prepare(model().eval(), X, recipe=chosen), [X], progress=False)
    plain = fxquant.prepare(model().eval(), X, recipe=recipe("observed", "observed"))
    plain = fxquant.calibrate(plain, [X], progress=False)
    for path in ("x_quantizer.output_quantizer", "second.weight_quantizer"):
        own, usual = prepared.get_submodule(path).scale, plain.get_submodule(path).scale
        assert torch.allclose(own, 2 * usual, rtol=0.02), path
    fxquant.save(prepared, tmp_path / "model.pt")
    with torch.no_grad():
        assert torch.equal(fxquant.load(model(), tmp_path / "model.pt")(X), prepared(X))
    learned = fxquant.prepare(model(), X, qat=True, recipe=recipe("lsq", "lsq", estimator="doubled")).train()
    learned(X)
    span = X.max() - X.min()
    assert torch.allclose(learned.x_quantizer.output_quantizer.scale, 2 * span / 63, rtol=1e-3)


class NoState(MinMax):
    def initial_state(self, channels: int | None, **_: Any) -> dict[str, Tensor]:
        return {}


class Blind(MinMax):
    def update(self, *_: Any, **__: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("name", "estimator", "what"),
    [
        ("mse", Doubled(), "a string that is none of"),
        ("own", object(), "has no initial_state, update, range"),
        ("own", NoState(), "fails on a tensor"),
        ("own", Blind(), "gives the range"),
    ],
)
def test_an_estimator_that_cannot_be_used_is_refused(name, estimator, what):
    with pytest.raises(SchemeError, match=what):
        register_estimator(name, estimator)
    assert "own" not in ESTIMATORS


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"name": "lsq", "weight": HalfLearned}, "there is a quantizer 'lsq' already"),
        ({"name": "own"}, "of tensors' quantizers, of weights', or both"),
        ({"name": "own", "tensor": HalfLearned}, "is no subclass of fxquant.nn.fake_quantize.FakeQuantize"),
        ({"name": "own", "weight": HalfLearnedTensor}, "is no subclass of .*WeightQuantize"),
        ({"name": "own", "weight": nn.Identity}, "is no subclass of .*WeightQuantize"),
        ({"name": "own", "weight": HalfLearned, "estimator": "best"}, "estimator='best'"),
        ({"name": "own", "weight": HalfLearned, "rounding": "up"}, "rounding='up'"),
        ({"name": "", "weight": HalfLearned}, "give a string"),
    ],
)
def test_a_rule_that_cannot_be_used_is_refused(arguments, what):
    with pytest.raises(SchemeError, match=what):
        register(**arguments)
    assert "own" not in RULES and "own" not in QUANTIZERS


def test_a_name_that_nobody_registered_is_an_error():
    for field in ("quantizer", "estimator"):
        with pytest.raises(SchemeError, match=rf"{field}='own' is not known(.|\n)*call fxquant.quantizers.register"):
            Scheme.weight(4, **{field: "own"})


def test_a_file_that_names_a_rule_which_is_not_registered_says_so(tmp_path):
    register("half", **OWN["half"])
    prepared = fxquant.prepare(model(), X, qat=True, recipe=recipe("half", "half"))
    train(prepared)
    fxquant.save(prepared, tmp_path / "model.pt")
    del RULES["half"], QUANTIZERS["half"]
    with pytest.raises(CheckpointError, match=r"quantizer='half' is not known(.|\n)*before load"):
        fxquant.load(model(), tmp_path / "model.pt")


def test_a_rule_without_a_class_for_it_or_that_refuses_the_scheme_is_refused_at_prepare():
    before = {k: v.clone() for k, v in model().state_dict().items()}
    user = model()
    with pytest.raises(
        RecipeError, match=r"first has the weight scheme s4 .* pact, and pact is a rule for tensors only"
    ):
        fxquant.prepare(user, X, qat=True, recipe=recipe("pact", "pact", bits=4))
    register(
        "even", weight=RoundedUp, refuses=lambda scheme, kind: Refusal("it has even bits") if scheme.bits % 2 else None
    )
    with pytest.raises(RecipeError, match=r"scheme s5 .* even, and it has even bits(.|\n)*another weight scheme"):
        fxquant.prepare(user, X, qat=True, recipe=recipe("observed", "even", bits=5))
    with pytest.raises(RecipeError, match=r"x has the activation scheme .* even is a rule for weights only"):
        fxquant.prepare(user, X, qat=True, recipe=recipe("even", "even", bits=4))
    assert all(torch.equal(before[k], v) for k, v in user.state_dict().items())
    register("curt", weight=RoundedUp, refuses=lambda scheme, kind: "it has even bits")
    with pytest.raises(SchemeError, match=r"'curt': refuses\(s5 .*, 'weight'\) gave 'it has(.|\n)*Refusal\(why\)"):
        fxquant.prepare(user, X, qat=True, recipe=recipe("observed", "curt", bits=5))
    with pytest.raises(SchemeError, match=r"'dull': simulates='it is'. Give fxquant.errors.Refusal\(why\)"):
        register("dull", weight=RoundedUp, simulates="it is")


def test_a_rule_that_is_simulated_trains_and_is_refused_where_integers_are_made(tmp_path):
    register("soft", weight=RoundedUp, simulates=Refusal("its levels are no multiples of one number"))
    prepared = fxquant.prepare(model(), X, qat=True, recipe=recipe("observed", "soft"))
    train(prepared)
    assert "weight simulated by soft, no integers: its levels" in str(fxquant.diff(model(), prepared))
    fxquant.save(prepared, tmp_path / "model.pt")
    with torch.no_grad():
        assert torch.equal(fxquant.load(model(), tmp_path / "model.pt").eval()(X), prepared.eval()(X))
    refusals = [fxquant.freeze, fxquant.convert, lambda p: fxquant.export_onnx(p, tmp_path / "model.onnx")]
    for verb in (*refusals, lambda p: fxquant.compile(p, X)):
        with pytest.raises(LevelError, match=r"quantized by 'soft', which is simulated: its levels(.|\n)*what to do"):
            verb(prepared)


def test_a_known_range_stays_plain_and_the_diff_says_so():
    prepared = fxquant.prepare(model(), X, qat=True, recipe=recipe("lsq", "lsq"))
    assert type(prepared.sigmoid.output_quantizer) is FakeQuantize
    assert "its range is known in advance: lsq has nothing to find" in str(fxquant.diff(model(), prepared))


def test_the_default_rule_has_the_state_that_it_had():
    prepared = fxquant.prepare(model(), X, qat=True, processor="vnni")
    tensor = ("scale", "zero_point", "origin", "known", "follows", "range_low", "range_high")
    weight = ("scale", "zero_point", "range_low", "range_high", "is_pinned")
    assert [n for n, _ in prepared.x_quantizer.output_quantizer.named_buffers()] == list(tensor)
    assert [n for n, _ in prepared.second.weight_quantizer.named_buffers()] == list(weight)


def test_a_rule_that_says_only_how_it_rounds_is_the_one_that_overrides_forward():
    register("up", weight=RoundedUp, estimator="minmax")
    register("up_by_hook", weight=RoundedUpByHook, estimator="minmax")
    found = {}
    for name in ("up", "up_by_hook"):
        prepared = fxquant.prepare(model(), X, qat=True, recipe=recipe("observed", name))
        fxquant.calibrate(prepared, [X], progress=False)
        train(prepared, 2)
        prepared.eval()
        rounded, integer = prepared(X), fxquant.convert(prepared)(X)
        with fxquant.quantizers_off(prepared):
            found[name] = rounded, integer, prepared(X)
    assert torch.equal(found["up"][0], found["up_by_hook"][0])
    assert torch.equal(found["up"][1], found["up_by_hook"][1])
    assert not torch.equal(found["up_by_hook"][0], found["up_by_hook"][2])


def test_one_quantizer_that_rounds_in_its_own_way_is_no_longer_its_rule_s():
    prepared = fxquant.calibrate(fxquant.prepare(model(), X), [X], progress=False)
    quantizer = prepared.second.weight_quantizer
    assert rule_of(quantizer) is RULES["observed"]
    quantizer.rounded = lambda x: torch.zeros_like(x)
    assert rule_of(quantizer) is None
    with pytest.raises(LevelError, match=r"cannot be placed anew: second\.weight_quantizer, a WeightQuantize"):
        place_again(prepared, Recipe())
