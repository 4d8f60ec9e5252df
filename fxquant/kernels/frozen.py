"""A program without Python: traced and frozen by TorchScript, which halves what calling an operator costs.

torch is giving TorchScript up, so nothing depends on it: where it is gone, declines or gives other bits than the
program, the model itself is called.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.utils import _pytree as pytree

from fxquant.graph.leveled import RUNNER, LeveledModule
from fxquant.kernels.data_flow import follows_data
from fxquant.kernels.program import Program
from fxquant.kernels.runner import Runner, input_key

__all__ = ["Frozen", "fastest"]

_SHAPES = 8
"""Shapes of inputs that are kept, fewer than a runner keeps."""
_WARM_UP = 3
"""Calls after which TorchScript has done its own specializing."""

_KNOWN_WARNINGS = (
    (r"`torch\.jit\.\w+` is deprecated", FutureWarning),
    (r"`torch\.jit\.\w+` is (deprecated|not supported)", DeprecationWarning),
    (r"Converting a tensor to a Python|Iterating over a tensor", TracerWarning),
)
"""What torch says while tracing: that TorchScript ends, and that shapes and the model's own numbers become constants, as
they may (one program, one shape). Where data could become a constant nothing is traced, see ``follows_data``."""


def fastest(model: nn.Module, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The fastest callable for an integer model and calls like this one, which is made once to prepare it.

    Inputs of each shape get a program of their own when they are first seen; the eight that were used last are kept.

    Args:
        model: what ``convert`` returned; not changed, and read again if its numbers change.
        args, kwargs: one call of the model.

    Returns:
        A callable with the model's signature; ``model`` itself where nothing faster is known.
    """
    fast: Callable[..., Any] = model
    runner = model.__dict__.get(RUNNER)
    if isinstance(model, LeveledModule) and isinstance(runner, Runner) and not (runner.native or follows_data(model)):
        fast = Frozen(model)
    fast(*args, **kwargs)
    return fast


class Frozen:
    """An integer model behind frozen programs by the shapes of their inputs, the least recently used one dropped first."""

    def __init__(self, model: LeveledModule) -> None:
        self.model = model
        self.runner: Runner = model.__dict__[RUNNER]
        self._made: OrderedDict[Any, tuple[Program, Callable[[Sequence[Any]], Any] | None]] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        spec = self.model.meta.get("call")
        inputs = list(args) if spec is None else spec.bind(args, kwargs)
        key = input_key(inputs)
        program = None if key is None else self.runner.current(key)
        made, run = self._made.get(key, (None, None))
        if program is None or made is not program:
            return self._first_call(key, inputs, args, kwargs)
        self._made.move_to_end(key)
        if run is None:
            return self.model(*args, **kwargs)
        result = run(inputs)
        return result if spec is None else spec.restore(result)

    def _first_call(self, key: Any, inputs: Sequence[Any], args: Any, kwargs: Any) -> Any:
        """Call the model, and freeze the program that it has made for such inputs."""
        result = self.model(*args, **kwargs)
        program = None if key is None else self.runner.current(key)
        if isinstance(program, Program):
            self._made[key] = program, _freeze(program, inputs)
            self._made.move_to_end(key)
            while len(self._made) > _SHAPES:
                self._made.popitem(last=False)
        return result


class _Lines(nn.Module):
    """A program as a module of its tensor inputs that gives a flat tuple."""

    def __init__(self, program: Program, inputs: Sequence[Any], places: Sequence[int]) -> None:
        super().__init__()
        self.program, self.inputs, self.places = program, list(inputs), places
        for index, packed in enumerate(program.packed):  # where the tracer looks for them
            setattr(self, f"packed_{index}", packed)

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        inputs = list(self.inputs)
        for place, tensor in zip(self.places, tensors, strict=True):
            inputs[place] = tensor
        return tuple(pytree.tree_leaves(self.program.run(*inputs)))


def _freeze(program: Program, inputs: Sequence[Any]) -> Callable[[Sequence[Any]], Any] | None:
    """A function from the graph's inputs to its result; None where TorchScript cannot say it, or says it otherwise."""
    places = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    tensors = tuple(inputs[i] for i in places)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            for message, category in _KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message=message, category=category)
            leaves, structure = pytree.tree_flatten(program.run(*inputs))
            if not tensors or not all(isinstance(leaf, Tensor) for leaf in leaves):
                return None
            traced = torch.jit.trace(_Lines(program, inputs, places).eval(), tensors, check_trace=False)
            script = torch.jit.freeze(traced)
            for _ in range(_WARM_UP):
                again = script(*tensors)
            if not all(torch.equal(a, b) for a, b in zip(again, leaves, strict=True)):
                return None
    except (RuntimeError, AttributeError, NotImplementedError, ValueError, TypeError):
        return None

    def run(values: Sequence[Any]) -> Any:
        with torch.no_grad():
            return pytree.tree_unflatten(list(script(*[values[i] for i in places])), structure)

    return run
