"""The quantized weights of a prepared model: every call that reads one, by the path with which a recipe selects it.

A layer that is called once is a module with its weight; one that is called several times is a function of a parameter, and
so is ``F.linear(x, self.weight)``. Two calls may read one weight, with a quantizer for both or with one each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxquant.capture.islands import graphs_of
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.fake_quantize import WeightQuantize
from fxquant.nn.modules import QuantWeighted, QuantWeightedOp
from fxquant.ops.calls import call_of

__all__ = ["WeightedCall", "attribute", "weighted_calls"]


@dataclass(frozen=True)
class WeightedCall:
    """One call that multiplies by a parameter.

    Attributes:
        name: the path that selects it in a recipe.
        node, part: in the graph.
        weight: the float parameter.
        quantizer: of the weight.
    """

    name: str
    node: fx.Node
    part: Any
    weight: Tensor
    quantizer: WeightQuantize


def weighted_calls(prepared: nn.Module) -> Iterator[WeightedCall]:
    """Every call of a prepared model whose weight is a parameter with a quantizer that rounds to whole numbers of a grid."""
    for path, graph in graphs_of(prepared).items():
        for node in graph.graph.nodes:
            part: Any = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            if (
                not isinstance(part, (QuantWeighted, QuantWeightedOp))
                or type(part.weight_quantizer) is not WeightQuantize
            ):
                continue
            weight = part.weight if isinstance(part, QuantWeighted) else _read_weight(graph, node, part)
            if weight is not None:
                yield WeightedCall(_name(graph, path, node, part), node, part, weight, part.weight_quantizer)


def attribute(module: Any, path: str) -> Any:
    """What ``path`` leads to from a module."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _read_weight(graph: LeveledModule, node: fx.Node, part: Any) -> Tensor | None:
    read = call_of(node, part).operand("weight")
    return attribute(graph, str(read.target)) if isinstance(read, fx.Node) and read.op == "get_attr" else None


def _name(graph: LeveledModule, path: str, node: fx.Node, part: Any) -> str:
    """As ``passes.apply_recipe.site_of`` has it for the canonical graph."""
    if graph.meta.get("layer"):
        return path
    own = str(node.target)
    if isinstance(part, QuantWeightedOp):
        inside, name = node.meta.get("module_path") or "", node.meta["entry"].name
        own = inside if inside and node.meta.get("was_module") else f"{inside}.{name}".strip(".")
    return f"{path}.{own}".strip(".")
