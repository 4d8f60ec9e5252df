"""Ops that move values without changing them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.behaviour import Passing, Rescaling
from fxquant.errors import Refusal
from fxquant.nn.integer import IntegerEvaluate, IntegerPass, Site
from fxquant.ops.entry import Call, OpEntry, scalar
from fxquant.ops.example import example
from fxquant.ops.exported_forms import squeeze_of_ones
from fxquant.ops.reduction import carried_pass

__all__ = [
    "expand",
    "flip",
    "getitem",
    "identity",
    "selects_nothing",
    "permute",
    "repeat",
    "reshape",
    "unflatten",
    "view",
]


def view(input: Tensor, shape: Any) -> Tensor:
    """``input.view(shape)``."""
    return input.view(shape)


def reshape(input: Tensor, shape: Any) -> Tensor:
    """``input.reshape(shape)``."""
    return input.reshape(shape)


def permute(input: Tensor, dims: Any) -> Tensor:
    """``input.permute(dims)``."""
    return input.permute(dims)


def expand(input: Tensor, size: Any) -> Tensor:
    """``input.expand(size)``."""
    return input.expand(size)


def repeat(input: Tensor, repeats: Any) -> Tensor:
    """``input.repeat(repeats)``."""
    return input.repeat(repeats)


def flip(input: Tensor, dims: Any) -> Tensor:
    """``input.flip(dims)``."""
    return input.flip(dims)


def unflatten(input: Tensor, dim: int, sizes: Any) -> Tensor:
    """``input.unflatten(dim, sizes)``."""
    return input.unflatten(dim, sizes)


def contiguous(input: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """``input.contiguous(memory_format=…)``."""
    return input.contiguous(memory_format=memory_format)


def getitem(input: Any, index: Any) -> Any:
    """``input[index]``."""
    return input[index]


def selects_nothing(node: fx.Node) -> bool:
    """Whether ``node`` is a selection that has no values whatever it reads, as ``x[:, :0]``."""
    if node.op != "call_function" or node.target is not operator.getitem or len(node.args) != 2:
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return any(isinstance(i, slice) and isinstance(i.stop, int) and i.stop in (0, i.start) for i in index)


def identity(input: Tensor) -> Tensor:
    """``input`` itself."""
    return input


def padding_pass(site: Site) -> IntegerPass:
    return IntegerPass(site, carried=site.attributes.get("mode", "constant") != "constant", fill="value")


def _passing(
    name: str,
    function: Callable[..., Any],
    signature: str,
    sample: nn.Module | Callable[..., Any],
    *shapes: tuple[int, ...],
    onnx: str,
    joins: bool = False,
    views: bool = True,
    integer: Callable[[Site], nn.Module] = IntegerPass,
    **spellings: Any,
) -> None:
    """One row: values pass through ``function``, whose result may be a view of its input unless ``views=False``."""
    OpEntry(
        name=name,
        function=function,
        signature=signature,
        behaviour=Passing(joins=joins),
        integer=integer,
        onnx=onnx,
        views=views,
        example=example(sample, *shapes, behind_op=len(shapes) == 1),
        **spellings,
    )


_passing(
    "cat",
    torch.cat,
    "tensors*, dim=0",
    lambda x, y: torch.cat([x * 0.5, y], dim=1) * 1.5,
    (2, 3, 4, 5),
    (2, 4, 4, 5),
    views=False,
    onnx="Concat",
    joins=True,
    functions=(torch.concat, torch.concatenate),
    aliases={"axis": "dim"},
    quantized=True,
    native="concatenation",
)
_passing(
    "stack",
    torch.stack,
    "tensors*, dim=0",
    lambda x, y: torch.stack((x * 0.5, y), dim=2) * 1.5,
    (2, 3, 4),
    (2, 3, 4),
    views=False,
    onnx="Concat",
    joins=True,
    native="stack",
)
_passing(
    "flatten",
    torch.flatten,
    "input*, start_dim=0, end_dim=-1",
    lambda x: torch.flatten(x, 1, 2),
    (2, 3, 4, 5),
    onnx="Flatten",
    methods=("flatten",),
    modules=(nn.Flatten,),
    quantized=True,
)
_passing(
    "view",
    view,
    "input*, ...shape",
    lambda x: x.view(x.size(0), -1),
    (2, 3, 4),
    onnx="Reshape",
    methods=("view",),
    quantized=True,
)
_passing(
    "reshape",
    reshape,
    "input*, ...shape",
    lambda x: x.reshape(x.shape[0], 2, -1),
    (2, 3, 4),
    onnx="Reshape",
    functions=(torch.reshape,),
    methods=("reshape",),
    quantized=True,
)
_passing(
    "unflatten",
    unflatten,
    "input*, dim, sizes",
    lambda x: x.unflatten(1, (3, 2)),
    (2, 6, 4),
    onnx="Reshape",
    functions=(torch.unflatten,),
    methods=("unflatten",),
    quantized=True,
)
_passing(
    "permute",
    permute,
    "input*, ...dims",
    lambda x: x.permute(0, 2, 3, 1),
    (2, 3, 4, 5),
    onnx="Transpose",
    functions=(torch.permute,),
    methods=("permute",),
    quantized=True,
)
_passing(
    "transpose",
    torch.transpose,
    "input*, dim0, dim1",
    lambda x: x.transpose(-1, 1),
    (2, 3, 4),
    onnx="Transpose",
    functions=(torch.swapaxes, torch.swapdims),
    methods=("transpose", "swapaxes", "swapdims"),
    quantized=True,
)
_passing(
    "squeeze",
    torch.squeeze,
    "input*, dim",
    lambda x: x.squeeze(2),
    (2, 3, 1, 4),
    onnx="Squeeze",
    exported_as=squeeze_of_ones,
    methods=("squeeze",),
    accepts=lambda call: "dim" in call.arguments,
    quantized=True,
)
_passing(
    "unsqueeze",
    torch.unsqueeze,
    "input*, dim",
    lambda x: torch.unsqueeze(x, -1),
    (2, 3),
    onnx="Unsqueeze",
    methods=("unsqueeze",),
    quantized=True,
)
_passing("movedim", torch.movedim, "input*, source, destination", lambda x: torch.movedim(x, 1, -1), (2, 3, 4),
         onnx="Transpose", methods=("movedim",))  # fmt: skip
_passing("expand", expand, "input*, ...size", lambda x: x.expand(-1, 4, -1), (2, 1, 3), onnx="Expand",
         methods=("expand",), quantized=True)  # fmt: skip
_passing("repeat", repeat, "input*, ...repeats", lambda x: x.repeat(1, 2, 1), (2, 2, 3), views=False, onnx="Tile",
         methods=("repeat",))  # fmt: skip
_passing("flip", flip, "input*, ...dims", lambda x: torch.flip(x, (1,)), (2, 3, 4), views=False, onnx="Slice",
         functions=(torch.flip,), methods=("flip",))  # fmt: skip
_passing("roll", torch.roll, "input*, shifts, dims=None", lambda x: torch.roll(x, (1, -2), dims=(1, 2)), (2, 3, 5),
         views=False, onnx="Concat", methods=("roll",))  # fmt: skip
_passing("select", torch.select, "input*, dim, index", lambda x: x.select(1, 2), (2, 3, 4), onnx="Gather",
         methods=("select",), quantized=True)  # fmt: skip
_passing("narrow", torch.narrow, "input*, dim, start, length", lambda x: x.narrow(2, 1, 2), (2, 3, 4), onnx="Slice",
         methods=("narrow",), quantized=True)  # fmt: skip
_passing("getitem", getitem, "input*, index", lambda x: x[:, 1:, ::2, 0], (2, 3, 4, 5), onnx="Slice",
         functions=(operator.getitem,), methods=("__getitem__",), quantized=True)  # fmt: skip
_passing("chunk", torch.chunk, "input*, chunks, dim=0", lambda x: x.chunk(2, dim=1)[1], (2, 4, 3), onnx="Split",
         methods=("chunk",), returns="tuple", quantized=True)  # fmt: skip
_passing("split", torch.split, "input*, split_size_or_sections, dim=0", lambda x: torch.split(x, [1, 3], dim=1)[1],
         (2, 4, 3), onnx="Split", methods=("split",), aliases={"tensor": "input", "split_size": "split_size_or_sections"},
         returns="tuple", quantized=True)  # fmt: skip
_passing("unbind", torch.unbind, "input*, dim=0", lambda x: x.unbind(1)[2], (2, 3, 4), onnx="Split",
         methods=("unbind",), returns="tuple")  # fmt: skip
_passing("contiguous", contiguous, "input*, memory_format=None", lambda x: x.transpose(1, 2).contiguous(), (2, 3, 4),
         onnx="Identity", methods=("contiguous",), quantized=True)  # fmt: skip
_passing(
    "clone", torch.clone, "input*", lambda x: x.clone(), (2, 3, 4), views=False, onnx="Identity", methods=("clone",)
)
_passing(
    "identity", identity, "input*", nn.Identity(), (2, 3, 4), onnx="Identity", modules=(nn.Identity,), quantized=True
)
_passing(
    "pixel_shuffle",
    F.pixel_shuffle,
    "input*, upscale_factor",
    nn.PixelShuffle(2),
    (2, 8, 3, 4),
    views=False,
    onnx="DepthToSpace",
    modules=(nn.PixelShuffle,),
)
_passing(
    "pixel_unshuffle",
    F.pixel_unshuffle,
    "input*, downscale_factor",
    nn.PixelUnshuffle(2),
    (2, 2, 6, 4),
    views=False,
    onnx="SpaceToDepth",
    modules=(nn.PixelUnshuffle,),
)
_passing(
    "channel_shuffle",
    F.channel_shuffle,
    "input*, groups",
    nn.ChannelShuffle(3),
    (2, 6, 3, 4),
    views=False,
    onnx="Transpose",
    modules=(nn.ChannelShuffle,),
    functions=(torch.channel_shuffle,),
    integer=carried_pass,
)


def read_padding_module(module: nn.Module) -> dict[str, Any]:
    """Arguments of ``pad`` as the padding modules hold them."""
    name = type(module).__name__
    mode = next((m for key, m in (("Reflection", "reflect"), ("Replication", "replicate"), ("Circular", "circular"))
                 if name.startswith(key)), "constant")  # fmt: skip
    sides = module.padding
    arguments = {"pad": tuple(sides) if isinstance(sides, (tuple, list)) else sides}
    if mode != "constant":
        return {**arguments, "mode": mode}
    return {**arguments, "value": float(getattr(module, "value", 0.0))}


def _fills_with_zero(call: Call) -> bool:
    return call["mode"] != "constant" or call["value"] in (None, 0)


def _fill_reason(call: Call) -> Refusal | None:
    value = call["value"]
    return None if scalar(value) and math.isfinite(value) else Refusal(f"it pads with {value}")


_PAD = "input*, pad, mode='constant', value=None"
OpEntry(
    name="pad",
    function=F.pad,
    signature=_PAD,
    behaviour=Passing(),
    modules=(
        *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
        *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
        *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    ),
    read=read_padding_module,
    integer=padding_pass,
    accepts=_fills_with_zero,
    onnx="Pad",
    example=example(lambda x: F.pad(x, (1, 2, 0, 1)), (2, 3, 4, 5), behind_op=True),
)
OpEntry(
    name="pad_value",
    function=F.pad,
    signature=_PAD,
    behaviour=Rescaling(),
    functions=(F.pad,),
    modules=(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    read=read_padding_module,
    integer=IntegerEvaluate,
    accepts=lambda call: not _fills_with_zero(call),
    check=_fill_reason,
    onnx="Pad",
    example=example(lambda x: F.pad(x, (1, 2, 0, 1), value=0.5), (2, 3, 4, 5)),
)
