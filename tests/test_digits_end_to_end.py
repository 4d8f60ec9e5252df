"""Post-training quantization of a trained network on scikit-learn's digits."""

from __future__ import annotations

import digits
import pytest
import torch
from comparisons import assert_ops_agree, assert_same_bits, assert_same_top1

import fxquant
from fxquant import Recipe, Scheme, Setting


def calibrated(recipe: Recipe | None = None) -> fxquant.graph.leveled.LeveledModule:
    model, batches = digits.trained(), list(digits.training_batches(0))[:8]
    prepared = fxquant.prepare(model, batches[0][0], recipe=recipe)
    return fxquant.calibrate(prepared, batches, progress=False)


def test_the_integer_model_is_as_good_as_the_float_one():
    model = digits.trained()
    frozen = fxquant.freeze(calibrated())
    integer = fxquant.convert(frozen)
    assert digits.accuracy(model) > 93, "the float model has learned something"
    assert digits.accuracy(integer) >= digits.accuracy(model) - 0.6
    assert_same_top1(digits.logits(integer), digits.logits(frozen), 0.995)
    assert_ops_agree(frozen, integer, (digits.test_images()[0],))


@pytest.mark.parametrize("estimator", ["minmax", "moving_average", "percentile", "mse"])
def test_every_estimator_keeps_the_accuracy(estimator):
    recipe = Recipe(default=Setting(activation=Scheme(estimator=estimator)))
    integer = fxquant.convert(calibrated(recipe))
    assert digits.accuracy(integer) >= digits.accuracy(digits.trained()) - 1.0


@pytest.mark.parametrize("rounding", ["single", "double", "float"])
def test_every_rounding_keeps_the_classes(rounding):
    frozen = fxquant.freeze(calibrated())
    assert_same_top1(digits.logits(fxquant.convert(frozen, rounding=rounding)), digits.logits(frozen), 0.994)


def test_fewer_bits_cost_accuracy_and_do_not_break():
    bits = {n: Setting(weight=Scheme(bits=n, symmetric=True, signed=True, per_channel=True, narrow_range=True),
                       activation=Scheme(bits=n)) for n in (2, 4, 8)}  # fmt: skip
    found = {n: digits.accuracy(fxquant.convert(calibrated(Recipe(default=setting)))) for n, setting in bits.items()}
    assert found[2] < found[4] <= found[8] + 1.0 and found[4] > 80


def test_one_verb_does_what_three_do():
    batches = list(digits.training_batches(0))[:8]
    one = fxquant.quantize(digits.trained(), batches, progress=False)
    three = fxquant.convert(calibrated())
    assert_same_bits(digits.logits(one), digits.logits(three))


def test_the_integer_model_is_made_of_integers():
    integer = fxquant.convert(calibrated())
    weights = {n: b for n, b in integer.named_buffers() if n.endswith((".weight", ".bias"))}
    assert weights and all(b.dtype == (torch.int8 if n.endswith("weight") else torch.int32) for n, b in weights.items())
    assert not list(integer.parameters())
