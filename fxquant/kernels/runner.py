"""The fast way of an integer graph: made when it is first called, kept for each shape of inputs, never saved.

That is the native kernels, bit for bit the reference, where this machine has them and they have the graph; a program of
torch's int8 operators, which are within one integer step of it, for the parts that they do not have, or for all of it.

The graph and its modules stay what they are, the exact reference that is inspected, saved and exported. A runner only
holds what can be made again from them. It steps aside, and the reference runs, wherever a program would not be right:
inputs on another device, of another class (tracers, fake tensors), empty or asking for gradients; modules with hooks;
under autocast.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from fxquant.errors import FxquantError, Refusal
from fxquant.graph.leveled import RUNNER, LeveledModule
from fxquant.kernels.agreement import described
from fxquant.kernels.choice import REFERENCE, expected_kernel, without_kernel
from fxquant.kernels.native.library import missing
from fxquant.kernels.native.model import NATIVE, PLAIN, NativeModel
from fxquant.kernels.native.parts import Parts, cut_up
from fxquant.kernels.operators import Operators, operators
from fxquant.kernels.place import HELD, Held
from fxquant.kernels.program import Program, build, resolved
from fxquant.kernels.reference_layers import told_of_layers, told_of_model
from fxquant.nn.integer import IntegerOp

__all__ = [
    "KERNELS",
    "Runner",
    "by_reference",
    "input_key",
    "kernel_of",
    "natively_in_parts",
    "on_torch",
    "use_kernels",
]

KERNELS = ("auto", "torch", "reference")
"""What ``convert`` takes: the native kernels where they have the graph, else torch's; torch's; the exact reference."""

_PROGRAMS = 16
"""Shapes of inputs that are kept."""
_OWN_PACKS = 2
"""The first shapes have their weights packed for themselves: torch remembers what it compiled for one shape a pack, and
works some 30 microseconds longer at a layer for any other. All further shapes share one more pack."""

_INSIDE = (*(os.path.join(folder, "") for folder in (Path(torch.__file__).parent, Path(__file__).parents[1])), "<")
"""What the names of files begin with that hold torch's code, ours, and code that was made."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def use_kernels(graph: LeveledModule, kernels: str) -> None:
    """Let calls of an integer graph take the fast way, or not."""
    graph.__dict__.pop(RUNNER, None)
    if kernels == "auto" or (kernels == "torch" and operators() is not None):
        graph.__dict__[RUNNER] = Runner(native=kernels == "auto")


def on_torch(module: nn.Module) -> nn.Module:
    """``module``, whose integer graphs take torch's operators where they would take the native kernels: a twin then,
    which shares its tensors."""
    if not any(runner.native for graph in _graphs(module) if (runner := graph.__dict__.get(RUNNER)) is not None):
        return module
    twin = _twin(module)
    for graph in _graphs(twin):
        if RUNNER in graph.__dict__:
            use_kernels(graph, "torch")
    return twin


def natively_in_parts(module: nn.Module) -> nn.Module | None:
    """A twin of ``module`` that shares its tensors and takes the native kernels wherever they have something of its
    integer graphs; None where they have nothing."""
    twin, own = _twin(module), False
    for graph in _graphs(twin):
        use_kernels(graph, "auto")
        own |= bool(graph.__dict__[RUNNER].natively(graph))
    return twin if own else None


def _graphs(module: nn.Module) -> list[LeveledModule]:
    return [part for part in module.modules() if isinstance(part, LeveledModule)]


