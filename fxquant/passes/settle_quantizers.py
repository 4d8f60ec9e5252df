"""settle_quantizers: put a plain quantizer in the place of each of a user's own, provided that it rounds the same.

The contract of a quantizer of a registered rule (``fxquant.quantizers``), or of your own, put where a prepared model has
``weight_quantizer`` or ``output_quantizer``: a subclass of ``FakeQuantize`` or ``WeightQuantize``, a parametrized one, one
whose scale is a parameter:

- ``forward`` may do anything. In eval mode its results lie on the grid that the property ``grid`` gives: scale, zero point
  (0 for a weight) and scheme.
- A weight becomes what ``forward`` makes of it, so that a rounding of your own (learned, stochastic, by blocks) is kept.
- Data is not known when a model is frozen: ``forward`` has to round each number to the nearest of the grid, as the integer
  model will, and to clamp to ``lower`` and ``upper``, which a merged ReLU gives it.
- A tensor and what it passes through (pools, reshapes) hold one object.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.errors import LevelError
from fxquant.graph.edit import Edit, clone_module
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.fake_quantize import FakeQuantize, Grid, WeightQuantize
from fxquant.nn.modules import QuantOp, QuantWeightedOp
from fxquant.numerics.affine import broadcast, in_float32
from fxquant.ops.calls import call_of
from fxquant.passes.facts import Placed
from fxquant.passes.finite import require_finite
from fxquant.quantizers.registry import is_plain, rule_of

__all__ = ["grid_of", "settle_quantizers"]

_NEAR = 1e-3
"""Real numbers that differ by less than this part of a step are the same."""
_NOISE = 2.0**-22
"""What float32 may add to a multiple of a scale, divided by the scale again, as a part of it: 16 bits are 2^15 steps."""
_PROBED = 512
"""Levels that are tried at each end of a grid, and around its middle."""


def settle_quantizers(module: LeveledModule) -> LeveledModule:
    """Replace each quantizer of a user's own by a plain one on its grid, and make of pinned integers the weight they are.

    Law:
        The graph is unchanged, and so are its outputs in eval mode, up to float rounding.

    Raises:
        LevelError: a quantizer of a user's own rounds otherwise than its grid does; or what shares a grid holds several;
            or a rule has no integers.
        CalibrationError: a weight, a bias or a learned range holds NaN or infinity.
    """
    require_finite(module)
    edit = Edit(module, by="settle_quantizers")
    _require_integers(edit)
    _one_quantizer_each(edit)
    settled: dict[int, FakeQuantize] = {}
    for node in edit.nodes:
        part: Any = edit.module(node)
        own = getattr(part, "output_quantizer", None)
        if own is not None and not is_plain(own):
            if id(own) not in settled:
                settled[id(own)] = _of_tensor(own, f"{node.target}.output_quantizer")
            if part.applies:
                _hold_against(
                    own,
                    settled[id(own)],
                    f"{node.target}.output_quantizer",
                    part.clamp if isinstance(part, QuantOp) else None,
                )
            edit.set_module(node, clone_module(part, output_quantizer=settled[id(own)]))
        own = getattr(part, "weight_quantizer", None)
        if own is not None and (not is_plain(own) or getattr(own, "integers", None) is not None):
            _settle_weight(edit, node, own)
    return edit.done()


def _require_integers(edit: Edit) -> None:
    """Refuse rules that are only simulated."""
    for node in edit.nodes:
        for name in ("weight_quantizer", "output_quantizer"):
            own = getattr(edit.module(node), name, None)
            rule = rule_of(own) if isinstance(own, FakeQuantize) else None
            if rule is not None and rule.simulates is not None:
                raise LevelError(
                    f"{node.target}.{name} is quantized by {rule.name!r}, which is simulated: {rule.simulates}.\n"
                    "  what to do: train and evaluate the prepared model; to deploy one, prepare it with a rule that has "
                    "integers (fxquant.quantizers.RULES)."
                )


def _one_quantizer_each(edit: Edit) -> None:
    """Tensors of one group hold one object; a passing op's own would never be asked."""
    held: dict[str, tuple[Any, fx.Node]] = {}
    for node in edit.nodes:
        quantizer, group = getattr(edit.module(node), "output_quantizer", None), Placed(node).group
        if quantizer is None or group is None:
            continue
        first, holder = held.setdefault(group, (quantizer, node))
        if first is not quantizer:
            raise LevelError(
                f"{node.target} and {holder.target} are on one grid, since values pass from one to the other, but hold two "
                f"quantizers, a {type(quantizer).__name__} and a {type(first).__name__}.\n"
                "  what to do: put one object in all places that shared one after prepare."
            )


