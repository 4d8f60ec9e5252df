"""An integer model behind fxquant's own kernels, called as the model is."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxquant.errors import InputError
from fxquant.graph.leveled import LeveledModule
from fxquant.kernels.native.library import missing
from fxquant.kernels.native.lowering import lower
from fxquant.kernels.native.plan import Plan
from fxquant.kernels.native.weights import Unfit

__all__ = ["NativeModel", "Unfit"]

_SHAPES = 8
"""Shapes of inputs whose plans are kept, those used last."""


class NativeModel:
    """An integer graph on the native kernels.

    Args:
        model: the integer model; read once, not kept.

    Raises:
        Unfit: the machine or a node of the graph is not for these kernels; says why.
    """

    def __init__(self, model: LeveledModule) -> None:
        reason = missing()
        if reason is not None:
            raise Unfit(reason)
        self.program, self.spec = lower(model), model.meta.get("call")
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
            InputError: an input is no float32 tensor on the CPU, or is empty.
        """
        inputs = list(args) if self.spec is None else self.spec.bind(args, kwargs)
        tensors = [_checked(x) for x in inputs]
        with self._lock, torch.no_grad():
            results = self._plan(tuple(tuple(x.shape) for x in tensors)).run(tensors)
        found = dict(zip(self.program.outputs, results, strict=True))
        result = pytree.tree_map(lambda leaf: found[leaf.value], self.program.result)
        return result if self.spec is None else self.spec.restore(result)

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan for such a call."""
        inputs = list(args) if self.spec is None else self.spec.bind(args, kwargs)
        return self._plan(tuple(tuple(x.shape) for x in inputs))

    def _plan(self, shapes: Any) -> Plan:
        found = self._plans.get(shapes)
        if found is None:
            found = self._plans[shapes] = Plan(self.program, shapes)
            while len(self._plans) > _SHAPES:
                self._plans.popitem(last=False)
        self._plans.move_to_end(shapes)
        return found


def _checked(x: Any) -> Tensor:
    if not isinstance(x, Tensor) or x.device.type != "cpu" or not x.is_floating_point() or not x.numel():
        described = f"a {x.dtype} tensor of shape {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"the native kernels take float tensors on the CPU that are not empty, got {described}.")
    return x.detach().float().contiguous()
