"""Is any model captured, and does it still compute the same? torchvision's, timm's and transformers' networks.

Each network is prepared for QAT (nothing is folded) from its own code, and with quantizers off compared bit for bit with
the original: at the example, at another batch size, at another image size or length where the original takes one, and in
train mode under a fixed seed, outputs and buffers (BatchNorm statistics). Weights carry a signal to the output
(`zoo_models.randomize`); "signal" is the share of the output that depends on the input, since where it is small, equality
says little. Nothing is downloaded.

- verdict: ``whole`` (one graph), ``islands`` (parts run their author's code), ``refused`` (an error fxquant raises on
  purpose), ``failed`` (any other error, a crash, the time limit) or ``too large`` (not tried);
- MACs: the share of convolutions' and linear layers' multiply-accumulates that run inside fake-quant modules, counted
  while both models run at the example, by watching which ops are dispatched; products of activations (attention
  scores) count apart, under "products";
- capture / forward: seconds of capture over one plain forward of the example; "peak MiB" is what resident memory
  rises to during capture over what it was with the model built. "others" is how many cores other processes took
  meanwhile: a ratio counts only below 0.3, because contention slows a forward on two threads far more than a capture;

torch's fast path of ``nn.MultiheadAttention`` and ``nn.TransformerEncoder`` is switched off for all comparisons: it runs
other kernels that round otherwise.

Peers get the same model and inputs: ``torch.fx.symbolic_trace`` (where it fails, once more with forward's unused
arguments at their defaults), ``prepare_fx`` (it folds BatchNorm, so its bits may differ for that reason alone: the
difference tells), ``torch.export`` with a dynamic batch, and static where that fails.

Every model runs in a worker process with limits of time and memory; a row is appended to a JSON-lines file as it comes,
so that ``--resume`` goes on where a run ended, and ``--merge`` publishes what several shards measured.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import faulthandler
import gc
import inspect
import json
import logging
import os
import queue
import random
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from record import RESULTS, add_output_option, publish, seconds
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from zoo_models import FAMILIES, Case, Entry, Inputs, TooLargeError, build, call, entries, leaves

from fxquant.benchmark.time_limit import OutOfTimeError, time_limit

EXAMPLE_BATCH, OTHER_BATCH = 2, 3
LEAST_SIGNAL = 1e-2
MOST_OTHERS = 0.3  # cores: with both taken by others, a forward has been seen to take 50 times as long
LEAST_MACS = {"detection": 0.90, "optical_flow": 0.90}  # of the other kinds: 0.99
PEERS = ("fx", "prepare_fx", "export")
COMPARISONS = ("example", "batch", "size", "train", "buffers")
Row = dict[str, Any]
Leaves = list[tuple[str, Any]]


# ---- what is measured -----------------------------------------------------------------------------------------------


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
    return all(_equal(*pair) for pair in pairs), max((_difference(*pair) for pair in pairs), default=0.0)


def _equal(own: Any, other: Any) -> bool:
    if not isinstance(own, Tensor) or not isinstance(other, Tensor):
        return type(own) is type(other) and (own == other or own != own)
    if own.shape != other.shape or own.dtype != other.dtype:
        return False
    if not own.is_floating_point():
        return torch.equal(own, other)
    return torch.equal(own.isnan(), other.isnan()) and torch.equal(own.nan_to_num(), other.nan_to_num())


def _difference(own: Any, other: Any) -> float:
    if not isinstance(own, Tensor) or not isinstance(other, Tensor) or not own.numel():
        return 0.0 if _equal(own, other) else float("inf")
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


# ---- one row --------------------------------------------------------------------------------------------------------


class Study:
    """Measures one network stage by stage; ``tell`` gets the row after each, so that a crash leaves the rest."""

    def __init__(self, entry: Entry, options: Row, tell: Callable[[Row], None]) -> None:
        self.entry, self.options, self.tell = entry, options, tell
        self.row: Row = {**asdict(entry), "stage": "build"}
        self.difference = 0.0

    def measure(self) -> Row:
        """All stages; errors are written into the row."""
        row = self.row
        try:
            with time_limit(self.options["limit"]):
                self._own()
        except OutOfTimeError:
            row["note"] = f"{row.get('note', '')} time limit in {row['stage']}".strip()
            row.setdefault("verdict", f"failed: time limit of {self.options['limit']:g} s in {row['stage']}")
        except TooLargeError as error:
            row["verdict"] = f"too large: {error}"
        except Exception as error:
            logging.debug("failed", exc_info=True)
            row.setdefault("verdict", f"failed: {row['stage']}: {told(error)}")
        if self.options["peers"] and hasattr(self, "expected") and self.entry.kind != "quantized":
            self._peers()
        row.pop("stage", None)
        return row

    def _stage(self, name: str) -> None:
        self.row["stage"] = name
        self.tell(self.row)

    def _own(self) -> None:
        self._stage("build")
        largest = self.options["largest"] * 2**30 if self.entry.family == "timm" else float("inf")
        case = self.case = build(self.entry, largest)
        parameters = list(case.model.parameters())
        self.row["parameters M"] = round(sum(parameter.numel() for parameter in parameters) / 1e6, 2)
        self.row["input"] = case.size
        if case.note:
            self.row["note"] = "; ".join(case.note)
        self._stage("forward")
        self._original(case)
        self._stage("capture")
        prepared = self._prepare(case)
        if prepared is None:
            return
        self._stage("coverage")
        self._coverage(case, prepared)
        self._stage("compare")
        self._compare(prepared)
        self._stage("train")
        self._train(case, prepared)

    def _original(self, case: Case) -> None:
        self.inputs: dict[str, Inputs] = {
            "example": case.inputs(EXAMPLE_BATCH, case.size),
            "batch": case.inputs(OTHER_BATCH, case.size),
        }
        if case.other_size is not None:
            self.inputs["size"] = case.inputs(EXAMPLE_BATCH, case.other_size)
        expected = {}
        for what, inputs in self.inputs.items():
            try:
                expected[what] = run(case.model, inputs)
            except Exception as error:
                if what != "size":
                    raise
                logging.debug("the original refuses size %s: %s", case.other_size, error)
        self.start = clocks()
        times: list[float] = []
        while len(times) < 3 and sum(times) < 2:
            start = time.perf_counter()
            run(case.model, self.inputs["example"])
            times.append(time.perf_counter() - start)
        self.row["forward s"] = seconds(min(times))
        self.row["signal"] = spread(expected["batch"], OTHER_BATCH)
        numbers = [value for _, value in expected["example"] if isinstance(value, Tensor)]
        self.row["outputs"] = sum(value.numel() for value in numbers)
        if not all(bool(value.isfinite().all()) for value in numbers):
            self.row["note"] = f"{self.row.get('note', '')} not finite".strip()
        self.expected = expected

    def _prepare(self, case: Case) -> nn.Module | None:
        import fxquant
        from fxquant.capture.capture import capture

        row, example = self.row, self.inputs["example"]
        torch.manual_seed(1)
        if "example_inputs" in inspect.signature(capture).parameters:
            with suppress(Exception), peak_memory(row, "peak MiB"), timed(row, "capture s"):
                capture(case.model, example_inputs=example, for_training=True)
        tensors = (value for value in case.model.state_dict().values() if isinstance(value, Tensor))
        row["model MiB"] = round(sum(tensor.nbytes for tensor in tensors) / 2**20, 1)
        self._stage("prepare")
        try:
            with timed(row, "prepare s"):
                prepared = fxquant.prepare(case.model, example, qat=True)
            row["others"] = others(self.start)
        except fxquant.FxquantError as error:
            row["verdict"] = f"refused: {told(error, 400)}"
            return None
        except Exception as error:
            logging.debug("prepare failed", exc_info=True)
            row["verdict"] = f"failed: {told(error, 400)}"
            return None
        row["verdict"] = "whole"
        with suppress(ImportError):
            self._structure(prepared)
        return prepared

    def _structure(self, prepared: nn.Module) -> None:
        from fxquant.capture.islands import graphs_of, islands_of, specializations_of

        row, islands = self.row, islands_of(prepared)
        if islands:
            row["verdict"] = "islands"
            causes = Counter(" ".join(str(island.cause).split())[:120] for island in islands)
            row["causes"] = [f"{count} × {cause}" for cause, count in causes.most_common(3)]
        row["islands"], row["graphs"] = len(islands), len(graphs_of(prepared))
        row["specializations"] = len(tuple(specializations_of(prepared)))

    def _coverage(self, case: Case, prepared: nn.Module) -> None:
        import fxquant

        row, example = self.row, self.inputs["example"]
        prepared.eval()
        total = count_macs(case.model, example)
        with fxquant.quantizers_off(prepared):
            own = count_macs(prepared, example, prepared=True)
        if total is not None:
            row["GMACs"] = float(f"{total['weights'] / 1e9:.4g}")
        if total is not None and own is not None:
            for kind, name in (("weights", "MACs"), ("products", "products")):
                row[name] = round(own[f"quantized {kind}"] / total[kind], 4) if total[kind] else None
            if own["weights"] != total["weights"]:
                row["MACs of prepared"] = round(own["weights"] / max(total["weights"], 1), 4)
        try:
            share = fxquant.coverage(prepared).macs_share
            row["coverage"] = None if share is None else round(float(getattr(share, "share", share)), 4)
        except Exception as error:
            row["coverage"] = told(error)

    def _compare(self, prepared: nn.Module) -> None:
        import fxquant

        prepared.eval()
        with fxquant.quantizers_off(prepared):
            for what, expected in self.expected.items():
                self._judge(what, lambda what=what: run(prepared, self.inputs[what]), expected)

    def _judge(self, what: str, actual: Callable[[], Leaves], expected: Leaves) -> None:
        try:
            same, difference = same_bits(actual(), expected)
        except Exception as error:
            logging.debug("%s failed", what, exc_info=True)
            self.row[what] = f"error: {told(error, 300)}"
            return
        self.row[what] = same
        if not same:
            self.row["difference"] = max(self.row.get("difference", 0.0), float(f"{difference:.1e}"))

    def _train(self, case: Case, prepared: nn.Module) -> None:
        import fxquant

        inputs = self.inputs["batch"]
        more = case.targets(inputs) if case.targets else ()
        kept = {name: buffer.clone() for name, buffer in case.model.named_buffers()}
        try:
            expected = run(case.model.train(), inputs, more)
        except Exception as error:
            self.row["train note"] = f"the original: {told(error)}"
            return
        finally:
            buffers = {name: buffer.clone() for name, buffer in case.model.named_buffers()}
            _restore(case.model, kept)
        prepared.train()
        with fxquant.quantizers_off(prepared):
            self._judge("train", lambda: run(prepared, inputs, more), expected)
        if buffers and not str(self.row["train"]).startswith("error"):
            own = dict(prepared.named_buffers(remove_duplicate=False))
            common = [name for name in buffers if name in own]
            changed = [name for name in buffers if not _equal(buffers[name], kept[name])]
            if lost := [name for name in changed if name not in own]:
                self.row["buffers"] = f"error: {len(lost)} are missing: {', '.join(lost[:3])}"
            elif common:
                pairs = ([(name, own[name]) for name in common], [(name, buffers[name]) for name in common])
                self._judge("buffers", lambda: pairs[0], pairs[1])

    def _peers(self) -> None:
        calls = {"fx": _symbolic_trace, "prepare_fx": _prepare_fx, "export": _export}
        for name in PEERS:
            self._stage(name)
            peer: Row = {}
            self.row[name] = peer
            self.case.model.eval()
            try:
                with time_limit(self.options["peer_limit"]):
                    self._peer(calls[name], peer)
            except OutOfTimeError:
                peer.setdefault("verdict", "time limit")
            except Exception as error:
                peer.setdefault("verdict", told(error, 120))
            gc.collect()
        torch._dynamo.reset()

    def _peer(self, make: Callable[[nn.Module, Inputs], tuple[nn.Module, str]], peer: Row) -> None:
        with timed(peer, "s"):
            made, verdict = make(self.case.model, self.inputs["example"])
        peer["verdict"] = verdict
        for what in ("example", "batch"):
            try:
                same, difference = same_bits(run(made, self.inputs[what]), self.expected[what], values_only=True)
                peer[what] = same
                if not same:
                    peer["difference"] = max(peer.get("difference", 0.0), float(f"{difference:.1e}"))
            except Exception as error:
                peer[what] = f"error: {told(error, 80)}"


@torch.no_grad()
def _restore(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Eval mode with the buffers as they were."""
    for name, buffer in model.eval().named_buffers():
        if name in buffers and buffer.shape == buffers[name].shape:
            buffer.copy_(buffers[name])


