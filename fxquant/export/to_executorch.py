"""export_executorch: an ExecuTorch program (``.pte``) that computes in XNNPACK's integer kernels.

    prepared ──freeze──▶ frozen ──to_integer──▶ integer ──to_decomposed──▶ torch.export ──▶ XNNPACK's delegates ──▶ .pte

What XNNPACK does not take runs in ExecuTorch's portable kernels between the delegates. A weight whose layer is among that
is written as the floats that its integers stand for: ExecuTorch 1.5 reads integers with one scale per channel wrongly
there (measured without fxquant too: 0 dB).

XNNPACK multiplies a sum with its scale in float32 and rounds that product: of 2^17 values one, next to the middle of two
integers, may go to the other one than fxquant's (of a residual sum's, one in 20,000). It rounds a float that enters by a
product with the reciprocal of the scale, where fxquant divides: half way between two integers, as averages of few pixels
often are, the two may differ. ``ExecutorchReport.agreement`` counts what comes of it: in a deep network one such integer
moves others in every layer behind it (one in resnet18's first convolution, random weights: 15 % of its logits by a step).
Source: https://docs.pytorch.org/executorch/stable/backends-xnnpack.html
"""

from __future__ import annotations

import contextlib
import copy
import math
import operator
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.capture.calls import Call
from fxquant.capture.islands import graphs_of, map_graphs
from fxquant.capture.values import unchanged
from fxquant.errors import ExportError, FxquantError, InputError
from fxquant.export.agreement import GOOD_SQNR, compare_output, other_batch, together
from fxquant.export.deployment import example_call, integer_model
from fxquant.export.executorch_report import ExecutorchReport
from fxquant.export.finding import finding
from fxquant.export.free_sizes import is_fixed
from fxquant.export.signature import FlatModel, Signature
from fxquant.export.tolerance import exact_outputs, least_sqnr
from fxquant.export.trace import first_line, has_free_batch, quiet, refusal, trace, two_rows
from fxquant.installed import require
from fxquant.kernels.runner import use_kernels
from fxquant.nn.decomposed import StoredPerChannel
from fxquant.nn.integer import IntegerOp
from fxquant.onnx.files import checked_path, replacing
from fxquant.passes.levels import check
from fxquant.passes.to_decomposed import to_decomposed

__all__ = ["DecomposedModel", "ExecutorchReport", "executorch_session", "export_executorch"]

DYNAMIC = ("batch", "none")
_MOVING = ("view", "sym_size", "alloc", "_to_dim_order_copy")
"""What stands between delegates and computes nothing: views, memory, copies to another layout."""
_ROUNDS_OTHERWISE = (
    "XNNPACK rounds in float32, so that a value next to the middle of two integers can go to the other one, and what reads "
    "it with it"
)
_READS_WEIGHT = "dequantize_per_channel"


def export_executorch(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    dynamic: str = "batch",
    largest_batch: int = 64,
    verify: bool = True,
) -> ExecutorchReport:
    """Write a quantized model as an ExecuTorch program for XNNPACK. Prepare it with ``target="xnnpack"``.

    Example:
        >>> prepared = fxquant.calibrate(fxquant.prepare(model, images, target="xnnpack"), loader)
        >>> print(export_executorch(prepared, "model.pte", images))

    Args:
        model: what ``calibrate``, ``freeze`` or ``convert`` returned, or a trained prepared model; not touched.
        path: the file, ``….pte``. It is replaced only once everything has succeeded.
        example_inputs: as for ``prepare``; None for noise of the shapes that the model was prepared with. Numbers and
            flags among them become constants of the program; its inputs are the call's tensors in order, its outputs the
            result's.
        dynamic: ``batch``, the first axis is free; or ``none``, every size is the example's.
        largest_batch: the most rows that the program is to take. ExecuTorch plans memory for inputs and outputs of that
            size, so choose it small for large images on small devices.
        verify: run the program in ExecuTorch on the example, and on one row more where the batch is free, and compare
            with the integer model.

    Raises:
        LevelError, CalibrationError: the model is not ready.
        MissingPackageError: executorch is not installed.
        InputError: an argument or the example does not fit.
        ExportError: torch.export cannot follow a part of the model, ExecuTorch refuses it, or it cannot be written.
    """
    target = checked_path(path, ".pte")
    if dynamic not in DYNAMIC:
        raise InputError(f"dynamic={dynamic!r} is not known. Choose one of {', '.join(DYNAMIC)}.")
    if isinstance(largest_batch, bool) or not isinstance(largest_batch, int) or largest_batch < 2:
        raise InputError(
            f"largest_batch={largest_batch!r}: give a whole number of at least 2, or dynamic='none' for one size only."
        )
    require("executorch", "export to ExecuTorch", "executorch")
    made = DecomposedModel(model, example_inputs)
    with unchanged(made.flat):  # ExecuTorch's passes run it, and forward may write to its buffers
        lowered, report = _made(made, target, dynamic, largest_batch, verify)
    with replacing(target) as new, open(new, "wb") as file:
        file.write(lowered.content)
    return report


