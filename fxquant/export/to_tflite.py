"""export_tflite: a LiteRT (TensorFlow Lite) file, ``.tflite``, whose operators compute in integers.

    prepared ──freeze──▶ frozen ──to_integer──▶ integer ──to_decomposed──▶ litert_torch.convert ──▶ .tflite

LiteRT's own converter makes integer operators of what stands between ``dequantize`` and ``quantize``. It takes no stored
integers, so a weight goes in as the floats that its integers stand for, rounded to the very same integers in the program.
Inputs and outputs that the model rounds are integers in the file, with their scale and zero point in it: ``TfliteReport``
lists them.

LiteRT's reference kernels requantize in two roundings, as ``target="tflite"`` does, and give every integer. XNNPACK's, which
it takes on processors where it can, round once: a few values in a hundred are one step off.
Source: https://ai.google.dev/edge/litert/models/quantization_spec, https://github.com/google-ai-edge/litert-torch
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from fxquant.errors import ExportError
from fxquant.export.agreement import GOOD_SQNR, OutputAgreement, compare_output, together
from fxquant.export.finding import finding
from fxquant.export.to_executorch import DecomposedModel
from fxquant.export.trace import first_line, quiet
from fxquant.installed import require
from fxquant.nn.decomposed import Rows, StoredPerChannel, StoredPerTensor
from fxquant.nn.qdq import Stored
from fxquant.onnx.files import checked_path, replacing

__all__ = ["TfliteReport", "TfliteTensor", "export_tflite", "tflite_session"]

EXTRA = "litert"
_FLOATS = "DEQUANTIZE"
_CONVERTER, _INTERPRETER = "litert_torch", "ai_edge_litert.interpreter"


@dataclass(frozen=True)
class TfliteTensor:
    """An input or output of the file: ``x = (q - zero_point) * scale`` where it has a scale.

    Attributes:
        name: the model's own name for it.
        shape: its sizes.
        dtype: ``int8``, ``float32`` ...
        scale, zero_point: None where it holds floats, indices or flags.
    """

    name: str
    shape: list[int]
    dtype: str
    scale: float | None
    zero_point: int | None

    def __str__(self) -> str:
        grid = "" if self.scale is None else f" = (q - {self.zero_point}) * {self.scale:.6g}"
        return f"{self.name} {self.shape} {self.dtype}{grid}"


@dataclass
class TfliteReport:
    """What was written, and how it agrees with the integer model.

    Attributes:
        path: the file.
        size: bytes.
        inputs, outputs: what a caller gives and gets.
        operators: how many there are of each kind; ``DEQUANTIZE`` and ``QUANTIZE`` stand where a part computes in float.
        agreement: one entry per output, against the integer model; empty without ``verify``.
        notes: what could not be had.
    """

    path: str
    size: int
    inputs: list[TfliteTensor]
    outputs: list[TfliteTensor]
    operators: dict[str, int]
    agreement: list[OutputAgreement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.operators.items())
        lines = [
            f"{self.path}: {self.size / 1e6:.2f} MB for LiteRT",
            f"  inputs    {'; '.join(map(str, self.inputs))}",
            f"  outputs   {'; '.join(map(str, self.outputs))}",
            f"  operators {counts}",
            *(f"  {own}" for own in self.agreement),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def export_tflite(
    model: nn.Module, path: str | os.PathLike[str], example_inputs: Any = None, *, verify: bool = True
) -> TfliteReport:
    """Write a quantized model as a LiteRT file. Prepare it with ``target="tflite"``.

    Example:
        >>> prepared = fxquant.calibrate(fxquant.prepare(model, images, target="tflite"), loader)
        >>> print(export_tflite(prepared, "model.tflite", images))

    Args:
        model: what ``calibrate``, ``freeze`` or ``convert`` returned, or a trained prepared model; not touched.
        path: the file, ``….tflite``. It is replaced only once everything has succeeded.
        example_inputs: as for ``prepare``; None for noise of the shapes that the model was prepared with. The file's sizes
            are those of the example, its batch too. Numbers and flags among them become constants.
        verify: run the file in LiteRT on the example, and compare with the integer model.

    Raises:
        LevelError, CalibrationError: the model is not ready.
        MissingPackageError: litert-torch is not installed.
        InputError: an argument or the example does not fit.
        ExportError: LiteRT's converter refuses a part of the model.
    """
    target = checked_path(path, ".tflite")
    require(_CONVERTER, "export to LiteRT", EXTRA)
    made = DecomposedModel(model, example_inputs)
    _as_rounded_floats(made.flat)
    content = _converted(made)
    session = tflite_session(content)
    report = TfliteReport(
        path=target,
        size=len(content),
        inputs=session.tensors("input", made.signature.input_names),
        outputs=session.tensors("output", made.signature.output_names),
        operators=session.operators(),
    )
    report.notes.append("every size is the example's, the batch too: LiteRT's interpreter can resize its inputs")
    if _FLOATS in report.operators:
        report.notes.append(
            f"{report.operators[_FLOATS]} tensors become floats in the file ({_FLOATS}): LiteRT has no integer kernel for "
            'what reads them as it stands, or the model was not prepared with target="tflite"'
        )
    if verify:
        _verify(made, session, report)
    with replacing(target) as new, open(new, "wb") as file:
        file.write(content)
    return report


class _RoundedFloats(Stored):
    """A weight as real numbers that are rounded to its integers whenever it is read.

    Args:
        stored: the weight as integers.
    """

    real: Tensor
    zero_points: Tensor

    def __init__(self, stored: StoredPerChannel | StoredPerTensor) -> None:
        super().__init__(stored.integers, stored.scale, stored.axis, stored.bits)
        self.per_channel = isinstance(stored, StoredPerChannel)
        self.register_buffer("real", stored().detach())
        self.low, self.high, self.dtype = stored.low, stored.high, stored.integers.dtype
        if isinstance(stored, StoredPerChannel):
            self.register_buffer("zero_points", stored.zero_points)
        else:
            self.step = stored.step

    def forward(self) -> Tensor:
        ops, bounds = torch.ops.quantized_decomposed, (self.low, self.high, self.dtype)
        if not self.per_channel:
            q = ops.quantize_per_tensor.default(self.real, self.step, 0, *bounds)
            return ops.dequantize_per_tensor.default(q, self.step, 0, *bounds)
        q = ops.quantize_per_channel.default(self.real, self.scale, self.zero_points, self.axis, *bounds)
        return ops.dequantize_per_channel.default(q, self.scale, self.zero_points, self.axis, *bounds)


def _as_rounded_floats(flat: nn.Module) -> None:
    """Have every weight of the decomposed form read as floats that are rounded."""
    for part in list(flat.modules()):
        for name, held in list(part.named_children()):
            if isinstance(held, (StoredPerChannel, StoredPerTensor)):
                setattr(part, name, _RoundedFloats(held))
            elif isinstance(held, Rows):
                raise ExportError(
                    f"{name}: LiteRT's converter takes no table of integers, as an embedding has it.\n"
                    '  what to do: keep it in float, with recipe={"…": None}, or export to ONNX or ExecuTorch.'
                )


def _converted(made: DecomposedModel) -> bytes:
    """The file's bytes."""
    with quiet():
        litert: Any = require(_CONVERTER, "export to LiteRT", EXTRA)
        rules: Any = require(f"{_CONVERTER}.quantize.pt2e_quantizer", "export to LiteRT", EXTRA)
        options: Any = require(f"{_CONVERTER}.quantize.quant_config", "export to LiteRT", EXTRA)
        # The converter asks for a quantizer to know that roundings are to become integer operators; it is not run.
        static = rules.PT2EQuantizer().set_global(rules.get_symmetric_quantization_config(is_per_channel=True))
        try:
            edge = litert.convert(
                made.flat.eval(), tuple(made.inputs), quant_config=options.QuantConfig(pt2e_quantizer=static)
            )
            return bytes(edge.model_content())
        except Exception as error:  # the converter lets through whatever torch.export and MLIR raise
            raise ExportError(
                f"LiteRT's converter refuses the model: {first_line(error)}\n"
                "  what to do: keep the op that it names in float, with a recipe; or export to ONNX or ExecuTorch."
            ) from error


