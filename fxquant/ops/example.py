"""Small models for the mandatory examples of the op table, and for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Applied", "Example", "example"]


@dataclass(frozen=True)
class Example:
    """A small model that contains an op with non-default attributes, and inputs for it."""

    module: nn.Module
    inputs: tuple[Tensor, ...]


class Applied(nn.Module):
    """A function as a model; modules given by name are its children and the function's first argument is the model."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        self.bound = bool(modules)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        return self.function(self, x, *more) if self.bound else self.function(x, *more)


class _Two(Applied):
    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x, y) if self.bound else self.function(x, y)


class _Three(Applied):
    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x, y, z) if self.bound else self.function(x, y, z)


class _One(Applied):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x) if self.bound else self.function(x)


class _After(nn.Module):
    """Something that passes values on, behind an op that makes them: alone it would have nothing to quantize."""

    def __init__(self, what: nn.Module | Callable[..., Any]) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what(x * 0.9)


def example(what: nn.Module | Callable[..., Any], *shapes: tuple[int, ...], behind_op: bool = False, seed: int = 0,
            **modules: nn.Module | nn.Parameter) -> Callable[[], Example]:  # fmt: skip
    """An example that is built when asked for.

    Args:
        what: a module, or a function of tensors.
        shapes: the tensors' shapes.
        behind_op: let ``what`` read the result of a multiplication.
        seed: of inputs and parameters.
        modules: children of the model; the function's first argument is then the model.
    """

    def build() -> Example:
        generator = torch.Generator().manual_seed(seed)
        inputs = tuple(torch.randn(shape, generator=generator) * 1.5 + 0.2 for shape in shapes)
        if behind_op:
            module: nn.Module = _After(what)
        elif isinstance(what, nn.Module):
            module = what
        else:
            module = (_One, _Two, _Three)[len(shapes) - 1](what, **modules)
        _randomize(module, generator)
        return Example(module.eval(), inputs)

    return build


def _randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Parameters and statistics away from their defaults, some scales negative: defaults hide lost attributes."""
    for part in module.modules():
        if isinstance(part, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
            for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                draw = torch.rand(tensor.shape, generator=generator)
                with torch.no_grad():
                    if name == "running_var":
                        tensor.copy_(0.5 + draw)
                    elif tensor.is_floating_point():
                        tensor.copy_(1.6 * draw - 0.6)
        elif isinstance(part, nn.Module) and next(part.parameters(recurse=False), None) is not None:
            for parameter in part.parameters(recurse=False):
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
