"""export_onnx: an ONNX file whose tensors are quantized by pairs of QuantizeLinear and DequantizeLinear.

    prepared ──freeze──▶ frozen ──to_integer──▶ integer ──to_qdq──▶ QDQ form ──torch.onnx──▶ file

Weights are 8-bit (or 4- or 16-bit) integers and biases 32-bit integers in the file, each behind a DequantizeLinear;
runtimes turn the pattern into integer kernels. Nothing in the file is particular to fxquant.
Source: ONNX operators QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from fxquant.capture.findings import unproven
from fxquant.capture.islands import specializations_of
from fxquant.errors import ExportError, FxquantError, InputError
from fxquant.export.deployment import Deployment
from fxquant.export.free_sizes import contradicted_size, fixed_sizes
from fxquant.export.onnx_file import ExportReport, OnnxFile, described, hold_against_model
from fxquant.export.program import emit
from fxquant.export.qdq_model import QdqModel, narrow_weights, needed_bits
from fxquant.export.trace import first_line, has_free_batch, refusal, trace, two_rows
from fxquant.installed import require
from fxquant.onnx.concat_inputs import round_before_joining
from fxquant.onnx.files import Folder, Pair, checked_path, put, serialized
from fxquant.runtimes import RUNTIMES
from fxquant.targets import Target

__all__ = ["ExportReport", "OnnxFile", "deployed", "export_onnx", "make_onnx"]

DYNAMIC = ("auto", "sizes", "batch", "none")
FORMS = ("qdq", "qoperator")
SMALLEST_OPSET, DEFAULT_OPSET, OPSET_OF_NARROW_AND_WIDE = 18, 19, 21
"""The smallest opset that is written; the smallest that ONNX's own reference evaluator reads; that of 4 and 16 bits."""


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
        report = described(made, target)
        if verify:
            hold_against_model(made, report, every_node=verify == "nodes")
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
