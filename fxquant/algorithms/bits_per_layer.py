"""Mixed precision: how many bits each layer's weight gets, so that the network's output loses least within a budget.

    loss[g, b] = E‖y - y_{g,b}‖² / E‖y‖²   or   KL(softmax y ‖ softmax y_{g,b})

y is the float network's output, y_{g,b} that of the float network in which the weights of one group alone are rounded to
b bits. Losses of groups are added up, which is right as long as they are small; the sum's least value within the budget
is exact, see ``budget``. Labels are not needed.

Source: the choice as a knapsack: Yao et al., HAWQ-V3, 2011.10680, §3.4, eq. 9–12, with the measured loss in place of its
estimate by the Hessian's trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from fxquant.algorithms.budget import Option, Point, pareto_front, within_budget
from fxquant.algorithms.recover import kept_batches, run_batch
from fxquant.algorithms.weights import WeightedCall, weighted_calls
from fxquant.capture.values import unchanged
from fxquant.errors import CalibrationError, InputError
from fxquant.flow import prepare, quantizers_off
from fxquant.inputs import arguments_of, move_to
from fxquant.nn.fake_quantize import FakeQuantize
from fxquant.numerics.scheme import Scheme
from fxquant.recipe import Recipe, Setting
from fxquant.reporting.census import macs_of
from fxquant.targets import X86, Target, get

__all__ = ["Assignment", "mixed_precision"]

MEASURES = ("noise", "kl")


@dataclass(frozen=True)
class Assignment:
    """Bits for every layer, and what else could have been had.

    Attributes:
        bits: of each layer's weight, by its path.
        loss: the sum of what single groups lose.
        cost: in bits of weights, or in bit operations of one sample.
        front: the choices that no other one beats, by rising cost; each as a pair of cost and loss.
        weights: how many weights there are.
        unit: what a cost counts.
    """

    bits: dict[str, int]
    loss: float
    cost: int
    front: tuple[tuple[int, float], ...]
    weights: int
    unit: str

    def recipe(self, *, weight: Scheme | None = None, activation: Scheme | None = None) -> Recipe:
        """The recipe that gives each layer its bits.

        Args:
            weight: the scheme of weights but for its bits; None for the usual one.
            activation: the scheme of tensors between ops; None for the target's own.
        """
        usual = weight or Scheme.weight()
        pairs = [(name, Setting(weight=replace(usual, bits=b), activation=activation)) for name, b in self.bits.items()]
        return Recipe(pairs, default=Setting(activation=activation))

    def __str__(self) -> str:
        each = [f"  {name:<40} {bits} bits" for name, bits in self.bits.items()]
        step = max(1, len(self.front) // 12)
        points = [*self.front[:-1:step], *self.front[-1:]]
        scale = self.weights if self.unit == "bits" else 1
        unit = "bits a weight" if self.unit == "bits" else self.unit
        front = [f"  {cost / scale:>14.4g} {loss:>12.4g}" for cost, loss in points]
        head = f"{self.cost / scale:.4g} {unit}, loss {self.loss:.4g}"
        return "\n".join([head, *each, f"  {unit:>14} {'loss':>12}   (choices that no other one beats)", *front])


def mixed_precision(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    bits: Sequence[int] = (2, 3, 4, 8),
    bits_per_weight: float | None = None,
    bit_operations: int | None = None,
    activation_bits: int = 8,
    measure: str = "noise",
    groups: Sequence[str] = (),
    target: str | Target = X86,
    forward: Callable[[Any, Any], Any] | None = None,
    batches: int | None = 4,
    progress: bool = True,
) -> Assignment:
    """Choose the bits of every layer's weight within a budget, by what the network's output loses.

    Example:
        >>> found = mixed_precision(model, loader, bits_per_weight=4.2)
        >>> prepared = fxquant.prepare(model, images, recipe=found.recipe())

    Args:
        model: the float model; not touched.
        loader: batches as for ``calibrate``, without labels.
        bits: what there is to choose from.
        bits_per_weight: the budget as the mean over all weights of layers.
        bit_operations: or as the sum over layers of multiply-adds of one sample, times bits of the weight, times those of
            what it multiplies.
        activation_bits: bits of tensors between ops, for ``bit_operations``.
        measure: ``"noise"``, the noise's share of the output's power; ``"kl"``, for outputs that are logits ``(N,
            classes)``.
        groups: globs over paths of layers; those that one of them selects share their bits, as calls of one weight always
            do.
        target: where the model will run.
        forward: how to run one batch, as ``forward(model, batch)``, for batches of another form.
        batches: how many to use; None for all.
        progress: show a progress bar.

    Raises:
        InputError: no budget, or two; one that cannot be met; a measure or bits that do not exist; a model that gives no
            tensor of real numbers.
        CalibrationError: the loader is empty, or the model gives NaN or infinity.
    """
    groups = (groups,) if isinstance(groups, str) else groups
    _require(bits, bits_per_weight, bit_operations, measure, get(target))
    kept = kept_batches(loader, batches, "mixed_precision")
    prepared = prepare(model, None if forward is not None else _example(model, kept[0]), target=target)
    members = _groups(prepared, groups)
    if not members:
        raise InputError("mixed_precision found no layer with a weight of its own in this model.")
    measured = _losses(prepared, kept, forward, members, bits, measure, progress)
    sizes = [sum({id(call.weight): call.weight.numel() for call in group}.values()) for group in members]
    if bits_per_weight is not None:
        return _best(members, bits, sizes, measured, int(bits_per_weight * sum(sizes) + 1e-6), sum(sizes), "bits")
    assert bit_operations is not None
    costs = [_macs(group) * activation_bits for group in members]
    return _best(members, bits, costs, measured, int(bit_operations), sum(sizes), "bit operations")


def _example(model: nn.Module, batch: Any) -> Any:
    """A batch as ``prepare`` takes it."""
    args, kwargs = arguments_of(model, move_to(model, batch))
    return kwargs or args


def _best(
    members: list[list[WeightedCall]],
    bits: Sequence[int],
    costs: list[int],
    losses: list[list[float]],
    budget: int,
    weights: int,
    unit: str,
) -> Assignment:
    """The choice with the least loss; ``costs`` are of one bit."""
    options = [
        [Option(cost * b, loss) for b, loss in zip(bits, each, strict=True)]
        for cost, each in zip(costs, losses, strict=True)
    ]
    best: Point = within_budget(options, budget)
    front = tuple((point.cost, point.loss) for point in pareto_front(options))
    chosen = {name: bits[choice] for group, choice in zip(members, best.chosen, strict=True) for name in _names(group)}
    return Assignment(chosen, best.loss, best.cost, front, weights, unit)


def _names(group: list[WeightedCall]) -> list[str]:
    """The paths of a group, each once."""
    return list(dict.fromkeys(call.name for call in group))


def _require(bits: Any, per_weight: Any, operations: Any, measure: str, target: Target) -> None:
    if (per_weight is None) == (operations is None):
        raise InputError("give one budget: bits_per_weight=, or bit_operations=.")
    budget = per_weight if operations is None else operations
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not math.isfinite(budget):
        name = "bits_per_weight" if operations is None else "bit_operations"
        raise InputError(f"{name}={budget!r}: a budget is a finite number.")
    if measure not in MEASURES:
        raise InputError(f"measure={measure!r} is not known. Choose one of {', '.join(MEASURES)}.")
    if not isinstance(bits, Sequence) or not bits or len(set(bits)) != len(bits):
        raise InputError(f"bits={bits!r}: give different numbers of bits to choose from, such as (2, 4, 8).")
    for each in bits:
        refusal = target.refuses_weight(target.kept_narrow(replace(target.weight, bits=each)))
        if refusal is not None:
            raise InputError(f"bits={tuple(bits)!r}: {refusal}.")


def _groups(prepared: nn.Module, globs: Sequence[str]) -> list[list[WeightedCall]]:
    """The calls with weights, those together that share a decision: a weight, a path or quantizer, or a glob's word."""
    groups: list[tuple[set[Any], list[WeightedCall]]] = []
    unused = set(globs)
    for call in weighted_calls(prepared):
        own: set[Any] = {id(call.weight), id(call.quantizer), call.name}
        if (glob := next((glob for glob in globs if fnmatchcase(call.name, glob)), None)) is not None:
            own.add(("glob", glob))
            unused.discard(glob)
        joined = [group for group in groups if group[0] & own]
        members = [other for _, others in joined for other in others]
        groups = [group for group in groups if not group[0] & own]
        groups.append((own.union(*(keys for keys, _ in joined)), [*members, call]))
    for glob in globs:
        if glob in unused:
            raise InputError(f"groups: {glob!r} selects no layer with a weight.")
    return [members for _, members in groups]


