"""The exact choice of one option per group under a budget: what is lost is least, what it costs is no more than that.

    min Σ_g loss[g, o_g]   with   Σ_g cost[g, o_g] ≤ budget                  (a multiple-choice knapsack)

Dynamic programming over the groups, keeping of all partial choices those that no other one beats in both numbers
(Nemhauser and Ullmann, 1969). What is left after the last group is the whole Pareto front; nothing is rounded and nothing
is cut off. There are never more partial choices than distinct sums of costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.errors import InputError

__all__ = ["Option", "Point", "pareto_front", "within_budget"]


@dataclass(frozen=True)
class Option:
    """One way to do a group.

    Attributes:
        cost: a whole number, such as bits of memory.
        loss: what is lost by it; adds up over groups.
    """

    cost: int
    loss: float


@dataclass(frozen=True)
class Point:
    """A choice for all groups that no other one beats: the number of the option of each, and both sums."""

    chosen: tuple[int, ...]
    cost: int
    loss: float


def pareto_front(groups: Sequence[Sequence[Option]], *, budget: int | None = None) -> list[Point]:
    """All choices that no other one beats, by rising cost and falling loss.

    Args:
        groups: the options of each group.
        budget: leave out what costs more; None for all.

    Raises:
        InputError: a group has no option, or a loss is not finite.
    """
    for options in groups:
        if not options or not all(torch.isfinite(torch.tensor(option.loss)) for option in options):
            raise InputError("each group needs an option, and each option a finite loss.")
    room = [sum(min(option.cost for option in later) for later in groups[i + 1 :]) for i in range(len(groups))]
    costs, losses = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    steps: list[tuple[Tensor, Tensor]] = []
    for options, needed in zip(groups, room, strict=True):
        added = torch.tensor([option.cost for option in options], dtype=torch.int64)
        lost = torch.tensor([option.loss for option in options], dtype=torch.float64)
        costs, losses = (costs[:, None] + added).flatten(), (losses[:, None] + lost).flatten()
        kept = _unbeaten(costs, losses)
        if budget is not None:
            kept = kept[costs[kept] + needed <= budget]
        costs, losses = costs[kept], losses[kept]
        steps.append((kept // len(options), kept % len(options)))
    return [_traced(steps, i, int(costs[i]), float(losses[i])) for i in range(len(costs))]


def within_budget(groups: Sequence[Sequence[Option]], budget: int) -> Point:
    """The choice with the least loss that costs at most ``budget``.

    Raises:
        InputError: even the cheapest options cost more; says how much.
    """
    front = pareto_front(groups, budget=budget)
    if not front:
        least = sum(min(option.cost for option in options) for options in groups)
        raise InputError(f"a budget of {budget} is below the {least} that the cheapest choice costs.")
    return front[-1]


def _unbeaten(costs: Tensor, losses: Tensor) -> Tensor:
    """The places of what nothing beats, by rising cost."""
    order = torch.argsort(losses, stable=True)
    order = order[torch.argsort(costs[order], stable=True)]
    lost = losses[order]
    before = torch.cat([lost.new_full((1,), torch.inf), lost.cummin(0).values[:-1]])
    return order[lost < before]


def _traced(steps: list[tuple[Tensor, Tensor]], place: int, cost: int, loss: float) -> Point:
    chosen = []
    for parents, options in reversed(steps):
        chosen.append(int(options[place]))
        place = int(parents[place])
    return Point(tuple(reversed(chosen)), cost, loss)
