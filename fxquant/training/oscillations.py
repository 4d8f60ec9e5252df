"""Weights that flip between two neighbouring integers while they train: how often they do, and two ways to stop them.

With straight-through gradients a weight whose best value lies between two levels is pushed across the threshold, and back,
for as long as it trains. At 4 bits and below, in depthwise convolutions above all, what ships is then a matter of the last
step, and batch norms' statistics lag behind. With w_int = clip(round(w / s), n, p) at step t, and ψ the direction of the
last change before:

    oscillation   o = 1 where w_int changes at t, and in the direction opposite to ψ, else 0
    frequency     f ← m·o + (1 - m)·f
    freezing      e ← m·w_int + (1 - m)·e;  where f > f_th the weight is round(e) from then on, whatever becomes of s
    dampening     L = λ · Σ (ŵ - clip(w, s·n, s·p))²,  with a gradient of w alone

f_th may fall and λ rise by half a cosine while training goes on. Take batch norms' statistics anew afterwards
(``fxquant.reestimate_batchnorm``). Source: Nagel et al., Overcoming Oscillations in Quantization-Aware Training, 2203.11086,
§3 and §4, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import InputError, Refusal
from fxquant.nn.fake_quantize import WeightQuantize
from fxquant.numerics.affine import broadcast
from fxquant.quantizers.learned import LearnedWeight
from fxquant.training.weights import weights_of

__all__ = ["Oscillations"]

Course = float | tuple[float, float]


@dataclass
class _Weight:
    """What is known of one weight; all of its shape.

    Attributes:
        last: its integers at the last step.
        direction: of their last change: -1 or 1, 0 where there was none.
        frequency: f.
        mean: e.
        frozen: where integers are held, which are those of ``last``.
    """

    last: Tensor
    direction: Tensor
    frequency: Tensor
    mean: Tensor
    frozen: Tensor

    @classmethod
    def of(cls, integers: Tensor) -> _Weight:
        zeros = torch.zeros_like(integers)
        return cls(integers, zeros, zeros.clone(), integers.clone(), torch.zeros_like(integers, dtype=torch.bool))


class Oscillations:
    """Follows the integers of a model's weights. Call ``step()`` after each step of the optimizer.

    Args:
        prepared: what ``prepare(..., qat=True)`` returned, with batch norms late or frozen.
        bits: weights of so many bits, or fewer, are followed.
        momentum: m.
        freeze_above: f_th, or where it begins and ends; None freezes nothing.
        dampening: λ, or where it begins and ends.
        steps: how many steps such a course takes; afterwards its end holds.

    Attributes:
        count: how many steps were done.
        left_out: weights that are not followed, with the reason, by path.

    Example:
        >>> oscillations = fxquant.training.Oscillations(prepared, freeze_above=(0.04, 0.01), steps=5000)
        >>> for x, y in loader:
        ...     (criterion(prepared(x), y) + oscillations.loss()).backward()
        ...     optimizer.step()
        ...     oscillations.step()

    Raises:
        InputError: no weight can be followed, or a setting makes no sense.
    """

    def __init__(
        self,
        prepared: nn.Module,
        *,
        bits: int = 4,
        momentum: float = 0.01,
        freeze_above: Course | None = None,
        dampening: Course = 0.0,
        steps: int | None = None,
    ) -> None:
        if not 0 < momentum <= 1 or (steps is None and any(isinstance(c, tuple) for c in (freeze_above, dampening))):
            raise InputError("momentum is above 0 and at most 1, and a course from one number to another needs steps.")
        self.bits, self.momentum, self.freeze_above, self.dampening = bits, momentum, freeze_above, dampening
        self.steps, self.count, self.left_out = steps, 0, dict[str, str]()
        self._weights: dict[str, tuple[WeightQuantize, nn.Parameter]] = {}
        for name, part, weight in weights_of(prepared):
            reason = _refusal(part)
            if reason is None:
                self._weights[name] = part.weight_quantizer, weight
            else:
                self.left_out[name] = reason.why
        self._known: dict[str, tuple[int, _Weight]] = {}
        if not self._weights:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(self.left_out.items())[:3])
            raise InputError(f"no weight of this {type(prepared).__name__} can be followed. {reasons}".rstrip())
        self._follow()

    @torch.no_grad()
    def step(self) -> None:
        """Look at the weights as the optimizer has left them; hold those that are frozen, and freeze others."""
        self.count += 1
        threshold = math.inf if self.freeze_above is None else self._now(self.freeze_above)
        for name, known in self._follow().items():
            quantizer, weight = self._weights[name]
            integers = torch.where(known.frozen, known.last, _integers(quantizer, weight))
            change = (integers - known.last).sign()
            known.frequency.lerp_((change * known.direction < 0).float(), self.momentum)
            known.direction = torch.where(change != 0, change, known.direction)
            known.mean.lerp_(integers, self.momentum)
            new = (known.frequency > threshold) & ~known.frozen
            known.last, known.frozen = torch.where(new, known.mean.round(), integers), known.frozen | new
            if self.freeze_above is not None:
                _hold(quantizer, weight, known)

    def loss(self) -> Tensor:
        """λ · Σ (ŵ - clip(w, s·n, s·p))² over the weights that are followed, a float32 scalar."""
        strength, terms = self._now(self.dampening), []
        for name in self._follow() if strength else ():
            quantizer, weight = self._weights[name]
            with torch.no_grad():
                rounded = _rounded(quantizer, weight).float()
                scale = broadcast(quantizer.grid.scale, weight.ndim, quantizer.axis)
                low, high = scale * quantizer.scheme.qmin, scale * quantizer.scheme.qmax
            terms.append((rounded - torch.clamp(weight.float(), low, high)).square().sum())
        if not terms:
            return torch.zeros((), device=next(iter(self._weights.values()))[1].device)
        return strength * torch.stack(terms).sum()

    @property
    def frequencies(self) -> dict[str, Tensor]:
        """f of each weight that is followed now, by path."""
        return {name: known.frequency.clone() for name, (_, known) in self._known.items()}

    @property
    def frozen(self) -> dict[str, Tensor]:
        """Where integers are held, likewise."""
        return {name: known.frozen.clone() for name, (_, known) in self._known.items()}

    def share(self, above: float = 0.005) -> float:
        """The share of weights that oscillate, with a frequency above this one."""
        found = [known.frequency > above for _, known in self._known.values()]
        return float(sum(int(f.sum()) for f in found) / max(1, sum(f.numel() for f in found)))

    def state_dict(self) -> dict[str, Any]:
        """All that is known, as numbers and tensors."""
        known = {
            name: {"bits": bits, **{f.name: getattr(one, f.name).clone() for f in fields(one)}}
            for name, (bits, one) in self._known.items()
        }
        return {"count": self.count, "weights": known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, which an object with the same settings has given.

        Raises:
            InputError: it knows other weights.
        """
        unknown = set(state["weights"]) - set(self._weights)
        if unknown:
            raise InputError(f"this state knows weights that are not followed here: {', '.join(sorted(unknown)[:4])}.")
        self.count, self._known = int(state["count"]), {}
        for name, one in state["weights"].items():
            device = self._weights[name][1].device
            values = {field.name: one[field.name].to(device, copy=True) for field in fields(_Weight)}
            self._known[name] = int(one["bits"]), _Weight(**values)

    @torch.no_grad()
    def _follow(self) -> dict[str, _Weight]:
        """What is known of the weights that have few bits now; begun anew where the number of bits has changed."""
        for name, (quantizer, weight) in self._weights.items():
            bits = quantizer.scheme.bits
            if bits > self.bits:
                self._known.pop(name, None)
            elif name not in self._known or self._known[name][0] != bits:
                self._known[name] = bits, _Weight.of(_integers(quantizer, weight))
        return {name: known for name, (_, known) in self._known.items()}

    def _now(self, course: Course) -> float:
        """Where a course is: its end after ``steps``, by half a cosine."""
        if not isinstance(course, tuple):
            return course
        assert self.steps is not None
        begin, end = course
        return end + (begin - end) * (1 + math.cos(math.pi * min(1.0, self.count / self.steps))) / 2


