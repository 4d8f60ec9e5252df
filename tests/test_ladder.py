"""auto: stops where it is good enough, keeps the budget, and goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import digits
import numpy as np
import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import InputError
from fxquant.targets import TARGETS, get
from fxquant.tuning.fingerprint import described


def batches() -> list[torch.Tensor]:
    return list(digits.data()[0][:256].split(128))


def test_it_stops_at_the_first_rung_that_is_good_enough():
    model = digits.trained()
    found = fxquant.auto(model, batches(), evaluate=digits.accuracy, max_drop=1.0, progress=False)
    assert [rung.name for rung in found.rungs] == ["nearest"] and found.meets and found.chosen == "nearest"
    assert found.float_accuracy == digits.accuracy(model)
    assert digits.accuracy(found.model) == found.rungs[0].accuracy and found.rungs[0].bits_per_weight == 8
    sizes = [p.numel() for n, p in model.named_parameters() if n.endswith("weight") and p.ndim > 1]
    assert found.rungs[0].weight_bytes == sum(sizes)
    assert "'nearest' is within a drop of 1." in str(found)


@pytest.mark.long
def test_none_is_good_enough_and_the_best_is_returned():
    """A drop that no integer model has: every rung is tried, and the budget of 3.4 bits holds for all."""
    found = fxquant.auto(
        digits.trained(),
        batches(),
        evaluate=digits.accuracy,
        max_drop=-100,
        bits_per_weight=3.4,
        steps=5,
        progress=False,
    )
    names = ["nearest", "chosen ranges", "closed form", "equalized", "reconstructed", "mixed precision"]
    assert [rung.name for rung in found.rungs] == names and not found.meets
    tried = [rung for rung in found.rungs if rung.accuracy is not None]
    assert all(rung.bits_per_weight <= 3.4 for rung in tried) and tried[0].bits_per_weight == 3
    assert max(rung.accuracy for rung in tried) == digits.accuracy(found.model)
    assert tried[2].accuracy > tried[0].accuracy
    assert "is the best, and not within" in str(found)


class StoppedError(Exception):
    """The run is ended from outside."""


@pytest.mark.long
def test_a_run_that_was_stopped_goes_on_and_finds_the_same(tmp_path):
    model, calls = digits.trained(), []
    settings = {"max_drop": -100, "bits_per_weight": 3, "steps": 3, "progress": False}

    def evaluate(one: nn.Module) -> float:
        calls.append(one)
        if len(calls) == 4:
            raise StoppedError
        return digits.accuracy(one)

    with pytest.raises(StoppedError):
        fxquant.auto(model, batches(), evaluate=evaluate, state=tmp_path, **settings)
    calls += [None]
    resumed = fxquant.auto(model, batches(), evaluate=evaluate, state=tmp_path, **settings)
    assert len(calls) == 5 + len([rung for rung in resumed.rungs[2:] if rung.accuracy is not None])
    whole = fxquant.auto(model, batches(), evaluate=digits.accuracy, **settings)
    for one, other in zip(resumed.rungs, whole.rungs, strict=True):
        assert (one.name, one.accuracy, one.drop, one.bits_per_weight) == (
            *(other.name, other.accuracy, other.drop),
            other.bits_per_weight,
        )
    with torch.no_grad():
        x = digits.test_images()[0]
        assert resumed.chosen == whole.chosen and torch.equal(resumed.model(x), whole.model(x))
        again = fxquant.auto(
            model, batches(), evaluate=lambda one: pytest.fail("all is known"), state=tmp_path, **settings
        )
        assert torch.equal(again.model(x), whole.model(x))


def test_a_folder_of_another_run_is_refused(tmp_path):
    model = digits.trained()
    settings = {"evaluate": digits.accuracy, "state": tmp_path, "progress": False}
    fxquant.auto(model, batches(), max_drop=5.0, **settings)
    with pytest.raises(InputError, match="another model"):
        fxquant.auto(model, batches(), max_drop=5.0, bits_per_weight=4, **settings)
    with torch.no_grad():
        model.fc.bias += 1
    with pytest.raises(InputError, match="another model"):
        fxquant.auto(model, batches(), max_drop=5.0, **settings)


def test_what_auto_takes():
    with pytest.raises(InputError, match="between 2 and 16"):
        fxquant.auto(digits.trained(), batches(), evaluate=digits.accuracy, bits_per_weight=1)
    with pytest.raises(InputError, match="finite number"):
        fxquant.auto(digits.trained(), batches(), evaluate=lambda one: float("nan"), progress=False)


class Tiny(nn.Module):
    """A layer of the op table's, an activation, and a layer; cheap enough to climb many times."""

    def __init__(self, act: nn.Module | None = None, *, twice: bool = False, gain: float = 1.0) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(6, 6), act or nn.ReLU(), nn.Linear(6, 3)
        self.twice, self.gain = twice, gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.a(x)) * self.gain
        return self.b(self.act(self.a(x)) if self.twice else x)


