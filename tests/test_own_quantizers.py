"""Quantizers of a user's own: what they make is what is frozen and converted, or they are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxquant
from fxquant.errors import CheckpointError, LevelError
from fxquant.nn.fake_quantize import FakeQuantize, Grid, WeightQuantize
from fxquant.tuning.placing import place_again

X = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(3))


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class LearnedWeight(WeightQuantize):
    """LSQ (Esser et al., 1902.08153): the scale is a parameter."""

    def __init__(self, old: WeightQuantize, weight: Tensor) -> None:
        super().__init__(old.scheme, axis=old.axis, channels=old.channels)
        scale = 2 * weight.detach().abs().flatten(1).mean(1) / old.scheme.qmax**0.5
        del self._buffers["scale"]
        self.scale = nn.Parameter(scale)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        scale = self.scale.abs().reshape(-1, *[1] * (x.ndim - 1))
        return Rounded.apply(torch.clamp(x / scale, self.scheme.qmin, self.scheme.qmax)) * scale

    @property
    def grid(self) -> Grid:
        return Grid(self.scale.abs(), self.zero_point, self.scheme)


class Learned(FakeQuantize):
    """The same for a tensor."""

    def __init__(self, old: FakeQuantize) -> None:
        super().__init__(old.scheme)
        self.set_grid(old.scale, old.zero_point)
        scale = self._buffers.pop("scale")
        self.scale = nn.Parameter(scale)

    def levels(self, x: Tensor) -> Tensor:
        return Rounded.apply(x)

    def forward(
        self,
        x: Tensor,
        lower: float | None = None,
        upper: float | None = None,
        inplace: bool = False,
        observes: bool = True,
    ) -> Tensor:
        x = x if lower is None and upper is None else torch.clamp(x, lower, upper)
        q = torch.clamp(self.levels(x / self.scale) + self.zero_point, self.scheme.qmin, self.scheme.qmax)
        return (q - self.zero_point) * self.scale


class Upwards(WeightQuantize):
    """A rounding of its own, as AdaRound learns one."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        self.refresh(x)
        scale = self.scale.reshape(-1, *[1] * (x.ndim - 1))
        return torch.clamp(torch.ceil(x / scale), self.scheme.qmin, self.scheme.qmax) * scale


class Widened(WeightQuantize):
    """A range of its own."""

    def refresh(self, weight: Tensor) -> None:
        super().refresh(weight)
        with torch.no_grad():
            self.scale.mul_(1.5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.free = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 4, 1),
            nn.Parameter(torch.randn(5, 4, 1, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.first(x)), 2)
        return F.conv2d(torch.relu(self.second(x)), self.free)


def trained(*, recipe: fxquant.Recipe | None = None) -> Any:
    torch.manual_seed(0)
    prepared = fxquant.prepare(Net(), X, qat=True, recipe=recipe).train()
    prepared(X)
    return prepared


def replace_weights(prepared: Any, make: Callable[[WeightQuantize, Tensor], nn.Module]) -> list[Any]:
    made = []
    for part in prepared.modules():
        if hasattr(part, "weight_quantizer"):
            part.weight_quantizer = make(part.weight_quantizer, getattr(part, "weight", prepared.free))
            made.append(part.weight_quantizer)
    return made


def replace_tensors(prepared: Any, make: Callable[[FakeQuantize], nn.Module]) -> list[Any]:
    made: dict[int, Any] = {}
    for part in list(prepared.modules()):
        old = getattr(part, "output_quantizer", None)
        if old is not None:
            if id(old) not in made:
                made[id(old)] = make(old)
            part.output_quantizer = made[id(old)]
    return list(made.values())


def like(old: WeightQuantize, cls: type[WeightQuantize]) -> WeightQuantize:
    return cls(old.scheme, axis=old.axis, channels=old.channels)


def step_of(model: Any) -> float:
    """A coarse bound: the largest step of a tensor."""
    return max(float(q.scale) for q in model.modules() if isinstance(q, FakeQuantize) and not q.scale.ndim)


def assert_used(prepared: Any) -> Any:
    prepared.eval()
    frozen = fxquant.freeze(prepared)
    integer = fxquant.convert(frozen)
    with torch.no_grad():
        wanted = prepared(X)
        assert (frozen(X) - wanted).abs().max() <= 0.02 * wanted.abs().max()
        assert (integer(X) - frozen(X)).abs().max() <= 0.02 * wanted.abs().max()
    assert all(type(q) in (FakeQuantize, WeightQuantize) for q in frozen.modules() if isinstance(q, FakeQuantize))
    return frozen


def test_learned_scales_get_gradients_and_are_what_is_frozen():
    prepared = trained()
    weights, tensors = replace_weights(prepared, LearnedWeight), replace_tensors(prepared, Learned)
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        (prepared(X) - 1).square().mean().backward()
        optimizer.step()
    assert len(weights) == 3 and all(q.scale.grad is not None for q in (*weights, *tensors))
    before = [q.scale.detach().clone() for q in (*weights, *tensors)]
    frozen = assert_used(prepared)
    scales = [q.scale for q in frozen.modules() if isinstance(q, FakeQuantize)]
    for scale in before:
        assert any(s.shape == scale.shape and torch.allclose(s, scale, rtol=1e-6, atol=0) for s in scales)
    learned = {q.scale.data_ptr() for q in (*weights, *tensors)}
    assert not learned & {s.data_ptr() for s in scales}, "a frozen model shares nothing with the prepared one"


