"""The quantizer of one tensor: it finds a range, and rounds to the grid that covers it.

A quantizer belongs to the module that produces the tensor; modules whose values pass through hold the same object. It is
in one of four states, which the verbs of ``flow`` switch:

    observing   folds what passes into the range, rounds nothing            while calibrating
    tracking    folds and rounds                                            QAT, in training mode
    ready       rounds                                                      after calibration; in eval mode
    off         lets everything pass                                        inside ``quantizers_off``

What it knows lives in buffers: see ``grid_state``.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import InputError, LevelError
from fxquant.nn.grid import Grid
from fxquant.nn.grid_state import GridState
from fxquant.nn.pinning import Pinned
from fxquant.nn.processes import fold_of_all, warn_if_alone
from fxquant.nn.switch import Switch
from fxquant.numerics.affine import scale_and_zero_point
from fxquant.numerics.gradients import fake_quantize, traces
from fxquant.numerics.pairs import scale_factor
from fxquant.numerics.ranges import ESTIMATOR, Auto
from fxquant.numerics.scheme import OBSERVED, Scheme

__all__ = ["FakeQuantize", "Grid", "WeightQuantize"]


class FakeQuantize(GridState):
    """Quantizes and dequantizes a tensor, so that it holds only values that its integer grid has.

    Args:
        scheme: the grid.
        axis: channel axis where ``scheme.per_channel``.
        channels: number of channels along ``axis``.
        fixed_range: ``(low, high)`` known in advance; then nothing is ever observed.
        fixed_grid: ``(scale, zero_point)`` prescribed, likewise.

    Attributes:
        tracking: whether the range follows what passes in training mode; set it to False to hold the range still.
        delayed: whether values still pass unrounded while the range follows them (``training.Schedule``).
        ready: whether there is a range to round to.
        synchronized: whether it follows what all processes of a group see; see ``processes``.
        takes_estimator: whether its range, or where a learned one starts, is what the scheme's estimator finds.
        seen_dtype: that of whole numbers that it was given and could not find a range of.

    Buffers:
        scale: float32, ``()`` or ``(channels,)``; 0 as long as no range is known.
        zero_point: int32, of the same shape.
        origin: float32, of the same shape: ``zero_point`` as a real number, which averages.
        known: float32, ``()``: 1 where a range is known, else 0; a share of 1 in an average.
        range_*: the running state of the range estimator.
        follows: ``tracking``.
    """

    seen_dtype: torch.dtype | None = None
    synchronized = False
    delayed = False
    keeps_bits = ""
    """Why ``set_bits`` cannot change its bits; empty where it can."""
    tracking = Switch("follows", initial=False)
    follows_graph = True
    takes_estimator = True

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
            step, zero = fixed_grid
            fixed_range = (scheme.qmin - zero) * step, (scheme.qmax - zero) * step
        self.scheme, self.axis, self.channels, self.fixed_range = scheme, axis, channels, fixed_range
        shape = () if channels is None else (channels,)
        self.make_grid(shape)
        self._state_names: list[str] = []
        self.enabled, self.observing = True, False
        if fixed_range is not None:
            self.set_range(*(torch.full(shape, float(bound)) for bound in fixed_range))
            if fixed_grid is not None:
                self.set_grid(torch.tensor(fixed_grid[0]), torch.tensor(fixed_grid[1]))
            return
        if self.averages:
            self.tracking = False
        for name, value in ESTIMATOR[scheme.estimator].initial_state(channels).items():
            self.register_buffer(f"range_{name}", value)
            self._state_names.append(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse a learned scale where rounding is not a rule's own: the grid is computed, and gets no gradient."""
        own = type(self).rounded is not FakeQuantize.rounded
        if param is not None and not own and type(self).forward in (FakeQuantize.forward, WeightQuantize.forward):
            raise LevelError(
                f"{name!r} of a {type(self).__name__} cannot be a parameter: its forward computes the grid from what it "
                "sees, and gives it no gradient.\n  what to do: name a rule that learns it, Scheme(quantizer='lsq'); or "
                "subclass it, override rounded (or all of it: override forward), and let its property grid give the scale "
                "that it rounds with (see fxquant.quantizers)."
            )
        super().register_parameter(name, param)

    @property
    def grid(self) -> Grid:
        self._settle()
        return Grid(self.scale.detach().clone(), self.zero_point.detach().clone(), self.scheme)

    @property
    def active(self) -> bool:
        """Whether values are rounded now."""
        return self.enabled and not self.observing and not self.delayed and self.ready

    @property
    def own_bits(self) -> int:
        """The bits that it was made with."""
        bits: int = self.__dict__.get("_own_bits", self.scheme.bits)
        return bits

    @torch.no_grad()
    def set_bits(self, bits: int) -> None:
        """Give the grid other bits from now on; its step is scaled by two to the number of those taken away.

        A range that is observed or fixed is covered anew.
        """
        self.__dict__.setdefault("_own_bits", self.scheme.bits)
        grid, before = self.grid, self.scheme
        self.scheme = replace(before, bits=bits)
        if not self.ready:
            return
        if self.fixed_range is not None:
            self.set_range(*(torch.full_like(grid.scale, float(bound)) for bound in self.fixed_range))
            return
        factor = 2.0 ** (before.bits - bits)
        origin = self.scheme.qmin + torch.round((grid.zero_point - before.qmin) / factor)
        exact = torch.zeros_like(origin) if before.signed else torch.full_like(origin, 2.0 ** (bits - 1))
        self.take_grid(grid.scale * factor, exact if before.symmetric else origin)
        self._cover_observed()

    def _cover_observed(self) -> None:
        state = self.range_state()
        if bool((torch.isfinite(state["low"]) & torch.isfinite(state["high"])).all()):
            self.update_scale()

    def upgrade_state(self, state: dict[str, Any], prefix: str) -> None:
        """Rewrite what an older version saved of this quantizer: the estimator that ``auto`` chose, as a number."""
        old = state.pop(f"{prefix}range_choice", None) if "auto" in self._state_names else None
        if old is not None:
            own = {name: value.clone() for name, value in self.range_state().items()}
            Auto().choose(own, old.to(own["auto"].device))
            state[f"{prefix}range_auto"] = own["auto"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.upgrade_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

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
        """Observe ``x``, and give it ``rounded``, as the state of the quantizer says.

        While no rounding happens the clamp does not happen either: it is the caller's, who merged it into this call.
        With ``observes=False`` the range is left alone: it is another tensor's.
        """
        if observes and self.enabled and (self.observing or self.follows_now()):
            self.observe(x, lower=lower, upper=upper)
        if not self.active or not x.is_floating_point():
            return x
        return self.rounded(x, lower, upper, inplace)

    def follows_now(self) -> bool:
        """Whether the range follows what passes, without being calibrated."""
        return self.training and self.tracking

    def rounded(
        self, x: Tensor, lower: float | None = None, upper: float | None = None, inplace: bool = False
    ) -> Tensor:
        """``x`` clamped to ``[lower, upper]`` and on the grid, with the rule's gradient; called while ``active``."""
        y = fake_quantize(
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
        if traces():
            return self.where_known(y, x)
        if self.tracking and not self.training and y.requires_grad:
            y.register_hook(_warn_left_behind)
        return y

    @torch.no_grad()
    def observe(self, x: Tensor, *, lower: float | None = None, upper: float | None = None) -> None:
        """Fold ``x`` into the running range; while tracking, follow it with scale and zero point at once.

        While tracking, a batch with NaN or infinity leaves the range as it was, and so does a forward pass inside a
        backward pass: that is activation checkpointing, which runs again what was observed already.

        A mask has the range of all masks, and passes unrounded: 0 and 1 are on its grid. Whole numbers have none.

        Raises:
            InputError: ``x`` is no tensor.
        """
        if not isinstance(x, Tensor):
            raise InputError(
                f"an input of the model is a {type(x).__module__}.{type(x).__name__}, where its graph reads a tensor.\n"
                "  what to do: give tensors, as torch.from_numpy(array); batches of another form need forward=."
            )
        if x.dtype == torch.bool:
            x = torch.tensor([0.0, 1.0], device=x.device)
        if not x.is_floating_point():
            self.seen_dtype = x.dtype
        if self.fixed_range is not None or not x.is_floating_point() or (x.numel() == 0 and not self.synchronized):
            return
        state, estimator = self.range_state(), ESTIMATOR[self.scheme.estimator]
        if self.observing:
            estimator.update(state, x.detach(), axis=self.axis, lower=lower, upper=upper)
            return
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        self._start_anew(state)
        before = {name: value.clone() for name, value in state.items()}
        if self.synchronized:
            fold_of_all(estimator, state, x.detach(), lower=lower, upper=upper)
        else:
            estimator.update(state, x.detach(), axis=self.axis, lower=lower, upper=upper)
            warn_if_alone()
        finite = (torch.isfinite(state["low"]) & torch.isfinite(state["high"])).all()
        for name, value in state.items():
            value.copy_(torch.where(finite, value, before[name]))
        self.update_scale()
        if not self.ready:
            warnings.warn(
                "NaN or infinity in the first batch that a quantizer of this model saw: it has no range, and lets its "
                f"tensor {tuple(x.shape)} pass unrounded until a finite batch comes.",
                stacklevel=2,
            )

    def _start_anew(self, state: dict[str, Tensor]) -> None:
        """Forget a range that is NaN: averages of models make such of the infinities that stand for no range."""
        lost = (torch.isnan(state["low"]) | torch.isnan(state["high"])).any()
        for name, value in ESTIMATOR[self.scheme.estimator].initial_state(self.channels, device=lost.device).items():
            if name != "auto":
                state[name].copy_(torch.where(lost, value, state[name]))

    @torch.no_grad()
    def update_scale(self) -> None:
        """Compute scale and zero point from what was observed; without any observation nothing changes."""
        if self.fixed_range is not None:
            return
        state = self.range_state()
        if torch.compiler.is_compiling():
            low, high = ESTIMATOR[self.scheme.estimator].range(state, self.scheme)
            holds = (torch.isfinite(low) & torch.isfinite(high)).all()
            self.follow_grid(*scale_and_zero_point(low, high, self.scheme), holds)
            return
        if not self._ready and not bool((torch.isfinite(state["low"]) & torch.isfinite(state["high"])).all()):
            return
        self.set_range(*ESTIMATOR[self.scheme.estimator].range(state, self.scheme))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Cover ``[low, high]``."""
        self.take_grid(*scale_and_zero_point(low, high, self.scheme))

    def reset(self) -> None:
        """Forget every observation, but not which estimator was chosen."""
        for name, value in ESTIMATOR[self.scheme.estimator].initial_state(self.channels).items():
            if name != "auto":
                self.get_buffer(f"range_{name}").copy_(value)

    def extra_repr(self) -> str:
        if not self.ready:
            return f"{self.scheme}, not calibrated"
        if self.scale.ndim:
            return f"{self.scheme}, scale {self.scale.min().item():.3g}…{self.scale.max().item():.3g}"
        return f"{self.scheme}, scale {self.scale.item():.4g}, zero point {int(self.zero_point)}"


def _warn_left_behind(gradient: Tensor) -> None:
    warnings.warn(
        "a backward pass through quantizers in eval mode: their ranges do not follow what passes.\n"
        "  what to do: if this trains the model, call .train() on the whole of it, and hold batch norms still with "
        "fxquant.freeze_batchnorm or with .eval() on them alone.",
        stacklevel=2,
    )


class WeightQuantize(Pinned, FakeQuantize):
    """The quantizer of a parameter: its range is read off the parameter in every pass, whoever has changed it.

    Where sums of two products have to fit into 16 bits (``limit_pairs``) the scales of channels that would leave them are
    raised, by the least factor that is enough; see ``numerics.pairs``.

    Attributes:
        pinned: whether the grid stays as it is instead; and the integers too, where ``pin`` was given some.
        is_shared: whether several layers or calls of one graph read the weight through this quantizer.

    Buffers, where pairs are limited:
        reach: float32 ``(groups, input channels of a group)``, the largest byte that each input channel is expected to hold.
        seen: float32, the largest real number that calibration saw there; -inf where it saw none.
    """

    pinned = Switch("is_pinned", initial=False)
    averages = False
    is_shared = False
    reach: Tensor
    seen: Tensor

    def __init__(self, scheme: Scheme, *, axis: int | None = None, channels: int | None = None) -> None:
        super().__init__(scheme, axis=axis, channels=channels)
        self.pinned = False
        self.out_axis: int | None = None

    def forward(
        self,
        x: Tensor,
        lower: float | None = None,
        upper: float | None = None,
        inplace: bool = False,
        observes: bool = True,
    ) -> Tensor:
        if self.enabled and not self.pinned:
            self.refresh(x)
        if not self.active or not x.is_floating_point():
            return x
        return self.rounded(x) if self.integers is None else self.as_pinned(x)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Recompute scale and zero point from ``weight``."""
        self.read_range(weight)
        self._keep_pairs(weight.detach())

    @torch.no_grad()
    def read_range(self, weight: Tensor) -> None:
        """Cover the range that the estimator finds in ``weight``."""
        self.reset()
        estimator, state = ESTIMATOR[self.scheme.estimator], self.range_state()
        estimator.update(state, weight.detach(), axis=self.axis)
        self.set_range(*estimator.range(state, self.scheme))

    def limit_pairs(self, out_axis: int, groups: int, inputs: int, largest: int) -> None:
        """Keep sums of two products within 16 bits, for ``groups * inputs`` input channels of bytes up to ``largest``.

        A weight that several calls read keeps the bounds of all: where their groups differ, those of every group.
        """
        if self.out_axis is None:
            self.register_buffer("reach", torch.full((groups, inputs), float(largest)))
            self.register_buffer("seen", torch.full((groups, inputs), float("-inf")))
        elif self.reach.shape != (groups, inputs):
            self.reach = self.reach.amax(0, keepdim=True) if out_axis == 0 else self.reach.reshape(1, -1)
            self.seen = torch.full_like(self.reach, float("-inf"))
        self.reach.clamp_(min=largest)
        self.out_axis = out_axis

    def _keep_pairs(self, weight: Tensor) -> None:
        if self.out_axis is not None:
            self.scale.mul_(self.pair_factor(weight, self.scale))

    def pair_factor(self, weight: Tensor, scale: Tensor) -> Tensor:
        """What ``scale`` has to be multiplied by so that no pair leaves 16 bits; only where pairs are limited."""
        assert self.out_axis is not None
        clipped = self.scheme.estimator != "minmax" or self.scheme.quantizer != OBSERVED
        bounds: dict[str, Any] = {"qmin": self.scheme.qmin, "qmax": self.scheme.qmax, "clipped": clipped}
        return scale_factor(weight.float(), scale, self.reach, out_axis=self.out_axis, **bounds)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A state from before pairs were limited has no bounds on inputs: those that are here stay."""
        if self.out_axis is not None and any(key.startswith(prefix) for key in state_dict):
            for name in ("reach", "seen"):
                state_dict.setdefault(f"{prefix}{name}", self._buffers[name])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def observe(self, x: Tensor, *, lower: float | None = None, upper: float | None = None) -> None:
        """Nothing: ``refresh`` has read the whole parameter already."""