def _in_order(named: dict[str, Any]) -> list[Any]:
    """The details of a signature's tensors in the order of the numbers in which their names end."""
    return [named[name] for name in sorted(named, key=lambda name: int(name.rpartition("_")[2]))]


class tflite_session:  # noqa: N801  as the functions of other runtimes that open one
    """A file in LiteRT's interpreter, as a function from the model's tensors to tensors of real numbers.

    Args:
        content: the file's bytes.
        reference: take LiteRT's reference kernels instead of XNNPACK's.

    Raises:
        MissingPackageError: its interpreter is not installed.
        ExportError: it refuses the file.
    """

    def __init__(self, content: bytes, *, reference: bool = False) -> None:
        with quiet():
            interpreter: Any = require(_INTERPRETER, "a LiteRT file", EXTRA)
            kinds = interpreter.OpResolverType
            kernels = kinds.BUILTIN_REF if reference else kinds.AUTO
            try:
                self._made = interpreter.Interpreter(model_content=content, experimental_op_resolver_type=kernels)
                self._made.allocate_tensors()
            except (RuntimeError, ValueError) as error:
                raise ExportError(f"LiteRT refuses the file: {first_line(error)}") from error
        runner = self._made.get_signature_runner()
        self._given = _in_order(runner.get_input_details())
        self._got = _in_order(runner.get_output_details())

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        for detail, x in zip(self._given, tensors, strict=True):
            self._made.set_tensor(detail["index"], _stored(x, detail))
        self._made.invoke()
        return [_real(self._made.get_tensor(detail["index"]), detail) for detail in self._got]

    def tensors(self, which: str, names: Sequence[str]) -> list[TfliteTensor]:
        """The inputs or outputs, by the model's names."""
        details = self._given if which == "input" else self._got
        found = []
        for name, detail in zip(names, details, strict=True):
            scale, zero_point = detail["quantization"]
            grid = (float(scale), int(zero_point)) if scale else (None, None)
            found.append(TfliteTensor(name, [int(n) for n in detail["shape"]], detail["dtype"].__name__, *grid))
        return found

    def operators(self) -> dict[str, int]:
        """How many operators of each kind the file has."""
        kinds: dict[str, int] = {}
        for own in self._made._get_ops_details():
            if own["op_name"] != "DELEGATE":
                kinds[own["op_name"]] = kinds.get(own["op_name"], 0) + 1
        return kinds


