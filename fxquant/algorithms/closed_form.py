"""Closed-form rounding: the integers of a layer's weight from second moments of what it reads, without gradients.

For one layer with float weight W, float target t and quantized input x̂, both less their means where there is a bias:

    H = E[x̂ x̂ᵀ],  C = E[t x̂ᵀ]
    J(V) = E‖t - V x̂‖² = tr(V H Vᵀ - 2 C Vᵀ) + const.            the layer's error
    V* = argmin J(V) + λ‖V - W‖² = W + (C - W H)(H + λI)⁻¹         ridge least squares
    Ŵ = s · q,  q whole numbers of the grid                        what is looked for

1. *Targets from the float network, inputs from the quantized one* (the asymmetric form: Nagel et al., AdaRound, 2004.10568,
   §3.3, eq. 25; Li et al., GPTAQ, 2504.02692). Where GPTAQ adds a term to each of GPTQ's updates, V* is solved for first; it
   also makes up for what the layers before have lost.
2. *Where there are few positions to a column*, least squares would give the images that calibrate, and nothing else. There
   λ is the one with which V* from three quarters of the data gives the last quarter best, and from then on J is the error
   around V*, (V - V*) H' (V - V*)ᵀ, with H' = H + δI and δ likewise the one with which a rounding on three quarters of the
   data loses least on the last quarter.
3. *Scales*: for each channel the least Σ|v - s·q|^2.4 of V*, then a few scales around it, the one with the least J.
4. *Rounding*: GPTQ (Frantar et al., 2210.17323, §3, eq. 2–3, and §4 Step 3 for the Cholesky form), columns in the order of
   falling H_kk. Then single columns are rounded again, given all others, as long as J falls (coordinate descent, as in Zhang
   et al., COMQ, 2403.07134), and each scale is set to its least-squares value, s = (C qᵀ) / (q H qᵀ), alternately with that.
   Whatever J prefers is kept, nearest rounding included: J is never above that of rounding V* or W to the nearest integer on
   the same scale.
5. *Bias*: b̂ = E[t] - Ŵ E[x̂], exactly.

All of this is done in float64, group by group of a convolution and for all groups at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxquant.algorithms.columns import Matrices
from fxquant.algorithms.engine import Layer
from fxquant.algorithms.moments import Moments, moments_of
from fxquant.errors import Refusal
from fxquant.numerics.affine import smallest_scale
from fxquant.numerics.pairs import reach_of, scale_factor
from fxquant.numerics.scheme import Scheme

__all__ = ["closed_form", "least_squares", "round_in_order", "rounded_rows"]

ENOUGH = 40
"""So many positions a column tell H and C well enough. ResNets on CIFAR-10 have 57 and more, and lose 0.3 points at W4A4
where their layers are taken for such with few; EfficientNet-Lite0's last layers, with 64 crops, have 0.05 to 9."""
RIDGE = 0.1
"""The least λ, as a share of the mean of H's diagonal. On held-out images anything from 0.005 to 0.2 did as well: ResNet-20
at W4A4 was 0.28 to 0.30 nats (KL) from float."""
RIDGES = (RIDGE, 0.3, 1.0, 3.0, 10.0, 1e2, 1e3, 1e4)
"""What is tried of it."""
DAMPINGS = (0.0, 0.1, 1.0, 10.0, 1e2, 1e3)
"""δ, as such shares; what is tried."""
DAMPING = 0.01
"""What GPTQ adds to H's diagonal, likewise (2210.17323, §4, Step 3)."""
NORM = 2.4
SHRINKS = torch.linspace(1.0, 0.2, 81, dtype=torch.float64)
"""Scales to begin with, as parts of the one that reaches the largest weight."""
AROUND = (1.0, 0.9, 1.1, 0.8, 1.2)
AROUND_TERNARY = (1.0, 0.85, 1.2, 0.7, 1.4)
"""Scales around the one with the least error of the weights; wider where a grid has three numbers."""
_TURNS = 2
_ROUNDS = 3
_BLOCK = 64
_LARGEST_BIAS = 2.0**29
_TRIES = 6
_ROWS = 32
"""So many of a group's rows tell how far its H is to be trusted."""


@dataclass
class Rows:
    """A rounding of a layer's rows: ``s · q``.

    Attributes:
        integers: ``(G, R, K)``.
        scale: one number for each of the quantizer's scales, ``(S,)``.
    """

    integers: Tensor
    scale: Tensor


