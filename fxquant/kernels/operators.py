"""torch's int8 CPU operators, looked up by name and schema, and whether they compute right on this machine.

``quantized::*`` take tensors that carry a scale and a zero point (``torch.quint8``) and packed weights. Two engines pack:
``onednn`` is the faster one, and keeps what it compiled for the first shape it saw; ``fbgemm`` costs less to call. The
names are torch's own and may go: whatever is missing, has another signature or fails the check below is not used, and the
reference takes its place.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ENGINES", "KINDS", "Engine", "Operators", "engine_named", "operators", "quantized_weight", "unary_operator"]

ENGINES = ("onednn", "fbgemm")
"""By preference."""
KINDS = {"dense": 1, "grouped": 4, "depthwise": 16}
"""Kinds of layers that have kernels of their own, with the number of groups of 16 channels that each is checked with."""

_DEPRECATED = r"torch\.quantize_per_tensor, torch\.quantize_per_channel and other quantized tensor creation"
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Engine:
    """One way to pack and multiply.

    Attributes:
        name: torch's name.
        saturates: the kinds of layers (``KINDS``) for which it keeps sums of products of an unsigned and a signed byte in
            16 bits here: all on x86 without VNNI, depthwise convolutions of fbgemm everywhere.
    """

    name: str
    saturates: frozenset[str]


@dataclass(frozen=True)
class Operators:
    """The operators of this torch, and the engines that passed the check, by preference.

    Attributes:
        conv2d, linear: ``(input, packed, output_scale, output_zero_point)``.
        linear_float: ``(float input, scale, zero_point, packed by fbgemm)``, a float result; None where torch has none.
        add, mul: ``(a, b, output_scale, output_zero_point)``, for equal shapes.
        affine: ``(input, gain, offset, mean, variance, eps, output_scale, output_zero_point)``, for four dimensions; None
            where torch has none.
    """

    conv2d: Callable[..., Tensor]
    conv2d_pack: Callable[..., Any]
    linear: Callable[..., Tensor]
    linear_pack: Callable[..., Any]
    linear_float: Callable[..., Tensor] | None
    add: Callable[..., Tensor]
    mul: Callable[..., Tensor]
    affine: Callable[..., Tensor] | None
    engines: tuple[Engine, ...]

    def pack(self, kind: str, engine: Engine, weight: Tensor, bias: Tensor, *geometry: Any) -> Any:
        """Packed weights of ``kind`` ``conv2d`` or ``linear`` for one engine; geometry as the operator takes it."""
        packer = self.conv2d_pack if kind == "conv2d" else self.linear_pack
        with _engine(engine.name):
            return packer(weight, bias, *geometry)


@cache
def unary_operator(name: str) -> Callable[..., Tensor] | None:
    """torch's function of one quantized tensor by its qualified name; None where there is none."""
    return _find(name, "default", "input", "output_scale", "output_zero_point") if name else None


def _find(name: str, overload: str, *arguments: str) -> Any:
    """The operator of that name whose arguments are named so; None where this torch has no such one."""
    space, short = name.split("::")
    try:
        found = getattr(getattr(getattr(torch.ops, space), short), overload)
    except (AttributeError, RuntimeError):
        return None
    return found if tuple(a.name for a in found._schema.arguments) == arguments else None


@contextmanager
def _engine(name: str) -> Iterator[None]:
    """Inside, torch packs for engine ``name``: which engine is one setting of the process, put back afterwards."""
    with _LOCK:
        before = torch.backends.quantized.engine
        setattr(torch.backends.quantized, "engine", name)  # noqa: B010
        try:
            yield
        finally:
            setattr(torch.backends.quantized, "engine", before)  # noqa: B010


def quantized_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 integers with one scale per row (axis 0) as torch's quantized tensor."""
    zeros = torch.zeros_like(scale, dtype=torch.int64)
    return torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)