def _made(
    made: DecomposedModel, target: str, dynamic: str, largest_batch: int, verify: bool
) -> tuple[Any, ExecutorchReport]:
    """The program and its report."""
    rows = max(largest_batch, *(_rows(x) for x in made.inputs))
    lowered = _lowered(made, dynamic, rows)
    report = lowered.report(target)
    if verify:
        try:
            _verify(lowered, report)
        except _CannotRunError as error:
            lowered = _lowered(made, dynamic, rows, one_by_one=True)
            report = lowered.report(target)
            report.notes.append(f"each operator is a delegate of its own, which is slower: joined, {first_line(error)}")
            _verify(lowered, report)
    return lowered, report


class _CannotRunError(ExportError):
    """ExecuTorch made a program that it cannot run."""


class DecomposedModel:
    """A model in decomposed form between tensors, and the integer model that its numbers are held against."""

    def __init__(self, model: Any, example_inputs: Any) -> None:
        integer = integer_model(model).eval()
        form = map_graphs(integer, lambda graph: check(to_decomposed(graph, signed=True), by="to_decomposed")).eval()
        call: Call = example_call(model, example_inputs)
        self.integer, self._call = integer, call
        self.signature = Signature(form, call)
        self.flat = FlatModel(form, self.signature)
        self.reference = FlatModel(_by_the_reference(integer), self.signature)
        self.inputs = self.signature.tensors(call.args, call.kwargs)
        self.floats: list[str] = []
        self.reference_outputs(self.inputs)  # which names the outputs

    @torch.no_grad()
    def reference_outputs(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The integer model's outputs, by the exact reference."""
        with unchanged(self.reference, but=IntegerOp):
            outputs: tuple[Tensor, ...] = self.reference(*(x.clone() for x in tensors))
        return outputs

    def least_sqnr(self) -> float:
        """Decibels to which a runtime has to agree on the example; see ``tolerance``."""
        return least_sqnr(self.integer, self._call, exact_outputs(self.integer, self._call))

    def as_floats(self, names: set[str]) -> None:
        """Hold the weights whose integers have one of these ``names`` as floats."""
        for path, part in list(self.flat.named_modules()):
            for name, weight in list(part.named_children()):
                if isinstance(weight, StoredPerChannel) and f"{path}.{name}.integers" in names:
                    self.floats.append(path.removeprefix("model."))
                    delattr(part, name)
                    part.register_buffer(name, weight().detach())


def _by_the_reference(integer: Any) -> Any:
    """A copy of an integer model that the exact reference computes."""
    made = copy.deepcopy(integer).eval()
    for graph in graphs_of(made).values():
        use_kernels(graph, "reference")
    return made


@dataclass
class _Lowered:
    made: DecomposedModel
    content: bytes
    graph: Any
    largest_batch: int
    is_free: list[bool]
    notes: list[str]

    def report(self, path: str) -> ExecutorchReport:
        delegates = [part for name, part in self.graph.named_children() if hasattr(part, "original_module")]
        inside = Counter(kind for part in delegates for kind in _kinds(part.original_module.graph))
        signature = self.made.signature
        with torch.no_grad():
            outputs = self.made.flat(*(x.clone() for x in self.made.inputs))
        rows = {_rows(x) for x, free in zip(self.made.inputs, self.is_free, strict=True) if free}
        named_inputs = zip(signature.input_names, self.made.inputs, self.is_free, strict=True)
        return ExecutorchReport(
            path=path,
            size=len(self.content),
            inputs={name: _shape(x, free) for name, x, free in named_inputs},
            outputs={
                name: _shape(y, bool(y.ndim) and y.shape[0] in rows)
                for name, y in zip(signature.output_names, outputs, strict=True)
            },
            largest_batch=self.largest_batch,
            delegates=len(delegates),
            delegated=dict(inside),
            outside=dict(Counter(_kinds(self.graph.graph))),
            notes=list(self.notes),
        )


def _lowered(made: DecomposedModel, dynamic: str, largest_batch: int, *, one_by_one: bool = False) -> _Lowered:
    """The program with a free batch where that can be had, and no weight outside of the delegates that is read wrongly.

    ``one_by_one`` makes each operator a delegate of its own: ExecuTorch 1.5 makes programs of larger ones that it cannot
    run where one of them also reads what was computed outside.
    """
    notes: list[str] = []
    if dynamic == "batch":
        try:
            return _lowered_for(made, "batch", largest_batch, notes, one_by_one)
        except FxquantError as error:
            notes = [f"a free batch could not be had: {first_line(error)}"]
    return _lowered_for(made, "none", largest_batch, notes, one_by_one)


def _lowered_for(made: DecomposedModel, which: str, largest_batch: int, notes: list[str], one_by_one: bool) -> _Lowered:
    program = _traced(made, which, largest_batch)
    edge = _edge(program, one_by_one)
    outside = _weights_outside(edge.exported_program())
    if outside:
        made.as_floats(outside)
        edge = _edge(_traced(made, which, largest_batch), one_by_one)
    lowered = edge.exported_program()
    with _no_choice_by_batch_size():
        try:
            content = bytes(edge.to_executorch().buffer)
        except Exception as error:
            raise ExportError(f"ExecuTorch refuses the program: {first_line(error)}") from error
    if made.floats:
        notes.append(
            f"{', '.join(made.floats)}: XNNPACK has no integer kernel for it as it stands, so it computes in float; "
            'prepare with target="xnnpack" rounds results where they leave the model'
        )
    free = [which == "batch" and bool(x.ndim) and not is_fixed(s) for x, s in _first_sizes(made, program)]
    if which == "batch" and not any(free):
        notes.append("the batch size is the example's: the model's own code, or an operator in it, fixes it")
    return _Lowered(
        made, content, lowered.graph_module, largest_batch if any(free) else _rows(made.inputs[0]), free, notes
    )


def _traced(made: DecomposedModel, which: str, largest_batch: int) -> torch.export.ExportedProgram:
    inputs = made.inputs if which == "none" else two_rows(made.inputs)
    try:
        with _no_choice_by_batch_size():
            program = trace(made.flat, tuple(inputs), {}, which, largest_batch=largest_batch)
    except FxquantError:
        raise
    except Exception as error:  # torch.export lets through whatever the model's own code raises
        raise refusal(error, made.flat.model) from error
    if which != "none" and not has_free_batch(program) and inputs is not made.inputs:
        raise ExportError("the batch size cannot be free")  # the second row was ours
    return program


def _edge(program: torch.export.ExportedProgram, one_by_one: bool) -> Any:
    """``program`` with what XNNPACK takes in delegates."""
    exir, partition = _part("exir"), _part("backends.xnnpack.partition.xnnpack_partitioner")
    with _no_choice_by_batch_size():
        try:
            return exir.to_edge_transform_and_lower(
                program, partitioner=[partition.XnnpackPartitioner(per_op_mode=one_by_one)]
            )
        except Exception as error:
            raise ExportError(f"ExecuTorch refuses the program: {first_line(error)}") from error


def _part(name: str) -> Any:
    """A module of ExecuTorch; importing it warns of what it uses itself."""
    with quiet():
        return require(f"executorch.{name}", "an ExecuTorch program", "executorch")


@contextlib.contextmanager
def _no_choice_by_batch_size() -> Iterator[None]:
    """Without torch's own CPU libraries for convolutions, between which it chooses by the batch size.

    While a program is traced that choice is a condition on the free batch (below 16 rows, for one thread), and ExecuTorch
    plans memory for no more rows than it allows. No convolution is computed here that a result depends on.
    """
    with quiet(), torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        yield


def _weights_outside(program: torch.export.ExportedProgram) -> set[str]:
    """The names of the integers that are read outside of the delegates with one scale per channel."""
    signature = program.graph_signature
    held = {
        **signature.inputs_to_buffers,
        **signature.inputs_to_parameters,
        **signature.inputs_to_lifted_tensor_constants,
    }
    reads = [node for node in program.graph.nodes if _READS_WEIGHT in str(node.target) and node.op == "call_function"]
    return {held[node.args[0].name] for node in reads if node.args[0].name in held}


def _kinds(graph: Any) -> Iterator[str]:
    """What each operator of a graph is called, but for roundings and what computes nothing."""
    for node in graph.nodes:
        name = str(getattr(node.target, "__name__", node.target)).split(".")
        kind = next((part for part in name if part not in ("aten", "edge", "quantized_decomposed")), name[0])
        hidden = "quantize_per" in str(node.target) or "call_delegate" in str(node.target)
        if node.op == "call_function" and node.target is not operator.getitem and not hidden and kind not in _MOVING:
            yield kind


def _first_sizes(made: DecomposedModel, program: torch.export.ExportedProgram) -> Iterator[tuple[Tensor, Any]]:
    named = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    for x, name in zip(made.inputs, program.graph_signature.user_inputs, strict=True):
        value = named.get(str(name))
        yield x, value.shape[0] if isinstance(value, Tensor) and value.ndim else 0


def _rows(x: Tensor) -> int:
    return int(x.shape[0]) if x.ndim else 1


def _shape(x: Tensor, is_free: bool) -> list[int | str]:
    return ["batch", *x.shape[1:]] if is_free else list(x.shape)


def executorch_session(content: bytes) -> Any:
    """A program in ExecuTorch's runtime, as a function from tensors to tensors.

    Raises:
        MissingPackageError: executorch is not installed.
        ExportError: its runtime refuses the program.
    """
    runtime, _ = _part("runtime"), _part("kernels.quantized")  # the second registers roundings outside of XNNPACK
    with quiet():
        try:
            program = runtime.Runtime.get().load_program(content, verification=runtime.Verification.Minimal)
            method = program.load_method("forward")
        except Exception as error:
            raise ExportError(f"ExecuTorch refuses the program: {first_line(error)}") from error
    return partial(_run, program, method)


def _run(program: Any, method: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of one call; ``program`` has to live as long as its method."""
    try:
        return [y.clone() for y in method.execute([x.detach().contiguous() for x in tensors])]
    except RuntimeError as error:
        shapes = ", ".join(str(list(x.shape)) for x in tensors)
        raise InputError(
            f"ExecuTorch refuses inputs of shapes {shapes}: {first_line(error)}\n"
            "  what to do: give no more rows than largest_batch was when it was written, and sizes as in its report."
        ) from error


def _verify(lowered: _Lowered, report: ExecutorchReport) -> None:
    """Run the program beside the integer model; loaded anew each time, since it may keep state from call to call."""
    made = lowered.made
    names, low = made.signature.output_names, math.inf
    free = lowered.is_free
    more = other_batch(made.inputs, lambda i: free[i])
    if more is not None and max(map(_rows, more)) > lowered.largest_batch:
        more = None
    for tensors in (made.inputs, *([] if more is None else [more])):
        try:
            found = executorch_session(lowered.content)(tensors)
        except InputError as error:
            raise _CannotRunError(
                f"ExecuTorch cannot run the program that it made: {first_line(error)}\n"
                "  what to do: dynamic='none'; or export the parts of the model one by one to find the one that it refuses."
            ) from error
        expected = made.reference_outputs(tensors)
        for name, own, other in zip(names, found, expected, strict=True):
            if own.shape != other.shape:
                raise ExportError(
                    f"ExecuTorch gives {name} in the shape {list(own.shape)} and the integer model in {list(other.shape)}: "
                    "the program is not written.\n  what to do: dynamic='none', and please report it with the model."
                )
            report.agreement.append(compare_output(name, own, other, None))
        low = min(low, together(found, expected))
    outside = ", ".join(report.outside)
    if low < GOOD_SQNR:
        report.notes.append(str(finding("ExecuTorch", low, made.integer, made.least_sqnr(), outside=outside)))
        return
    apart = [own for own in report.agreement if own.equal < 1.0]
    if apart:
        worst = min(apart, key=lambda own: own.sqnr)
        report.notes.append(
            f"{worst.name} is not the integer model's to the bit ({worst.sqnr:.1f} dB): "
            + (f"{outside} computes outside of XNNPACK" if outside else _ROUNDS_OTHERWISE)
        )
