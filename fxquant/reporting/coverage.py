"""How much of a model is in integers, what is not, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate
from torch import fx, nn

from fxquant.capture.islands import Specialization, graphs_of, islands_of, level_of, specializations_of
from fxquant.errors import FxquantError, InputError
from fxquant.graph.leveled import LeveledModule
from fxquant.kernels.audit import Audit, audit
from fxquant.kernels.runner import kernel_of
from fxquant.reporting.census import (
    Share,
    absolute,
    is_float_op,
    macs_of,
    macs_share,
    module_at,
    nodes_of,
    short,
    state_of,
    uncounted,
    weights_share,
)
from fxquant.reporting.findings_text import capture_text
from fxquant.reporting.island_macs import own_macs
from fxquant.reporting.rows import op_text, path_of, source_line, target_of, told
from fxquant.targets import X86

__all__ = ["Coverage", "FloatOp", "IslandReport", "OpCount", "SkippedFold", "coverage"]

_SHOWN = 12
_RUNS = "it runs its own code, see capture"
_IN_NO_GRAPH = "no graph has it: the example did not call it, or it cannot be traced where it is called"


@dataclass(frozen=True)
class OpCount:
    """How often an op occurs.

    Attributes:
        op: the op's class name in the table, or the name of an unknown function.
        integer: calls in integers, or that will be after ``convert``.
        float: calls in float.
        macs: multiply-accumulates of all calls; None where not known.
        kernels: which kernels run it, on integer models.
    """

    op: str
    integer: int
    float: int
    macs: int | None
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class FloatOp:
    """An op that computes in float: where, why, the line that calls it, and its multiply-accumulates if known."""

    path: str
    op: str
    reason: str
    source: str | None
    macs: int | None


@dataclass(frozen=True)
class SkippedFold:
    """A batch norm that stands alone, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class IslandReport:
    """A module that runs its author's own code.

    Attributes:
        path: the module; empty for the top module.
        cause: why it was not traced.
        source: ``file:line`` of what stopped the tracer.
        advice: what to change to have it in a graph.
        macs: multiply-accumulates of its own code, those of the graphs inside left out; None where not known.
        is_named: it was named in ``leaves``.
    """

    path: str
    cause: str
    source: str | None
    advice: str
    macs: int | None
    is_named: bool


@dataclass(frozen=True)
class Coverage:
    """What ``coverage`` found.

    Attributes:
        name, level: the model's class, and how far it has come.
        macs: the MACs in integers and in all; None without recorded shapes.
        weights: the weights in integers and in all.
        ops: counts by op, most frequent first.
        float_ops: every op that computes in float, and in islands every module with weights that no graph has.
        skipped_folds: every batch norm that was not folded.
        kernels: on integer models, the kernel of each op, by path.
        islands: every module that runs its author's own code.
        specializations: every answer about the example that the graphs hold for given, and check.
        audit: on integer models, what could overflow, saturate or vanish, layer by layer.
        target: the name of the runtime that it was prepared for.
    """

    name: str
    level: str
    macs: Share | None
    weights: Share
    ops: tuple[OpCount, ...]
    float_ops: tuple[FloatOp, ...]
    skipped_folds: tuple[SkippedFold, ...]
    kernels: dict[str, str]
    islands: tuple[IslandReport, ...] = ()
    specializations: tuple[Specialization, ...] = ()
    audit: Audit = field(default_factory=Audit)
    target: str = X86.name

    @property
    def macs_share(self) -> float | None:
        """The share of MACs in integers, 0 to 1; None without recorded shapes."""
        return None if self.macs is None else self.macs.fraction

    @property
    def weights_share(self) -> float:
        """The share of weights in integers, 0 to 1."""
        return self.weights.fraction

    def require(self, share: float) -> Coverage:
        """Raise unless at least ``share`` of the MACs, where shapes were recorded, and of the weights are in integers.

        Weights stand for what no formula counts: an op of any kind that holds some counts by them.

        Raises:
            FxquantError: names the share and the float ops with the most MACs.
        """
        if not 0 <= share <= 1:
            raise InputError(f"require({share!r}): a share lies between 0 and 1, as 0.95.")
        shares = [(self.macs, "MACs"), (self.weights, "weights")]
        short_of = [(found, of) for found, of in shares if found is not None and found.fraction < share]
        if not short_of:
            return self
        measured, of = short_of[0]
        largest = sorted(self.float_ops, key=lambda op: -(op.macs or 0))[:5]
        lines = [f"    {op.path}: {op.reason} ({source_line(op.source) or 'source unknown'})" for op in largest]
        raise FxquantError(
            f"{measured} of {self.name}'s {of} are in integers; {100 * share:.4g} % are required.\n"
            + "\n".join(
                ["  in float:", *lines] if lines else ["  no op is named as float: see print(fxquant.coverage(model))"]
            )
        )

    def __str__(self) -> str:
        shares = [f"{self.macs} of MACs"] if self.macs else ["MACs unknown without example_inputs"]
        shares += uncounted(self.macs)
        made_for = "" if self.target == X86.name else f" for {self.target}"
        title = f"{self.name}, {self.level}{made_for}: in integers {', '.join([*shares, f'{self.weights} of weights'])}"
        capture = capture_text(self.islands, self.specializations)
        audited = [text] if (text := str(self.audit)) else []
        return "\n\n".join([title, self._ops_text(), *self._float_text(), *self._folds_text(), *capture, *audited])

    def _ops_text(self) -> str:
        header = ["op", "integer", "float", "MACs", "kernel"]
        lines = [
            [
                c.op,
                c.integer or "",
                c.float or "",
                "?" if c.macs is None else short(c.macs) if c.macs else "",
                ", ".join(c.kernels),
            ]
            for c in self.ops
        ]
        if not self.kernels:
            header, lines = header[:-1], [line[:-1] for line in lines]
        align = ["left", "right", "right", "right", "left"][: len(header)]
        return _plain(lines, header, align)

    def _float_text(self) -> Iterator[str]:
        if not self.float_ops:
            return
        islands = {island.path for island in self.islands}
        lines = [
            [f.path, f.op, _RUNS if f.path in islands else f.reason.removeprefix(f"{f.op} is "), source_line(f.source)]
            for f in self.float_ops[:_SHOWN]
        ]
        more = len(self.float_ops) - len(lines)
        yield _plain(lines, ["in float", "op", "why", "source"], ["left"] * 4) + (f"\nand {more} more" if more else "")

    def _folds_text(self) -> Iterator[str]:
        if self.skipped_folds:
            lines = [[fold.path, fold.reason] for fold in self.skipped_folds[:_SHOWN]]
            more = len(self.skipped_folds) - len(lines)
            yield _plain(lines, ["not folded", "why"], ["left"] * 2) + (f"\nand {more} more" if more else "")