# ---- the peers ------------------------------------------------------------------------------------------------------


def _symbolic_trace(model: nn.Module, example: Inputs) -> tuple[nn.Module, str]:
    try:
        return torch.fx.symbolic_trace(model), "ok"
    except Exception:
        parameters = inspect.signature(model.forward).parameters
        given = set(example) if isinstance(example, dict) else set(list(parameters)[: len(example)])
        unused = {
            name: parameter.default
            for name, parameter in parameters.items()
            if name not in given and parameter.default is not parameter.empty
        }
        if not unused:
            raise
        return torch.fx.symbolic_trace(model, concrete_args=unused), "ok, unused arguments fixed"


def _prepare_fx(model: nn.Module, example: Inputs) -> tuple[nn.Module, str]:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    values = tuple(example.values()) if isinstance(example, dict) else example
    return prepare_fx(copy.deepcopy(model).eval(), get_default_qconfig_mapping("x86"), values), "ok"


def _export(model: nn.Module, example: Inputs) -> tuple[nn.Module, str]:
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    values = list(kwargs.values()) if kwargs else list(args)
    if all(isinstance(value, Tensor) for value in values):
        dynamic = [{0: torch.export.Dim("batch")} for _ in values]
        shapes = dict(zip(kwargs, dynamic, strict=True)) if kwargs else tuple(dynamic)
        with suppress(Exception):
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes).module(), "ok"
    return torch.export.export(model, args, kwargs).module(), "static"


