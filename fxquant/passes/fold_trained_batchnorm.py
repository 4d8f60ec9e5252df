"""fold_trained_batchnorm: a weighted op that folds a batch norm in every pass (*whitepaper* mode) becomes what ships."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxquant.graph.edit import Edit, clone_module
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.fake_quantize import FakeQuantize
from fxquant.nn.modules import QuantWeighted
from fxquant.passes.facts import Placed
from fxquant.passes.settle_quantizers import grid_of

__all__ = ["fold_trained_batchnorm", "take_over"]


def fold_trained_batchnorm(module: LeveledModule) -> LeveledModule:
    """Give weighted ops the folded weight and bias that they round in eval mode, and take the batch norms out.

    Before:
        x = input
        x_quantizer = QuantInput[x_quantizer](x)
        conv = QuantConv2d[conv](x_quantizer)
        bn = QuantBatchNorm2d[bn](conv)
        relu = QuantReLU[relu](bn)
        return relu

    After:
        x = input
        x_quantizer = QuantInput[x_quantizer](x)
        conv = QuantConv2d[conv](x_quantizer)
        relu = QuantReLU[relu](conv)
        return relu

    Law:
        Outputs in eval mode are unchanged, bit for bit.

    Raises:
        LevelError: a weight has a quantizer that is none.
    """
    edit = Edit(module, by="fold_trained_batchnorm")
    for node in edit.nodes:
        part = edit.module(node)
        if not isinstance(part, QuantWeighted) or part.folded_norm is None:
            continue
        if not isinstance(part.weight_quantizer, FakeQuantize):
            grid_of(part.weight_quantizer, f"{node.target}.weight_quantizer")
        (batch_norm,) = node.users
        weight, bias = (p.detach().to(part.weight.dtype) for p in part.rounded_parameters() if p is not None)
        made = {name: nn.Parameter(p, requires_grad=False) for name, p in (("weight", weight), ("bias", bias))}
        folded = take_over(edit, node, clone_module(part, **made), batch_norm)
        del folded.__dict__["_folded_norm"]
    return edit.done()


def take_over(edit: Edit, node: fx.Node, part: Any, batch_norm: fx.Node) -> Any:
    """Remove a folded batch norm behind ``node``; where it was the last link, its quantizer becomes the weighted op's.

    Returns:
        The copy of ``part`` that now stands at ``node``.
    """
    last: Any = edit.module(batch_norm)
    part = clone_module(part)
    if not Placed(batch_norm).continues:
        part.attach(last.output_quantizer, applies=True, inplace=True)
        for key in ("continues", "group", "quantized", "leaves_as_float", "stays_wide"):
            node.meta[key] = batch_norm.meta.get(key)
    edit.set_module(node, part)
    edit.absorb(node, batch_norm, "folded")
    return part
