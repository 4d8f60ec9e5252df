"""From a model in QDQ form to an ONNX program in memory, through torch's own exporter.

The exporter knows every float op and follows islands; our quantize and dequantize operators are told to it here. What it
leaves behind (traces of source lines, duplicate constants, 4-bit integers in 8-bit tensors) is put right afterwards.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxquant.errors import ExportError
from fxquant.export.trace import quiet
from fxquant.onnx.batch_axis import copy_batch_size, count_rows
from fxquant.onnx.default_attributes import drop_copies, drop_defaults, drop_zero_points
from fxquant.onnx.integer_moves import move_integers
from fxquant.onnx.names import name_axes, name_operators, name_tensors
from fxquant.onnx.per_head_scales import spread_over_rows
from fxquant.onnx.qoperators import to_qoperators
from fxquant.onnx.repeated_roundings import drop_repeated_roundings

__all__ = ["emit"]


def emit(
    program: torch.export.ExportedProgram,
    opset: int,
    inputs: list[str],
    outputs: list[str],
    narrow: set[str],
    form: str = "qdq",
    passes: Sequence[Callable[[Any], object]] = (),
) -> Any:
    """``program`` as an ``onnx_ir.Model``.

    Args:
        program: what ``trace`` returned.
        opset: version of the operator set.
        inputs, outputs: names.
        narrow: names of the buffers whose integers fit into 4 bits and are stored so.
        form: ``qdq`` or ``qoperator``.
        passes: of the runtime that the file is for, over an ``onnx_ir.Model``.

    Raises:
        ExportError: it holds an operator that has no ONNX form.
    """
    try:
        with quiet(), _without_pairwise_rules():
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                custom_translation_table=_translations(),
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"torch's ONNX exporter refuses the model: {_reason(error)}\n"
            "  what to do: replace that operator in the model's code, or leave its module out of the exported part."
        ) from error
    assert made is not None
    model = made.model
    with quiet():
        copy_batch_size(model)
        count_rows(model)
        _separate(model, inputs, outputs)
        _pack(model, narrow)
        rows = [
            x.shape[0] if x.ndim else None for x in pytree.tree_leaves(program.example_inputs) if isinstance(x, Tensor)
        ]
        _rewrite(model, form, passes, {*program.state_dict, *program.constants}, rows)
    return model


def _rewrite(
    model: Any, form: str, passes: Sequence[Callable[[Any], object]], held: set[str], rows: list[int | None]
) -> None:
    """What runtimes read well, in as few bytes as it takes.

    Constants that the program ``held`` keep their names; ``rows`` are those of the inputs in the example.
    """
    from onnx_ir.passes import common

    name_operators(model)
    _clean(model, rows)
    drop_repeated_roundings(model)
    for step in passes:
        step(model)
    spread_over_rows(model)
    if form == "qoperator":
        move_integers(model)
        to_qoperators(model)
    drop_zero_points(model)
    drop_defaults(model)
    common.RemoveUnusedNodesPass()(model)
    drop_copies(model)
    name_tensors(model, held)


@contextlib.contextmanager
def _without_pairwise_rules() -> Iterator[None]:
    """Without the one rule of onnxscript's optimizer that tries every pair of nodes: two slices become one split.

    On graphs of thousands of nodes it takes minutes (swin_t: four fifths of the export), and saves a node. Where
    onnxscript keeps its rules elsewhere, all of them run.
    """
    from onnxscript import rewriter

    owner: Any = rewriter
    rules = getattr(owner, "_DEFAULT_REWRITE_RULES", None)
    if not isinstance(rules, tuple):
        yield
        return
    owner._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if getattr(rule, "name", None) != "SlicesSplit")
    try:
        yield
    finally:
        owner._DEFAULT_REWRITE_RULES = rules


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _translations() -> dict[Any, Any]:
    """What our operators are in ONNX."""
    import numpy as np
    import onnx_ir as ir
    from onnxscript import opset18

    op: Any = opset18
    types = {(8, False): "UINT8", (8, True): "INT8", (16, False): "UINT16", (16, True): "INT16"}

    def grid(scale: float, zero_point: int, bits: int, signed: bool) -> tuple[Any, Any]:
        stored = ir.DataType[types[bits, signed]]
        return (
            op.Constant(value=ir.tensor(np.array(scale, dtype=np.float32))),
            op.Constant(value=ir.tensor(np.array(zero_point, dtype=stored.numpy()), dtype=stored)),
        )

    def quantize(x: Any, scale: float, zero_point: int, bits: int, signed: bool) -> Any:
        return op.QuantizeLinear(x, *grid(scale, zero_point, bits, signed))

    def dequantize(q: Any, scale: float, zero_point: int, bits: int, signed: bool) -> Any:
        return op.DequantizeLinear(q, *grid(scale, zero_point, bits, signed))

    def dequantize_per_axis(q: Any, scale: Any, axis: int, bits: int) -> Any:
        if bits > 8 or bits <= 4:
            return op.DequantizeLinear(q, scale, axis=axis)
        zeros = np.zeros(tuple(scale.shape), dtype=np.int8)
        return op.DequantizeLinear(q, scale, op.Constant(value=ir.tensor(zeros)), axis=axis)

    ours = torch.ops.fxquant
    return {
        ours.quantize.default: quantize,
        ours.dequantize.default: dequantize,
        ours.dequantize_per_axis.default: dequantize_per_axis,
    }


def _separate(model: Any, inputs: list[str], outputs: list[str]) -> None:
    """Give every input and output a tensor of its own, where the model returns one twice, or an input as it is."""
    import onnx_ir as ir

    graph = model.graph
    seen = {id(value) for value in (*graph.inputs, *graph.initializers.values())}
    for i, value in enumerate(list(graph.outputs)):
        if id(value) in seen:
            node = ir.Node("", "Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[i] = node.outputs[0]
            if value.is_initializer():
                value.name = f"{value.name}:constant"
        seen.add(id(value))
    for value, name in (*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=True)):
        value.name = name


def _pack(model: Any, narrow: set[str]) -> None:
    """Store the weights named in ``narrow`` in 4 bits."""
    import onnx_ir as ir

    for name in narrow & set(model.graph.initializers):
        value = model.graph.initializers[name]
        numbers = value.const_value.numpy().astype(ir.DataType.INT4.numpy())
        value.const_value = ir.Tensor(numbers, dtype=ir.DataType.INT4, name=name)
        value.dtype = ir.DataType.INT4


def _clean(model: Any, rows: list[int | None]) -> None:
    """Drop what speaks of this machine, and name free sizes."""
    sizes = name_axes(model.graph.inputs, rows)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            _clean_value(value, sizes)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        _clean_value(value, sizes)
    model.producer_name, model.producer_version = "fxquant", None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _clean_value(value: Any, names: dict[str, str]) -> None:
    """Sizes that are numbers are written as such, and free ones by names that mean something."""
    value.metadata_props.clear()
    if value.shape is None:
        return
    sizes = [getattr(size, "value", size) for size in value.shape]
    value.shape = type(value.shape)([_size(size, names) if isinstance(size, str) else size for size in sizes])


def _size(text: str, names: dict[str, str]) -> int | str:
    return int(text) if text.isdigit() else re.sub(r"\w+", lambda match: names.get(match[0], match[0]), text)
