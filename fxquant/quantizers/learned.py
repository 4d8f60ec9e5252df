"""What quantizers with a learned range share: the parameter, where it starts, what is frozen of it.

    parameter ──decode──▶ scale > 0 ──round_to_learned_grid──▶ values on the grid

A subclass says what its parameter is (``encode``, ``decode``) and which gradient it has (``gradients``). Before there is
a range the parameter is 0 and ``known`` is 0, and values pass unrounded. The range comes from ``calibrate``, or from the
first batch that is trained on; that of a weight from the weight. From then on the parameter belongs to the optimizer, and
the forward pass asks the device nothing.

An average of models that began before the first range holds the same share of the parameter and of ``known`` (see
``nn.grid_state``), so that parameter / known is the average over the steps that had a range.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import CalibrationError, InputError
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.nn.processes import several
from fxquant.numerics.affine import smallest_scale
from fxquant.numerics.learned_rounding import GradientRule, round_to_learned_grid

__all__ = ["LearnedRange", "LearnedTensor", "LearnedWeight", "learned_parameter"]


def learned_parameter(shape: tuple[int, ...]) -> nn.Parameter:
    """Zeros; of one number ``(1,)``: FSDP2 (``fully_shard``) takes no scalars."""
    return nn.Parameter(torch.zeros(shape or (1,)))


class LearnedRange(FakeQuantize):
    """The part that tensors' and weights' quantizers share.

    Parameters:
        step: float32, ``(1,)`` or ``(channels,)``: what is learned; the scale itself, unless a rule encodes it.

    Buffers:
        known: as of ``FakeQuantize``.
        origin: float32, of the same shape: the zero point as a real number.
    """

    gradients = GradientRule()
    decays = False
    """Whether the method wants weight decay on its parameters; ``fxquant.parameter_groups`` asks."""
    holds_range = False
    """Whether the parameter says where the range ends, whatever the bits, and not how far levels are apart."""
    step: nn.Parameter

    def make_grid(self, shape: tuple[int, ...]) -> None:
        self.step = learned_parameter(shape)
        self.register_buffer("origin", torch.zeros(shape))
        self.register_buffer("known", torch.zeros(()))
        self._ready = False

    def encode(self, scale: Tensor) -> Tensor:
        """The parameter for a scale; may be inexact where the rule has no such scale."""
        return scale

    def decode(self, step: Tensor) -> Tensor:
        """The scale for a parameter: positive whatever the optimizer has made of it, and differentiable."""
        return step.abs().clamp(min=smallest_scale())

    def learned_scale(self) -> Tensor:
        """The scale that ``forward`` rounds with, differentiable."""
        return self.decode(self.value_of(self.step))

    def value_of(self, parameter: Tensor) -> Tensor:
        """A parameter as it counts, of the grid's shape; differentiable."""
        return (parameter / self._share()).reshape(self.origin.shape)

    def offset(self) -> Tensor:
        """The zero point as a real number."""
        return self.origin / self._share()

    def _share(self) -> Tensor:
        return torch.where(self.known > 0, self.known, torch.ones_like(self.known))

    @torch.no_grad()
    def _scale(self) -> Tensor:
        """float32, ``()`` or ``(channels,)``, without gradient; 0 as long as no range is known."""
        scale = self.learned_scale()
        return torch.where(self.known > 0, scale, torch.zeros_like(scale))

    @torch.no_grad()
    def _zero_point(self) -> Tensor:
        """int32, of the scale's shape."""
        return torch.round(self.offset()).clamp(self.scheme.qmin, self.scheme.qmax).to(torch.int32)

    scale: Any = property(_scale)
    zero_point: Any = property(_zero_point)

    @property
    def ready(self) -> bool:
        """As of ``FakeQuantize``."""
        if not self._ready:
            self._ready = bool(self.known > 0)
        return self._ready

    @ready.setter
    @torch.no_grad()
    def ready(self, value: bool) -> None:
        if value:
            raise InputError("a quantizer is ready when it has a range: calibrate, train, set_range or set_grid.")
        self.known.zero_()
        self.step.zero_()
        self._ready = False

    @torch.no_grad()
    def take_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Start from a grid, or from the nearest that the rule has: of its scale, with zero where the grid has it."""
        self.known.fill_(1.0)
        self._ready = True
        self.step.copy_(self.encode(scale.to(self.step)).reshape(self.step.shape))
        shift = zero_point.to(self.origin) - self.scheme.qmin
        free = not self.scheme.symmetric and not self.scheme.per_channel
        shift = torch.round(shift * scale / self.scale) if free else shift
        self.origin.copy_((self.scheme.qmin + shift).reshape(self.origin.shape))

    def set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take over a given scale and zero point.

        Raises:
            InputError: there are more scales than this quantizer has.
        """
        if scale.numel() not in (1, self.step.numel()):
            raise InputError(
                f"a learned range of shape {tuple(self.step.shape)} was given scales {tuple(scale.shape)}."
            )
        self.take_grid(*(t.reshape(-1).expand(self.step.numel()).reshape(self.step.shape) for t in (scale, zero_point)))

    @torch.no_grad()
    def set_bits(self, bits: int) -> None:
        """As of ``FakeQuantize``; a parameter that says where the range ends stays what it is."""
        step, factor = self.step / self._share(), 1.0 if self.holds_range else 2.0 ** (self.scheme.bits - bits)
        super().set_bits(bits)
        if self.ready:
            self.step.copy_(step * factor)

    def _cover_observed(self) -> None:
        """Nothing: the range is the parameter's."""

    def read_state(self) -> None:
        """Follow buffers and parameters that were replaced from outside."""
        self.read_switches()
        self._ready = False

    def _settle(self) -> None:
        """Nothing: averages are divided by their share wherever they are read."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def _rounded(self, x: Tensor, scale: Tensor, lower: float | None = None, upper: float | None = None) -> Tensor:
        scheme = self.scheme
        return round_to_learned_grid(
            x,
            scale,
            self.zero_point,
            scheme.qmin,
            scheme.qmax,
            rule=self.gradients,
            offset=self._learned_offset(),
            axis=self.axis,
            lower=lower,
            upper=upper,
            gain=self.gain(x),
        )

    def _learned_offset(self) -> Tensor | None:
        """The number that gets the offset's gradient, in a rule that learns one."""
        return None

    def gain(self, x: Tensor) -> float:
        """The factor on the parameter's gradient: 1 / sqrt(N·qmax), N the numbers of one sample that share a scale.

        Source: LSQ, §2.2. N leaves the batch out, so that the learning rate does not depend on its size: the loss is a
        mean over the batch.
        """
        return float((self.shared_by(x) * self.scheme.qmax) ** -0.5)

    def shared_by(self, x: Tensor) -> int:
        """How many numbers of one sample share a scale."""
        return max(1, x.numel() // max(1, x.shape[0])) if x.ndim else 1


class LearnedTensor(LearnedRange):
    """The quantizer of a tensor whose range is learned.

    In training mode, a range that nothing has set yet starts from the first batch, as the scheme's estimator has it. Where
    several processes train, each would start from a batch of its own: calibrate before wrapping the model, or let them start
    from what all see (``fxquant.training.synchronize``).
    """

    def follows_now(self) -> bool:
        """Only until there is a range: from then on it is the parameter's."""
        return super().follows_now() and not self.delayed and not self._ready and not self.ready

    def observe(self, x: Tensor, *, lower: float | None = None, upper: float | None = None) -> None:
        """As of ``FakeQuantize``.

        Raises:
            CalibrationError: several processes would each start the range from a batch of its own.
        """
        if not self.observing and not self.synchronized:
            _require_one_process()
        super().observe(x, lower=lower, upper=upper)

    def rounded(
        self, x: Tensor, lower: float | None = None, upper: float | None = None, inplace: bool = False
    ) -> Tensor:
        return self._rounded(x, self.learned_scale(), lower, upper)


class LearnedWeight(LearnedRange, WeightQuantize):
    """The quantizer of a weight whose range is learned, per channel where the scheme is; it starts from the weight.

    Where pairs are limited (``limit_pairs``: weights of 8 bits, unless ``processor`` says otherwise) scales are widened in
    every pass by what this takes, which asks the device.

    Buffers, where pairs are limited:
        widened: float32, of the scale's shape: that factor, as of the last forward pass.
    """

    widened: Tensor

    def rounded(
        self, x: Tensor, lower: float | None = None, upper: float | None = None, inplace: bool = False
    ) -> Tensor:
        if self.out_axis is not None and not self.pinned:
            with torch.no_grad():
                bare = self.decode(self.value_of(self.step))
                self.widened.copy_(self.pair_factor(x.detach(), bare))
        scale = self.learned_scale()
        return self._rounded(x, scale.detach() if self.pinned else scale)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Start from ``weight``, unless there is a range already."""
        if not self.ready:
            self.read_range(weight)

    def learned_scale(self) -> Tensor:
        scale = super().learned_scale()
        # The clone: another call of this weight may write the buffer before the backward pass.
        return scale if self.out_axis is None else scale * self.widened.clone()

    def limit_pairs(self, out_axis: int, groups: int, inputs: int, largest: int) -> None:
        super().limit_pairs(out_axis, groups, inputs, largest)
        if "widened" not in self._buffers:
            self.register_buffer("widened", torch.ones_like(self.origin))

    def _keep_pairs(self, weight: Tensor) -> None:
        """Nothing: ``rounded`` widens the scale, whatever it has become."""

    def shared_by(self, x: Tensor) -> int:
        return max(1, x.numel() // self.step.numel())


def _require_one_process() -> None:
    """Refuse to start a range where several processes would each start another.

    Raises:
        CalibrationError: there are several.
    """
    if several():
        raise CalibrationError(
            f"a learned range has no start, and each of {torch.distributed.get_world_size()} processes would start it from "
            "a batch of its own.\n  what to do: fxquant.calibrate(prepared, loader) before the model is wrapped "
            "(DistributedDataParallel gives all processes what the first one found), or fxquant.training.synchronize("
            "prepared) in every process."
        )