def tiny(**settings: Any) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = Tiny(**settings).eval()
    return model, [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.mark.parametrize("accuracies, best", [([0.0, -2.0, -1.0], 0), ([-3.0, 0.0, -1.0], 1), ([-3.0, -2.0, -1.0], 2)])
def test_zero_may_be_the_best_accuracy(accuracies, best):
    """Such as that of a measure whose values are losses with a minus."""
    model, data = tiny()
    told = iter([1.0, *accuracies, *[-9.0] * 9])
    found = fxquant.auto(model, data, evaluate=lambda one: next(told), max_drop=-100, steps=2, progress=False)
    assert found.chosen == found.rungs[best].name and found.rungs[best].accuracy == accuracies[best]


GIVEN = {
    "None": (lambda one: None, "evaluate gave None for the float model"),
    "text": (lambda one: "97.2", "evaluate gave '97.2'"),
    "NaN": (lambda one: math.nan, "evaluate gave nan"),
    "infinity": (lambda one: -math.inf, "evaluate gave -inf"),
    "logits": (lambda one: torch.zeros(8, 3), r"a tensor of shape \(8, 3\)"),
    "a complex": (lambda one: torch.tensor(1j), "has to give a finite number"),
    "a pair": (lambda one: (97.2, 99.1), "has to give a finite number"),
    "no function": (3, "evaluate=3 is not a function"),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_what_evaluate_gives_is_a_number(kind):
    model, data = tiny()
    evaluate, says = GIVEN[kind]
    with pytest.raises(InputError, match=says):
        fxquant.auto(model, data, evaluate=evaluate, progress=False)


@pytest.mark.parametrize("number", [torch.tensor(1.5), torch.tensor([1.5]), np.float32(1.5), 2, True])
def test_numbers_of_all_kinds_will_do(number):
    model, data = tiny()
    found = fxquant.auto(model, data, evaluate=lambda one: number, progress=False)
    assert found.float_accuracy == float(number) and found.meets


def test_a_rung_is_judged_like_the_float_model():
    """In eval mode, whatever mode the user's model is in; and that stays, with its statistics."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    _, data = tiny()
    modes: list[bool] = []

    def evaluate(one: nn.Module) -> float:
        modes.append(one.training)
        one(data[0])
        return 1.0

    before = {name: value.clone() for name, value in model.state_dict().items()}
    fxquant.auto(model, data, evaluate=evaluate, progress=False)
    assert modes == [False, False] and model.training and all(part.training for part in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "another activation": ({"act": nn.GELU()}, {}),
    "a layer called twice": ({"twice": True}, {}),
    "another constant": ({"gain": 1.5}, {}),
    "another target": ({}, {"target": "onnxruntime"}),
    "a target of the same name": ({}, {"target": dataclasses.replace(get("x86"), rounds_joined=False)}),
    "other bits": ({}, {"activation_bits": 7}),
    "other data": ({}, {"batches": 1}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_run_goes_on_with_the_same_model_and_settings_alone(kind, tmp_path):
    model, data = tiny()
    target = dataclasses.replace(get("x86"), activation_bits=(7, 8))
    settings: dict[str, Any] = {"evaluate": lambda one: 1.0, "state": tmp_path, "target": target, "progress": False}
    first = fxquant.auto(model, data, **settings)
    again = fxquant.auto(tiny()[0], data, **{**settings, "evaluate": lambda one: pytest.fail("all is known")})
    assert again.rungs == first.rungs
    other, given = OTHERS[kind]
    with pytest.raises(InputError, match="holds a run of another model, on other data or with other settings"):
        fxquant.auto(tiny(**other)[0], data, **{**settings, **given})


@pytest.mark.long
def test_a_key_is_the_same_in_every_process():
    """Sets of strings have another order in each, and functions another address."""
    code = (
        "from fxquant.targets import TARGETS, get\nfrom fxquant.tuning.fingerprint import described\n"
        "print([described(get(name)) for name in sorted(TARGETS)], described((print, {'b': {3, 1}, 'a': 2.5})))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    here = [described(get(name)) for name in sorted(TARGETS)], described((print, {"b": {3, 1}, "a": 2.5}))
    assert there == f"{here[0]} {here[1]}" and "{'a': 2.5, 'b': {1, 3}}" in there


def test_a_folder_that_lost_a_model_builds_it_again_and_a_broken_one_says_so(tmp_path):
    model, data = tiny()
    settings: dict[str, Any] = {"evaluate": lambda one: 1.0, "state": tmp_path, "progress": False}
    first = fxquant.auto(model, data, **settings)
    (tmp_path / "0.pt").unlink()
    with pytest.warns(UserWarning, match="'nearest' is built again"):
        again = fxquant.auto(model, data, **settings)
    assert torch.equal(again.model(data[0]), first.model(data[0]))
    (tmp_path / "rungs.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read"):
        fxquant.auto(model, data, **settings)


def test_a_budget_between_the_widths_of_a_target():
    """What lies below it is taken, and what lies above it does not count."""
    model, data = tiny()
    target = dataclasses.replace(get("x86"), weight_bits=(4, 8))
    settings: dict[str, Any] = {"evaluate": lambda one: 1.0, "target": target, "progress": False}
    assert fxquant.auto(model, data, bits_per_weight=6, **settings).rungs[0].bits_per_weight == 4
    with pytest.raises(InputError, match="takes weights of 4 bits"):
        fxquant.auto(model, data, bits_per_weight=3, **settings)


def test_bytes_of_a_weight_that_is_called_twice_count_once():
    model, data = tiny(twice=True)
    found = fxquant.auto(model, data, evaluate=lambda one: 1.0, bits_per_weight=4, progress=False)
    assert found.rungs[0].bits_per_weight == 4 and found.rungs[0].weight_bytes == (36 + 18) // 2
