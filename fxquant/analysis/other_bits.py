"""The quantizers of one op at other bits than its own: of the same rule, over the same range, or why the rule has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from fxquant.analysis.spots import Spot
from fxquant.errors import Refusal
from fxquant.nn.fake_quantize import FakeQuantize
from fxquant.quantizers import RULES, rule_of

__all__ = ["refusal", "result_at", "weight_at"]


def refusal(spot: Spot, bits: int) -> Refusal | None:
    """Why what ``spot`` rounds cannot be rounded to ``bits``; None where it can."""
    rounded = [("tensor", spot.grid if spot.rounds else None), ("weight", spot.weight)]
    for kind, own in rounded:
        if own is None or own.scheme.bits == bits:
            continue
        rule = rule_of(own)
        if rule is None:
            return Refusal(
                f"its {kind}'s quantizer, a {type(own).__name__}, is of no registered rule, which would make it at other "
                f"bits than its {own.scheme.bits} (see fxquant.quantizers.register)"
            )
        reason = rule.refusal(replace(own.scheme, bits=bits), kind)
        if reason is None:
            try:
                _made(own, kind, bits)
            except Exception as error:  # a rule of the user's own, which may raise anything
                reason = Refusal(f"it cannot be made: {type(error).__name__}: {error}")
        if reason is not None:
            return Refusal(f"the quantizer rule {rule.name!r} of its {kind} has no {bits} bits: {reason}")
    return None


def _made(own: FakeQuantize, kind: str, bits: int) -> FakeQuantize:
    """A new quantizer of the rule of ``own``; a weight's finds its range in the weight."""
    rule, scheme = RULES[own.scheme.quantizer], replace(own.scheme, bits=bits)
    if kind == "weight":
        assert rule.weight is not None
        made: FakeQuantize = rule.weight(scheme, axis=own.axis, channels=own.channels)
    else:
        assert rule.tensor is not None
        made, grid = rule.tensor(scheme), own.grid
        made.to(grid.scale.device)
        made.set_range((grid.qmin - grid.zero_point) * grid.scale, (grid.qmax - grid.zero_point) * grid.scale)
    made.to(own.scale.device)
    return made.eval()


@contextmanager
def weight_at(spot: Spot, bits: int) -> Iterator[None]:
    """Inside, the weight of ``spot`` is rounded to ``bits``."""
    own = spot.weight
    assert own is not None
    quantizer = own if own.scheme.bits == bits else _made(own, "weight", bits)
    before, quantizer.enabled = quantizer.enabled, True
    spot.part.weight_quantizer = quantizer
    try:
        yield
    finally:
        spot.part.weight_quantizer = own
        quantizer.enabled = before


def result_at(spot: Spot, bits: int) -> Callable[[Tensor], Tensor]:
    """What rounds a result of ``spot`` to ``bits``."""
    own = spot.grid
    assert own is not None
    if own.scheme.bits != bits:
        return _made(own, "tensor", bits)
    quantizer: FakeQuantize = own

    def rounded(x: Tensor) -> Tensor:
        before, quantizer.enabled = quantizer.enabled, True
        try:
            result: Tensor = quantizer(x)
            return result
        finally:
            quantizer.enabled = before

    return rounded
