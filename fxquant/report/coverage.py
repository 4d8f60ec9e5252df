"""How much of a model is in integers, what is not, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate
from torch import fx, nn

from fxquant.errors import FxquantError, InputError
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.integer import IntegerEvaluate, IntegerOp
from fxquant.report.census import Share, is_float_op, macs_of, macs_share, module_at, short, state_of, weights_share
from fxquant.report.rows import op_text, path_of, source_line, told

__all__ = ["Coverage", "FloatOp", "OpCount", "SkippedFold", "coverage"]

_SHOWN = 12


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
class Coverage:
    """What ``coverage`` found.

    Attributes:
        name, level: the model's class, and how far it has come.
        macs: the MACs in integers and in all; None without recorded shapes.
        weights: the weights in integers and in all.
        ops: counts by op, most frequent first.
        float_ops: every op that computes in float.
        skipped_folds: every batch norm that was not folded.
        kernels: on integer models, the kernel of each op, by path.
    """

    name: str
    level: str
    macs: Share | None
    weights: Share
    ops: tuple[OpCount, ...]
    float_ops: tuple[FloatOp, ...]
    skipped_folds: tuple[SkippedFold, ...]
    kernels: dict[str, str]

    @property
    def macs_share(self) -> float | None:
        """The share of MACs in integers, 0 to 1; None without recorded shapes."""
        return None if self.macs is None else self.macs.fraction

    @property
    def weights_share(self) -> float:
        """The share of weights in integers, 0 to 1."""
        return self.weights.fraction

    def require(self, share: float) -> Coverage:
        """Raise unless at least ``share`` of the MACs (of the weights, without recorded shapes) are in integers.

        Raises:
            FxquantError: names the share and the float ops with the most MACs.
        """
        if not 0 <= share <= 1:
            raise InputError(f"require({share!r}): a share lies between 0 and 1, as 0.95.")
        measured, of = (self.macs, "MACs") if self.macs is not None else (self.weights, "weights")
        if measured.fraction >= share:
            return self
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
        if self.macs and self.macs.unknown:
            shares.append(f"{self.macs.unknown} float ops could not be counted")
        title = f"{self.name}, {self.level}: in integers {', '.join([*shares, f'{self.weights} of weights'])}"
        return "\n\n".join([title, self._ops_text(), *self._float_text(), *self._folds_text()])

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
        lines = [
            [f.path, f.op, f.reason.removeprefix(f"{f.op} is "), source_line(f.source)] for f in self.float_ops[:_SHOWN]
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

    Raises:
        InputError: the model was not made by ``prepare`` or ``convert``.
    """
    if not isinstance(module, LeveledModule) or module.level in ("captured", "canonical"):
        raise InputError(
            f"coverage was given a {type(module).__name__} that fxquant has not prepared.\n"
            "  what to do: coverage(fxquant.prepare(model, example_inputs)), or the result of convert."
        )
    return Coverage(
        name=module.__class__.__name__,
        level=module.level,
        macs=macs_share(module),
        weights=weights_share(module),
        ops=_count(module),
        float_ops=tuple(_float_op(module, n) for n in module.graph.nodes if is_float_op(n, module_at(module, n))),
        skipped_folds=tuple(_skipped_folds(module)),
        kernels={path_of(n): kernel for n in module.graph.nodes if (kernel := _kernel(module_at(module, n)))},
    )


def _skipped_folds(module: LeveledModule) -> Iterator[SkippedFold]:
    paths = {node.name: path_of(node) for node in module.graph.nodes}
    prefix = "not folded: "
    for node in module.graph.nodes:
        for note in node.meta.get("notes", ()):
            if note.startswith(prefix):
                yield SkippedFold(paths[node.name], told(note.removeprefix(prefix), paths, seen_from=paths[node.name]))


def _count(module: LeveledModule) -> tuple[OpCount, ...]:
    found: dict[str, list[Any]] = {}
    for node in module.graph.nodes:
        part = module_at(module, node)
        state = state_of(node, part)
        if state not in ("integer", "float"):
            continue
        counts = found.setdefault(_title(module, node), [0, 0, 0, dict[str, None]()])
        counts[0 if state == "integer" else 1] += 1
        macs = macs_of(node, part)
        counts[2] = None if macs is None or counts[2] is None else counts[2] + macs
        if kernel := _kernel(part):
            counts[3][kernel] = None
    ops = [OpCount(op, integer, floats, macs, tuple(kernels)) for op, (integer, floats, macs, kernels) in found.items()]
    return tuple(sorted(ops, key=lambda count: -(count.integer + count.float)))


def _title(module: LeveledModule, node: fx.Node) -> str:
    entry = node.meta["entry"]
    return op_text(module, node) if "reason" in node.meta else str(entry.title)


def _kernel(part: nn.Module | None) -> str:
    """Which kernel computes an integer op; empty for whatever is no integer op."""
    if not isinstance(part, IntegerOp):
        return ""
    return "reference, float64 inside" if isinstance(part, IntegerEvaluate) else "reference"


def _float_op(module: LeveledModule, node: fx.Node) -> FloatOp:
    part = module_at(module, node)
    return FloatOp(
        path_of(node), op_text(module, node), node.meta["reason"], node.meta.get("source"), macs_of(node, part)
    )


def _plain(lines: list[list[Any]], header: list[str], align: list[str]) -> str:
    table = tabulate(lines, header, tablefmt="simple", colalign=align, disable_numparse=True)
    return "\n".join(line.rstrip() for line in table.split("\n"))
