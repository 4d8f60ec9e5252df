"""auto: stops where it is good enough, keeps the budget, and goes on where it was stopped."""

from __future__ import annotations

import digits
import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import InputError


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
