"""A runtime in data: what it computes in integers, on which grids, and where it wants tensors rounded.

Passes read these fields and know no runtime by name. Ops are named as the op table names them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from fxquant.errors import Refusal, SchemeError
from fxquant.numerics.requantize import ROUNDINGS
from fxquant.numerics.scheme import ACTIVATION, OBSERVED, WEIGHT, Scheme
from fxquant.targets.processors import PROCESSORS

__all__ = ["BYTE_WEIGHTS", "Target"]

BYTE_WEIGHTS = tuple(range(2, 9))
"""Widths of weights whose integers lie in a tensor of bytes, which kernels for 8 bits take as they are."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a runtime has and wants.

    Example:
        >>> onnxruntime = fxquant.targets.get("onnxruntime")
        >>> mine = dataclasses.replace(onnxruntime, name="mine", integer_ops=frozenset({"conv2d", "relu"}))
        >>> prepared = fxquant.prepare(model, images, target=mine)

    Args:
        name: how ``prepare`` is told of it.
        title: how people call it.
        source: where its rules are written down.
        activation, weight: the schemes of tensors and weights that a recipe leaves open.
        activation_bits, weight_bits: the widths it computes, or reads.
        activation_signs: whether integers of tensors may be signed (True), unsigned (False), or both.
        affine: whether tensors may have a zero point other than the middle of their grid.
        wide_weights: whether a signed weight may hold the lowest integer of its type.
        per_channel: the weighted ops whose weights may have a scale per channel; None for all.
        per_tensor_in_groups: those of them whose weights have one scale where they compute in groups.
        integer_ops: the ops it computes on integers; None for all. Others stay in float, with that reason.
        reasons: why one of the others stays in float, where there is more to say.
        keeps_scale: ops that compute, and yet give their result on the grid of their first operand.
        fixed_grids: ``(scale, zero_point)`` of ops whose result lies on a grid that the runtime prescribes.
        reads_accumulators: ops that it computes in one kernel with a weighted op before them. What passes between is
            not rounded: of several operands the first that comes from a weighted op, and only from there.
        rounds_for_float: whether a weighted op's result is rounded where only float ops read it.
        rounds_outputs: weighted ops that it has no kernel for whose result is a float: they are rounded where their result
            leaves the model, too. Of all others the wide accumulator leaves as a float.
        rounding: how its kernels requantize accumulators, as ``convert`` spells it.
        rounds_joined: whether files for it round what a concatenation gives; what it joins otherwise, which is the same.
        integer_biases: whether files for it hold biases as 32-bit integers; as floats otherwise.
        packs_weights: whether files for it hold weights of up to 4 bits in 4; in bytes otherwise.
        integer_operators: whether it takes ONNX files with operators on integers (``form="qoperator"``).
        file_rules: the rules that an ONNX file for it is held against at export, by name; none where empty.
        adds_pairs: whether its kernels for x86 without dot products add two products in 16 bits.
        processor: where it will run, by a name of ``PROCESSORS``; ``prepare(..., processor=...)`` sets another.
    """

    name: str
    title: str
    source: str = ""
    activation: Scheme = ACTIVATION
    weight: Scheme = WEIGHT
    activation_bits: tuple[int, ...] = (8,)
    weight_bits: tuple[int, ...] = BYTE_WEIGHTS
    activation_signs: tuple[bool, ...] = (False, True)
    affine: bool = True
    wide_weights: bool = True
    per_channel: frozenset[str] | None = None
    per_tensor_in_groups: frozenset[str] = frozenset()
    integer_ops: frozenset[str] | None = None
    reasons: Mapping[str, str] = field(default_factory=dict, hash=False)
    keeps_scale: frozenset[str] = frozenset()
    fixed_grids: Mapping[str, tuple[float, int]] = field(default_factory=dict, hash=False)
    reads_accumulators: frozenset[str] = frozenset()
    rounds_for_float: bool = True
    rounds_outputs: frozenset[str] = frozenset()
    rounding: str = "single"
    rounds_joined: bool = True
    integer_biases: bool = True
    packs_weights: bool = True
    integer_operators: bool = True
    file_rules: str = ""
    adds_pairs: bool = True
    processor: str = "any"

    def __post_init__(self) -> None:
        if self.processor not in PROCESSORS:
            near = difflib.get_close_matches(str(self.processor), PROCESSORS, n=1)
            raise SchemeError(
                f"processor={self.processor!r} is not known.{f' Did you mean {near[0]!r}?' if near else ''}\n"
                f"  what to do: give one of {', '.join(PROCESSORS)}."
            )
        if self.rounding not in ROUNDINGS:
            raise SchemeError(
                f"target {self.name!r}: rounding={self.rounding!r}. Choose one of {', '.join(ROUNDINGS)}."
            )
        both = self.keeps_scale & (self.reads_accumulators | set(self.fixed_grids))
        if both:
            raise SchemeError(
                f"target {self.name!r} contradicts itself: {', '.join(sorted(both))} is in keeps_scale, and what reads an "
                "accumulator or lies on a prescribed grid has no input's scale to keep."
            )
        for scheme, of in ((self.activation, "activation"), (self.weight, "weight")):
            refused = self.refuses_activation(scheme) if of == "activation" else self.refuses_weight(scheme)
            if refused:
                raise SchemeError(
                    f"target {self.name!r} contradicts itself: its own {of} scheme is {scheme}: {refused}"
                )

    def lacks(self, op: str) -> Refusal | None:
        """Why ``op`` stays in float on this target; None where it does not."""
        if self.integer_ops is None or op in self.integer_ops:
            return None
        return Refusal(self.reasons.get(op, f"{self.title} has no integer {op}"), "prepare for another target", op)

    def refuses_activation(self, scheme: Scheme) -> Refusal | None:
        """Why tensors cannot have ``scheme`` here; None where they can."""
        if scheme.bits not in self.activation_bits:
            return Refusal(f"{self.title} takes tensors of {_listed(self.activation_bits)} bits")
        if scheme.signed not in self.activation_signs:
            return Refusal(f"{self.title} takes {'signed' if self.activation_signs[0] else 'unsigned'} tensors")
        if not self.affine and (not scheme.symmetric or not scheme.signed):
            return Refusal(f"{self.title} takes tensors with zero point 0: symmetric=True, signed=True")
        return None

    def refuses_weight(self, scheme: Scheme) -> Refusal | None:
        """Why weights cannot have ``scheme`` here; None where they can."""
        if scheme.bits not in self.weight_bits:
            return Refusal(f"{self.title} takes weights of {_listed(self.weight_bits)} bits")
        if not self.wide_weights and not scheme.narrow_range:
            return Refusal(f"{self.title} takes weights without the lowest integer: narrow_range=True")
        return None

    def takes_per_channel(self, op: str, *, in_groups: bool = False) -> bool:
        """Whether weights of ``op``, computing ``in_groups`` or not, may have one scale per channel."""
        if in_groups and op in self.per_tensor_in_groups:
            return False
        return self.per_channel is None or op in self.per_channel

    def weight_of(self, op: str, *, in_groups: bool = False) -> Scheme:
        """The weight scheme of ``op`` where a recipe leaves it open."""
        weight = self.kept_narrow(self.weight)
        return weight if self.takes_per_channel(op, in_groups=in_groups) else replace(weight, per_channel=False)

    @property
    def limits_pairs(self) -> bool:
        """Whether weights are chosen so that sums of two products stay within 16 bits."""
        return self.adds_pairs and PROCESSORS[self.processor].adds_pairs

    def kept_narrow(self, weight: Scheme) -> Scheme:
        """``weight`` without -128 where a kernel of the processor could not take that."""
        wide = weight.bits == 8 and weight.signed and not weight.narrow_range
        return replace(weight, narrow_range=True) if wide and PROCESSORS[self.processor].narrow_weights else weight

    def with_estimator(self, estimator: str) -> Target:
        """The same target with tensors' ranges estimated otherwise, where they are observed."""
        if self.activation.quantizer != OBSERVED:
            return self
        return replace(self, activation=replace(self.activation, estimator=estimator))

    def named_ops(self) -> dict[str, frozenset[str]]:
        """The ops that each field names, for those that name any."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            name: frozenset(value)
            for name, value in named.items()
            if isinstance(value, (frozenset, Mapping)) and len(value)
        }


def _listed(numbers: tuple[int, ...]) -> str:
    if len(numbers) > 2 and numbers == tuple(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return " or ".join(str(number) for number in numbers)
