"""A graph before and after as rows of facts, one per node in order: the data of a diff."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.behaviour import ChannelAffine
from fxquant.capture.islands import graphs_of
from fxquant.errors import InputError
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.text import target_text
from fxquant.nn.integer import Dequantize, IntegerOp, Quantize
from fxquant.numerics.scheme import Scheme
from fxquant.ops.calls import FLOAT, behaviour_of
from fxquant.passes.apply_recipe import op_path
from fxquant.reporting.census import absolute, module_at, state_of
from fxquant.reporting.paths import near
from fxquant.targets import X86, Target

__all__ = ["Row", "op_text", "path_of", "rows", "source_line", "target_of", "told"]

_NODE_NAME = re.compile(r"\b[A-Za-z]\w*_\w+\b")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one node.

    Attributes:
        name: the node's name in the graph.
        path: where the op stands in the model, as the printed model and recipes spell it.
        before: the op before (``Conv2d``, ``add``); empty for what was put in.
        after: the op after (``QuantConv2d``, ``IntAdd+ReLU``); empty where it is gone.
        state: integer, border (a quantize or dequantize), input, parameter, float, shape (reads one) or gone.
        weight: the scheme of its weight.
        output: the scheme of its result; None where the result is float, or where the chain goes on.
        shares: path of the earlier row with the same quantizer.
        rounded_by: path of the last link of the fused chain, whose quantizer rounds for this one too.
        scale, zero_point: of the result's grid, once known.
        range: the smallest and the largest real number of that grid.
        into: path of what it was folded or merged into.
        how: ``folded``, ``merged`` or ``removed``, where it is gone.
        note: why it stayed float, what was not folded and why, and what else is worth a word.
        source: ``file:line`` of the call in the user's code.
    """

    name: str
    path: str
    before: str
    after: str
    state: str
    weight: Scheme | None = None
    output: Scheme | None = None
    shares: str | None = None
    rounded_by: str | None = None
    scale: float | None = None
    zero_point: int | None = None
    range: tuple[float, float] | None = None
    into: str | None = None
    how: str | None = None
    note: str = ""
    source: str | None = None


def rows(before: LeveledModule, after: LeveledModule) -> list[Row]:
    """One row for each node of either graph, in order; ``before`` is canonical or of a later level.

    Checks of what was held for given have no row: see ``specializations_of``.

    Raises:
        InputError: ``after`` was not made from the model that ``before`` is.
    """
    return list(_Reader(before, after).read())


def target_of(module: nn.Module) -> Target:
    """What a model was prepared for."""
    graph = next(iter(graphs_of(module).values()), None)
    found: Target = X86 if graph is None else graph.settings.get("target", X86)
    return found


def source_line(source: str | None) -> str:
    """``net.py:31``: a source without its folders."""
    return os.path.basename(source) if source else ""


