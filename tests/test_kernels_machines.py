"""Fast kernels on machines that lack operators, whose engines err or whose pairs of products saturate."""

from __future__ import annotations

import torch
from comparisons import assert_same_bits
from op_cases import ROUNDED, recipe_with
from torch import nn
from torch_kernels import (
    Mixed,
    converted,
    fast,
    kernels_used,
    of_reference,
    require_agreement,
    signal,
)

import fxquant
from fxquant import Scheme
from fxquant.graph.leveled import RUNNER
from fxquant.kernels import choice as choice_module
from fxquant.kernels import operators as operators_module
from fxquant.kernels import runner as runner_module
from fxquant.kernels.agreement import agreement
from fxquant.kernels.operators import KINDS, Engine, Operators, operators
from fxquant.kernels.saturation import can_saturate, largest_pair, saturating_layers
from fxquant.kernels.storage import Storage, convert


def test_the_largest_pair_of_weights():
    weight = torch.tensor([[100, -3, 28, 5], [-60, -69, 127, 0]], dtype=torch.int8)
    assert largest_pair(weight) == 129 and can_saturate(weight)
    assert largest_pair(weight[:1]) == 128 and not can_saturate(weight[:1])
    assert not can_saturate(torch.tensor([[127]], dtype=torch.int8))


def test_without_operators_the_reference_runs(monkeypatch):
    monkeypatch.setattr(operators_module, "_find", lambda *_: None)
    assert operators_module.operators.__wrapped__() is None
    monkeypatch.setattr(runner_module, "operators", lambda: None)
    x = signal(2, 3, 32, 32)
    integer = converted(Mixed(), x)
    assert RUNNER not in integer.__dict__
    assert set(fxquant.coverage(integer).kernels.values()) == {"reference"}
    assert_same_bits(integer(x), of_reference(integer)(x))


@fast
def test_an_engine_that_errs_is_not_used(monkeypatch):
    monkeypatch.setattr(operators_module, "_is_exact", lambda *_: False)
    assert operators_module.operators.__wrapped__() is None


@fast
def test_where_pairs_saturate_only_small_weights_go_fast(monkeypatch):
    found = operators()
    limited = tuple(Engine(engine.name, frozenset(KINDS)) for engine in found.engines)
    monkeypatch.setattr(runner_module, "operators", lambda: Operators(**{**vars(found), "engines": limited}))
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), signal(2, 3, 9, 9)
    seven_bits = Scheme(bits=7, symmetric=True, signed=True, per_channel=True, narrow_range=True)
    kernels = []
    for weight in (None, seven_bits):
        integer = converted(model, x, recipe=recipe_with(None, weight), processor="vnni")
        integer(x)
        kernels.append(kernels_used(integer)["_0"])
        assert list(saturating_layers(integer)) == (["0", "2"] if weight is None else [])
    assert kernels == ["reference", found.engines[0].name]


@fast
def test_coverage_says_why_a_layer_is_slow(monkeypatch):
    found = operators()
    limited = tuple(Engine(engine.name, frozenset(KINDS)) for engine in found.engines)
    monkeypatch.setattr(choice_module, "operators", lambda: Operators(**{**vars(found), "engines": limited}))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    integer = converted(model, signal(2, 3, 9, 9), recipe=ROUNDED, processor="vnni")
    assert fxquant.coverage(integer).kernels["0"].endswith("could overflow 16 bits on this machine")


@fast
def test_depthwise_weights_never_saturate():
    """fbgemm adds pairs of products in 16 bits there, on every x86: whatever runs must not."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False))
    with torch.no_grad():
        model[1].weight.fill_(1.0)
    integer = converted(model, signal(2, 3, 9, 9), recipe=ROUNDED)
    for batch, size in ((2, 9), (1, 3), (1, 40)):
        require_agreement(agreement(integer, 3 * signal(batch, 3, size, size)))


def test_forms_share_memory():
    x = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    held = convert(x[:, 1:], Storage(0.5, 7), False)
    assert held.data_ptr() == x[:, 1:].data_ptr() and (held.q_scale(), held.q_zero_point()) == (0.5, 7)
    assert_same_bits(convert(held, None, False), x[:, 1:])
    signed = torch.arange(-128, 128, dtype=torch.int8)
    held = convert(signed, Storage(1.0, 128), True)
    assert_same_bits(held.dequantize(), signed.float())
    assert_same_bits(convert(held, None, True), signed)
