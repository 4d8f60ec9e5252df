"""AdaRound: learn for each weight of a layer whether it is rounded up or down, from what the layer gives.

    min over V of  Σ_rows  E(f(t) - f(Ŵ(V)·x̂ + b))² / e  +  λ·mean R(V)

(Nagel et al., 2004.10568, §3.3, eq. 25.) t is the float output, x̂ what the quantized layers before really give, f the clamp
behind the layer, e the error that the output channel has to begin with, and the mean runs over the weights of the
channel. The authors divide by nothing and take λ = 0.01 of the sum, so that what λ means depends on the size of the layer
and of what it gives; on layers of 12 weights that ended at 1.3 times the least error, and this at 1.1. Scales stay: give
the recipe an estimator that clips (``mse``, ``auto``), or run the closed form first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxquant.algorithms.columns import Matrices
from fxquant.algorithms.engine import Layer
from fxquant.algorithms.moments import positions_of
from fxquant.algorithms.soft_rounding import SoftRounding, annealed
from fxquant.behaviour import Clamping
from fxquant.errors import Refusal
from fxquant.ops.calls import behaviour_of, call_of

__all__ = ["STEPS", "adaround"]

STEPS = 2000
"""Steps of Adam by default; the paper takes 10,000."""
_RATE = 2e-2
_LAMBDA = 4.0
_LEAST_SHARE = 1e-3
"""Of the mean error of a layer's channels: what a channel's error counts at least as."""
_POSITIONS = 32
"""Output positions of an image that are looked at, on average."""
_BATCH = 1024
"""Positions of one step."""


def adaround(layer: Layer, generator: torch.Generator, *, steps: int = STEPS) -> Refusal | None:
    """Pin the learned rounding of one layer; or why there is none.

    An output channel keeps the rounding that it had where its error on all samples is not larger.

    Args:
        steps: of Adam.

    Source: Nagel et al., AdaRound, 2004.10568, §3.2–3.3.
    """
    if any(isinstance(value, fx.Node) for value in layer.call.attributes.values()):
        return Refusal("an attribute of it is computed in the graph")
    matrices = Matrices(layer.call, layer.behaviour, layer.weight)
    parts = list(positions_of(layer, matrices, generator, _POSITIONS))
    if not parts:
        return Refusal("no batch reaches it")
    inputs = torch.cat([x for x, _, _ in parts], -1)
    targets = torch.cat([target for _, target, _ in parts], -1)
    if not bool(torch.isfinite(inputs).all() and torch.isfinite(targets).all()):
        return Refusal("what it reads or gives is not finite")
    own, bounds = layer.quantizer, _bounds(layer)
    rounding = SoftRounding(own, layer.weight)
    bias = None if layer.bias is None else own.bias_for(layer.bias)
    offset = 0.0 if bias is None else bias.detach().reshape(targets.shape[:2])[..., None]

    def errors(weight: Tensor, at: Tensor | slice) -> Tensor:
        given = matrices.rows(weight) @ inputs[..., at] + offset
        lost = _clamped(targets[..., at], bounds) - _clamped(given, bounds)
        return lost.square().mean(-1)

    everywhere = slice(None)
    before = errors(rounding.start * rounding.scale, everywhere)
    unit = before.clamp(min=float(before.mean()) * _LEAST_SHARE + torch.finfo(before.dtype).tiny)
    with torch.enable_grad():
        share = _LAMBDA / matrices.rows(layer.weight).shape[-1]
        _learn(
            rounding, lambda at: (errors(rounding.soft(), at) / unit).sum(), share, inputs.shape[-1], generator, steps
        )
    chosen = rounding.integers()
    worse = errors(chosen * rounding.scale, everywhere) > before
    chosen = matrices.weight(torch.where(worse[..., None], matrices.rows(rounding.start), matrices.rows(chosen)))
    own.pin(chosen, own.scale, None if bias is None else bias.detach())
    return None


def _learn(
    rounding: SoftRounding, error: Any, weight: float, count: int, generator: torch.Generator, steps: int
) -> None:
    optimizer = torch.optim.Adam([rounding.v], lr=_RATE)
    for step in range(steps):
        at = torch.randint(count, (min(_BATCH, count),), generator=generator).to(rounding.v.device)
        loss, beta = error(at), annealed(step, steps)
        if beta is not None:
            loss = loss + weight * rounding.penalty(beta)
        optimizer.zero_grad()
        loss.backward(inputs=[rounding.v])
        optimizer.step()


def _bounds(layer: Layer) -> tuple[float | None, float | None]:
    """Of the clamp that alone reads the layer; open where there is none, or where a sum stands between."""
    if layer.call.node is None or len(layer.call.node.users) != 1:
        return None, None
    (user,) = layer.call.node.users
    behaviour = behaviour_of(user)
    if not isinstance(behaviour, Clamping):
        return None, None
    part: Any = layer.call.node.graph.owning_module
    bounds = behaviour.bounds(call_of(user, part.get_submodule(str(user.target)) if user.op == "call_module" else None))
    return (None, None) if isinstance(bounds, Refusal) else bounds


def _clamped(x: Tensor, bounds: tuple[float | None, float | None]) -> Tensor:
    return x if bounds == (None, None) else x.clamp(*bounds)
