"""The native kernels beside the reference, which computes in exact integers of 64 bits: the same bits, from any memory.

Every comparison runs twice, with all memory that the plan and its results take filled with zeros and with ones (NaN, in
floats) first: what is read before it was written, or never written at all, shows as a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comparisons import assert_same_bits, tensors_of
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxquant
from fxquant import Recipe
from fxquant.kernels.native.model import NativeModel

__all__ = ["ROUNDED", "Function", "integers_of", "poisoned", "require_same", "signal", "with_statistics"]

ROUNDED = Recipe(quantize_outputs=True)
"""Where a convolution is the last op, its result has to be rounded for the kernels."""


def signal(*shape: int, seed: int = 3, gain: float = 1.0, offset: float = 0.0) -> Tensor:
    return gain * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset


def with_statistics(model: nn.Module) -> nn.Module:
    """The model in eval mode with batch norms away from their defaults."""
    generator = torch.Generator().manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                part.running_mean.normal_(0, 0.1, generator=generator)
                part.running_var.uniform_(0.5, 1.5, generator=generator)
                part.weight.uniform_(-1.5, 1.5, generator=generator)
                part.bias.uniform_(-0.5, 0.5, generator=generator)
    return model.eval()


def integers_of(
    model: nn.Module, *inputs: Tensor, recipe: Recipe | None = ROUNDED, target: str = "x86", **options: Any
) -> Any:
    """The integer model on the reference's kernels, calibrated on ``inputs``: weights of 8 bits, whatever adds up in 16."""
    prepared = fxquant.prepare(with_statistics(model), inputs, recipe=recipe, target=target, processor="vnni")
    fxquant.calibrate(prepared, [inputs], progress=False)
    return fxquant.convert(prepared, kernels="reference", **options)


@contextmanager
def poisoned(value: int) -> Iterator[list[int]]:
    """Inside, fresh memory of bytes is full of ``value``, and of floats full of NaN; lists the sizes that were given."""
    made: list[int] = []
    before = {name: getattr(torch, name) for name in ("zeros", "empty")}

    def filled(name: str) -> Callable[..., Tensor]:
        def make(*shape: Any, **options: Any) -> Tensor:
            found = before[name](*shape, **options)
            if found.device.type == "cpu" and found.dtype == torch.uint8:
                made.append(found.numel())
                found.fill_(value)
            elif found.device.type == "cpu" and found.dtype == torch.float32:
                found.fill_(float("nan"))
            return found

        return make

    for name in before:
        setattr(torch, name, filled(name))
    try:
        yield made
    finally:
        for name, function in before.items():
            setattr(torch, name, function)


def require_same(integer: Any, *calls: tuple[Any, ...], values: int = 2) -> NativeModel:
    """The native model, after giving the reference's bits on each call, whatever was in memory before.

    Args:
        integer: the integer model.
        calls: the arguments of each call.
        values: how many different numbers the reference must give, lest nothing be compared.
    """
    with torch.no_grad():
        expected = [integer(*call) for call in calls]
    for result in expected:
        count = sum(len(t.unique()) for t in tensors_of(result))
        size = sum(t.numel() for t in tensors_of(result))
        assert count >= min(values, size), f"the reference gives {count} different numbers for {size}"
    for value in (0x00, 0xFF):
        native, sizes = NativeModel(integer), list[int]()
        for call, result in zip(calls, expected, strict=True):
            with poisoned(value) as made:
                found = native(*call)
            sizes += made
            assert_same_bits(found, result, f"memory full of {value}")
            assert pytree.tree_structure(found) == pytree.tree_structure(result)
        assert sizes, "the plans took their memory in a way that this test does not see"
    for call, result in zip(calls, expected, strict=True):
        assert_same_bits(native(*call), result, "after other shapes")
    return native


class Function(nn.Module):
    """A function of any number of tensors as a model, with modules of its own."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.function(self, x) if y is None else self.function(self, x, y)
