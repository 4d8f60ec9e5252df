"""The quantizer of one tensor: it finds a range, and rounds to the grid that covers it.

A quantizer belongs to the module that produces the tensor; modules whose values pass through hold the same object. It is
in one of four states, which the verbs of ``flow`` switch:

    observing   folds what passes into the range, rounds nothing            while calibrating
    tracking    folds and rounds                                            QAT, in training mode
    ready       rounds                                                      after calibration; in eval mode
    off         lets everything pass                                        inside ``quantizers_off``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.numerics.affine import scale_and_zero_point
from fxquant.numerics.gradients import fake_quantize
from fxquant.numerics.ranges import ESTIMATOR
from fxquant.numerics.scheme import Scheme

__all__ = ["FakeQuantize", "Grid", "WeightQuantize"]


@dataclass(frozen=True)
class Grid:
    """The integers a tensor is made of: ``x = (q - zero_point) * scale`` with ``qmin <= q <= qmax``."""

    scale: Tensor
    zero_point: Tensor
    scheme: Scheme

    @property
    def qmin(self) -> int:
        return self.scheme.qmin

    @property
    def qmax(self) -> int:
        return self.scheme.qmax

    @property
    def dtype(self) -> torch.dtype:
        return self.scheme.storage_dtype


class FakeQuantize(nn.Module):
    """Quantizes and dequantizes a tensor, so that it holds only values that its integer grid has.

    Args:
        scheme: the grid.
        axis: channel axis where ``scheme.per_channel``.
        channels: number of channels along ``axis``.
        fixed_range: ``(low, high)`` known in advance; then nothing is ever observed.
        fixed_grid: ``(scale, zero_point)`` prescribed, likewise.

    Buffers:
        scale: float32, ``()`` or ``(channels,)``; 0 as long as no range is known.
        zero_point: int32, of the same shape.
        range_*: the running state of the range estimator.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        scheme: Scheme,
        *,
        axis: int | None = None,
        channels: int | None = None,
        fixed_range: tuple[float, float] | None = None,
        fixed_grid: tuple[float, int] | None = None,
    ) -> None:
        super().__init__()
        if fixed_grid is not None:
            fixed_range = tuple((q - fixed_grid[1]) * fixed_grid[0] for q in (scheme.qmin, scheme.qmax))  # type: ignore[assignment]
        self.scheme, self.axis, self.channels, self.fixed_range = scheme, axis, channels, fixed_range
        shape = () if channels is None else (channels,)
        self.register_buffer("scale", torch.zeros(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
        self._state_names: list[str] = []
        self.enabled, self.observing, self.tracking, self.ready = True, False, False, False
        if fixed_range is not None:
            self.set_range(*(torch.full(shape, float(bound)) for bound in fixed_range))
            if fixed_grid is not None:
                self.set_grid(torch.tensor(fixed_grid[0]), torch.tensor(fixed_grid[1]))
            return
        for name, value in ESTIMATOR[scheme.estimator].initial_state(channels).items():
            self.register_buffer(f"range_{name}", value)
            self._state_names.append(name)

    @property
    def grid(self) -> Grid:
        return Grid(self.scale.detach().clone(), self.zero_point.detach().clone(), self.scheme)

    @property
    def active(self) -> bool:
        """Whether values are rounded now."""
        return self.enabled and self.ready and not self.observing

    def range_state(self) -> dict[str, Tensor]:
        """The estimator's running state, by name."""
        return {name: self._buffers[f"range_{name}"] for name in self._state_names}  # type: ignore[misc]

    def forward(
        self,
        x: Tensor,
        lower: float | None = None,
        upper: float | None = None,
        inplace: bool = False,
        observes: bool = True,
    ) -> Tensor:
        """Fake-quantize ``x`` clamped to ``[lower, upper]``; see ``numerics.gradients.fake_quantize``.

        While no rounding happens the clamp does not happen either: it is the caller's, who merged it into this call.
        With ``observes=False`` the range is left alone: it is another tensor's.
        """
        if observes and self.enabled and (self.observing or (self.training and self.tracking)):
            self.observe(x, lower=lower, upper=upper)
        if not self.active or not x.is_floating_point():
            return x
        return fake_quantize(
            x,
            self.scale,
            self.zero_point,
            self.scheme.qmin,
            self.scheme.qmax,
            axis=self.axis,
            lower=lower,
            upper=upper,
            inplace=inplace,
        )

    @torch.no_grad()
    def observe(self, x: Tensor, *, lower: float | None = None, upper: float | None = None) -> None:
        """Fold ``x`` into the running range; while tracking, follow it with scale and zero point at once."""
        if self.fixed_range is not None or not x.is_floating_point() or x.numel() == 0:
            return
        ESTIMATOR[self.scheme.estimator].update(
            self.range_state(), x.detach(), axis=self.axis, lower=lower, upper=upper
        )
        if not self.observing:
            self.update_scale()

    @torch.no_grad()
    def update_scale(self) -> None:
        """Compute scale and zero point from what was observed; without any observation nothing changes."""
        if self.fixed_range is not None:
            return
        state = self.range_state()
        if not self.ready and not bool(torch.isfinite(state["low"]).all()):
            return
        self.set_range(*ESTIMATOR[self.scheme.estimator].range(state, self.scheme))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Cover ``[low, high]``."""
        scale, zero_point = scale_and_zero_point(low, high, self.scheme)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.ready = True

    @torch.no_grad()
    def set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take over a given scale and zero point; a per-tensor grid becomes per channel where the scale is."""
        self.scale, self.zero_point = scale.float().clone(), zero_point.to(torch.int32).clone()
        self.ready = True

    def reset(self) -> None:
        """Forget every observation."""
        for name, value in ESTIMATOR[self.scheme.estimator].initial_state(self.channels).items():
            self._buffers[f"range_{name}"].copy_(value)  # type: ignore[union-attr]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Restores readiness with the scale; a float model's checkpoint, which knows no quantizer, loads as it is."""
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.ready = bool((self.scale > 0).all())

    def extra_repr(self) -> str:
        if not self.ready:
            return f"{self.scheme}, not calibrated"
        if self.scale.ndim:
            return f"{self.scheme}, scale {self.scale.min().item():.3g}…{self.scale.max().item():.3g}"
        return f"{self.scheme}, scale {self.scale.item():.4g}, zero point {int(self.zero_point)}"


class WeightQuantize(FakeQuantize):
    """The quantizer of a parameter: its range is read off the parameter in every pass, whoever has changed it."""

    def __init__(self, scheme: Scheme, *, axis: int | None = None, channels: int | None = None) -> None:
        super().__init__(scheme, axis=axis, channels=channels)
        self.frozen = False

    def forward(
        self,
        x: Tensor,
        lower: float | None = None,
        upper: float | None = None,
        inplace: bool = False,
        observes: bool = True,
    ) -> Tensor:
        if self.enabled and not self.frozen:
            self.refresh(x)
        return super().forward(x)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Recompute scale and zero point from ``weight``."""
        self.reset()
        estimator, state = ESTIMATOR[self.scheme.estimator], self.range_state()
        estimator.update(state, weight.detach(), axis=self.axis)
        self.set_range(*estimator.range(state, self.scheme))

    def observe(self, x: Tensor, *, lower: float | None = None, upper: float | None = None) -> None:
        """Nothing: ``refresh`` has read the whole parameter already."""
