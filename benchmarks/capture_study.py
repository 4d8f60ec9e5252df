"""One row of `capture_zoo.py`: a network captured, compared and timed, and what the peers make of it."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

import torch
from capture_measures import (
    Leaves,
    Row,
    clocks,
    count_macs,
    equal,
    others,
    peak_memory,
    run,
    same_bits,
    spread,
    timed,
    told,
)
from record import seconds
from torch import Tensor, nn
from zoo_cases import Case, Entry, Inputs, TooLargeError
from zoo_models import build

from fxquant.benchmark.time_limit import OutOfTimeError, time_limit

EXAMPLE_BATCH, OTHER_BATCH = 2, 3
PEERS = ("fx", "prepare_fx", "export")
COMPARISONS = ("example", "batch", "size", "train", "buffers")


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
            changed = [name for name in buffers if not equal(buffers[name], kept[name])]
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
