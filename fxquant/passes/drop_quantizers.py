"""drop_quantizers: from a prepared graph back to the canonical one that it was made of, to place quantizers anew."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxquant.graph.edit import Edit, clone_module
from fxquant.graph.leveled import LeveledModule
from fxquant.nn.modules import QuantInput, QuantOp, float_class_of
from fxquant.ops.calls import call_of
from fxquant.passes import (
    apply_recipe,
    choose_regions,
    keep_accumulators,
    leave_unrounded,
    merge_clamps,
    place_quantizers,
    round_for_readers,
    scale_groups,
)
from fxquant.passes.facts import Placed

__all__ = ["drop_quantizers"]

_PLACING = (
    *(apply_recipe, leave_unrounded, choose_regions, merge_clamps, keep_accumulators, round_for_readers),
    *(scale_groups, place_quantizers),
)
"""The files of the passes between the canonical and the prepared graph; all that they write on nodes is ``Placed``."""

_PASSES = tuple(file.__name__.rpartition(".")[2] for file in _PLACING)
"""Their names, as they sign notes."""


def drop_quantizers(module: LeveledModule) -> LeveledModule:
    """Replace each fake-quant module by the float op that it stands for, and take quantizers of entering tensors out.

    Before:
        x = input
        x_quantizer = QuantInput[x_quantizer](x)
        conv = QuantConv2d[conv](x_quantizer)
        relu = QuantReLU[relu](conv)
        max_pool2d = QuantMaxPool2d[max_pool2d](relu)
        fc = QuantLinear[fc](max_pool2d)
        return fc

    After:
        x = input
        conv = Conv2d[conv](x)
        relu = relu(conv)
        max_pool2d = max_pool2d(relu, kernel_size=2)
        fc = Linear[fc](max_pool2d)
        return fc

    Law:
        Outputs are the prepared graph's with quantizers off, bit for bit.
    """
    edit = Edit(module, by="drop_quantizers")
    for node in edit.nodes:
        part = edit.module(node)
        if isinstance(part, QuantInput) or Placed(node).rounds_for_reader:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            edit.remove(node, source)
            continue
        if part is not None and float_class_of(part) is not None:
            _restore_module(edit, node, part)
        elif isinstance(part, QuantOp):
            call = call_of(node, part)
            edit.call_function(node, call.entry.function, *call.entry.arrange(call.arguments))
        if "setting" in Placed(node) and Placed(node).setting is None:
            node.meta.pop("reason", None)  # the recipe's, which it will give again
        Placed.reset(node)
        edit.unnote(node, _PASSES)
    return edit.done(level="canonical")


def _restore_module(edit: Edit, node: fx.Node, part: nn.Module) -> None:
    made: Any = clone_module(part, float_class_of(part))
    for name in ("output_quantizer", "weight_quantizer"):
        made._modules.pop(name, None)
        made.__dict__.pop(name, None)
    for name in ("entry", "applies", "inplace", "_bias_of", "_folded_norm", "_folded_into"):
        made.__dict__.pop(name, None)
    edit.set_module(node, made)