class Scales:
    """Which rows of ``(G, R, K)`` one scale is for: each its own, the same row of every group, or all.

    Args:
        groups, rows: G and R.
        count: S, how many scales there are.
    """

    def __init__(self, groups: int, rows: int, count: int) -> None:
        self.groups, self.rows, self.count = groups, rows, count

    def spread(self, scale: Tensor) -> Tensor:
        """``(S,)`` as ``(G, R)``."""
        if self.count == self.groups * self.rows:
            return scale.reshape(self.groups, self.rows)
        return scale.expand(self.groups, self.rows)

    def collect(self, per_row: Tensor) -> Tensor:
        """The sums ``(S,)`` of numbers ``(G, R)``."""
        if self.count == self.groups * self.rows:
            return per_row.flatten()
        return per_row.sum(0) if self.count == self.rows else per_row.sum().reshape(1)

    def largest(self, rows: Tensor) -> Tensor:
        """The largest magnitude ``(S,)`` of rows ``(G, R, K)``."""
        top = rows.abs().amax(-1)
        if self.count == self.groups * self.rows:
            return top.flatten()
        return top.amax(0) if self.count == self.rows else top.amax().reshape(1)


def closed_form(layer: Layer, generator: torch.Generator) -> Refusal | None:
    """Pin the rounding of one layer; or why there is none.

    Source: see the head of this file.
    """
    scheme, quantizer = layer.quantizer.scheme, layer.quantizer
    if any(isinstance(value, torch.fx.Node) for value in layer.call.attributes.values()):
        return Refusal("an attribute of it is computed in the graph")
    matrices = Matrices(layer.call, layer.behaviour, layer.weight)
    moments = moments_of(layer, matrices, generator)
    if moments is None:
        return Refusal("no batch reaches it")
    if not bool(torch.isfinite(moments.inputs).all() and torch.isfinite(moments.crossed).all()):
        return Refusal("what it reads or gives is not finite")
    rows = matrices.rows(layer.weight).double()
    scales = Scales(rows.shape[0], rows.shape[1], max(quantizer.scale.numel(), 1))
    few = moments.count < ENOUGH * rows.shape[-1]
    goal = rows if layer.is_shared else least_squares(rows, moments, chosen_ridge(rows, moments) if few else RIDGE)
    crossed = rows @ moments.inputs if layer.is_shared else moments.crossed
    if few:
        moments = replace(moments, inputs=_damped(moments.inputs, chosen_damping(goal, moments, scheme)))
        crossed = goal @ moments.inputs
    found = rounded_rows(goal, rows, moments.inputs, crossed, scales, scheme, floor=_floor(layer, moments, scales))
    found = _within_16_bits(layer, matrices, moments, scales, goal, crossed, found)
    real = found.integers * scales.spread(found.scale)[..., None]
    bias = None
    if layer.bias is not None:
        mean = moments.target_mean
        if layer.is_shared:  # each call keeps its own mean: only what rounding does to it is made up for
            mean = layer.bias.double().reshape(rows.shape[:2]) + (rows * moments.input_mean[:, None]).sum(-1)
        bias = (mean - (real * moments.input_mean[:, None]).sum(-1)).flatten().to(layer.bias.dtype)
    scale = found.scale.float().reshape(quantizer.scale.shape)
    quantizer.pin(matrices.weight(found.integers), scale, bias)
    return None


def least_squares(rows: Tensor, moments: Moments, ridge: float) -> Tensor:
    """``V*``, the weight that gives the targets best from the quantized inputs, ``(G, R, K)``."""
    matrix = _damped(moments.inputs, ridge)
    lacking = moments.crossed - rows @ moments.inputs
    return rows + torch.linalg.solve(matrix, lacking, left=False)


def chosen_ridge(rows: Tensor, moments: Moments) -> float:
    """λ as a share of the mean of H's diagonal: of ``RIDGES`` the one whose V* of most of the data gives the rest best."""
    if moments.halves is None:
        return RIDGE
    fit, rest = moments.halves
    errors = [float(_errors(least_squares(rows, fit, r), rest.inputs, rest.crossed).sum()) for r in RIDGES]
    return RIDGES[errors.index(min(errors))]


def chosen_damping(goal: Tensor, moments: Moments, scheme: Scheme) -> float:
    """What H's diagonal gets: of ``DAMPINGS`` the one with which a rounding on most of the data loses least on the rest."""
    if moments.halves is None:
        return 0.0
    fit, rest = moments.halves
    some = goal[:, :_ROWS]
    step = (some.abs().amax(-1) / scheme.qmax).clamp(min=smallest_scale())
    errors = []
    for share in DAMPINGS:
        inputs = _damped(fit.inputs, share)
        integers = _descended(round_in_order(some, inputs, step, scheme), step, inputs, some @ inputs, scheme)
        off = integers * step[..., None] - some
        errors.append(float(((off @ rest.inputs) * off).sum()))
    return DAMPINGS[errors.index(min(errors))]


