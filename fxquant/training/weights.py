"""The weights of a prepared model, each once, with what computes with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fxquant.capture.islands import graphs_of
from fxquant.nn.modules import QuantWeighted, QuantWeightedOp
from fxquant.ops.calls import call_of

__all__ = ["weights_of"]


def weights_of(prepared: nn.Module) -> Iterator[tuple[str, Any, nn.Parameter]]:
    """Path, weighted op and parameter of every weight that has a quantizer; of several calls of one weight the first."""
    seen = set[int]()
    for path, graph in graphs_of(prepared).items():
        for node in graph.graph.nodes:
            part: Any = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            if not isinstance(part, (QuantWeighted, QuantWeightedOp)) or id(part.weight_quantizer) in seen:
                continue
            seen.add(id(part.weight_quantizer))
            if isinstance(part, QuantWeighted):
                yield f"{path}.{node.target}.weight".strip("."), part, part.weight  # type: ignore[misc]
                continue
            source = call_of(node, part).operand("weight")
            assert source is not None
            yield f"{path}.{source.target}".strip("."), part, graph.get_parameter(str(source.target))
