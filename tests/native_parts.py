"""What the tests of the native kernels share: small parts of networks, and which of them are kernels of their own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from native_oracle import Function, require_same
from torch import Tensor, nn

from fxquant import Recipe, Scheme, Setting
from fxquant.errors import Refusal
from fxquant.nn.accumulating import IntegerWeighted

__all__ = [
    "FORMS",
    "REFUSED",
    "SIGNED",
    "conv",
    "linear_parts",
    "mixed",
    "of_kind",
    "require_same_or_reason",
    "weighted",
]

REFUSED = re.compile(r"\w+( \([\w ]+\))?(:| has|,) .{8,}")
"""A reason names the node first."""
SIGNED = Recipe(default=Setting(activation=Scheme(symmetric=True, signed=True)), quantize_outputs=True)


def mixed() -> nn.Module:
    """Every kind of kernel in one small model."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        a = F.relu6(m.first(x))
        b = m.second(a) + a
        c = torch.cat([b, m.third(F.max_pool2d(b, 3, 1, 1)), F.avg_pool2d(a, 3, 1, 1)], 1)
        gate = torch.sigmoid(m.gate(F.adaptive_avg_pool2d(c, 1)))
        return m.head(torch.flatten(F.adaptive_avg_pool2d(F.hardswish(m.norm(c * gate)), (2, 1)), 1))

    return Function(
        forward,
        first=nn.Conv2d(3, 9, 3, stride=2, padding=1),
        second=nn.Conv2d(9, 9, 3, padding=1, groups=9),
        third=nn.Conv2d(9, 5, 1),
        gate=nn.Conv2d(23, 23, 1),
        norm=nn.BatchNorm2d(23),
        head=nn.Linear(46, 7),
    )


def require_same_or_reason(integer: Any, *calls: tuple[Any, ...]) -> str | None:
    """The reason why there is no native form, which has to name a node; None where the bits were the same."""
    try:
        require_same(integer, *calls)
    except Refusal as reason:
        assert REFUSED.match(str(reason)), reason
        return str(reason)
    return None


def weighted(integer: nn.Module) -> list[IntegerWeighted]:
    return [part for part in integer.modules() if isinstance(part, IntegerWeighted)]


def of_kind(integer: nn.Module, kind: type) -> list[Any]:
    return [part for part in integer.modules() if isinstance(part, kind)]


FORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Conv2d(9, 35, 3, padding=1), (2, 9, 6, 7)),
    "pointwise": (lambda: nn.Conv2d(9, 35, 1), (2, 9, 6, 7)),
    "by lines": (lambda: nn.Conv2d(3, 35, 3), (2, 3, 8, 9)),
    "grouped": (lambda: nn.Conv2d(9, 33, 3, groups=3), (2, 9, 8, 9)),
    "depthwise": (lambda: nn.Conv2d(35, 35, 3, padding=1, groups=35), (2, 35, 6, 7)),
    "depthwise, few": (lambda: nn.Conv2d(9, 9, 3, padding=1, groups=9), (2, 9, 6, 7)),
    "depthwise, wide window": (lambda: nn.Conv2d(35, 35, 5, padding=2, groups=35), (2, 35, 6, 7)),
    "linear": (lambda: nn.Linear(9, 35), (50, 9)),
}


def conv(depth: int, channels: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(depth, channels, kernel, padding=kernel // 2, **options)


def linear_parts() -> dict[str, nn.Module]:
    return {
        "a": conv(5, 11),
        "b": conv(5, 11, 3),
        "c": conv(11, 11),
        "d": conv(11, 11, 3, groups=11),
        "drop": nn.Dropout2d(),
    }