def _refusal(part: Any) -> Refusal | None:
    """Why a weight cannot be followed; None where it can."""
    quantizer = part.weight_quantizer
    plain = type(quantizer) is WeightQuantize and quantizer.scheme.estimator == "minmax"
    if not (plain or isinstance(quantizer, LearnedWeight)):
        return Refusal(f"its integers do not stay where they are put ({quantizer.scheme})")
    if quantizer.integers is not None:
        return Refusal("its rounding is pinned")
    if getattr(part, "folded_norm", None) is not None:
        return Refusal("a batch norm is folded before it is rounded, whose gain moves its integers")
    return None


def _rounded(quantizer: WeightQuantize, weight: Tensor) -> Tensor:
    before, quantizer.enabled = quantizer.enabled, True
    rounded = quantizer(weight.detach())
    quantizer.enabled = before
    return rounded


def _integers(quantizer: WeightQuantize, weight: Tensor) -> Tensor:
    """w_int, float32."""
    rounded = _rounded(quantizer, weight).float()
    return (rounded / broadcast(quantizer.grid.scale, weight.ndim, quantizer.axis)).round()


def _hold(quantizer: WeightQuantize, weight: Tensor, known: _Weight) -> None:
    """Write what is frozen into the parameter, on the grid as it is now, where it rounds to itself."""
    scale = broadcast(quantizer.grid.scale, weight.ndim, quantizer.axis)
    weight.copy_(torch.where(known.frozen, (known.last * scale).to(weight.dtype), weight))
