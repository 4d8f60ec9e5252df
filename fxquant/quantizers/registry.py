"""The rules that a scheme can name, and how a rule or a range estimator of your own becomes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxquant.errors import Refusal, SchemeError
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.numerics.ranges import ESTIMATOR, RangeEstimator
from fxquant.numerics.requantize import ROUNDINGS
from fxquant.numerics.scheme import ESTIMATORS, OBSERVED, QUANTIZERS, Scheme

__all__ = [
    "RULES",
    "QuantizerRule",
    "has_rule",
    "is_plain",
    "refusal_of",
    "register",
    "register_estimator",
    "rule_of",
    "without_rule",
]


@dataclass(frozen=True, kw_only=True)
class QuantizerRule:
    """One way to quantize, by the name that schemes give it.

    Example:
        >>> print(RULES["pact"].refusal(Scheme.weight(4), "weight"))
        pact is a rule for tensors only

    Args:
        name: what ``Scheme(quantizer=...)`` says.
        tensor: the class of the quantizers of tensors, called as ``tensor(scheme)``; None where the rule has none.
        weight: that of weights, called as ``weight(scheme, axis=..., channels=...)``; None where the rule has none.
        refuses: why the rule cannot have a scheme for a ``"tensor"`` or a ``"weight"``; None where it can.
        simulates: why no integer model can compute what the rule does; None where one can. Such a model trains and is
            evaluated, and ``freeze``, ``convert`` and the exports refuse it with this reason.
        rounding: how ``convert`` requantizes unless it is told; None for the target's way.
    """

    name: str
    tensor: type[FakeQuantize] | None = None
    weight: type[WeightQuantize] | None = None
    refuses: Callable[[Scheme, str], Refusal | None] = lambda scheme, kind: None
    simulates: Refusal | None = None
    rounding: str | None = None

    def refusal(self, scheme: Scheme, kind: str) -> Refusal | None:
        """Why this rule cannot quantize a ``"tensor"`` or a ``"weight"`` to ``scheme``; None where it can.

        Raises:
            SchemeError: ``refuses`` gives neither None nor a ``Refusal``.
        """
        if getattr(self, kind) is None:
            return Refusal(f"{self.name} is a rule for {'weights' if kind == 'tensor' else 'tensors'} only")
        answer = self.refuses(scheme, kind)
        if answer is not None and not isinstance(answer, Refusal):
            raise SchemeError(
                f"quantizer {self.name!r}: refuses({scheme}, {kind!r}) gave {answer!r}.\n"
                "  what to do: let it give None, or fxquant.errors.Refusal(why)."
            )
        return answer


RULES: dict[str, QuantizerRule] = {OBSERVED: QuantizerRule(name=OBSERVED, tensor=FakeQuantize, weight=WeightQuantize)}
"""All rules by name."""


def refusal_of(scheme: Scheme, kind: str) -> Refusal | None:
    """Why the rule that ``scheme`` names cannot quantize a ``"tensor"`` or a ``"weight"`` to it; None where it can."""
    return RULES[scheme.quantizer].refusal(scheme, kind)


def register(
    name: str,
    *,
    tensor: type[FakeQuantize] | None = None,
    weight: type[WeightQuantize] | None = None,
    estimator: str = "mse",
    refuses: Callable[[Scheme, str], Refusal | None] = lambda scheme, kind: None,
    simulates: Refusal | None = None,
    rounding: str | None = None,
) -> QuantizerRule:
    """Enter a quantizer rule, which ``Scheme(quantizer=name)`` then names. The contract stands in ``fxquant.quantizers``.

    Example:
        >>> lsq = RULES["lsq"]
        >>> rule = register("my_lsq", tensor=lsq.tensor, weight=lsq.weight, estimator="minmax")
        >>> print(Scheme.weight(4, quantizer="my_lsq"))
        s4 symmetric per-channel narrow my_lsq

    Args:
        name: what schemes, recipes, saved models and the diff call it.
        tensor, weight, refuses, simulates, rounding: as of ``QuantizerRule``.
        estimator: where its ranges come from unless a scheme says so.

    Raises:
        SchemeError: the name is taken, or what is given cannot be used; nothing was entered.
    """
    if not isinstance(name, str) or not name:
        raise SchemeError(f"quantizer name {name!r}: give a string that schemes will name it by.")
    if name in RULES:
        raise SchemeError(f"there is a quantizer {name!r} already. Give yours another name.")
    if tensor is None and weight is None:
        raise SchemeError(f"quantizer {name!r}: give the class of tensors' quantizers, of weights', or both.")
    for kind, given, parent in (("tensor", tensor, FakeQuantize), ("weight", weight, WeightQuantize)):
        fits = given is None or (isinstance(given, type) and issubclass(given, parent))
        if not fits or (kind == "tensor" and isinstance(given, type) and issubclass(given, WeightQuantize)):
            raise SchemeError(
                f"quantizer {name!r}: {kind}={given!r} is no subclass of fxquant.nn.fake_quantize.{parent.__name__}."
            )
    if estimator not in ESTIMATORS:
        raise SchemeError(f"quantizer {name!r}: estimator={estimator!r}. Choose one of {', '.join(ESTIMATORS)}.")
    if simulates is not None and not isinstance(simulates, Refusal):
        raise SchemeError(f"quantizer {name!r}: simulates={simulates!r}. Give fxquant.errors.Refusal(why), or None.")
    if rounding is not None and rounding not in ROUNDINGS:
        raise SchemeError(f"quantizer {name!r}: rounding={rounding!r}. Choose one of {', '.join(ROUNDINGS)}.")
    rule = QuantizerRule(
        name=name, tensor=tensor, weight=weight, refuses=refuses, simulates=simulates, rounding=rounding
    )
    RULES[name], QUANTIZERS[name] = rule, estimator
    return rule


def register_estimator(name: str, estimator: RangeEstimator) -> None:
    """Enter a range estimator, which ``Scheme(estimator=name)`` then names: for tensors and weights, in every rule.

    Example:
        >>> register_estimator("widest", ESTIMATOR["minmax"])
        >>> scheme = Scheme.activation(8, estimator="widest")

    Args:
        name: what schemes and saved models call it.
        estimator: as ``fxquant.numerics.ranges.RangeEstimator`` describes; without state of its own.

    Raises:
        SchemeError: the name is taken, or the estimator does not do what one has to; nothing was entered.
    """
    if not isinstance(name, str) or not name or name in ESTIMATORS:
        raise SchemeError(f"estimator name {name!r}: give a string that is none of {', '.join(ESTIMATORS)}.")
    wrong = _wrong_with(estimator)
    if wrong:
        raise SchemeError(f"estimator {name!r}, a {type(estimator).__name__}, {wrong} (see RangeEstimator).")
    ESTIMATOR[name] = estimator
    ESTIMATORS.append(name)


def _wrong_with(estimator: Any) -> str | None:
    """What an estimator does otherwise than the protocol says, on a tensor and on a weight of three channels."""
    lacks = [n for n in ("initial_state", "update", "range") if not callable(getattr(estimator, n, None))]
    if lacks:
        return f"has no {', '.join(lacks)}"
    x = torch.linspace(-1.0, 2.0, 24).reshape(2, 3, 4)
    for channels, axis, scheme in ((None, None, Scheme()), (3, 1, Scheme.weight())):
        shape = () if channels is None else (channels,)
        try:
            state = estimator.initial_state(channels, device="cpu")
            for key, first in (("low", torch.inf), ("high", -torch.inf)):
                if (
                    state[key].shape != shape
                    or state[key].dtype != torch.float32
                    or not bool((state[key] == first).all())
                ):
                    return f"begins with {key}={state[key]}, not with {first} of shape {shape} in float32"
            estimator.update(state, x, axis=axis, lower=None, upper=None)
            ends = estimator.range(state, scheme)
        except Exception as error:
            return f"fails on a tensor of shape {tuple(x.shape)} with axis={axis}: {type(error).__name__}: {error}"
        found = len(ends) == 2 and all(tuple(e.shape) == shape and bool(torch.isfinite(e).all()) for e in ends)
        if not found or not bool((ends[0] <= ends[1]).all()):
            return f"gives the range {ends} of numbers from -1 to 2, not two finite float32 tensors of shape {shape}"
    return None


def _is_changed(quantizer: FakeQuantize) -> bool:
    """Whether one quantizer does otherwise than its class: a hook, or a ``forward`` or ``rounded`` of its own."""
    own = {"forward", "rounded"} & quantizer.__dict__.keys()
    return bool(own or quantizer._forward_hooks or quantizer._forward_pre_hooks)


def is_plain(quantizer: FakeQuantize) -> bool:
    """Whether a quantizer computes as fxquant's own classes of observed ranges do.

    Example:
        >>> is_plain(prepared.relu.output_quantizer)
        True
    """
    own = type(quantizer) in (FakeQuantize, WeightQuantize)
    return own and not quantizer._parameters and not _is_changed(quantizer)


def rule_of(quantizer: FakeQuantize) -> QuantizerRule | None:
    """The registered rule that made a quantizer as it is now; None for one that was changed, or of another class.

    Example:
        >>> rule_of(prepared.relu.output_quantizer).name
        'observed'
    """
    rule = RULES[quantizer.scheme.quantizer]
    return None if _is_changed(quantizer) or type(quantizer) not in (rule.tensor, rule.weight) else rule


def has_rule(quantizer: FakeQuantize) -> bool:
    """Whether a quantizer can be made again from its scheme: plain ones, and those of a registered rule.

    Example:
        >>> has_rule(prepared.relu.output_quantizer)
        True
    """
    return is_plain(quantizer) or rule_of(quantizer) is not None


def without_rule(module: nn.Module) -> list[str]:
    """The quantizers of ``module`` that cannot be made again from their schemes, each by its path and class."""
    found = ((path, part) for path, part in module.named_modules() if isinstance(part, FakeQuantize))
    return [f"{path}, a {type(part).__name__}" for path, part in found if not has_rule(part)]
