"""Ops of a user's own, entered from outside: recognized however they are reached, or refused with a reason."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.behaviour import Passing, Rescaling, Weighted
from fxquant.capture.kept import _FUNCTIONS, KEPT_CLASSES, KEPT_WHOLE
from fxquant.errors import InputError, Refusal
from fxquant.nn.accumulating import IntegerWeighted
from fxquant.nn.integer import IntegerEvaluate, IntegerPass, IntegerTable
from fxquant.ops import entry as entries
from fxquant.ops.entry import ENTRIES, OpEntry
from fxquant.ops.example import example
from fxquant.ops.table import _index


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    """The table as it was, afterwards."""
    held = (ENTRIES, entries._OWNERS, _FUNCTIONS)
    before, sets = [dict(one) for one in held], (set(KEPT_CLASSES), set(KEPT_WHOLE))
    yield
    for one, old in zip(held, before, strict=True):
        one.clear()
        one.update(old)
    for kept, old_set in zip((KEPT_CLASSES, KEPT_WHOLE), sets, strict=True):
        kept.intersection_update(old_set)
    _index.cache_clear()


def snake(input: Tensor, alpha: float = 1.0) -> Tensor:
    return input + torch.sin(alpha * input) ** 2


def snake_of(input: Tensor, alpha: Tensor) -> Tensor:
    return input + torch.sin(alpha * input) ** 2


class Snake(nn.Module):
    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.alpha * x) ** 2


class LearnedSnake(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.linspace(0.2, 1.5, 8)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return snake_of(x, self.alpha)


def enter(name: str, function: Callable[..., Any], signature: str = "input*", **more: Any) -> OpEntry:
    given: dict[str, Any] = {"behaviour": Rescaling(), "integer": IntegerTable, **more}
    made = example(function, (2, 3, 8, 8))
    return OpEntry(name=name, function=function, signature=signature, example=made, **given)


class Net(nn.Module):
    """Something between a convolution and a linear layer."""

    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.what, self.fc = nn.Conv2d(3, 8, 3), what, nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.what(self.conv(x)).flatten(1))


X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def quantized(model: nn.Module) -> tuple[Any, Any]:
    model = model.eval()
    wanted = model(X).detach()
    prepared = fxquant.prepare(model, X, verify=True)
    frozen = fxquant.freeze(fxquant.calibrate(prepared, [X], progress=False))
    made = fxquant.convert(frozen)
    error = (made(X) - wanted).square().sum() / wanted.square().sum()
    assert 10 * torch.log10(error) < -28
    assert torch.equal(model(X), wanted), "the user's model and functions are what they were"
    return made, fxquant.coverage(made)


def ops(model: Any) -> list[str]:
    return [node.meta["entry"].name for node in model.graph.nodes if "entry" in node.meta]


BY_NAME = {"snake": snake}


class Holder:
    @staticmethod
    def run(x: Tensor) -> Tensor:
        return BY_NAME["snake"](x, alpha=0.7)


def inside_a_closure() -> Callable[[Tensor], Tensor]:
    mine = snake
    return lambda x: mine(x, 0.3)


WAYS: dict[str, Callable[[], Any]] = {
    "a function": lambda: snake,
    "a class": lambda: Snake(0.8),
    "a method": lambda: lambda x: x.snake(0.4),
    "out of a dict, in a static method": lambda: Holder.run,
    "inside a closure": inside_a_closure,
    "through partial": lambda: partial(snake, alpha=0.6),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_op_is_recognized_however_it_is_reached(monkeypatch, way):
    monkeypatch.setattr(torch.Tensor, "snake", snake, raising=False)
    enter("snake", snake, "input*, alpha=1.0", modules=(Snake,), methods=("snake",))
    code = snake.__code__, snake.__defaults__, snake.__kwdefaults__
    made, covered = quantized(Net(WAYS[way]()))
    assert "snake" in ops(made) and not covered.float_ops
    assert (snake.__code__, snake.__defaults__, snake.__kwdefaults__) == code


def test_a_decorated_function_is_recognized():
    def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def around(*args: Any, **kwargs: Any) -> Tensor:
            return function(*args, **kwargs)

        return around

    waved = decorated(lambda x: torch.cos(x) * x)
    enter("waved", waved)
    made, covered = quantized(Net(waved))
    assert "waved" in ops(made) and not covered.float_ops


def test_a_learned_parameter_is_trained_frozen_and_exported(tmp_path):
    learned = {"behaviour": Rescaling(inputs=("input",)), "integer": IntegerEvaluate, "parametric": True}
    enter("snake_of", snake_of, "input*, alpha*", modules=(LearnedSnake,), **learned)
    model = Net(LearnedSnake())
    made, covered = quantized(model)
    assert "snake_of" in ops(made) and not covered.float_ops
    fxquant.export_onnx(made, tmp_path / "snake.onnx", X)
    trained = fxquant.prepare(model.train(), X, qat=True)
    trained(X).square().mean().backward()
    named = dict(trained.named_parameters())
    assert named["what.alpha"].grad is not None and torch.equal(named["what.alpha"], model.what.alpha)


def test_a_weighted_op_and_one_that_passes_values_on():
    def scaled_conv(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(input, weight, bias)

    def turned(input: Tensor) -> Tensor:
        return input.flip(1)

    class Scaled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return scaled_conv(input, self.weight, self.bias)

    form = partial(IntegerWeighted, channel_axis=1, weight_axis=0)
    enter("scaled_conv", scaled_conv, "input*, weight*, bias*=None", behaviour=Weighted(), integer=form)
    enter("turned", turned, behaviour=Passing(), integer=IntegerPass)
    made, covered = quantized(Net(nn.Sequential(Scaled(8, 8, 1), nn.ReLU(), Holderless(turned))))
    assert {"scaled_conv", "turned"} <= set(ops(made)) and not covered.float_ops


class Holderless(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def reasons(model: nn.Module) -> str:
    return " ".join(one.reason for one in fxquant.coverage(fxquant.prepare(model.eval(), X)).float_ops)


def test_what_cannot_be_used_says_why():
    enter("snake", snake, "input*, alpha=1.0", modules=(LearnedSnake,))
    enter("loose", loose)
    assert "its module holds alpha, which the entry of snake does not name as a tensor" in reasons(Net(LearnedSnake()))
    assert "called with beta=3" in reasons(Net(Keyed()))
    enter("formless", formless, integer=None)
    assert "the entry of formless has no integer form" in reasons(Net(formless))
    enter("picky", picky, check=lambda call: Refusal("it is too warm"))
    assert "it is too warm" in reasons(Net(picky))
    enter("curt", curt, check=lambda call: "it is too warm")
    with pytest.raises(InputError, match=r"the check of op 'curt' gave 'it is too warm'(.|\n)*Refusal\(why\)"):
        reasons(Net(curt))


def formless(input: Tensor) -> Tensor:
    return torch.sin(input) * 0.9


def picky(input: Tensor) -> Tensor:
    return torch.cos(input) * 0.9


def curt(input: Tensor) -> Tensor:
    return torch.cos(input) * 0.8


class Keyed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return unbound(x)


def unbound(x: Tensor) -> Tensor:
    return loose(x, beta=3)


def loose(input: Tensor, **more: Any) -> Tensor:
    return input * more["beta"]


def test_a_module_given_to_a_function_makes_an_island_that_says_so():
    def of_module(model: nn.Module, input: Tensor) -> Tensor:
        return torch.sin(input)

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return of_module(self, x)

    enter("of_module", of_module, "input*")
    (island,) = fxquant.coverage(fxquant.prepare(Net(Asks()).eval(), X)).islands
    assert "gives a module to" in island.cause and "of_module" in island.cause


@pytest.mark.parametrize("function", [partial(snake, alpha=2.0), Snake, nn.Tanh(), nn.Tanh().forward])
def test_what_no_tracer_sees_is_refused_at_once(function):
    with pytest.raises(ValueError, match="no function that a tracer sees called"):
        enter("unseen", function)


@pytest.mark.parametrize(
    ("signature", "words"),
    [
        (
            "input*, beta",
            r"'input\*, beta' of op 'unseen' is not that of its function: snake\(input, alpha\) has no beta",
        ),
        ("input*, other*, third*", r"has fewer than 3 arguments"),
        ("input*, alpha=nn", "cannot be read"),
        ("input*, alpha=(1", "cannot be read"),
    ],
)
def test_a_signature_that_is_not_the_function_s_is_refused_at_once(signature, words):
    with pytest.raises(ValueError, match=words):
        enter("unseen", snake, signature)
    assert "unseen" not in ENTRIES


@pytest.mark.parametrize("more", [{"functions": (F.gelu,)}, {"modules": (nn.GELU,)}, {"methods": ("relu",)}])
def test_a_spelling_that_is_taken_is_refused(more):
    with pytest.raises(ValueError, match=r"is a spelling of the op '\w+' already"):
        enter("second", snake, **more)
    assert "second" not in ENTRIES
