"""The facts that passes own on nodes, one class for each: canonical graphs, placing of quantizers, conversion."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxquant.graph.facts import Fact, Facts
from fxquant.numerics.scheme import Scheme
from fxquant.recipe import Setting

__all__ = ["Canonical", "Converted", "Folded", "Placed"]


class Canonical(Facts):
    """What ``canonicalize`` finds, and what is known of an op until it is placed."""

    entry = Fact[Any](object, None, "its entry in the op table")
    was_module = Fact[type | None](type, None, "the class of the module that it was called as")
    reason = Fact[str](str, "", "why it stays in float, in words for the user")
    reads_counts = Fact[bool](bool, False, "it is in float since it computes with counts, positions or indices")
    reads_shape = Fact[bool](bool, False, "it reads a tensor's shape alone")


class Folded(Facts):
    """What ``fold_batchnorm`` keeps of a batch norm that is part of a weighted op now."""

    statistics = Fact[tuple[Tensor, Tensor] | None](
        tuple, None, "mean and deviation of its result in training, per channel, as the batch norm gave it"
    )


class Placed(Facts):
    """What the placing passes decide (``flow.placing_passes``); ``drop_quantizers`` takes all of it back."""

    setting = Fact[Setting | None](Setting, None, "the schemes that the recipe gives it; None where it stays in float")
    entering = Fact[Scheme | None](Scheme, None, "the scheme that the recipe gives it as an input of the model")
    rounds_output = Fact[bool](bool, False, "the recipe has its result rounded, though it leaves the model")
    quantized = Fact[bool](bool, False, "its result is rounded, or continues to where it is")
    chain = Fact[list[str]](list, [], "the nodes that are one op with it, in order, this one last")
    continues = Fact[bool](bool, False, "the op that it belongs to ends in another node, which is rounded")
    group = Fact[str | None](str, None, "the tensor whose quantizer it shares, by name")
    keeps_scale = Fact[bool](bool, False, "its result is on its first operand's grid, as the target has it")
    requantizes = Fact[bool](bool, False, "it moves values onto another grid")
    rounds_for_reader = Fact[bool](bool, False, "it rounds a tensor anew for one op that reads it with other bits")
    leaves_as_float = Fact[bool](bool, False, "its accumulator leaves unrounded, as real numbers")
    stays_wide = Fact[bool](bool, False, "its accumulator is read unrounded by the op behind it")
    wide_operand = Fact[str](str, "", "the operand that it reads as an unrounded accumulator, by name")
    exact_operands = Fact[tuple[str, ...]](tuple, (), "the operands that must not be rounded for it, by name")
    reads_exactly = Fact[bool](bool, False, "it is a float op that rounding its operands would destroy")
    float_module = Fact[str](str, "", "the class of the module that the fake-quant module took the place of")


class Converted(Facts):
    """What ``to_integer`` knows of an integer graph."""

    integer_constant = Fact[bool](bool, False, "it reads an attribute that is made of integers")
    grid = Fact[tuple[float, int]](tuple, (1.0, 0), "of such a constant: scale and zero point")
    merged = Fact[list[str]](list, [], "the titles of the ops that are one integer op here")
