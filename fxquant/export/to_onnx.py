"""export_onnx: an ONNX file whose tensors are quantized by pairs of QuantizeLinear and DequantizeLinear.

    prepared ──freeze──▶ frozen ──to_integer──▶ integer ──to_qdq──▶ QDQ form ──torch.onnx──▶ file

Weights are 8-bit (or 4- or 16-bit) integers and biases 32-bit integers in the file, each behind a DequantizeLinear;
runtimes turn the pattern into integer kernels. Nothing in the file is particular to fxquant.
Source: ONNX operators QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from fxquant.capture.findings import unproven
from fxquant.capture.islands import specializations_of
from fxquant.errors import ExportError, FxquantError, InputError
from fxquant.export.agreement import (
    GOOD_SQNR,
    NodeAgreement,
    OutputAgreement,
    compare_nodes,
    compare_output,
    other_batch,
    together,
)
from fxquant.export.deployment import Deployment
from fxquant.export.finding import finding
from fxquant.export.free_sizes import contradicted_size, fixed_sizes
from fxquant.export.program import emit
from fxquant.export.qdq_model import QdqModel, narrow_weights, needed_bits
from fxquant.export.trace import first_line, has_free_batch, refusal, trace, two_rows
from fxquant.installed import require
from fxquant.onnx.concat_inputs import round_before_joining
from fxquant.onnx.files import Folder, Pair, checked_path, put, serialized
from fxquant.onnx.names import integers_name
from fxquant.runtimes import RUNTIMES
from fxquant.runtimes.onnxruntime import onnxruntime_session
from fxquant.runtimes.runtime import run_session
from fxquant.targets import Target

__all__ = ["ExportReport", "OnnxFile", "deployed", "export_onnx", "make_onnx"]

DYNAMIC = ("auto", "sizes", "batch", "none")
FORMS = ("qdq", "qoperator")
SMALLEST_OPSET, DEFAULT_OPSET, OPSET_OF_NARROW_AND_WIDE = 18, 19, 21
"""The smallest opset that is written; the smallest that ONNX's own reference evaluator reads; that of 4 and 16 bits."""


@dataclass(frozen=True)
class OnnxFile:
    """A file with the model that it was made from.

    Attributes:
        content: its bytes; without the larger tensors where these lie in a file of their own.
        model: what it was made from, with the signature that its tensors have.
        opset: the version of the operator set.
        notes: what could not be had.
        pair: where it lies on disk with those tensors beside it; None where ``content`` is all.
    """

    content: bytes
    model: QdqModel
    opset: int
    notes: tuple[str, ...]
    pair: Pair | None = None

    @property
    def source(self) -> bytes | Pair:
        """What runtimes and checkers read."""
        return self.content if self.pair is None else self.pair

    @property
    def size(self) -> int:
        """Bytes, those of the tensors beside it too."""
        return len(self.content) + (0 if self.pair is None else os.path.getsize(self.pair.data))