# ---- worker ---------------------------------------------------------------------------------------------------------


def work(options: Row) -> None:
    """Read entries from stdin, write rows to stdout; all that a model prints goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.DEBUG if options["debug"] else logging.CRITICAL, force=True)
    logging.getLogger("torch").setLevel(logging.WARNING)
    faulthandler.enable()
    torch.set_num_threads(options["threads"])
    torch.backends.mha.set_fastpath_enabled(False)
    if options["memory"]:
        bytes_ = int(options["memory"] * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (bytes_, bytes_))
    for line in sys.stdin:
        start = time.perf_counter()
        study = Study(Entry(**json.loads(line)), options, lambda row: print(json.dumps({"row": row}), file=out))
        row = study.measure()
        row["total s"] = seconds(time.perf_counter() - start)
        row["max RSS MiB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        print(json.dumps({"row": row, "done": True}), file=out)
        del study
        gc.collect()


class Worker:
    """A process that measures one model after another; a new one is started after a crash and after ``lives`` models."""

    def __init__(self, options: Row, lives: int) -> None:
        self.options, self.lives = options, lives
        self.process: subprocess.Popen[str] | None = None

    def measure(self, entry: Entry) -> Row:
        """The row of ``entry``, or what of it came before the worker died or was stopped."""
        if self.process is None:
            self._start()
        process, lines = self.process, self.lines
        row: Row = asdict(entry)
        deadline = time.monotonic() + self.options["limit"] + 60
        deadline += len(PEERS) * 2 * self.options["peer_limit"] if self.options["peers"] else 0
        try:
            process.stdin.write(json.dumps(asdict(entry)) + "\n")
            process.stdin.flush()
            while True:
                line = lines.get(timeout=max(deadline - time.monotonic(), 0.01))
                if line is None:
                    raise EOFError
                message = json.loads(line)
                row = message["row"]
                if message.get("done"):
                    break
        except queue.Empty:
            row = self._broken(row, "stopped: it did not answer to the time limit")
        except (EOFError, OSError):
            row = self._broken(row, f"the process died (exit {process.wait(10)})")
        else:
            self.left -= 1
            if self.left <= 0:
                self.stop()
        return row

    def _broken(self, row: Row, what: str) -> Row:
        self.stop()
        stage = row.pop("stage", "start")
        if stage in PEERS:
            row[stage] = {"verdict": what}
        elif "verdict" in row:
            row["note"] = f"{row.get('note', '')} {what} in {stage}".strip()
        else:
            row["verdict"] = f"failed: {what} in {stage}"
        return row

    def _start(self) -> None:
        errors = None if self.options["debug"] else subprocess.DEVNULL
        command = [sys.executable, __file__, "--worker", json.dumps(self.options)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.left = self.lives
        threading.Thread(target=self._read, args=(self.process, self.lines), daemon=True).start()

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


# ---- the whole run --------------------------------------------------------------------------------------------------


def measure_all(chosen: list[Entry], rows_file: Path, args: argparse.Namespace) -> None:
    """Measure ``chosen`` with ``args.jobs`` workers and append each row to ``rows_file``."""
    options = {name: getattr(args, name) for name in ("limit", "peer_limit", "peers", "largest", "memory", "debug")}
    options["threads"] = max(1, (os.cpu_count() or 1) // args.jobs)
    waiting: queue.Queue[Entry] = queue.Queue()
    for entry in chosen:
        waiting.put(entry)
    bar, lock = tqdm(total=len(chosen)), threading.Lock()

    def serve() -> None:
        worker = Worker(options, args.lives)
        try:
            while True:
                try:
                    entry = waiting.get_nowait()
                except queue.Empty:
                    return
                row = worker.measure(entry)
                with lock:
                    with rows_file.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    bar.update()
                    bar.set_description(f"{entry.model}: {row['verdict'][:60]}")
        finally:
            worker.stop()

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(args.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bar.close()


def read_rows(files: list[Path]) -> list[Row]:
    """The rows of ``files``, the last one of each model with the peers that an earlier one tried, in order."""
    found: dict[tuple[str, str, str], Row] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            with suppress(ValueError):
                row = json.loads(line)
                key = row["family"], row["kind"], row["model"]
                earlier = {peer: found[key][peer] for peer in PEERS if peer in found.get(key, ())}
                found[key] = {**earlier, **row}
    order = {family: index for index, family in enumerate(FAMILIES)}
    return [found[key] for key in sorted(found, key=lambda key: (order[key[0]], *key[1:]))]


def flat(row: Row) -> Row:
    """A row without what is empty or follows from the rest, its peers in one cell each."""
    shown = {
        name: value
        for name, value in row.items()
        if value not in (None, [], "") and name not in ("ci", *PEERS, "total s", "outputs", "parameters M", "model MiB")
    }
    if isinstance(row.get("input"), list):
        shown["input"] = "×".join(map(str, row["input"]))
    if row.get("causes"):
        shown["causes"] = "; ".join(row["causes"])
    if row.get("difference") == float("inf"):
        shown["difference"] = "other structure"
    shown["verdict"] = row["verdict"][:160]
    if (ratio := capture_ratio(row)) is not None:
        shown["capture / forward"] = seconds(ratio)
    for name in PEERS:
        if name in row:
            peer = row[name]
            bits = [{True: "same", False: "differs"}.get(peer.get(what), "error") for what in ("example", "batch")]
            made = peer.get("verdict", "").startswith(("ok", "static"))
            shown[name] = peer.get("verdict", "")[:80]
            if made:
                shown[name] = f"{peer['verdict']}: {'/'.join(bits)}, {peer['s']:g} s"
    return shown


def capture_ratio(row: Row) -> float | None:
    """Seconds of capture (of prepare, where capture cannot be timed alone) over one forward, where both were undisturbed."""
    if (row.get("others") or 0) > MOST_OTHERS:
        return None
    took = row.get("capture s", row.get("prepare s"))
    return took / row["forward s"] if took is not None and row.get("forward s") and captured(row) else None


def captured(row: Row) -> bool:
    """Whether a prepared model came out."""
    return row["verdict"] in ("whole", "islands")


def same_everywhere(row: Row) -> bool:
    """Whether all comparisons that could be made found the same bits."""
    found = [row[what] for what in COMPARISONS if row.get(what) is not None]
    return row.get("example") is True and row.get("batch") is True and all(same is True for same in found)


def summarize(rows: list[Row]) -> list[Row]:
    """One line a kind of network."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        name = row["kind"] if row["kind"] == row["family"] else f"{row['family']} {row['kind']}"
        kinds.setdefault(name, []).append(row)
    return [_summary(name, own) for name, own in kinds.items()]


