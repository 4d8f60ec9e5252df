"""A training step under torch.compile: one graph from the first batch on, the eager step's ranges, gradients and results.

In float64, where sums in another order flip no rounding.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_presets import ResNet
from torch import nn
from torch._dynamo.utils import counters

import fxquant
from fxquant import Recipe

CASES = {
    "observed": {},
    "academic": {"recipe": Recipe.preset("academic", weight_bits=4, activation_bits=4)},
    "learned 8 bits": {"recipe": Recipe.preset("deploy", weight_bits=8, activation_bits=8, rule="lsq")},
    "whitepaper": {"batch_norm": "whitepaper"},
    "frozen": {"batch_norm": "frozen"},
}
QUICK = ("observed",)


def batch(scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(4, 3, 8, 8, dtype=torch.float64)


def step_of(model: nn.Module, call: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    optimizer.zero_grad()
    result = call(x)
    result.square().mean().backward()
    optimizer.step()
    return result.detach()


@pytest.mark.long
@pytest.mark.parametrize("name", list(CASES))
def test_a_compiled_step_is_one_graph_and_the_eager_step(name):
    torch.manual_seed(0)
    eager = fxquant.prepare(ResNet().double().train(), batch(), qat=True, **CASES[name])
    if name.startswith("learned"):  # ranges that are learned start with a batch of their own
        eager(batch())
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    counters.clear()
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (eager, compiled)]
    for i in range(3):
        x = batch(1.0 + i)
        results = [step_of(*each, x, o) for each, o in zip(((eager, eager), (compiled, call)), optimizers, strict=True)]
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    state = compiled.state_dict()
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=2e-6, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")
    x = batch()
    with torch.no_grad():
        torch.testing.assert_close(fxquant.freeze(compiled)(x), fxquant.freeze(eager)(x), rtol=1e-5, atol=1e-7)


@pytest.mark.long
def test_a_first_batch_that_is_not_finite_passes_unrounded_until_one_is():
    torch.manual_seed(0)
    model = fxquant.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).double().train(), batch()[0, 0, :4, :4], qat=True)
    torch._dynamo.reset()
    call, x = torch.compile(model, backend="aot_eager", fullgraph=True), batch()[0, 0, :4, :4]
    bad = x.clone()
    bad[0, 0] = torch.nan
    y = call(bad)
    assert bool(y[0].isnan().any()) and bool(torch.isfinite(y[1:]).all())
    assert not bool((y[1:] == 0).all())
    assert bool(torch.isfinite(call(x)).all())
    other = fxquant.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).double().train(), x, qat=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), call(x))