def _damped(matrix: Tensor, share: float) -> Tensor:
    """``matrix`` with ``share`` of the mean of its diagonal added to that; the identity in the place of zeros."""
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = torch.where(mean > 0, share * mean, torch.ones_like(mean))
    return matrix + added[:, None, None] * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def rounded_rows(
    goal: Tensor, rows: Tensor, inputs: Tensor, crossed: Tensor, scales: Scales, scheme: Scheme, *, floor: Tensor
) -> Rows:
    """The best rounding that the search finds, by the layer's error J.

    Args:
        goal: V*, ``(G, R, K)``.
        rows: W, likewise.
        inputs, crossed: H ``(G, K, K)`` and C ``(G, R, K)``.
        floor: the least scales that are allowed, ``(S,)``.
    """
    start = torch.maximum(_least_error_scale(goal, scales, scheme), floor)
    best: Rows | None = None
    error = torch.full_like(start, torch.inf)
    for factor in AROUND_TERNARY if scheme.qmax == 1 else AROUND:
        scale = torch.maximum(start * factor, floor)
        spread = scales.spread(scale)
        candidates = [Rows(round_in_order(goal, inputs, spread, scheme), scale)]
        candidates += [Rows(_nearest(real, spread, scheme), scale) for real in (goal, rows)]
        for one in candidates:
            best, error = _better(best, error, one, inputs, crossed, scales)
    assert best is not None
    for turn in range(_TURNS):
        scale = torch.maximum(_refitted(best, inputs, crossed, scales), floor) if turn else best.scale
        spread = scales.spread(scale)
        one = Rows(_descended(best.integers, spread, inputs, crossed, scheme), scale)
        best, error = _better(best, error, one, inputs, crossed, scales)
    return _no_worse_than_nearest(best, goal, rows, inputs, crossed, scales, scheme)


def _no_worse_than_nearest(
    best: Rows, goal: Tensor, rows: Tensor, inputs: Tensor, crossed: Tensor, scales: Scales, scheme: Scheme
) -> Rows:
    """The same, or nearest rounding where that has the least error on the very scale that was found."""
    spread, integers = scales.spread(best.scale), best.integers
    error = _errors(integers * spread[..., None], inputs, crossed)
    for real in (goal, rows):
        other = _nearest(real, spread, scheme)
        found = _errors(other * spread[..., None], inputs, crossed)
        integers = torch.where((found < error)[..., None], other, integers)
        error = torch.minimum(error, found)
    return Rows(integers, best.scale)


def round_in_order(goal: Tensor, inputs: Tensor, spread: Tensor, scheme: Scheme) -> Tensor:
    """GPTQ: round column by column, each time letting the columns that are still real make up for it, ``(G, R, K)``.

    Columns come in the order of falling H_kk; blocks of them are updated at once (2210.17323, §4, Steps 2 and 3).

    Args:
        spread: the scale of each row, ``(G, R)``.
    """
    matrix = _damped(inputs, DAMPING)
    order = matrix.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    matrix = matrix.gather(1, order[:, :, None].expand_as(matrix)).gather(2, order[:, None, :].expand_as(matrix))
    index = order[:, None, :].expand_as(goal)
    left, step = goal.gather(2, index), spread
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    upper = torch.linalg.cholesky((inverse + inverse.mT) / 2).mT
    whole = torch.empty_like(left)
    for first in range(0, left.shape[-1], _BLOCK):
        last = min(first + _BLOCK, left.shape[-1])
        errors = torch.empty_like(left[..., first:last])
        for k in range(first, last):
            whole[..., k] = torch.clamp(torch.round(left[..., k] / step), scheme.qmin, scheme.qmax)
            errors[..., k - first] = (left[..., k] - whole[..., k] * step) / upper[:, None, k, k]
            left[..., k + 1 : last] -= errors[..., k - first, None] * upper[:, None, k, k + 1 : last]
        left[..., last:] -= errors @ upper[:, first:last, last:]
    return torch.empty_like(whole).scatter_(2, index, whole)


def _descended(integers: Tensor, spread: Tensor, inputs: Tensor, crossed: Tensor, scheme: Scheme) -> Tensor:
    """Each column rounded again given all others, until none changes or a few passes are over; J falls or stays.

    Given the others, J of column k has its least value at v_k + (C - V H)_k / H_kk, and is a parabola around it: the
    nearest integer is the best.
    """
    diagonal = inputs.diagonal(dim1=-2, dim2=-1)
    q, open_columns = integers.clone(), diagonal.amax(0) > 0
    slope = crossed - (q * spread[..., None]) @ inputs
    for _ in range(_ROUNDS):
        changed = False
        for k in open_columns.nonzero().flatten().tolist():
            curve = diagonal[:, None, k].clamp(min=torch.finfo(diagonal.dtype).tiny)
            wanted = torch.round(q[..., k] + slope[..., k] / (curve * spread)).clamp(scheme.qmin, scheme.qmax)
            wanted = torch.where(diagonal[:, None, k] > 0, wanted, q[..., k])
            move = wanted - q[..., k]
            if bool(move.any()):
                changed = True
                slope -= (move * spread)[..., None] * inputs[:, None, k]
                q[..., k] = wanted
        if not changed:
            break
    return q