def grid_of(own: Any, where: str) -> Grid:
    """The grid that a quantizer offers, in tensors of its own.

    Raises:
        LevelError: it offers none, or one that integers cannot have.
    """
    grid = getattr(own, "grid", None) if isinstance(own, FakeQuantize) else None
    if not isinstance(grid, Grid):
        raise _refusal(
            own, where, "is no FakeQuantize with a grid", "subclass FakeQuantize, or WeightQuantize for a weight"
        )
    scale, zero_point = grid.scale.detach().float().clone(), grid.zero_point.detach().to(torch.int32).clone()
    inside = (zero_point >= grid.qmin) & (zero_point <= grid.qmax)
    if (
        scale.ndim > 1
        or scale.shape != zero_point.shape
        or not bool((torch.isfinite(scale) & (scale > 0) & inside).all())
    ):
        what = (
            f"offers a grid of scale {scale.flatten()[:3].tolist()} and zero point {zero_point.flatten()[:3].tolist()}"
        )
        raise _refusal(own, where, what, "give one positive scale, or one per channel, and zero points on the grid")
    return Grid(scale, zero_point, grid.scheme)


def _refusal(own: Any, where: str, what: str, advice: str) -> LevelError:
    return LevelError(
        f"the quantizer {where}, a {type(own).__name__}, {what}; the integer model would not compute what it does.\n"
        f"  what to do: {advice} (see fxquant.passes.settle_quantizers); or use FakeQuantize itself."
    )


def _at_rest(own: Any) -> Any:
    """A copy in eval mode, to ask what it makes of something."""
    resting = copy.deepcopy(own).eval()
    resting.delayed = False
    return resting


def _of_tensor(own: Any, where: str) -> FakeQuantize:
    grid = grid_of(own, where)
    if grid.scale.numel() != 1:
        raise _refusal(own, where, "has a scale per channel", "give one scale per tensor")
    plain = FakeQuantize(grid.scheme).to(grid.scale.device).eval()
    plain.set_grid(grid.scale.reshape(()), grid.zero_point.reshape(()))
    return plain


@torch.no_grad()
def _hold_against(own: Any, plain: FakeQuantize, where: str, clamp: tuple[float | None, float | None] | None) -> None:
    """Compare a quantizer with the plain one on its grid, everywhere but on ties of rounding."""
    grid = plain.grid
    ends, middle = (grid.qmin, grid.qmax), (grid.qmin + grid.qmax) // 2
    levels = {q + d for q in (*ends, middle, int(grid.zero_point)) for d in range(-_PROBED, _PROBED)}
    parts = torch.tensor([-0.45, -0.2, 0.0, 0.3, 0.45], device=grid.scale.device)
    q = torch.tensor(sorted(levels), device=parts.device)[:, None] + parts - grid.zero_point
    x = (q * grid.scale).flatten()
    bounds = (None, None) if clamp is None else clamp
    found, wanted = _at_rest(own)(x.clone(), *bounds), plain(x.clone(), *bounds)
    off = torch.full_like(wanted, torch.inf) if found.shape != wanted.shape else ((found - wanted) / grid.scale).abs()
    if not bool((off <= _NEAR + 1e-5 * q.abs().flatten()).all()):
        worst = int(off.nan_to_num(torch.inf).argmax())
        got = (
            float(found.flatten()[worst]) if found.shape == wanted.shape else f"a tensor of shape {tuple(found.shape)}"
        )
        between = "" if clamp is None else f", clamped to {clamp[0]}…{clamp[1]}"
        what = f"makes {got} of {float(x[worst]):.6g}{between}, where its grid has {float(wanted[worst]):.6g}"
        raise _refusal(own, where, what, "let forward round to the nearest number of the grid that it offers")