def _stored(x: Tensor, detail: dict[str, Any]) -> Any:
    """``x`` as the file takes it."""
    scale, zero_point = detail["quantization"]
    own = numpy.iinfo(detail["dtype"]) if scale else None
    if own is not None:
        x = torch.round(x.double() / scale + zero_point).clamp(own.min, own.max)
    return x.numpy().astype(detail["dtype"])


def _real(value: Any, detail: dict[str, Any]) -> Tensor:
    scale, zero_point = detail["quantization"]
    made = torch.from_numpy(value.copy())
    return (made.float() - zero_point) * scale if scale else made


def _verify(made: DecomposedModel, session: Callable[[Sequence[Tensor]], list[Tensor]], report: TfliteReport) -> None:
    """Run the file beside the integer model."""
    found, expected = session(made.inputs), made.reference_outputs(made.inputs)
    for name, own, other in zip(made.signature.output_names, found, expected, strict=True):
        report.agreement.append(compare_output(name, own.to(other.dtype), other, None))
    low = together([own.to(other.dtype) for own, other in zip(found, expected, strict=True)], expected)
    if low < GOOD_SQNR:
        outside = _FLOATS if _FLOATS in report.operators else ""
        report.notes.append(str(finding("LiteRT", low, made.integer, made.least_sqnr(), outside=outside)))