def _nearest(real: Tensor, spread: Tensor, scheme: Scheme) -> Tensor:
    return torch.clamp(torch.round(real / spread[..., None]), scheme.qmin, scheme.qmax)


def _errors(real: Tensor, inputs: Tensor, crossed: Tensor) -> Tensor:
    """J of each row ``(G, R)``, less what no weight changes."""
    return ((real @ inputs - 2 * crossed) * real).sum(-1)


def _better(
    best: Rows | None, error: Tensor, one: Rows, inputs: Tensor, crossed: Tensor, scales: Scales
) -> tuple[Rows, Tensor]:
    """For each scale the rows with the lesser error."""
    found = scales.collect(_errors(one.integers * scales.spread(one.scale)[..., None], inputs, crossed))
    if best is None:
        return one, found
    wins = found < error
    integers = torch.where(scales.spread(wins)[..., None], one.integers, best.integers)
    return Rows(integers, torch.where(wins, one.scale, best.scale)), torch.where(wins, found, error)


def _refitted(rows: Rows, inputs: Tensor, crossed: Tensor, scales: Scales) -> Tensor:
    """The scales with the least J for given integers."""
    above = scales.collect((rows.integers * crossed).sum(-1))
    below = scales.collect(((rows.integers @ inputs) * rows.integers).sum(-1))
    scale = above / below
    return torch.where(torch.isfinite(scale) & (scale > 0) & (below > 0), scale, rows.scale)


def _least_error_scale(goal: Tensor, scales: Scales, scheme: Scheme) -> Tensor:
    """The scale of each channel with the least ``Σ |v - s·q|^2.4``, ``(S,)``."""
    top = scales.largest(goal)
    widest = torch.where(top > 0, top / scheme.qmax, torch.ones_like(top))
    best, error = widest, torch.full_like(widest, torch.inf)
    for shrink in SHRINKS.tolist():
        spread = scales.spread(widest * shrink)
        found = scales.collect((goal - _nearest(goal, spread, scheme) * spread[..., None]).abs().pow(NORM).sum(-1))
        best = torch.where(found < error, widest * shrink, best)
        error = torch.minimum(found, error)
    return best


def _floor(layer: Layer, moments: Moments, scales: Scales) -> Tensor:
    """The scales below which a bias of twice the size of now would not fit into 31 bits."""
    least = torch.full((scales.count,), smallest_scale(), dtype=torch.float64, device=layer.weight.device)
    if layer.bias is None or layer.entering is None:
        return least
    bias = torch.maximum(layer.bias.double().abs().reshape(moments.target_mean.shape), moments.target_mean.abs())
    needed = bias / (_LARGEST_BIAS * layer.entering.scale.double().to(bias.device))
    return torch.maximum(least, scales.largest(needed[..., None]))


def _within_16_bits(
    layer: Layer, matrices: Matrices, moments: Moments, scales: Scales, goal: Tensor, crossed: Tensor, found: Rows
) -> Rows:
    """``found``, or a rounding on coarser scales where sums of two products would leave 16 bits; see ``numerics.pairs``."""
    own = layer.quantizer
    if own.out_axis is None:
        return found
    grid = None if layer.entering is None else layer.entering.grid
    if grid is not None and bool(torch.isfinite(own.seen).all()):
        own.reach.copy_(reach_of(own.seen, max(moments.images, 1), grid.scale, grid.zero_point, grid.scheme))
    for attempt in range(_TRIES):
        spread = scales.spread(found.scale)
        weight = matrices.weight(found.integers * spread[..., None]).float()
        scale = found.scale.float().reshape(own.scale.shape)
        bounds = {"qmin": own.scheme.qmin, "qmax": own.scheme.qmax}
        factor = scale_factor(weight, scale, own.reach, out_axis=own.out_axis, clipped=False, **bounds)
        if not bool((factor > 1).any()):
            break
        coarser = found.scale * factor.double().reshape(-1) * (1 + 0.01 * attempt)
        spread = scales.spread(coarser)
        again = round_in_order(goal, moments.inputs, spread, own.scheme)
        again = _descended(again, spread, moments.inputs, crossed, own.scheme) if attempt == 0 else again
        kept = scales.spread(factor.reshape(-1) > 1)[..., None]
        found = Rows(
            torch.where(kept, again, found.integers), torch.where(factor.reshape(-1) > 1, coarser, found.scale)
        )
    return found