def _summary(name: str, rows: list[Row]) -> Row:
    tried = [row for row in rows if not row["verdict"].startswith("too large")]
    least = LEAST_MACS.get(rows[0]["kind"], 0.99)
    timed = [row for row in rows if capture_ratio(row) is not None]
    ratios = sorted(capture_ratio(row) for row in timed)
    beyond = [row.get("capture s", row.get("prepare s")) - 3 * row["forward s"] for row in timed]
    line = {
        "kind": name,
        "models": len(rows),
        "too large": len(rows) - len(tried),
        "captured": sum(captured(row) for row in rows),
        "whole": sum(row["verdict"] == "whole" for row in rows),
        "refused": sum(row["verdict"].startswith("refused") for row in rows),
        "failed": sum(row["verdict"].startswith("failed") for row in rows),
        "same bits": sum(same_everywhere(row) for row in rows),
        "trained": sum(row.get("train") is not None for row in rows),
        "MACs enough": sum((row.get("MACs") or 0) >= least for row in rows),
        "least MACs": least,
        "weak signal": sum(row.get("signal") is not None and row["signal"] < LEAST_SIGNAL for row in rows),
        "timed alone": len(ratios),
        "capture / forward": seconds(statistics.median(ratios)) if ratios else None,
        "beyond 3 forwards s": seconds(statistics.median(beyond)) if beyond else None,
        "90 %": seconds(ratios[min(len(ratios) - 1, int(0.9 * len(ratios)))]) if ratios else None,
    }
    for peer in PEERS:
        own = [row[peer] for row in rows if peer in row]
        made = [one for one in own if one.get("verdict", "").startswith(("ok", "static"))]
        if own:
            line[peer] = len(made)
            line[f"{peer} same"] = sum(one.get("example") is True and one.get("batch") is True for one in made)
            line[f"{peer} s"] = seconds(statistics.median(one["s"] for one in made)) if made else None
    return line


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="some of torchvision,timm,transformers")
    parser.add_argument("--models", nargs="+", default=["*"], metavar="GLOB", help="names, * and ? allowed")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="classification, detection, video, …")
    parser.add_argument("--timm", choices=("families", "all"), default="families", help="one a file, or all of them")
    parser.add_argument("--ci", action="store_true", help="the small set only")
    parser.add_argument("--list", action="store_true", help="say what would run")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="the I-th of N parts, counted from 1")
    parser.add_argument("--jobs", type=int, default=1, help="workers at a time (default 1); timings need 1")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--limit", type=float, default=300, help="seconds for a model (default 300)")
    parser.add_argument("--peer-limit", type=float, default=60, help="seconds for each peer (default 60)")
    parser.add_argument("--largest", type=float, default=1.5, help="GiB of parameters of a timm model (default 1.5)")
    parser.add_argument("--memory", type=float, default=14, help="GiB a worker may allocate, 0: any (default 14)")
    parser.add_argument("--lives", type=int, default=20, help="models that one worker measures (default 20)")
    parser.add_argument("--resume", action="store_true", help="keep the rows there are and measure the others")
    parser.add_argument("--retry", action="store_true", help="with --resume: measure failed rows again")
    parser.add_argument("--rows", type=Path, help="the JSON-lines file (default: results/capture_zoo.jsonl)")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="JSONL", help="measure nothing; publish these rows")
    parser.add_argument("--debug", action="store_true", help="show the workers' errors with their tracebacks")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    add_output_option(parser, "capture_zoo")
    args = parser.parse_args()
    args.families = args.families.split(",")
    if unknown := set(args.families) - set(FAMILIES):
        parser.error(f"--families: {', '.join(sorted(unknown))} is none of {', '.join(FAMILIES)}")
    try:
        index, parts = (int(part) for part in args.shard.split("/"))
    except ValueError:
        parser.error("--shard takes I/N")
    if not 1 <= index <= parts:
        parser.error("--shard takes I/N with I from 1 to N")
    args.part = (index - 1, parts)
    return args