@dataclass
class ExportReport:
    """What was written, and how it agrees with the model.

    Attributes:
        path: the file.
        data: the file beside it that holds its tensors; None where it holds them itself.
        size: bytes, of both.
        opset: the version of the operator set.
        inputs, outputs: shapes by name; sizes that are free are names.
        operators: how many nodes of each kind.
        agreement: one entry per output and run; empty without ``verify``.
        nodes: one entry a rounded tensor, with ``verify="nodes"``.
        notes: what could not be had.
    """

    path: str
    size: int
    opset: int
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    operators: dict[str, int]
    agreement: list[OutputAgreement] = field(default_factory=list)
    nodes: list[NodeAgreement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: str | None = None

    def __str__(self) -> str:
        def shapes(named: dict[str, list[int | str]]) -> str:
            return ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in named.items())

        beside = "" if self.data is None else f" and {os.path.basename(self.data)}"
        lines = [
            f"{self.path}{beside}: {self.size / 1e6:.2f} MB, opset {self.opset}, {sum(self.operators.values())} nodes",
            f"  inputs   {shapes(self.inputs)}",
            f"  outputs  {shapes(self.outputs)}",
            *(f"  {own}" for own in (*self.agreement, *self.nodes)),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    form: str = "qdq",
    opset: int | None = None,
    dynamic: str = "auto",
    verify: bool | str = True,
    external_data: bool | None = None,
) -> ExportReport:
    """Write a quantized model as an ONNX file that any runtime can load.

    Example:
        >>> print(fxquant.export_onnx(int8, "int8.onnx", images, verify="nodes"))

    Args:
        model: what ``calibrate``, ``freeze`` or ``convert`` returned, or a trained prepared model; not touched.
        path: the file, ``….onnx``. It is replaced only once everything has succeeded.
        example_inputs: as for ``prepare``; None for noise of the shapes that the model was prepared with. Numbers and
            flags among them become constants of the file.
        form: ``qdq``, pairs of QuantizeLinear and DequantizeLinear around operators on floats, which every runtime here
            turns into integer kernels; or ``qoperator``, the standard's operators on integers (QLinearConv, QLinearMatMul,
            MatMulInteger) where it has them, for runtimes that run a file as it is written. Give TensorRT and OpenVINO
            ``qdq``: one refuses such operators, the other (2026.4) takes a scale per channel for one per input channel.
        opset: version of the operator set, from 18; None for 19, or 21 where integers of 4 or 16 bits need it.
        dynamic: which sizes stay free: ``sizes`` (every axis whose size the model does not fix), ``batch`` (the first
            axis), ``none``, or ``auto``: the most that can be had and for which the file is right, since it cannot
            refuse a size for which the model was not captured.
        verify: run the file in ONNX Runtime on the example, and on one row more where the batch is free, and compare
            with the frozen model (with the integer model where that was given); ``"nodes"`` compares every rounded
            tensor inside too.
        external_data: whether tensors lie in a file of their own, ``….onnx.data`` beside the graph, which has to stay
            there; None for where they have to, since one file ends at 2 GiB. Both are replaced together, or neither.

    Raises:
        LevelError, CalibrationError: the model is not ready.
        MissingPackageError: onnx or onnxscript, or for ``verify`` onnxruntime, is not installed.
        InputError: an argument or the example does not fit.
        ExportError: a part of the model has no ONNX form, the file breaks a rule of the target that the model was
            prepared for, or it cannot be written; says which and why.
    """
    target = checked_path(path)
    if verify not in (True, False, "nodes"):
        raise InputError(f"verify={verify!r} is not known. Choose True, False or 'nodes'.")
    if verify:
        require("onnxruntime", "verify runs the file in ONNX Runtime and", "onnx")
    with contextlib.closing(Folder(os.path.dirname(os.path.abspath(target)))) as folder:
        settings: dict[str, Any] = {"form": form, "opset": opset, "dynamic": dynamic, "external_data": external_data}
        made = make_onnx(model, example_inputs, **settings, at=folder / os.path.basename(target))
        report = _describe(made, target)
        if verify:
            _verify(made, report, every_node=verify == "nodes")
        put(made.content, made.pair, target, folder)
    return report


