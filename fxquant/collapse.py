"""Warn of a calibrated model's outputs of which rounding to 8 bits leaves next to nothing, and say where it is lost.

Ranges cannot tell it: a norm divides by a spread of a few steps, a difference of near values leaves only their roundings.
So the last calibration batch and the first one are run once in float and once rounded: the rows of one can hide what others
show. Only where an output collapses are two more runs made, which compare what goes into each op and what comes out.

An island runs its author's own code, which may select and sort by its data, so that what it gives need not be comparable
value by value. There the values are compared as a set, from the smallest to the largest, and the tensors that no island has
touched yet one by one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxquant.capture.islands import graphs_of, islands_of
from fxquant.capture.values import unchanged
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.fake_quantize import FakeQuantize

__all__ = ["COLLAPSED", "warn_of_collapse"]

COLLAPSED = 15.0
"""In dB: an output of which less is left is worth a warning; 8 bits leave 30 to 50."""
_ENOUGH = 40.0
"""In dB: above, one op is as good as another."""


@torch.no_grad()
def warn_of_collapse(prepared: nn.Module, runs: Sequence[Callable[[], Any]], off: Callable[[], Any]) -> None:
    """Warn where an output of a calibrated model has less than ``COLLAPSED`` dB of signal to noise, and name the op.

    Says nothing of models that are still to be trained, or with quantizers of less than 8 bits: there a loss is expected.

    Args:
        prepared: the model, with its ranges set; not changed.
        runs: each runs one batch through it: the last one, and the first one where that is another.
        off: a context in which quantizers do not round.
    """
    if not _is_for_eight_bits(prepared):
        return
    for run in dict.fromkeys(runs):
        left = _left(prepared, run, off)
        if left < COLLAPSED:
            break
    else:
        return
    where = ""
    if (worst := _worst_op(prepared, run, off)) is not None:
        name, kind, before, after = worst
        where = f" Most is lost at {name} ({kind}): {before:.0f} dB go in, {after:.0f} dB come out."
    warnings.warn(
        f"rounding to 8 bits leaves {left:.1f} dB of an output on the {'last' if run is runs[0] else 'first'} calibration "
        f"batch (signal to noise against the same model in float).{where}\n"
        "  what to do: keep what computes its operands in float, by a recipe with their paths or Op(...) and None; "
        "fxquant.errors_by_layer tells what each op loses.",
        stacklevel=4,  # past torch.no_grad and calibrate, to the line that calls it
    )


def _comparable(prepared: nn.Module) -> dict[nn.Module, list[bool]]:
    """The modules whose results are compared, each with which of its tensors have to be sorted first.

    They are the model itself, and in a graph with islands what no island has touched and an island, or what follows it,
    reads. An empty list stands for a module all of whose tensors are sorted.
    """
    if not islands_of(prepared):
        return {prepared: [False]}
    if not isinstance(prepared, LeveledModule):
        return {prepared: []}
    parts, behind = _behind(prepared)
    read = dict.fromkeys(n for node in behind for n in node.all_input_nodes if n not in behind)
    results = next(node for node in prepared.graph.nodes if node.op == "output").args[0]
    sorts = [leaf in behind for leaf in tree_leaves(results) if isinstance(leaf, fx.Node)]
    return {prepared: sorts, **{parts[n]: [False] for n in read if n in parts}}


def _behind(prepared: LeveledModule) -> tuple[dict[fx.Node, nn.Module], dict[fx.Node, None]]:
    """The module of each node that calls one, and the nodes that are islands or read what an island has touched."""
    parts = {n: prepared.get_submodule(str(n.target)) for n in prepared.graph.nodes if n.op == "call_module"}
    behind: dict[fx.Node, None] = {}
    for node in prepared.graph.nodes:
        is_island = node in parts and bool(islands_of(parts[node]))
        if is_island or any(read in behind for read in node.all_input_nodes):
            behind[node] = None
    return parts, behind


def _entered(prepared: nn.Module) -> list[nn.Module]:
    """The islands none of whose operands another one has touched: there, what functions give them is compared as well."""
    if not isinstance(prepared, LeveledModule) or not islands_of(prepared):
        return []
    parts, behind = _behind(prepared)
    later = {parts[n] for n in behind if n in parts and any(read in behind for read in n.all_input_nodes)}
    return [parts[n] for n in behind if n in parts and islands_of(parts[n]) and parts[n] not in later]


def _left(prepared: nn.Module, run: Callable[[], Any], off: Callable[[], Any]) -> float:
    """The least signal to noise, in dB, that one run leaves of the model's results."""
    watched, entered = _comparable(prepared), _entered(prepared)
    exact, rounded = (_results(prepared, watched, entered, run, context) for context in (off, nullcontext))
    return min((_sqnr(x, y) for x, y in zip(rounded, exact, strict=False)), default=math.inf)


