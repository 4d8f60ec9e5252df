"""What the tests of the fast kernels share: models on them, the reference beside, and what has to agree."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import for_any_bytes
from torch import Tensor, nn

import fxquant
from fxquant.graph.leveled import RUNNER
from fxquant.kernels.agreement import Agreement
from fxquant.kernels.native.library import missing
from fxquant.kernels.operators import operators
from fxquant.kernels.runner import Runner

fast = pytest.mark.skipif(operators() is None, reason="torch has no int8 operators that are right on this machine")

needs_native = pytest.mark.skipif(missing() is not None, reason=f"native: {missing()}")
either = pytest.mark.parametrize("kernels", ["torch", pytest.param("auto", marks=needs_native)])
"""What is true of a call whatever computes it; ``auto`` is the native kernels."""


def converted(
    model: nn.Module,
    *inputs: Tensor,
    recipe: fxquant.Recipe | None = None,
    processor: str | None = None,
    **options: Any,
) -> Any:
    """The model, calibrated on ``inputs`` and converted for torch's operators, which its weights fit on any processor."""
    options.setdefault("kernels", "torch")
    prepared = fxquant.prepare(model.eval(), inputs, recipe=recipe, processor=processor)
    return fxquant.convert(for_any_bytes(fxquant.calibrate(prepared, [inputs], progress=False)), **options)


def of_reference(integer: Any) -> Any:
    """A copy that computes with the reference."""
    twin = copy.deepcopy(integer)
    twin.__dict__.pop(RUNNER, None)
    return twin


def require_agreement(found: list[Agreement], share: float = 0.999) -> None:
    """Every op within one step, float results within float32's rounding, and nearly all values equal."""
    assert found
    far = [a for a in found if a.worst > 1.0 or (a.equal < share * a.values - 1 and a.worst > 1e-5)]
    assert not far, far


def kernels_used(integer: Any) -> dict[str, str]:
    return next(reversed(runner_of(integer).programs.values())).kernels


def runner_of(integer: Any) -> Runner:
    runner = integer.__dict__[RUNNER]
    assert isinstance(runner, Runner)
    return runner


def signal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Mixed(nn.Module):
    """Convolutions, a residual add, squeeze and excitation, pools, cat, a hard swish and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.point, self.fc = nn.Conv2d(16, 16, 1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        y = F.hardswish(self.deep(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = F.relu(self.point(y * gate) + x)
        y = torch.cat([F.max_pool2d(y, 3, 2, 1), F.avg_pool2d(x, 2, ceil_mode=True)], 1)
        return self.fc(y.mean((2, 3)))