def make_onnx(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    form: str = "qdq",
    opset: int | None = None,
    dynamic: str = "auto",
    external_data: bool | None = None,
    at: str | None = None,
) -> OnnxFile:
    """The file that ``export_onnx`` writes, in memory: checked, with the shape of every tensor inferred.

    Where its tensors lie in a file of their own, both are on disk: at the path ``at``, or in a temporary folder that is
    removed with what this returns.

    Raises:
        as ``export_onnx``.
    """
    onnx: Any = require("onnx", "export to ONNX", "onnx")
    require("onnxscript", "export to ONNX", "onnx")
    if form not in FORMS:
        raise InputError(f"form={form!r} is not known. Choose one of {', '.join(FORMS)}.")
    if dynamic not in DYNAMIC:
        raise InputError(f"dynamic={dynamic!r} is not known. Choose one of {', '.join(DYNAMIC)}.")
    if external_data not in (None, True, False):
        raise InputError(f"external_data={external_data!r} is not known. Choose None, True or False.")
    qdq = QdqModel(model, example_inputs)
    if form == "qoperator" and not qdq.target.integer_operators:
        raise InputError(
            f"form='qoperator' is nothing for {qdq.target.title}, for which the model was prepared: it refuses or "
            "misreads operators on integers.\n  what to do: leave form out, or prepare for target='onnxruntime'."
        )
    needed = SMALLEST_OPSET if set().union(*needed_bits(qdq.flat)) <= {8, 32} else OPSET_OF_NARROW_AND_WIDE
    if opset is not None and opset < needed:
        raise InputError(
            f"opset={opset} is too old: this model needs {needed}"
            f"{', for integers of 4 or 16 bits' if needed > SMALLEST_OPSET else ''}. Leave opset out, or raise it."
        )
    opset = opset or max(needed, DEFAULT_OPSET)
    program, notes = _emitted(qdq, opset, dynamic, form)
    content, pair = serialized(program, external_data, at)
    made = OnnxFile(content, qdq, opset, notes, pair)
    if external_data and pair is None:
        notes += ("no tensor is large enough to lie in a file of its own",)
    try:
        onnx.checker.check_model(made.source, full_check=True)
    except Exception as error:
        raise ExportError(
            f"what was exported is no valid ONNX: {error}\n  This is a defect; please report it."
        ) from error
    return replace(made, notes=notes + _broken_rules(made.source, qdq.target))


def deployed(model: nn.Module, example_inputs: Any = None, *, dynamic: str = "auto") -> Deployment:
    """``model`` made ready for runtimes once, its file with the sizes free that ``dynamic`` says; see ``export_onnx``."""
    return Deployment(model, example_inputs, partial(make_onnx, dynamic=dynamic))


def _passes_for(target: Target) -> tuple[Callable[[Any], object], ...]:
    """The passes of runtimes over files for models that were prepared for ``target``."""
    own = [step for runtime in RUNTIMES.values() if runtime.target.name == target.name for step in runtime.file_passes]
    joined = () if target.rounds_joined else (round_before_joining,)
    return tuple(dict.fromkeys((*joined, *own)))


def _emitted(qdq: QdqModel, opset: int, dynamic: str, form: str) -> tuple[Any, tuple[str, ...]]:
    """The program with the most free sizes that can be had, and what could not."""
    signature, notes = qdq.signature, list[str]()
    if qdq.written:
        notes.append(
            f"forward writes into {', '.join(qdq.written)}, and a file has no state: each call of it begins with what "
            "was there at export"
        )
    *attempts, last = ("sizes", "batch", "none") if dynamic == "auto" else (dynamic,)
    if dynamic == "auto" and specializations_of(qdq.flat.model):
        held = contradicted_size(qdq.flat, qdq.inputs)
        if held is not None:
            notes.append(f"free sizes could not be had: {held}, and a file cannot refuse other sizes")
            attempts.remove("sizes")

    def attempt(which: str) -> Any:
        try:
            inputs = qdq.inputs if which == "none" else two_rows(qdq.inputs)
            with unproven() as given:
                program = trace(qdq.flat, tuple(inputs), {}, which)
        except FxquantError:
            raise
        except Exception as error:  # torch.export lets through whatever the model's own code raises
            raise refusal(error, qdq.flat.model) from error
        if which != "none" and not has_free_batch(program):
            notes.append("the batch size is the example's: the model's own code, or an operator in it, fixes it")
            if inputs is not qdq.inputs:  # the second row was ours: what is fixed has to be the user's size
                raise ExportError("the batch size cannot be free")
        if given and dynamic == "auto":
            raise ExportError(f"captured: {given[0]}, and a file cannot refuse other sizes")
        notes.extend(fixed_sizes(qdq.flat, qdq.inputs, program, which))
        notes.extend(f"captured: {text}, which nothing in the file checks" for text in given[:1])
        names = signature.input_names, signature.output_names
        return emit(program, opset, *names, narrow_weights(qdq.flat), form, _passes_for(qdq.target))

    for which in attempts:
        try:
            return attempt(which), tuple(notes)
        except FxquantError as error:
            notes.append(f"free {which} could not be had: {first_line(error)}")
    return attempt(last), tuple(notes)