def choose(args: argparse.Namespace) -> list[Entry]:
    """The networks of this run, in the order of `entries`."""
    chosen = entries(args.families, args.models, args.timm)
    chosen = [entry for entry in chosen if (entry.ci or not args.ci) and (not args.kinds or entry.kind in args.kinds)]
    if not chosen:
        raise SystemExit("no network matches; --list with fewer options says which there are")
    index, parts = args.part
    return chosen[index::parts]


def main() -> None:
    """Measure every chosen network and publish the table and its summary."""
    args = options()
    if args.worker:
        work(json.loads(args.worker))
        return
    if args.merge:
        finish(read_rows(args.merge), args)
        return
    chosen = choose(args)
    if args.list:
        print("\n".join(f"{entry.family} {entry.kind} {entry.model}{' ci' if entry.ci else ''}" for entry in chosen))
        return
    index, parts = args.part
    shard = "" if parts == 1 else f".{index + 1}of{parts}"
    rows_file = args.rows or RESULTS / f"capture_zoo{shard}.jsonl"
    rows_file.parent.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        rows_file.unlink(missing_ok=True)
    there = {(row["family"], row["kind"], row["model"]) for row in read_rows([rows_file])
             if not (args.retry and row["verdict"].startswith("failed"))}  # fmt: skip
    measure_all([entry for entry in chosen if (entry.family, entry.kind, entry.model) not in there], rows_file, args)
    wanted = {(entry.family, entry.kind, entry.model) for entry in chosen}
    finish([row for row in read_rows([rows_file]) if (row["family"], row["kind"], row["model"]) in wanted], args)


def finish(rows: list[Row], args: argparse.Namespace) -> None:
    """Print and write the rows and the summary."""
    summary = summarize(rows)
    hidden = ("part", "worker", "rows", "merge", "list", "resume", "retry", "debug")
    shown = argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in hidden})
    publish([flat(row) for row in rows], shown, summary=summary)
    print("\n" + tabulate(summary, headers="keys", missingval="–"))


if __name__ == "__main__":
    main()