@pytest.mark.parametrize("cls", [Upwards, Widened])
def test_a_rounding_or_a_range_of_its_own_is_kept(cls):
    prepared = trained()
    replace_weights(prepared, lambda old, _: like(old, cls))
    frozen = assert_used(prepared)
    for path in ("first", "second"):
        part = prepared.get_submodule(path)
        wanted = part.weight_quantizer(part.weight.detach()).detach()
        assert torch.allclose(frozen.get_submodule(path).weight, wanted, rtol=1e-6, atol=1e-8)
        plain = WeightQuantize(part.weight_quantizer.scheme, axis=0, channels=4)(part.weight.detach())
        assert not torch.allclose(plain, wanted, rtol=1e-3, atol=0), "the class makes a difference"


class PowerOfTwo(nn.Module):
    def forward(self, scale: Tensor) -> Tensor:
        return torch.exp2(torch.ceil(torch.log2(scale)))


def test_a_parametrized_quantizer_is_used():
    prepared = trained().eval()
    for quantizer in {id(q): q for q in prepared.modules() if type(q) is FakeQuantize}.values():
        parametrize.register_parametrization(quantizer, "scale", PowerOfTwo())
    frozen = assert_used(prepared)
    scales = [float(q.scale) for q in frozen.modules() if isinstance(q, FakeQuantize) and not q.scale.ndim]
    assert scales and all(torch.tensor(s).log2().frac() == 0 for s in scales)


class Soft(WeightQuantize):
    """Rounds nothing."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        self.refresh(x)
        return torch.tanh(x)


class Gridless(nn.Module):
    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x.round()


class Affine(WeightQuantize):
    def refresh(self, weight: Tensor) -> None:
        super().refresh(weight)
        self.zero_point.fill_(3)


@pytest.mark.parametrize(
    ("cls", "what"),
    [
        (Soft, "Soft, makes numbers of its weight that lie .* steps off its grid"),
        (Affine, "Affine, offers a grid that does not fit its weight"),
    ],
)
def test_a_weight_quantizer_off_its_grid_is_refused(cls, what):
    prepared = trained()
    replace_weights(prepared, lambda old, _: like(old, cls))
    for verb in (fxquant.freeze, fxquant.convert):
        with pytest.raises(LevelError, match=rf"first\.weight_quantizer, a {what}(.|\n)*what to do"):
            verb(prepared)


def test_a_module_without_a_grid_is_refused():
    prepared = trained()
    prepared.first.weight_quantizer = Gridless()
    with pytest.raises(LevelError, match=r"first\.weight_quantizer, a Gridless, is no FakeQuantize with a grid"):
        fxquant.freeze(prepared)


class Floored(Learned):
    def levels(self, x: Tensor) -> Tensor:
        return torch.floor(x)


class Unclamped(Learned):
    def __init__(self, old: FakeQuantize) -> None:
        super().__init__(old)
        self.zero_point.fill_(100)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return super().forward(x)


class Dynamic(Learned):
    """Its range is that of what it is given."""

    def forward(self, x: Tensor, *bounds: Any, **more: Any) -> Tensor:
        with torch.no_grad():
            self.scale.copy_(x.abs().max() / 255)
        return super().forward(x, *bounds, **more)


class Negative(Learned):
    def __init__(self, old: FakeQuantize) -> None:
        super().__init__(old)
        with torch.no_grad():
            self.scale.neg_()


@pytest.mark.parametrize(
    ("cls", "what"),
    [
        (Floored, "makes .* of .*, where its grid has"),
        (Unclamped, r"makes -.* clamped to 0(.0)?…None, where its grid has"),
        (Dynamic, "makes .* of .*, where its grid has"),
        (Negative, "offers a grid of scale"),
    ],
)
def test_a_tensor_quantizer_that_rounds_otherwise_than_its_grid_is_refused(cls, what):
    prepared = trained()
    replace_tensors(prepared, cls)
    with pytest.raises(LevelError, match=rf"output_quantizer, a {cls.__name__}, {what}(.|\n)*what to do"):
        fxquant.freeze(prepared)


@pytest.mark.parametrize("cls", [Learned, lambda old: FakeQuantize(old.scheme, fixed_range=(-1.0, 1.0))])
def test_two_quantizers_for_one_grid_are_refused(cls):
    prepared = trained()
    relu = prepared.get_submodule("relu")
    relu.output_quantizer = cls(relu.output_quantizer)
    with pytest.raises(LevelError, match=r"are on one grid(.|\n)*one object in all places"):
        fxquant.freeze(prepared)


def test_a_parameter_that_would_get_no_gradient_is_refused_at_once():
    prepared = trained()
    for quantizer in (prepared.first.weight_quantizer, like(prepared.first.weight_quantizer, Widened)):
        scale = quantizer._buffers.pop("scale")
        with pytest.raises(LevelError, match=r"'scale' of a \w+ cannot be a parameter(.|\n)*override forward"):
            quantizer.scale = nn.Parameter(scale)


def test_what_would_lose_them_is_refused(tmp_path):
    prepared = trained()
    replace_weights(prepared, lambda old, _: like(old, Upwards))
    with pytest.raises(CheckpointError, match=r"first\.weight_quantizer, a Upwards"):
        fxquant.save(prepared, tmp_path / "model.pt")
    with pytest.raises(LevelError, match=r"cannot be placed anew: first\.weight_quantizer, a Upwards"):
        place_again(prepared, fxquant.Recipe())
    fxquant.save(fxquant.freeze(prepared), tmp_path / "frozen.pt")
