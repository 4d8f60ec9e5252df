"""The fast way of an integer graph: made when it is first called, kept for each shape of inputs, never saved.

The graph and its modules stay what they are, the exact reference that is inspected, saved and exported. A runner only
holds what can be made again from them. It steps aside, and the reference runs, wherever a program would not be right:
inputs on another device, of another class (tracers, fake tensors), empty or asking for gradients; modules with hooks;
under autocast.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.graph.leveled import RUNNER, LeveledModule
from fxquant.kernels.choice import REFERENCE, expected_kernel
from fxquant.kernels.operators import operators
from fxquant.kernels.program import Program, build
from fxquant.nn.integer import IntegerEvaluate, IntegerOp

__all__ = ["KERNELS", "Runner", "input_key", "kernel_of", "use_kernels"]

KERNELS = ("auto", "reference")
"""What ``convert`` takes: the fastest kernels that are right on this machine, or the exact reference everywhere."""

_PROGRAMS = 16
"""Shapes of inputs that are kept."""
_OWN_PACKS = 2
"""The first shapes have their weights packed for themselves: torch remembers what it compiled for one shape a pack, and
works some 30 microseconds longer at a layer for any other. All further shapes share one more pack."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def use_kernels(graph: LeveledModule, kernels: str) -> None:
    """Let calls of an integer graph take the fast way, or not."""
    graph.__dict__.pop(RUNNER, None)
    if kernels == "auto" and operators() is not None:
        graph.__dict__[RUNNER] = Runner()


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
        kernel = next(reversed(runner.programs.values())).kernels.get(node.name, REFERENCE)
    else:
        kernel = expected_kernel(part)
    inexact = kernel == REFERENCE and isinstance(part, IntegerEvaluate)
    return f"{REFERENCE}, float64 inside" if inexact else kernel


class Runner:
    """Programs of one graph by the shapes of their inputs, the least recently used one dropped first."""

    def __init__(self) -> None:
        self.programs: OrderedDict[Any, Program] = OrderedDict()
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

    def current(self, key: Any) -> Program | None:
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
        if found is None or graph.training or any(hooks) or any(t.device.type != "cpu" for t in state):
            return False, None
        with torch.no_grad():
            program, result = build(graph, args, found, self._packs if self._own == _OWN_PACKS else {})
        self._own = min(self._own + 1, _OWN_PACKS)
        self._hooks = hooks
        self._watched = tuple(b for name, b in graph.named_buffers() if name.rpartition(".")[2] in ("weight", "bias"))
        self._version = sum([t._version for t in self._watched])
        self.programs[key] = program
        while len(self.programs) > _PROGRAMS:
            self.programs.popitem(last=False)
        return True, result

    def __deepcopy__(self, memo: dict[int, Any]) -> Runner:
        return Runner()

    def __reduce__(self) -> tuple[Any, ...]:
        return Runner, ()


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
        elif value is None or isinstance(value, (bool, int, float, str)):
            key.append(value)
        else:
            return None
    return tuple(key)
