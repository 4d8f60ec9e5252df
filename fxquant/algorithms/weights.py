"""The quantized weights of a prepared model: every call that reads one, by the path with which a recipe selects it.

A layer that is called once is a module with its weight; one that is called several times is a function of a parameter, and
so is ``F.linear(x, self.weight)``. Two calls may read one weight, with a quantizer for both or with one each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from fxquant.capture.islands import graphs_of
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.pattern import reads_alone
from fxquant.nn.fake_quantize import WeightQuantize
from fxquant.nn.modules import QuantWeighted, QuantWeightedOp
from fxquant.ops.calls import call_of

__all__ = ["OwnParameters", "WeightedCall", "attribute", "weighted_calls"]


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


class OwnParameters:
    """The parameters of a weighted function that nothing else in its graph reads, as a weighted module has them.

    Args:
        graph: that holds them.
        node, part: of the function, in ``graph``.

    Attributes:
        reader: the function's name in the graph.
        groups, weight_quantizer: as of a module.
    """

    def __init__(self, graph: LeveledModule, node: fx.Node, part: QuantWeightedOp) -> None:
        call = call_of(node, part)
        self._graph, self._paths = graph, {name: call.operand(name) for name in ("weight", "bias")}
        self.reader, self.weight_quantizer = node.name, part.weight_quantizer
        self.groups = int(call.attributes.get("groups", 1))

    @classmethod
    def of(cls, graph: LeveledModule, node: fx.Node, part: Any) -> OwnParameters | None:
        """Those of a node; None where it is no weighted function, or where something else of the graph reads them too."""
        if not isinstance(part, QuantWeightedOp):
            return None
        if not isinstance(call_of(node, part).attributes.get("groups", 1), int):
            return None
        own = cls(graph, node, part)
        reads = [other for other in own._paths.values() if other is not None]
        if own._paths["weight"] is None or not all(_is_own(graph, read) for read in reads):
            return None
        return own

    @property
    def weight(self) -> nn.Parameter:
        """The float weight."""
        return self._held("weight")

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        self._put("weight", value)

    @property
    def bias(self) -> nn.Parameter | None:
        """The float bias, if there is one."""
        return None if self._paths["bias"] is None else self._held("bias")

    @bias.setter
    def bias(self, value: nn.Parameter) -> None:
        self._put("bias", value)

    def named_parameters(self, recurse: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
        """Both, by name."""
        yield "weight", self.weight
        if self.bias is not None:
            yield "bias", self.bias

    def _held(self, name: str) -> nn.Parameter:
        found = attribute(self._graph, str(self._path(name)))
        assert isinstance(found, nn.Parameter)
        return found

    def _put(self, name: str, value: nn.Parameter) -> None:
        inside, _, last = self._path(name).rpartition(".")
        setattr(attribute(self._graph, inside) if inside else self._graph, last, value)

    def _path(self, name: str) -> str:
        read = self._paths[name]
        assert read is not None
        return str(read.target)


def _is_own(graph: LeveledModule, read: fx.Node) -> bool:
    """Whether ``read`` is of a parameter that nothing else in the graph reads."""
    if read.op != "get_attr" or not isinstance(attribute(graph, str(read.target)), nn.Parameter):
        return False
    return reads_alone(read, partial(attribute, graph))


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