def _broken_rules(file: bytes | Pair, target: Target) -> tuple[str, ...]:
    """Hold a file against the rules of the runtime that it is for: raise if that refuses it, tell what it runs slower."""
    if not target.file_rules:
        return ()
    rules = {name: own.file_rules for name, own in RUNTIMES.items() if own.file_rules is not None}
    if target.file_rules not in rules:
        raise InputError(
            f"target {target.name!r} asks for the rules {target.file_rules!r}, which are not known. "
            f"Choose one of {', '.join(rules)}, or leave file_rules out."
        )
    violations = rules[target.file_rules](file)
    broken = [violation for violation in violations if violation.refused]
    if broken:
        shown = "".join(f"\n    {violation}" for violation in broken[:8])
        more = f"\n    and {len(broken) - 8} more" if len(broken) > 8 else ""
        raise ExportError(
            f"{target.title} would refuse the file:{shown}{more}\n"
            "  what to do: leave to the target what the recipe or your own Target overrides; if neither does, this is a "
            "defect, please report it with the model."
        )
    return tuple(f"{target.title} would run this in float: {violation}" for violation in violations)


def _describe(made: OnnxFile, target: str) -> ExportReport:
    onnx: Any = require("onnx", "export to ONNX", "onnx")
    graph = onnx.load_from_string(made.content).graph
    return ExportReport(
        path=target,
        size=made.size,
        opset=made.opset,
        inputs={value.name: _shape(value) for value in graph.input},
        outputs={value.name: _shape(value) for value in graph.output},
        operators=dict(Counter(node.op_type for node in graph.node)),
        notes=list(made.notes),
        data=None if made.pair is None else f"{target}.data",
    )


def _shape(value: Any) -> list[int | str]:
    sizes = value.type.tensor_type.shape.dim
    return [size.dim_value if size.HasField("dim_value") else size.dim_param or "?" for size in sizes]


def _verify(made: OnnxFile, report: ExportReport, *, every_node: bool) -> None:
    qdq = made.model
    names, scales = qdq.signature.output_names, qdq.output_scales()
    session = onnxruntime_session(made.source)
    free = [bool(shape) and isinstance(shape[0], str) for shape in report.inputs.values()]
    more = other_batch(qdq.inputs, lambda i: i < len(free) and free[i])
    low = math.inf
    for tensors in (qdq.inputs, *([] if more is None else [more])):
        expected, actual = qdq.run(tensors), run_session(session, tensors)
        for name, own, other, scale in zip(names, actual, expected, scales, strict=True):
            report.agreement.append(compare_output(name, own, other, scale))
        low = min(low, together(actual, expected))
    if low < GOOD_SQNR:
        report.notes.append(str(finding("ONNX Runtime", low, qdq.integer, qdq.least_sqnr())))
    if every_node:
        report.nodes = _compare_every_node(made)


def _compare_every_node(made: OnnxFile) -> list[NodeAgreement]:
    onnx: Any = require("onnx", "export to ONNX", "onnx")
    taken: set[str] = set()
    expected = {integers_name(path, taken): q for path, q in made.model.integers(made.model.inputs)}
    proto = onnx.load_from_string(made.content)
    made_integers = [name for node in proto.graph.node for name in node.output]
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    outputs = {value.name for value in proto.graph.output}
    asked = [name for name in made_integers if name in expected and name in known and name not in outputs]
    proto.graph.output.extend(known[name] for name in asked)
    source: Any = proto.SerializeToString()
    if made.pair is not None:  # tensors are looked for beside the graph
        source = f"{made.pair.path}.nodes"
        onnx.save(proto, source)
    session = onnxruntime_session(source)
    results = run_session(session, made.model.inputs)[-len(asked) :] if asked else []
    return compare_nodes(dict(zip(asked, results, strict=True)), expected)
