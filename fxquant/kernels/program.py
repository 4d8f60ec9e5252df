"""Straight-line code of a graph: one line per node, fast forms where there are any, tensors let go after their last use.

The code is made while the graph runs once on real inputs, so each choice sees the shapes that it is for.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxquant.errors import Refusal
from fxquant.graph.leveled import LeveledModule
from fxquant.kernels.agreement import described
from fxquant.kernels.choice import step_of, without_kernel
from fxquant.kernels.operators import Operators
from fxquant.kernels.place import Known, Place, Step
from fxquant.kernels.storage import Storage, convert
from fxquant.nn.integer import IntegerOp

__all__ = ["Program", "build", "resolved"]


@dataclass(frozen=True)
class Program:
    """What ``build`` makes.

    Attributes:
        run: takes the graph's inputs in order.
        kernels: what computes each integer op, by the node's name.
        refusals: why an integer op has no kernel of torch's, likewise.
        seconds: how long each integer op took that the reference computes, in the run that the code was made in.
        text: the code.
        packed: the weights that the code holds, in torch's own form.
    """

    run: Callable[..., Any]
    kernels: dict[str, str]
    refusals: dict[str, Refusal]
    seconds: dict[str, float]
    text: str
    packed: tuple[Any, ...]


def build(
    graph: LeveledModule, args: Sequence[Any], operators: Operators, packs: dict[Any, Any]
) -> tuple[Program, Any]:
    """A program for inputs of the shapes of ``args``, and its result for them; ``packs`` are weights packed before."""
    writer = _Writer(graph, operators, packs)
    result = writer.write(args)
    return writer.program(), result


class _Writer:
    def __init__(self, graph: LeveledModule, operators: Operators, packs: dict[Any, Any]) -> None:
        self.graph, self.operators, self.packs = graph, operators, packs
        self.known: dict[fx.Node, Known] = {}
        self.held: dict[tuple[fx.Node, Storage | None], tuple[str, Any]] = {}
        self.names: dict[str, Any] = {}
        self.lines: list[tuple[str, str, list[str]]] = []
        self.parameters: list[str] = []
        self.kernels: dict[str, str] = {}
        self.refusals: dict[str, Refusal] = {}
        self.seconds: dict[str, float] = {}
        self.packed: list[Any] = []

    def write(self, args: Sequence[Any]) -> Any:
        """Run every node once, and write a line for it."""
        remaining = iter(args)
        left = {node: len(node.users) for node in self.graph.graph.nodes}
        for node in self.graph.graph.nodes:
            if node.op == "output":
                return self._finish(node)
            if node.op == "placeholder":
                self.parameters.append(f"v{len(self.parameters)}")
                self._keep(node, self.parameters[-1], next(remaining), None)
            else:
                self._compute(node)
            for source in node.all_input_nodes:
                left[source] -= 1
                if not left[source]:
                    self._let_go(source)
        return None

    def _compute(self, node: fx.Node) -> None:
        part = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        place = Place(part, node, self.known, self.operators, self.packs)
        fast, plain = step_of(place), self._plain(node, part)
        ways = [] if isinstance(fast, Refusal) else [(fast.run, fast), (_contiguous(fast.run), fast)]
        for run, step in [*ways, (plain, None)]:
            started = time.perf_counter()
            try:
                self._emit(node, run, step)
                break
            except (RuntimeError, NotImplementedError):
                continue  # torch has no such form of it for these arguments
        else:
            started = time.perf_counter()
            self._emit(node, _contiguous(plain), None)
            step = None
            fast = Refusal("torch has no such form of it for these arguments", where=node.name)
        if step is not None and step.packed is not None:
            self.packed.append(step.packed)
        if isinstance(part, IntegerOp):
            self.kernels[node.name] = without_kernel(part) if step is None else step.kernel
            if step is None:
                self.seconds[node.name] = time.perf_counter() - started
            if isinstance(fast, Refusal):
                self.refusals[node.name] = fast

    def _plain(self, node: fx.Node, part: nn.Module | None) -> Callable[..., Any]:
        """The node as the graph has it."""
        name: Any = node.target
        if node.op == "get_attr":
            return lambda: operator.attrgetter(name)(self.graph)
        if node.op == "call_method":
            return lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)
        return part if part is not None else name

    def _emit(self, node: fx.Node, run: Callable[..., Any], step: Step | None) -> None:
        count, takes = len(self.lines), {} if step is None else step.takes
        held = {n: self._in_form(n, takes.get(n)) for n in node.all_input_nodes}
        values = {n: value for n, (_, value) in held.items()}
        try:
            value = run(*resolved(node.args, values), **resolved(dict(node.kwargs), values))
        except BaseException:
            self._take_back(count)
            raise
        variables = {n: variable for n, (variable, _) in held.items()}
        variable = f"x{len(self.lines)}"
        self.lines.append((variable, self._call_text(node, self._name(run), variables), list(variables.values())))
        self._keep(node, variable, value, step)

    def _take_back(self, count: int) -> None:
        """Drop the lines after the first ``count``, and what they made."""
        dropped = {variable for variable, _, _ in self.lines[count:]}
        del self.lines[count:]
        self.held = {key: value for key, value in self.held.items() if value[0] not in dropped}

    def _call_text(self, node: fx.Node, function: str, variables: dict[fx.Node, str]) -> str:
        args = [self._text(value, variables) for value in node.args]
        kwargs = [f"{name}={self._text(value, variables)}" for name, value in node.kwargs.items()]
        return f"{function}({', '.join(args + kwargs)})"

    def _text(self, value: Any, variables: dict[fx.Node, str]) -> str:
        if isinstance(value, fx.Node):
            return variables[value]
        if isinstance(value, (tuple, list)):
            inside = "".join(f"{self._text(item, variables)}, " for item in value)
            if hasattr(value, "_fields"):
                return f"{self._name(type(value))}({inside})"
            return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {self._text(item, variables)}" for key, item in value.items()) + "}"
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return f"{self._name(slice)}({', '.join(self._text(part, variables) for part in parts)})"
        return repr(value) if value is None or type(value) in (bool, int, str) else self._name(value)

    def _name(self, value: Any) -> str:
        """A name under which the code finds ``value``."""
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    def _keep(self, node: fx.Node, variable: str, value: Any, step: Step | None) -> None:
        self.known[node] = described(self.graph, node, value, step)
        self.held[node, self.known[node].form] = variable, value

    def _in_form(self, node: fx.Node, form: Storage | None) -> tuple[str, Any]:
        """The variable and value of ``node`` in ``form``, by a line that converts it where none has it yet."""
        if (node, form) not in self.held:
            known = self.known[node]
            source, value = self.held[node, known.form]
            signed, variable = known.signed, f"x{len(self.lines)}"
            changed = convert(value, form, signed)
            text = f"{self._name(convert)}({source}, {self._name(form)}, {signed})"
            self.lines.append((variable, text, [source]))
            self.held[node, form] = variable, changed
        return self.held[node, form]

    def _let_go(self, node: fx.Node) -> None:
        for key in [key for key in self.held if key[0] is node]:
            del self.held[key]
        known = self.known[node]
        if isinstance(known.sample, Tensor):
            self.known[node] = Known(None, known.scale, known.signed, known.form)

    def _finish(self, node: fx.Node) -> Any:
        variables = {n: self._in_form(n, None) for n in node.all_input_nodes}
        texts = {n: variable for n, (variable, _) in variables.items()}
        self.returned = self._text(node.args[0], texts)
        self.last = list(texts.values())
        return resolved(node.args[0], {n: value for n, (_, value) in variables.items()})

    def program(self) -> Program:
        """The lines, compiled."""
        read_later, body = set(self.last), list[str]()
        for variable, text, reads in reversed(self.lines):
            done = sorted({v for v in reads if v not in read_later})
            read_later.update(done)
            unused = [variable] if variable not in read_later else []
            if done or unused:
                body.append(f"    {' = '.join([*done, *unused])} = None")
            body.append(f"    {variable} = {text}")
        head = f"def run({', '.join(self.parameters)}):"
        source = "\n".join([head, *reversed(body), f"    return {self.returned}"]) + "\n"
        namespace = dict(self.names)
        exec(compile(source, "<fxquant program>", "exec"), namespace)
        return Program(namespace["run"], self.kernels, self.refusals, self.seconds, source, tuple(self.packed))


def _contiguous(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` on tensors in their logical order of memory, which views may ask for."""

    def behind(*args: Any, **kwargs: Any) -> Any:
        return run(*(a.contiguous() if isinstance(a, Tensor) else a for a in args), **kwargs)

    return behind


def resolved(value: Any, values: dict[fx.Node, Any]) -> Any:
    """An argument with its nodes replaced by their values, in Python's own lists and dicts."""
    if isinstance(value, fx.Node):
        return values[value]
    if isinstance(value, (tuple, list)):
        items = [resolved(item, values) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {key: resolved(item, values) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(resolved(part, values) for part in (value.start, value.stop, value.step)))
    return value
