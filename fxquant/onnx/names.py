"""The names in a file: where they say something they are those of the model, and everything else has a number.

    layer1.0.conv1             the operator of that module; layer1.0.conv1_1 a second one
    layer1.0.conv1:integers    what its rounding makes
    layer1.0.conv1.weight      a weight's integers, layer1.0.conv1.weight:scale what they are multiplied by;
                               fc.weight:transposed where an operator wants them so
    batch, x_2                 a free first axis, and the free axis 2 of input x

The exporter names each tensor after the operator that makes it, twice a tensor, which is most of what a small network's
file holds beside its weights (measured: 16 of 25 KB in ResNet-20 for CIFAR).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Sequence
from typing import Any

__all__ = ["integers_name", "name_axes", "name_operators", "name_tensors"]

_ROUNDINGS = ("QuantizeLinear", "DequantizeLinear")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_INTEGERS = ":integers"


def name_operators(model: Any) -> None:
    """Name operators and integers in ``model`` (an ``onnx_ir.Model``) after the modules that they were traced in.

    An operator outside of all modules keeps the name that it has in the model's graph. Roundings need no name beside that
    of the integers.
    """
    taken, operators = set[str](), set[str]()
    nodes = list(model.graph.all_nodes())
    for node in sorted(nodes, key=lambda node: node.op_type not in _WEIGHTED):  # a layer's name is for its product
        node.name = None if node.op_type in _ROUNDINGS else _numbered(_scope(node), operators)
    for node in nodes:
        if node.op_type == "QuantizeLinear":
            node.outputs[0].name = integers_name(_module_path(node), taken)


def name_tensors(model: Any, held: Collection[str]) -> None:
    """Name the constants in ``model`` that the exported module ``held`` as that does, and number other tensors.

    Inputs, outputs and integers keep their names.
    """
    graph = model.graph
    kept = {id(value) for value in (*graph.inputs, *graph.outputs)}
    taken = {value.name for value in (*graph.inputs, *graph.outputs)}
    numbered: list[Any] = []
    constants: list[tuple[Any, str]] = []
    for part in model.graphs():
        for value in part.initializers.values():
            if id(value) in kept:
                continue
            if value.name.partition(":")[0] in held:
                constants.append((value, value.name))
            else:
                numbered.append(value)
        numbered += [value for value in part.inputs if id(value) not in kept]
        for node in part:
            for value in node.outputs:
                if value.name and _INTEGERS in value.name:
                    taken.add(value.name)
                elif value.name and id(value) not in kept:
                    numbered.append(value)
    for i, (value, _) in enumerate(constants):
        value.name = f":{i}"  # out of the way: what one is called now may be what another is to be called
    for value, name in constants:
        value.name = _numbered(_constant_name(name), taken)
    number = 0
    for value in numbered:
        while str(number) in taken:
            number += 1
        value.name, number = str(number), number + 1


def name_axes(inputs: Any, rows: Sequence[int | None]) -> dict[str, str]:
    """Free sizes by the exporter's symbols: ``batch`` for the first axis, ``NAME_AXIS`` for others.

    Inputs that had as many ``rows`` in the example share a batch, whether or not the model joins them.
    """
    names: dict[str, str] = {}
    batch: int | None = None
    for value, count in zip(inputs, rows, strict=True):
        for axis, size in enumerate(value.shape or ()):
            symbol = str(getattr(size, "value", size))
            if symbol.isidentifier() and symbol not in names:
                is_batch = not axis and (batch is None or count == batch)
                batch = count if is_batch else batch
                names[symbol] = "batch" if is_batch else f"{value.name}_{axis}"
    return names


def integers_name(path: str, taken: set[str]) -> str:
    """The name in the file of the integers that the rounding at ``path`` makes; numbered where it runs repeatedly."""
    return _numbered(f"{path.removesuffix('.rounding')}{_INTEGERS}", taken)


def _numbered(wanted: str, taken: set[str]) -> str:
    """``wanted``, with a number behind it where it is ``taken``; taken from now on."""
    name, number = wanted, 0
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name


def _constant_name(name: str) -> str:
    """The name of a buffer of the exported module as the user's model has it."""
    own, mark, changed = name.removeprefix("model.").partition(":")
    stored = re.fullmatch(r"((?:.*\.)?)parameter_([^.]+)(\.integers|\.scale)?", own)
    own = own if stored is None else stored[1] + stored[2] + (":scale" if stored[3] == ".scale" else "")
    return own + mark + changed


def _scopes(node: Any) -> list[str]:
    """The paths of the modules that a node was traced in, outermost first, and its own name in the innermost's graph."""
    return [str(scope) for scope in ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))]


def _module_path(node: Any) -> str:
    """The path of the module that a node was traced in, in the model that was exported."""
    path = (["", *_scopes(node)])[-2:][0]
    return path.removeprefix("model.") if path.startswith("model.") else ""


def _scope(node: Any) -> str:
    """The module path of a node; its own name outside of all modules."""
    return _module_path(node) or (_scopes(node) or [node.op_type.lower()])[-1]