def _is_for_eight_bits(prepared: nn.Module) -> bool:
    quantizers = [part for part in prepared.modules() if isinstance(part, FakeQuantize)]
    trains = any(graph.settings.get("qat") for graph in graphs_of(prepared).values())
    return bool(quantizers) and not trains and all(quantizer.scheme.bits >= 8 for quantizer in quantizers)


def _results(
    prepared: nn.Module,
    watched: dict[nn.Module, list[bool]],
    entered: list[nn.Module],
    run: Callable[[], Any],
    off: Callable[[], Any],
) -> list[Tensor]:
    """The real numbers that the calls of ``watched`` give in one run, sorted where that is said, and those that the
    calls of ``entered`` are given."""
    found: list[Tensor] = []

    def keep(part: nn.Module, args: Any, result: Any) -> None:
        if part not in watched:  # the calls of one layer share its hooks
            return
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        told = watched[part]
        if len(told) == 1:
            told = told * len(leaves)
        elif len(told) != len(leaves):
            told = [True] * len(leaves)
        for leaf, sorts in zip(leaves, told, strict=True):
            found.extend(x.flatten().sort().values if sorts else x for x in _reals(leaf))

    def keep_given(part: nn.Module, args: Any, kwargs: Any) -> None:
        if part in entered:
            found.extend(_reals((args, kwargs)))

    hooks = [part.register_forward_hook(keep) for part in watched]
    hooks += [part.register_forward_pre_hook(keep_given, with_kwargs=True) for part in entered]
    try:
        with _apart(prepared), off():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _worst_op(
    prepared: nn.Module, run: Callable[[], Any], off: Callable[[], Any]
) -> tuple[str, str, float, float] | None:
    """The op that loses most: its path, its class, and what is left in dB of its operands and of its result."""
    lost: list[tuple[float, str, str, float, float]] = []
    names = {
        part: name for name, part in prepared.named_modules() if getattr(part, "output_quantizer", None) is not None
    }
    exact: dict[nn.Module, list[tuple[list[Tensor], list[Tensor]]]] = {part: [] for part in names}

    def keep(part: nn.Module, args: Any, result: Any) -> None:
        if part in exact:  # the calls of one layer share its hooks
            exact[part].append((_reals(args), _reals(result)))

    def compare(part: nn.Module, args: Any, result: Any) -> None:
        if not exact.get(part):
            return
        before, after = exact[part].pop(0)
        given = min((_sqnr(x, y) for x, y in zip(_reals(args), before, strict=False)), default=math.inf)
        made = min((_sqnr(x, y) for x, y in zip(_reals(result), after, strict=False)), default=math.inf)
        lost.append((min(given, _ENOUGH) - made, names[part], type(part).__name__.removeprefix("Quant"), given, made))

    for hook, context in ((keep, off), (compare, nullcontext)):
        handles = [part.register_forward_hook(hook) for part in names]
        try:
            with _apart(prepared), context():
                run()
        finally:
            for handle in handles:
                handle.remove()
    return max(lost)[1:] if lost else None


@contextmanager
def _apart(prepared: nn.Module) -> Iterator[None]:
    """Inside, runs leave neither the model's state nor torch's random numbers changed, and begin with the same ones."""
    state = torch.get_rng_state()
    try:
        with unchanged(prepared, but=FakeQuantize):
            yield
    finally:
        torch.set_rng_state(state)


def _reals(value: Any) -> list[Tensor]:
    found = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [leaf.detach().clone() for leaf in found if leaf.numel()]


def _sqnr(actual: Tensor, expected: Tensor) -> float:
    """Signal to noise in dB, of what is finite in float (masked scores are not); infinite where there is no signal to lose,
    or shapes differ with the data."""
    if actual.shape != expected.shape:
        return math.inf
    is_finite = torch.isfinite(expected)
    if not bool(is_finite.all()):
        actual, expected = actual[is_finite], expected[is_finite]
    signal, noise = _power(expected), _power(actual - expected)
    return 10 * math.log10(signal / noise) if signal > 0 and 0 < noise < math.inf and signal < math.inf else math.inf


def _power(x: Tensor) -> float:
    """The sum of squares: each in float32 at least, the largest of which is 1, and added up in float64."""
    wide = x.float() if x.dtype.itemsize < 4 else x
    largest = float(wide.abs().max()) if wide.numel() else 0.0
    if not 0 < largest < math.inf:
        return largest
    return float((wide / largest).square_().sum(dtype=torch.float64)) * largest**2