def coverage(module: nn.Module) -> Coverage:
    """Count what of a prepared, frozen or integer model is in integers.

    Example:
        >>> print(fxquant.coverage(int8))
        >>> fxquant.coverage(int8).require(0.99)

    Raises:
        InputError: the model was not made by ``prepare`` or ``convert``.
    """
    level = level_of(module)
    if level in (None, "captured", "canonical"):
        raise InputError(
            f"coverage was given a {type(module).__name__} that fxquant has not prepared.\n"
            "  what to do: coverage(fxquant.prepare(model, example_inputs)), or the result of convert."
        )
    own = own_macs(module)
    return Coverage(
        name=module.__class__.__name__,
        level=str(level),
        macs=macs_share(module, own),
        weights=weights_share(module),
        ops=_count(module, own),
        float_ops=(
            *(_float_op(g, n, own) for g, n in nodes_of(module) if is_float_op(n, module_at(g, n))),
            *_in_no_graph(module),
        ),
        skipped_folds=tuple(_skipped_folds(module)),
        kernels={absolute(g, path_of(n)): kernel for g, n in nodes_of(module) if (kernel := kernel_of(g, n))},
        islands=tuple(
            IslandReport(i.path, i.cause, i.source, i.advice, own[i.path], i.is_named) for i in islands_of(module)
        ),
        specializations=specializations_of(module),
        audit=audit(graphs_of(module).values()),
        target=target_of(module).name,
    )


def _skipped_folds(module: nn.Module) -> Iterator[SkippedFold]:
    prefix = "not folded: "
    paths = {(graph, node.name): absolute(graph, path_of(node)) for graph, node in nodes_of(module)}
    for graph, node in nodes_of(module):
        for note in node.meta.get("notes", ()):
            if note.startswith(prefix):
                path = paths[graph, node.name]
                own = {name: other for (owner, name), other in paths.items() if owner is graph}
                yield SkippedFold(path, told(note.removeprefix(prefix), own, seen_from=path))


def _macs(node: fx.Node, part: nn.Module | None, own: dict[str, int | None]) -> int | None:
    return own[node.meta["island"].path] if "island" in node.meta else macs_of(node, part)


def _count(module: nn.Module, own: dict[str, int | None]) -> tuple[OpCount, ...]:
    found: dict[str, list[Any]] = {}
    for graph, node in nodes_of(module):
        part = module_at(graph, node)
        state = state_of(node, part)
        if state not in ("integer", "float"):
            continue
        counts = found.setdefault(_title(graph, node), [0, 0, 0, dict[str, None]()])
        counts[0 if state == "integer" else 1] += 1
        macs = _macs(node, part, own)
        counts[2] = None if macs is None or counts[2] is None else counts[2] + macs
        if kernel := kernel_of(graph, node):
            counts[3][kernel] = None
    ops = [OpCount(op, integer, floats, macs, tuple(kernels)) for op, (integer, floats, macs, kernels) in found.items()]
    return tuple(sorted(ops, key=lambda count: -(count.integer + count.float)))


def _title(module: LeveledModule, node: fx.Node) -> str:
    entry = node.meta["entry"]
    return op_text(module, node) if "reason" in node.meta else str(entry.title)


def _float_op(graph: LeveledModule, node: fx.Node, own: dict[str, int | None]) -> FloatOp:
    macs = _macs(node, module_at(graph, node), own)
    path = absolute(graph, path_of(node))
    return FloatOp(path, op_text(graph, node), node.meta["reason"], node.meta.get("source"), macs)


def _in_no_graph(module: nn.Module) -> Iterator[FloatOp]:
    """What holds weights inside an island and is in no graph, such as a branch that the example did not take."""
    islands = {island.path: island for island in islands_of(module)}

    def inside(part: nn.Module, path: str) -> Iterator[FloatOp]:
        for name, child in part.named_children():
            own = f"{path}.{name}" if path else name
            if isinstance(child, LeveledModule) or own in islands:
                continue
            if any(parameter.ndim >= 2 for parameter in child.parameters(recurse=False)):
                yield FloatOp(own, type(child).__name__, _IN_NO_GRAPH, None, None)
            yield from inside(child, own)

    for path, island in islands.items():
        if not island.is_named:
            yield from inside(module.get_submodule(path), path)


def _plain(lines: list[list[Any]], header: list[str], align: list[str]) -> str:
    table = tabulate(lines, header, tablefmt="simple", colalign=align, disable_numparse=True)
    return "\n".join(line.rstrip() for line in table.split("\n"))