@cache
def operators() -> Operators | None:
    """What this machine can use; None where torch lacks an operator or no engine computes right."""
    output = ("output_scale", "output_zero_point")
    conv2d = _find("quantized::conv2d", "new", "qx", "packed_weight", *output)
    geometry = ("stride", "padding", "dilation", "groups")
    conv2d_pack = _find("quantized::conv2d_prepack", "default", "weight", "bias", *geometry)
    linear = _find("quantized::linear", "default", "X", "W_prepack", "Y_scale_i", "Y_zero_point_i")
    linear_pack = _find("quantized::linear_prepack", "default", "W", "B")
    scaled = ("X", "X_scale", "X_zero_point", "W_prepack")
    linear_float = _find("quantized::linear_with_input_q_dq_qweight_dq_output_fp32", "default", *scaled)
    add = _find("quantized::add", "default", "qa", "qb", "scale", "zero_point")
    mul = _find("quantized::mul", "default", "qa", "qb", "scale", "zero_point")
    norm = ("qx", "weight", "bias", "mean", "var", "eps", *output)
    affine = _find("quantized::batch_norm2d", "default", *norm)
    if None in (conv2d, conv2d_pack, linear, linear_pack, add, mul):
        return None
    found = Operators(conv2d, conv2d_pack, linear, linear_pack, linear_float, add, mul, affine, ())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_DEPRECATED, category=UserWarning)
        engines = tuple(e for name in ENGINES if (e := _checked(found, name)) is not None)
    return replace(found, engines=engines) if engines else None


def engine_named(found: Operators, name: str) -> Engine | None:
    """The engine of that name, if it passed the check."""
    return next((engine for engine in found.engines if engine.name == name), None)


def _checked(found: Operators, name: str) -> Engine | None:
    """Engine ``name`` if it exists and multiplies small numbers exactly, and whether it saturates with large ones."""
    if name not in torch.backends.quantized.supported_engines:
        return None
    engine = Engine(name, frozenset())
    try:
        if not all(_is_exact(found, engine, groups, 3) for groups in KINDS.values()):
            return None
        return Engine(name, frozenset(k for k, groups in KINDS.items() if not _is_exact(found, engine, groups, 127)))
    except (RuntimeError, NotImplementedError):
        return None


def _is_exact(found: Operators, engine: Engine, groups: int, largest: int) -> bool:
    """Whether a convolution and a linear layer with weights up to ``largest`` give the integers that they should."""
    generator = torch.Generator().manual_seed(groups)
    high = 256 if largest > 64 else 16
    q = torch.randint(high // 2, high, (2, 16, 5, 4), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-largest, largest + 1, (16, 16 // groups, 3, 3), generator=generator, dtype=torch.int8)
    weight[: 16 // 2] = weight[: 16 // 2].abs()
    scale = torch.full((16,), 2.0 ** -(13 if largest > 64 else 6))
    bias = torch.full((16,), 0.001)  # no sum lies half way between integers
    x, packed_weight = q.contiguous(memory_format=torch.channels_last), quantized_weight(weight, scale)
    pairs = []
    for z_x, z_y in ((0, 0), (5, 3)):
        packed = found.pack("conv2d", engine, packed_weight, bias, [1, 1], [1, 1], [1, 1], groups)
        real = q.double() - z_x
        sums = F.conv2d(real, weight.double() * float(scale[0]), bias.double(), padding=1, groups=groups)
        got = found.conv2d(torch._make_per_tensor_quantized_tensor(x, 1.0, z_x), packed, 1.0, z_y).int_repr()
        pairs.append((got, sums + z_y))
    rows = weight.flatten(1)
    flat = q.flatten(1)[:, : rows.shape[1]].contiguous()
    packed = found.pack("linear", engine, quantized_weight(rows, scale), bias)
    products = flat.double() @ rows.double().t() * float(scale[0]) + bias.double()
    line = found.linear(torch._make_per_tensor_quantized_tensor(flat, 1.0, 0), packed, 1.0, 3).int_repr()
    pairs.append((line, products + 3))
    return all(torch.equal(a, torch.round(b).clamp(0, 255).to(torch.uint8)) for a, b in pairs)
