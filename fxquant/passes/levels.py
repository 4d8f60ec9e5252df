"""Seven levels, checked: what must hold of a graph at each, and one function that says what does not.

captured → canonical → prepared → frozen → integer → qdq or decomposed. A level's laws are rows: a name and a function
that yields the nodes that break it. ``check`` runs after every pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx, nn

from fxquant.behaviour import Passing, Rescaling
from fxquant.errors import LevelError
from fxquant.graph.facts import DECLARED
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.pattern import nodes_in
from fxquant.graph.text import node_text
from fxquant.nn.fake_quantize import FakeQuantize
from fxquant.nn.form import lost_state
from fxquant.nn.integer import Dequantize, IntegerOp, Quantize
from fxquant.nn.modules import QuantInput, QuantOp, QuantParametric, QuantWeighted
from fxquant.ops.calls import behaviour_of
from fxquant.passes.facts import Converted, Placed

__all__ = ["LAWS", "check"]

Law = Callable[[LeveledModule], Iterator[tuple[fx.Node | None, str]]]

_COMPUTE = ("call_module", "call_function", "call_method")
_FAKE_QUANT = (QuantOp, QuantParametric, QuantWeighted, QuantInput)


def _module(graph_module: LeveledModule, node: fx.Node) -> nn.Module | None:
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


def well_formed(module: LeveledModule) -> Iterator[tuple[fx.Node | None, str]]:
    """Nodes are defined before they are used, and every module and parameter exists."""
    try:
        module.graph.lint()
    except Exception as error:
        yield None, str(error)


def knows_its_place(module: LeveledModule) -> Iterator[tuple[fx.Node | None, str]]:
    """Every compute node carries the path of the module that it was called in."""
    for node in module.graph.nodes:
        if node.op in _COMPUTE and "module_path" not in node.meta and "by" not in node.meta:
            yield node, "no module path"


def facts_are_typed(module: LeveledModule) -> Iterator[tuple[fx.Node | None, str]]:
    """What is known of a node is what its owner says that it is."""
    for node in module.graph.nodes:
        for name, value in node.meta.items():
            owner = DECLARED.get(name)
            if owner is not None and not owner.facts[name].fits(value):
                yield node, f"{owner.__name__}.{name} ({owner.facts[name].meaning}) is {value!r}"


def one_entry_each(module: LeveledModule) -> Iterator[tuple[fx.Node | None, str]]:
    """Every compute node carries exactly one op entry, and calls its function, its module, or stays in float visibly."""
    for node in module.graph.nodes:
        if node.op not in _COMPUTE:
            continue
        entry = node.meta.get("entry")
        if entry is None:
            yield node, "no op entry"
        elif node.op == "call_method" and "reason" not in node.meta and node.meta.get("is_tensor"):
            yield node, "still spelled as a method"
        elif node.op == "call_function" and "reason" not in node.meta and node.meta.get("is_tensor"):
            if node.target is not entry.function:
                yield node, f"spelled otherwise than {entry.name}"


def quantized_once(module: LeveledModule) -> Iterator[tuple[fx.Node | None, str]]:
    """Every quantized op is a fake-quant module that owns or shares one quantizer, and no value is quantized twice."""
    for node in module.graph.nodes:
        part = _module(module, node)
        if node.op in _COMPUTE and Placed(node).quantized and node.meta.get("is_tensor", True):
            if not isinstance(part, _FAKE_QUANT):
                yield node, "quantized, but not a fake-quant module"
            elif part.output_quantizer is None and not Placed(node).continues:
                yield node, "quantized, but without a quantizer"
            elif part.applies and isinstance(behaviour_of(node), Passing) and not Placed(node).requantizes:
                yield node, "rounds values that pass through it and were rounded before"
        if isinstance(part, QuantWeighted) and not isinstance(part.weight_quantizer, FakeQuantize):
            yield node, "has a weight without a quantizer"


def grids_are_sound(module: LeveledModule) -> Iterator[tuple[fx.Node | None, str]]:
    """Every quantizer has a finite positive scale and a zero point on its grid."""
    for name, part in module.named_modules():
        if not isinstance(part, FakeQuantize):
            continue
        scale, zero_point = part.scale, part.zero_point
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            yield None, f"{name} has scale {scale.flatten()[:3].tolist()}"
        if not bool(((zero_point >= part.scheme.qmin) & (zero_point <= part.scheme.qmax)).all()):
            yield None, f"{name} has zero point {zero_point.flatten()[:3].tolist()} off its grid"


def _reads_integers(node: fx.Node) -> bool:
    """Whether an integer op reads quantized tensors; a table lookup reads indices instead."""
    behaviour = behaviour_of(node)
    return not (isinstance(behaviour, Rescaling) and behaviour.inputs == ())


def integers_between(module: LeveledModule) -> Iterator[tuple[fx.Node | None, str]]:
    """Between quantize and dequantize no tensor is float but an accumulator on its way into the op that rounds it: integer
    ops read integers, float ops read floats."""
    integer: set[fx.Node] = set()
    for node in module.graph.nodes:
        part = _module(module, node)
        if isinstance(part, IntegerOp):
            first = next((a for a in nodes_in(node.args) if a.meta.get("is_tensor")), None)
            wide = Placed(node).wide_operand and first is not None and Placed(first).stays_wide
            if first is not None and first not in integer and _reads_integers(node) and not wide:
                yield node, f"an integer op reads {first.name}, which is float"
            if part.output_dtype is not None or isinstance(behaviour_of(node), Passing):
                integer.add(node)
        elif isinstance(part, Quantize) or Converted(node).integer_constant:
            integer.add(node)
        elif not isinstance(part, Dequantize):
            for read in nodes_in((node.args, node.kwargs)):
                if read in integer and not node.meta.get("reads_shape") and node.op != "placeholder":
                    if node.op == "output" or node.meta.get("is_tensor", True):
                        yield node, f"a float op reads {read.name}, which is made of integers"


def state_can_be_written(module: LeveledModule) -> Iterator[tuple[fx.Node | None, str]]:
    """All that an integer form holds is part of what it is written as; a form that cannot be written is refused there."""
    for node in module.graph.nodes:
        part = _module(module, node)
        if isinstance(part, IntegerOp) and (lost := lost_state(part)):
            names, state = ", ".join(sorted(lost)), tuple(sorted(lost))
            held = f"its form {type(part).__name__} holds {names}, which would be lost"
            yield (
                node,
                f"{held}: let its face real account for it, RealForm(..., state={state}), or make it a form of its own",
            )


def nothing_integer(module: LeveledModule) -> Iterator[tuple[fx.Node | None, str]]:
    """No module of the integer form is left."""
    for node in module.graph.nodes:
        if isinstance(_module(module, node), (IntegerOp, Quantize, Dequantize)):
            yield node, "computes on integers"


LAWS: dict[str, tuple[Law, ...]] = {
    "captured": (well_formed, facts_are_typed, knows_its_place),
    "canonical": (well_formed, facts_are_typed, knows_its_place, one_entry_each),
    "prepared": (well_formed, facts_are_typed, knows_its_place, quantized_once),
    "frozen": (well_formed, facts_are_typed, knows_its_place, quantized_once, grids_are_sound),
    "integer": (well_formed, facts_are_typed, knows_its_place, integers_between, state_can_be_written),
    "qdq": (well_formed, facts_are_typed, knows_its_place, nothing_integer),
    "decomposed": (well_formed, facts_are_typed, knows_its_place, nothing_integer),
}


def check(module: LeveledModule, *, by: str) -> LeveledModule:
    """``module``, if it obeys every law of its level.

    Raises:
        LevelError: names the pass, the law, the node, the module path and the user's source line.
    """
    for law in LAWS[module.level]:
        for node, what in law(module):
            place = "" if node is None else f"\n  node: {node_text(node)}"
            if node is not None:
                place += f"\n  module path: {node.meta.get('module_path') or '(top)'}"
                place += f"\n  source: {node.meta.get('source') or 'unknown'}"
            raise LevelError(
                f"pass {by} broke a law of level {module.level}: {law.__name__}.\n"
                f"  law: {(law.__doc__ or '').strip()}\n  broken by: {what}{place}\n"
                "  This is a defect of fxquant, or of an op, form, quantizer or pass that you have entered, and not of your "
                "model: if there is none, please report it with the model."
            )
    return module