def _twin(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


@contextmanager
def by_reference(module: nn.Module) -> Iterator[None]:
    """Inside, every integer graph of ``module`` computes by the exact reference."""
    held = [(graph, graph.__dict__.pop(RUNNER, None)) for graph in _graphs(module)]
    try:
        yield
    finally:
        for graph, runner in held:
            if runner is not None:
                graph.__dict__[RUNNER] = runner


def kernel_of(graph: LeveledModule, node: fx.Node) -> str:
    """What computes an integer op of ``graph``: in the last program that was made, or will where its shapes allow it.

    Empty for a node that is no integer op.
    """
    part = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(part, IntegerOp):
        return ""
    runner: Runner | None = graph.__dict__.get(RUNNER)
    if runner is None:
        kernel = REFERENCE
    elif runner.programs:
        kernel = next(reversed(runner.programs.values())).kernels.get(node.name) or without_kernel(part)
    else:
        kernel = runner.natively(graph).get(node.name) or expected_kernel(part)
    inexact = kernel == REFERENCE and part.in_float64
    return f"{REFERENCE}, float64 inside" if inexact else kernel


AnyProgram: TypeAlias = "Program | _Natively | _InParts"
"""What computes a graph for inputs of some shapes."""


class _Natively:
    """The calls of a native model, in the place of a program."""

    def __init__(self, model: NativeModel) -> None:
        self.model, self.kernels = model, model.kernels

    def run(self, *args: Any) -> Any:
        return self.model.run(args)


class _InParts:
    """A graph in parts, each with a runner of its own, in the place of a program."""

    def __init__(self, graph: LeveledModule, parts: Parts) -> None:
        self.graph, self.parts = weakref.proxy(graph), parts  # the graph holds its runner, which holds this
        self.runners = [Runner(native=part.native, told=True) for part in parts.parts]
        for part, runner in zip(parts.parts, self.runners, strict=True):
            part.module.__dict__[RUNNER] = runner
            inputs = (node for node in part.module.graph.nodes if node.op == "placeholder")
            for own, node in zip(inputs, part.takes, strict=True):
                known = described(graph, node, None)
                own.meta[HELD] = Held(known.scale, known.signed)

    @torch.no_grad()
    def run(self, *args: Any) -> Any:
        """The graph's result."""
        values = dict(zip(self.parts.inputs, args, strict=True))
        values |= {node: self._read(str(node.target)) for node in self.parts.attributes}
        for part in self.parts.parts:
            given = part.module._run([values[node] for node in part.takes])
            for node in part.last:
                del values[node]
            values.update(zip(part.gives, given, strict=True))
        return resolved(self.parts.result, values)

    def _read(self, path: str) -> Any:
        """What stands there now; of a parameter its tensor, since nothing is learned here."""
        value = attrgetter(path)(self.graph)
        return value.detach() if isinstance(value, nn.Parameter) else value

    @property
    def kernels(self) -> dict[str, str]:
        """What computed each integer op last, by the node's name."""
        return self._last("kernels")

    @property
    def refusals(self) -> dict[str, Refusal]:
        """Why an integer op has no kernel of torch's, where it was torch's to compute."""
        return self._last("refusals")

    @property
    def seconds(self) -> dict[str, float]:
        """How long each integer op took that the reference computes, where that was measured."""
        return self._last("seconds")

    def _last(self, name: str) -> dict[str, Any]:
        programs = (next(reversed(runner.programs.values())) for runner in self.runners if runner.programs)
        return {node: value for program in programs for node, value in getattr(program, name, {}).items()}


class Runner:
    """Programs of one graph by the shapes of their inputs, the least recently used one dropped first.

    Args:
        native: whether the native kernels are taken where they can be.
        told: whether it was said which layers run by the reference; it is once.

    Attributes:
        unfit: why they have no part of the graph's calls; empty while nothing speaks against them.
    """

    def __init__(self, native: bool = False, told: bool = False) -> None:
        self.native, self.told, self.unfit = native, told, ""
        self.programs: OrderedDict[Any, AnyProgram] = OrderedDict()
        self._model: NativeModel | None = None
        self._refusal: Refusal | None = None
        self._parts: _InParts | Refusal | None = None
        self._declined = ""
        self._packs: dict[Any, Any] = {}
        self._own = 0
        self._owner = 0
        self._watched: tuple[Tensor, ...] = ()
        self._hooks: tuple[Any, ...] = ()
        self._version = -1

    def __call__(self, graph: LeveledModule, args: Sequence[Any]) -> tuple[bool, Any]:
        """Whether the fast way was taken, and the result."""
        if self._owner != id(graph):
            self.forget()
            self._owner = id(graph)
        key = input_key(args)
        if key is None or (self.programs and any(self._hooks)):
            return False, None
        program = self.current(key)
        if program is not None:
            return True, program.run(*args)
        return self._first_run(graph, key, args)

    def forget(self) -> None:
        """Drop what was made: the numbers or the graph have changed."""
        self.programs.clear()
        self._packs, self._own = {}, 0
        self._model, self.unfit, self._declined = None, "", ""
        self._refusal = self._parts = None

    def natively(self, graph: LeveledModule) -> dict[str, str]:
        """What the native kernels are to compute, by the names of nodes."""
        native = self.native_model(graph)
        if native is not None:
            return native.kernels
        cut = self._in_parts(graph)
        return {} if cut is None else dict.fromkeys(cut.parts.native, NATIVE)

    def native_model(self, graph: LeveledModule) -> NativeModel | None:
        """The graph on the native kernels; None where these are not wanted, not here, or lack something."""
        if self._model is None and self.native and not self.unfit:
            try:
                self._model = NativeModel(graph)
            except Refusal as refusal:
                self.unfit, self._refusal = str(refusal), refusal
        return self._model

    def _in_parts(self, graph: LeveledModule) -> _InParts | None:
        """The graph in parts, made once the native kernels refused it; None where no part is theirs."""
        if self._parts is None and self._refusal is not None and missing() is None:
            found = cut_up(graph, self._refusal)
            self._parts = found if isinstance(found, Refusal) else _InParts(graph, found)
        return self._parts if isinstance(self._parts, _InParts) else None

    def current(self, key: Any) -> AnyProgram | None:
        """The program for inputs of that key, if there is one and the model's numbers are what they were."""
        program = self.programs.get(key)
        if program is not None:
            if self._version != sum([t._version for t in self._watched]):
                self.forget()
                return None
            self.programs.move_to_end(key)
        return program

    @torch.inference_mode(False)
    def _first_run(self, graph: LeveledModule, key: Any, args: Sequence[Any]) -> tuple[bool, Any]:
        found = operators()
        hooks = tuple(getattr(part, name) for part in graph.modules() if part is not graph for name in _HOOKS)
        hooks += tuple(getattr(nn.modules.module, f"_global{name}", {}) for name in _HOOKS)
        state = [*graph.parameters(), *graph.buffers()]
        if graph.training or any(hooks) or any(t.device.type != "cpu" for t in state):
            return False, None
        made, failure = self._run_natively(graph, args)
        if made is None and failure is None and (cut := self._in_parts(graph)) is not None:
            made = cut, cut.run(*args)  # what it raises is the model's own: each part has tried all ways
        if made is None and found is not None:
            made = self._build(graph, args, found)
            if failure is not None:  # the model itself refuses nothing
                warnings.warn(
                    f"the native kernels failed on a call that torch's operators take, which run it now: {failure!r}.\n"
                    "  what to do: nothing for right results; please report it.",
                    stacklevel=_user_level(),
                )
        self._tell(graph, None if made is None else made[0])
        if made is None:
            return False, None
        program, result = made
        self._hooks = hooks
        self._watched = tuple(b for name, b in graph.named_buffers() if name.rpartition(".")[2] in ("weight", "bias"))
        self._version = sum([t._version for t in self._watched])
        self.programs[key] = program
        while len(self.programs) > _PROGRAMS:
            self.programs.popitem(last=False)
        return True, result

    def _tell(self, graph: LeveledModule, program: AnyProgram | None) -> None:
        """Warn of the layers that the reference computes, if that was not done."""
        if self.told or isinstance(program, _Natively):
            return
        native = self._declined or self.unfit
        words = (
            told_of_model(native)
            if program is None
            else told_of_layers(graph, program.seconds, program.refusals, native)
        )
        if words:
            self.told = True
            warnings.warn(words, stacklevel=_user_level())

    def _run_natively(
        self, graph: LeveledModule, args: Sequence[Any]
    ) -> tuple[tuple[AnyProgram, Any] | None, Exception | None]:
        """A call on the native kernels; None where these lack the graph, or inputs of such shapes.

        With it, an error of which only a second try tells whether it is the model's own, which refuses the call, or ours.
        """
        model = self.native_model(graph)
        if model is None:
            return None, None
        try:
            return (_Natively(model), model.run(args)), None
        except (Refusal, FxquantError) as refusal:
            self._declined = str(refusal).splitlines()[0]
            self._refusal = refusal if isinstance(refusal, Refusal) else None
            return None, None
        except Exception as error:
            return None, error

    def _build(self, graph: LeveledModule, args: Sequence[Any], found: Operators) -> tuple[AnyProgram, Any]:
        """A call by a program of torch's operators that is written on the way."""
        with torch.no_grad():
            made = build(graph, args, found, self._packs if self._own == _OWN_PACKS else {})
        self._own = min(self._own + 1, _OWN_PACKS)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Runner:
        return Runner(self.native, self.told)

    def __reduce__(self) -> tuple[Any, ...]:
        return Runner, (self.native, self.told)


def _user_level() -> int:
    """Where the user's code is above the caller's, as ``warnings.warn`` counts frames: behind ours and torch's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level


def input_key(args: Sequence[Any]) -> Any:
    """What a program depends on; None for inputs that it is not for."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch.is_autocast_enabled("cpu"):
        return None
    key: list[Any] = [torch.get_num_threads()]
    for value in args:
        if type(value) in (Tensor, nn.Parameter):
            if value.device.type != "cpu" or value.requires_grad or not value.numel():
                return None
            key += (value.shape, value.dtype)
        elif value is None or isinstance(value, PLAIN):
            key.append(value)
        else:
            return None
    return tuple(key)
