"""What `capture_zoo.py` measures of a model: its outputs bit for bit, its MACs, memory and time."""

from __future__ import annotations

import copy
import ctypes
import gc
import logging
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import seconds
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from zoo_cases import Inputs, call, leaves

Row = dict[str, Any]
Leaves = list[tuple[str, Any]]


def run(model: nn.Module, inputs: Inputs, more: tuple[Any, ...] = ()) -> Leaves:
    """Everything ``model`` returns on a copy of ``inputs``, under fixed seeds, without gradients."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    with torch.no_grad():
        output = call(model, copy.deepcopy(inputs), copy.deepcopy(more))
    return [(path, value.clone() if isinstance(value, Tensor) else value) for path, value in leaves(output)]


def same_bits(actual: Leaves, expected: Leaves, *, values_only: bool = False) -> tuple[bool, float]:
    """Whether two outputs are equal bit for bit (and in structure), and their largest relative difference."""
    if values_only:
        actual, expected = ([(" ", v) for _, v in own if isinstance(v, Tensor)] for own in (actual, expected))
    if [path for path, _ in actual] != [path for path, _ in expected]:
        return False, float("inf")
    pairs = [(own, other) for (_, own), (_, other) in zip(actual, expected, strict=True)]
    return all(equal(*pair) for pair in pairs), max((_difference(*pair) for pair in pairs), default=0.0)


def equal(own: Any, other: Any) -> bool:
    if not isinstance(own, Tensor) or not isinstance(other, Tensor):
        return type(own) is type(other) and (own == other or own != own)
    if own.shape != other.shape or own.dtype != other.dtype:
        return False
    if not own.is_floating_point():
        return torch.equal(own, other)
    return torch.equal(own.isnan(), other.isnan()) and torch.equal(own.nan_to_num(), other.nan_to_num())


def _difference(own: Any, other: Any) -> float:
    if not isinstance(own, Tensor) or not isinstance(other, Tensor) or not own.numel():
        return 0.0 if equal(own, other) else float("inf")
    if own.shape != other.shape:
        return float("inf")
    own, other = own.double(), other.double()
    return float((own - other).abs().max() / other.abs().max().clamp(min=1e-30))


def spread(output: Leaves, batch: int) -> float | None:
    """How much of the first output depends on the input: its largest spread over the batch over its largest value."""
    for _, value in output:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 and len(value) == batch:
            return round(float((value.amax(0) - value.amin(0)).max() / value.abs().max()), 3) if value.numel() else 0.0
    return None


class Macs(TorchDispatchMode):
    """Counts multiply-accumulates of weights and of activations, and of both inside modules of ``watched`` classes.

    Run it in inference mode: there ``aten::linear`` arrives whole. A product is a weight's where an operand's memory is a
    parameter's of ``model``, or where it runs inside a weighted fake-quant module.
    """

    def __init__(self, model: nn.Module, weighted: tuple[type, ...] = (), any_op: tuple[type, ...] = ()) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._watched = {"weighted": weighted, "any": any_op}
        self._open: Counter[str] = Counter()
        self._handles: list[Any] = []

    def __enter__(self) -> Macs:
        if not self._handles:
            self._handles = [
                hooks.register_module_forward_pre_hook(lambda module, args: self._step(module, 1)),
                hooks.register_module_forward_hook(lambda module, args, y: self._step(module, -1), always_call=True),
            ]
        return super().__enter__()

    def remove(self) -> None:
        """Take off the hooks."""
        for handle in self._handles:
            handle.remove()

    def _step(self, module: nn.Module, by: int) -> None:
        for name, classes in self._watched.items():
            if classes and isinstance(module, classes):
                self._open[name] += by

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        counted = "conv" in name or name in _PRODUCTS or "scaled_dot_product" in name
        if not counted and func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if counted:
            self._count(name, args, result)
        return result

    def _count(self, name: str, args: Any, result: Any) -> None:
        y = result[0] if isinstance(result, (tuple, list)) else result
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        inside = self._open["weighted"] > 0
        if "conv" in name:
            if len(tensors) < 2 or tensors[1].ndim < 3:
                return
            transposed = "transpose" in name or (name in ("convolution", "_convolution") and args[6])
            macs = (tensors[0] if transposed else y).numel() * tensors[1][0].numel()
            kind = "weights"
        elif "scaled_dot_product" in name:
            q, k, v = tensors[:3]
            macs, kind = q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]), "products"
        else:
            operands = tensors[-2:] if name in ("addmm", "baddbmm", "addmv") else tensors[:2]
            macs = y.numel() * operands[0].shape[-1]
            weight = inside or any(operand.untyped_storage().data_ptr() in self._weights for operand in operands)
            kind = "weights" if name == "linear" or weight else "products"
        self.counts[kind] += macs
        if inside if kind == "weights" else self._open["any"] > 0:
            self.counts[f"quantized {kind}"] += macs


_PRODUCTS = frozenset({"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv"})


def count_macs(model: nn.Module, inputs: Inputs, *, prepared: bool = False) -> Counter[str] | None:
    """The MACs of one run of ``model``; None where it does not run while it is watched."""
    from fxquant.nn import modules as quant

    classes = ((quant.QuantWeighted, quant.QuantWeightedOp), (quant.QuantOp,)) if prepared else ((), ())
    for context in (torch.inference_mode, torch.no_grad):
        counter = Macs(model, *classes)
        try:
            with context(), counter:
                call(model, copy.deepcopy(inputs))
            return counter.counts
        except Exception:
            logging.debug("not counted", exc_info=True)
        finally:
            counter.remove()
    return None


def resident(field: str) -> float:
    """``VmRSS`` or ``VmHWM`` (its peak) of this process in MiB."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


@contextmanager
def peak_memory(row: Row, name: str) -> Iterator[None]:
    """Write into ``row[name]`` the MiB that resident memory rises by, at its peak, while the block runs."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew from what is used now
        before = resident("VmRSS")
    except OSError:
        before = None
    yield
    if before is not None:
        row[name] = round(resident("VmHWM") - before, 1)


def clocks() -> tuple[float, float, float] | None:
    """Seconds on the wall, seconds that all cores computed, and seconds that this process did; None off Linux."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for a disk
    return time.perf_counter(), busy, time.process_time()


def others(start: tuple[float, float, float] | None) -> float | None:
    """How many cores other processes kept busy since ``start``, a result of `clocks`."""
    end = clocks()
    if start is None or end is None:
        return None
    wall, busy, own = (after - before for before, after in zip(start, end, strict=True))
    return round(max(busy - own, 0) / wall, 2)


@contextmanager
def timed(row: Row, name: str) -> Iterator[None]:
    """Write into ``row[name]`` the seconds that the block takes."""
    start = time.perf_counter()
    yield
    row[name] = seconds(time.perf_counter() - start)


def told(error: BaseException, width: int = 160) -> str:
    """An error in one line; files by their place in their package."""
    text = re.sub(r"\S*/site-packages/", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:width]