class _Reader:
    def __init__(self, before: LeveledModule, after: LeveledModule) -> None:
        self.before, self.after = before, after
        self.old = {node.name: node for node in before.graph.nodes}
        self.new = {node.name: node for node in after.graph.nodes}
        strangers = [name for name, node in self.new.items() if name not in self.old and "origin" not in node.meta]
        if strangers:
            raise InputError(
                f"the second model was not made from the first, which has no {', '.join(strangers[:3])}.\n"
                "  what to do: give diff the model that you gave to prepare, and what prepare or convert returned."
            )
        self.paths = self._paths()
        self.absorbed = dict(self._absorptions())
        self.owners: dict[str, str] = {}
        self.entering = self._entering()

    def _paths(self) -> dict[str, str]:
        """A path for each node, told apart where one module is called several times."""
        paths: dict[str, str] = {}
        taken: set[str] = set()
        for name, node in {**self.old, **self.new}.items():
            new = self.new.get(name)
            if new is not None and state_of(new, module_at(self.after, new)) == "border":
                paths[name] = paths[_source(new).name]
                continue
            wanted = str(new.target) if new is not None and new.op == "call_module" else path_of(node)
            wanted = absolute(self.after, wanted)
            path, number = wanted, 0
            while path in taken:
                number += 1
                path = f"{wanted}_{number}"
            paths[name] = path
            taken.add(path)
        return paths

    def _absorptions(self) -> Iterator[tuple[str, tuple[str, str]]]:
        """What was folded or merged, by name, with how and into what."""
        for node in self.new.values():
            for name, how in node.meta.get("absorbed", ()):
                yield name, (how, self.paths[node.name])

    def _entering(self) -> dict[str, fx.Node]:
        """The quantizer node of each input and parameter: both stand in one row."""
        found: dict[str, fx.Node] = {}
        for node in self.new.values():
            source = node.args[0] if node.args else None
            is_border = state_of(node, module_at(self.after, node)) == "border"
            if is_border and isinstance(source, fx.Node) and source.op in ("placeholder", "get_attr"):
                found[source.name] = node
        return found

    def read(self) -> Iterator[Row]:
        waiting = list(self.new.values())
        for old in self.old.values():
            if old.name not in self.new:
                yield from self._gone(old)
                continue
            while waiting:
                node = waiting.pop(0)
                yield from self._row(node)
                if node.name == old.name:
                    break
        for node in waiting:
            yield from self._row(node)

    def _gone(self, node: fx.Node) -> Iterator[Row]:
        if node.op == "get_attr" or "specialization" in node.meta:
            return
        how, into = self.absorbed.get(node.name, ("removed", None))
        yield Row(
            name=node.name, path=self.paths[node.name], before=op_text(self.before, node), after="", state="gone",
            into=into, how=how, source=node.meta.get("source"),
        )  # fmt: skip

    def _row(self, node: fx.Node) -> Iterator[Row]:
        part: Any = module_at(self.after, node)
        state = state_of(node, part)
        shown: fx.Node = self.entering.get(node.name, node)
        if (
            state == "output"
            or "specialization" in node.meta
            or node in self.entering.values()
            or (state == "parameter" and not self._is_quantized(node))
        ):
            return
        old = self.old.get(node.name)
        part = module_at(self.after, shown)
        weight = getattr(part, "weight_scheme", getattr(getattr(part, "weight_quantizer", None), "scheme", None))
        yield Row(
            name=node.name, path=self.paths[node.name], before="" if old is None else op_text(self.before, old),
            after=self._after_text(shown, state), state=state, weight=weight, note=self._note(node, state),
            source=node.meta.get("source"), **self._grid(node, shown, part),
        )  # fmt: skip

    def _is_quantized(self, node: fx.Node) -> bool:
        return node.name in self.entering or bool(node.meta.get("integer_constant"))

    def _after_text(self, node: fx.Node, state: str) -> str:
        if node.meta.get("integer_constant"):
            return "integers"
        if state == "float":
            return "float"
        merged = node.meta.get("merged", ())
        return "+".join([f"Int{merged[0]}", *merged[1:]]) if len(merged) > 1 else op_text(self.after, node)

    def _grid(self, node: fx.Node, shown: fx.Node, part: Any) -> dict[str, Any]:
        """Scheme, scale and zero point of the result, or who else has them."""
        if shown.meta.get("continues"):
            return {"rounded_by": self._end_of_chain(shown)}
        holder = part if isinstance(part, (Quantize, IntegerOp)) else getattr(part, "output_quantizer", None)
        if holder is None or isinstance(part, Dequantize) or holder.scheme is None:
            return {}
        owner = self.owners.setdefault(shown.meta.get("group") or node.name, self.paths[node.name])
        known = isinstance(part, (Quantize, IntegerOp)) or holder.ready
        grid = _grid_numbers(holder) if known else {}
        return {"output": holder.scheme, "shares": None if owner == self.paths[node.name] else owner, **grid}

    def _end_of_chain(self, node: fx.Node) -> str | None:
        while node.meta.get("continues"):
            (node,) = node.users
        return self.paths[node.name]

    def _note(self, node: fx.Node, state: str) -> str:
        parts: list[str] = []
        if "island" in node.meta:
            parts.append("it runs its own code, see its line")
        elif state == "float":
            parts.append(node.meta.get("reason") or "passes float values on")
        if node.meta.get("leaves_as_float"):
            parts.append("not rounded")
        source = node.args[0] if node.args else None
        in_chain = isinstance(source, fx.Node) and source.meta.get("continues")
        if state == "integer" and in_chain and isinstance(behaviour_of(node), ChannelAffine):
            assert isinstance(source, fx.Node)
            folds_first = getattr(module_at(self.after, source), "folded_norm", None) is not None
            parts.append("folds in every pass" if folds_first else "folds at conversion")
        for note in node.meta.get("notes", ()):
            parts.append(told(note, self.paths, seen_from=self.paths[node.name]))
        return "; ".join(parts)


def told(note: str, paths: dict[str, str], *, seen_from: str) -> str:
    """A pass's note with paths in the model where it names nodes of the graph."""
    return _NODE_NAME.sub(lambda match: near(paths.get(match[0], match[0]), seen_from), note)


def _source(node: fx.Node) -> fx.Node:
    """What a node reads first."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def path_of(node: fx.Node) -> str:
    """Where an op stands in the model: its module's path, or its caller's and the function's name."""
    if node.op in ("placeholder", "output"):
        return node.name
    if node.op == "get_attr" or "entry" not in node.meta:
        return str(node.target)
    path = op_path(node)
    if node.meta["entry"] is FLOAT and node.op != "call_module":
        return path.removesuffix(FLOAT.name) + target_text(node).lstrip(".")
    return path


def op_text(module: LeveledModule, node: fx.Node) -> str:
    """What a node runs, in a word: a class name, or a function's."""
    part = module_at(module, node)
    if part is not None:
        return str(part._get_name())  # type: ignore[no-untyped-call]
    if node.op in ("placeholder", "get_attr"):
        return {"placeholder": "input", "get_attr": "parameter"}[node.op]
    was: type[nn.Module] | None = node.meta.get("was_module")
    if was is not None:
        return was.__name__
    entry = node.meta.get("entry")
    return target_text(node).lstrip(".") if entry is None or entry is FLOAT else entry.name


def _grid_numbers(holder: Any) -> dict[str, Any]:
    scale, zero_point, scheme = holder.scale, holder.zero_point, holder.scheme
    assert isinstance(scale, Tensor) and isinstance(scheme, Scheme)
    if scale.ndim:
        return {}
    step, zero = float(scale.to(torch.float64)), int(zero_point)
    return {"scale": step, "zero_point": zero, "range": ((scheme.qmin - zero) * step, (scheme.qmax - zero) * step)}
