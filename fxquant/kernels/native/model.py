"""An integer model behind fxquant's own kernels, called as the model is."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import InputError, Refusal
from fxquant.graph.leveled import LeveledModule
from fxquant.kernels.native.library import missing
from fxquant.kernels.native.lowering import lower
from fxquant.kernels.native.plan import Plan

__all__ = ["NATIVE", "PLAIN", "NativeModel"]

NATIVE = "native"
"""What computes an op, in a report."""

PLAIN = (bool, int, float, str, torch.Size, torch.dtype, torch.device)
"""The classes of inputs that are no tensors: a plan is for their values."""

_SHAPES = 8
"""Shapes of inputs (and numbers of threads) whose plans are kept, those used last."""


class NativeModel:
    """An integer graph on the native kernels.

    Args:
        model: the integer model; read once, not kept.

    Attributes:
        kernels: what computes each integer op, by the names of its nodes.

    Raises:
        Refusal: the machine or a node of the graph is not for these kernels; says why.
    """

    def __init__(self, model: LeveledModule) -> None:
        refusal = missing()
        if refusal is not None:
            raise refusal.with_traceback(None)
        with torch.inference_mode(False), torch.device("cpu"):
            self.program, self.spec = lower(model), model.meta.get("call")
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._lock = threading.Lock()
        named = zip(self.program.names, self.program.lines, strict=True)
        own = [name for name, line in named if line.operation is not None or line.gone or line.moves]
        self.kernels = dict.fromkeys(own, NATIVE)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
            InputError: an input is neither a plain number nor a tensor on the CPU that is not empty.
            Refusal: an op of the model has no native kernel for inputs of these shapes.
        """
        inputs = list(args) if self.spec is None else self.spec.bind(args, kwargs)
        result = self.run(inputs)
        return result if self.spec is None else self.spec.restore(result)

    def run(self, inputs: Sequence[Any]) -> Any:
        """The graph's result, for its inputs in order; raises as a call does."""
        inputs = [_checked(x) for x in inputs]
        with self._lock, torch.no_grad():
            return self._plan(inputs).run(inputs)

    def plan_of(self, *inputs: Any) -> Plan:
        """The plan for inputs like these, in order: how each step computes."""
        with self._lock, torch.no_grad():
            return self._plan([_checked(x) for x in inputs])

    def _plan(self, inputs: Sequence[Any]) -> Plan:
        key = torch.get_num_threads(), *((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in inputs)
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = self._planned(inputs)
            while len(self._plans) > _SHAPES:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return found

    def _planned(self, inputs: Sequence[Any]) -> Plan:
        """A plan, whose making has left the generator of random numbers where it stood."""
        before = torch.get_rng_state()
        with torch.inference_mode(False), torch.device("cpu"):
            plan = Plan(self.program, inputs)
        if not torch.equal(torch.get_rng_state(), before):
            torch.set_rng_state(before)
            raise Refusal("the model draws random numbers, which a plan would hold")
        return plan


def _checked(x: Any) -> Any:
    if not isinstance(x, Tensor):
        if x is None or isinstance(x, PLAIN):
            return x
        raise InputError(f"the native kernels take tensors and plain numbers, got {type(x).__name__}.")
    if x.device.type != "cpu" or not x.numel() or x.is_complex():
        described = f"a {x.dtype} tensor of shape {list(x.shape)} on {x.device}"
        raise InputError(f"the native kernels take tensors on the CPU that are not empty, got {described}.")
    return x.detach()