def _settle_weight(edit: Edit, node: fx.Node, own: Any) -> None:
    """The weight as its quantizer makes it, with a plain quantizer that leaves it so.

    A half-precision weight is asked for in float32: what the quantizer gives lies on its grid there, and not in the half.
    """
    part: Any = edit.module(node)
    where = f"{node.target}.weight_quantizer"
    source = call_of(node, part).operand("weight") if isinstance(part, QuantWeightedOp) else None
    weight: Tensor = part.weight if source is None else edit.attributes[str(source.target)]
    asked = _at_rest(own)
    with torch.no_grad():
        rounded = asked(in_float32(weight.detach()))
    grid = grid_of(asked, where)
    axis = own.axis if grid.scale.ndim else None
    fits = rounded.shape == weight.shape and (axis is None or len(grid.scale) == weight.shape[axis])
    if not fits or bool(grid.zero_point.any()) or (grid.scale.ndim and axis is None):
        what = "offers a grid that does not fit its weight"
        raise _refusal(own, where, what, "give zero point 0, and one scale or one per channel along axis")
    scale = broadcast(grid.scale, weight.ndim, axis)
    steps = rounded.float() / scale
    off = torch.maximum((steps - steps.round()).abs(), torch.maximum(grid.qmin - steps, steps - grid.qmax))
    if not bool((off <= _NEAR + _NOISE * steps.abs()).all()):
        what = f"makes numbers of its weight that lie {float(off.nan_to_num(torch.inf).max()):.3g} steps off its grid"
        raise _refusal(own, where, what, "let grid give the scale and the scheme whose multiples forward returns")
    plain = WeightQuantize(grid.scheme, axis=axis, channels=len(grid.scale) if grid.scale.ndim else None)
    plain = plain.to(weight.device).eval()
    plain.set_grid(grid.scale, grid.zero_point)
    plain.pinned = True
    made = nn.Parameter((steps.round() * scale).to(weight.dtype), requires_grad=False)
    if source is None:
        bias = _pinned_bias(asked, part.bias)
        edit.set_module(node, clone_module(part, weight=made, weight_quantizer=plain, **bias))
        return
    held = call_of(node, part).operand("bias")
    bias = {} if held is None else _pinned_bias(asked, edit.constant(held))
    edit.set_module(node, clone_module(part, weight_quantizer=plain))
    _read_instead(edit, node, source, "weight", made)
    if held is not None and bias:
        _read_instead(edit, node, held, "pinned_bias", bias["bias"])


def _pinned_bias(own: Any, bias: Tensor | None) -> dict[str, Tensor]:
    """The bias that was pinned with the integers, as a change of the module; none where there is none."""
    found = own.bias_for(bias) if isinstance(own, WeightQuantize) else bias
    return {} if found is bias or found is None else {"bias": nn.Parameter(found.detach().clone(), requires_grad=False)}


def _read_instead(edit: Edit, node: fx.Node, source: fx.Node, name: str, made: Tensor) -> None:
    """Let a call read a constant of its own in the place of the parameter that ``source`` reads."""
    path = edit.fresh_path(f"{str(node.target).replace('.', '_')}_{name}")
    facts = {key: source.meta.get(key) for key in ("shape", "dtype")}
    constant = edit.insert_attribute(node, path, made, is_tensor=True, constant=True, quantized=False, **facts)
    edit.redirect([node], source, constant)