def _macs(group: list[WeightedCall]) -> int:
    """Multiply-adds of one sample, of all calls."""
    total = 0
    for call in group:
        macs = macs_of(call.node, call.part)
        if macs is None:
            raise InputError(f"the multiply-adds of {call.name!r} are not known; give bits_per_weight instead.")
        total += macs // max(1, int(call.node.meta["shape"][0]))
    return total


@torch.no_grad()
def _losses(
    prepared: nn.Module,
    kept: list[Any],
    forward: Callable[[Any, Any], Any] | None,
    members: list[list[WeightedCall]],
    bits: Sequence[int],
    measure: str,
    progress: bool,
) -> list[list[float]]:
    """What the output loses for each group and number of bits."""
    outputs: list[Tensor] = []
    hook = prepared.register_forward_hook(lambda part, args, y: outputs.extend(_reals(y)))
    run = partial(run_batch, prepared, kept, forward)

    def result() -> list[Tensor]:
        outputs.clear()
        for i in range(len(kept)):
            run(i)
        return list(outputs)

    bar = tqdm(total=len(members) * len(bits), desc="sensitivity", unit="run", disable=not progress or None)
    try:
        with unchanged(prepared, but=FakeQuantize), quantizers_off(prepared), bar:
            prepared.eval()
            exact = result()
            _require_outputs(exact)
            found: list[list[float]] = []
            for group in members:
                found.append([])
                for b in bits:
                    with _Rounded(group, b):
                        found[-1].append(_loss(exact, result(), measure))
                    bar.update(1)
    finally:
        hook.remove()
    return found


