"""Selectors of a recipe reach the parts of a model whose class is torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import RecipeError
from fxquant.recipe import FIRST, INPUT, LAST, OUTPUT, Place

MODELS = {
    "Sequential": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), "2", (2, 8)),
    "nested": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 4))), "1.1", (2, 8)),
    "layer": (lambda: nn.Linear(8, 4), nn.Linear, (2, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_part_of_a_model_of_torchs_own_class_is_selected(name):
    make, selector, shape = MODELS[name]
    setting = fxquant.Setting(weight=fxquant.Scheme.weight(4))
    prepared = fxquant.prepare(make().eval(), torch.randn(shape), recipe={selector: setting})
    bits = {
        m.weight_quantizer.scheme.bits for m in prepared.modules() if getattr(m, "weight_quantizer", None) is not None
    }
    assert 4 in bits and bits <= {4, 8}


class Branched(nn.Module):
    """Two stems that meet, a body, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.body, self.head, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.relu(self.bn(self.stem(x)) + self.side(x))
        y = torch.relu(self.body(y))
        return self.head(y).flatten(1), self.other(y)


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
FOUR = fxquant.Setting(weight=fxquant.Scheme.weight(4), activation=fxquant.Scheme.activation(4))
EIGHT = fxquant.Setting(weight=fxquant.Scheme.weight(8))
ENTERS = fxquant.Setting(activation=fxquant.Scheme(bits=8, signed=True, symmetric=True))
ROUNDED = fxquant.Setting(weight=fxquant.Scheme.weight(6), activation=fxquant.Scheme.activation(7))


def branched() -> nn.Module:
    torch.manual_seed(0)
    return Branched()


@pytest.mark.parametrize("qat", [False, True])
def test_places_select_ends_and_inputs(qat, tmp_path):
    recipe = fxquant.Recipe([(FIRST, EIGHT), (LAST, EIGHT), (INPUT, ENTERS)], default=FOUR)
    prepared = fxquant.prepare(branched().train(qat), X, qat=qat, recipe=recipe)
    bits = {n: getattr(prepared, n).weight_quantizer.scheme.bits for n in ("stem", "side", "body", "head", "other")}
    assert bits == {"stem": 8, "side": 8, "body": 4, "head": 8, "other": 8}
    assert prepared.x_quantizer.output_quantizer.scheme == ENTERS.activation
    assert prepared.relu_1.output_quantizer.scheme == FOUR.activation
    assert prepared.head.output_quantizer is None, "the last accumulators leave as floats"
    fxquant.calibrate(prepared, [X], progress=False)
    fxquant.save(prepared.eval(), tmp_path / "model.pt")
    with torch.no_grad():
        pairs = zip(prepared(X), fxquant.load(branched(), tmp_path / "model.pt").eval()(X), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        integer = fxquant.convert(prepared)
        for found, wanted in zip(integer(X), prepared(X), strict=True):
            assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_outputs_are_rounded_where_a_recipe_gives_them_a_scheme():
    prepared = fxquant.prepare(branched().eval(), X, recipe=fxquant.Recipe([(OUTPUT, ROUNDED)], default=FOUR))
    for name in ("head", "other"):
        part = getattr(prepared, name)
        assert part.output_quantizer.scheme == ROUNDED.activation and part.weight_quantizer.scheme == ROUNDED.weight
    assert prepared.body.weight_quantizer.scheme == FOUR.weight
    fxquant.calibrate(prepared, [X], progress=False)
    with torch.no_grad():
        for out in prepared(X):
            assert len(out.unique()) <= 2**7


def test_a_place_in_float_and_what_inputs_cannot_be():
    prepared = fxquant.prepare(branched().eval(), X, recipe=fxquant.Recipe([(FIRST, None)], default=FOUR))
    assert type(prepared.stem) is nn.Conv2d and type(prepared.body) is not nn.Conv2d
    for setting in (None, EIGHT):
        with pytest.raises(RecipeError, match=r"INPUT: an input has no weight, and cannot stay in float(.|\n)*FIRST"):
            fxquant.Recipe([(INPUT, setting)])
    with pytest.raises(RecipeError, match="or FIRST, LAST, INPUT or OUTPUT"):
        fxquant.Recipe([(Place("MIDDLE"), None)])


class Opaque(nn.Module):
    """Its own forward cannot be traced: its parts are captured."""

    def __init__(self) -> None:
        super().__init__()
        self.net = branched()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for row in x.detach().numpy():
            total = total + self.net(torch.from_numpy(row)[None])[0].sum() * float(row.sum() > 0)
        return total


def test_a_place_in_a_model_of_parts_is_refused():
    with pytest.raises(RecipeError, match=r"FIRST matches nothing in this model(.|\n)*captured in parts"):
        fxquant.prepare(Opaque().eval(), X, recipe=fxquant.Recipe([(FIRST, EIGHT)]))
