"""require_finite: no grid covers NaN or infinity, whatever rule finds it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.errors import CalibrationError
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.fake_quantize import FakeQuantize
from fxquant.nn.modules import QuantParametric, QuantWeighted, QuantWeightedOp
from fxquant.ops.calls import call_of

__all__ = ["require_finite"]


@torch.no_grad()
def require_finite(module: LeveledModule) -> None:
    """Refuse a prepared graph whose quantized ops hold parameters, or whose quantizers learned ranges, that are not finite.

    A weight whose integers are pinned may be anything: nothing reads it.

    Raises:
        CalibrationError: names the first such tensor.
    """
    parts = {node: _part(module, node) for node in module.graph.nodes}
    for node, part in parts.items():
        for name, value in () if part is None else _parameters(module, node, part):
            if value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value).all()):
                where = ".".join(filter(None, (str(module.meta.get("path") or ""), str(node.target))))
                raise CalibrationError(
                    f"the {name} of {where} holds NaN or infinity: no grid covers it.\n"
                    "  what to do: if it was trained, the run has diverged: go back to a checkpoint from before; if it was "
                    "loaded, check the file."
                )


def _part(module: LeveledModule, node: fx.Node) -> Any:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _parameters(module: LeveledModule, node: fx.Node, part: Any) -> Iterator[tuple[str, Tensor]]:
    """What ``part`` computes with, by name."""
    own = getattr(part, "weight_quantizer", None)
    pinned = getattr(own, "integers", None) is not None
    if isinstance(part, QuantWeightedOp):
        call = call_of(node, part)
        for name in ("weight", "bias"):
            source = call.arguments.get(name)
            if isinstance(source, fx.Node) and source.op == "get_attr" and not (pinned and name == "weight"):
                yield name, _attribute(module, str(source.target))
    elif isinstance(part, (QuantWeighted, QuantParametric)):
        held = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        yield from (item for item in held if not (pinned and item[0] == "weight"))
    for place in ("weight_quantizer", "output_quantizer"):
        quantizer = getattr(part, place, None)
        if isinstance(quantizer, FakeQuantize):
            yield from ((f"{place}.{name}", value) for name, value in quantizer.named_parameters(recurse=False))


def _attribute(module: nn.Module, path: str) -> Tensor:
    before, _, name = path.rpartition(".")
    found: Tensor = getattr(module.get_submodule(before), name)
    return found