def _require_outputs(exact: list[Tensor]) -> None:
    """Raise unless there is something to compare, and it can be compared."""
    if not sum(x.numel() for x in exact):
        raise InputError(
            "mixed_precision compares what the model gives, and found no tensor of real numbers in it.\n"
            "  what to do: let the model return its logits, in a tensor, tuple, list or dict."
        )
    if not all(bool(torch.isfinite(x).all()) for x in exact):
        raise CalibrationError(
            "the float model gives NaN or infinity on these batches: nothing can be compared with that.\n"
            "  what to do: check the batches, and the model on them."
        )


class _Rounded:
    """Inside, the weights of a group are rounded to ``bits``."""

    def __init__(self, group: list[WeightedCall], bits: int) -> None:
        self.quantizers = list({id(call.quantizer): call.quantizer for call in group}.values())
        self.bits = bits

    def __enter__(self) -> None:
        self.before = [quantizer.scheme for quantizer in self.quantizers]
        for quantizer in self.quantizers:
            quantizer.scheme, quantizer.enabled = replace(quantizer.scheme, bits=self.bits), True

    def __exit__(self, *error: object) -> None:
        for quantizer, scheme in zip(self.quantizers, self.before, strict=True):
            quantizer.scheme, quantizer.enabled = scheme, False


def _reals(tree: Any) -> list[Tensor]:
    return [leaf.double() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _loss(exact: list[Tensor], rounded: list[Tensor], measure: str) -> float:
    if measure == "noise":
        noise = sum(float((x - y).square().sum()) for x, y in zip(exact, rounded, strict=True))
        return noise / max(sum(float(x.square().sum()) for x in exact), 1e-300)
    if any(x.ndim != 2 for x in exact):
        raise InputError("measure='kl' needs outputs (N, classes), and this model gives others; choose 'noise'.")
    total = sum(
        float((x.softmax(1) * (x.log_softmax(1) - y.log_softmax(1))).sum()) for x, y in zip(exact, rounded, strict=True)
    )
    return max(total, 0.0) / sum(len(x) for x in exact)
