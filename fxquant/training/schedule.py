"""What changes while a quantized model trains: when activations are rounded, ranges and batch norms held, bits taken away.

A schedule counts the steps of an optimizer and sets, for the number reached, what holds from then on. It depends on that
number alone, so that a run that was stopped goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import InputError, RecipeError, Refusal
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.quantizers import RULES
from fxquant.quantizers.learned import LearnedRange
from fxquant.training.loop import freeze_batchnorm as freeze_norms

__all__ = ["Schedule"]


class Schedule:
    """The phases of quantization-aware training. Call ``step()`` after each step of the optimizer.

    Args:
        prepared: what ``prepare(..., qat=True)`` returned, or a module that holds it. What holds at step 0 is set at once.
        round_activations: after so many steps activations begin to be rounded; until then ranges follow, in training mode,
            and values pass, in eval mode too (Jacob et al., 1712.05877, §3.1). Learned ranges that nothing was calibrated
            for start from the first batch that is rounded.
        stop_observing: after so many steps observed ranges stay as they are.
        freeze_batchnorm: after so many steps batch norms keep their statistics (``fxquant.freeze_batchnorm``).
        bits: from numbers of steps to bits: ``{0: 8, 500: 4, 1000: 2}``. From each on, weights and activations have so many,
            or those of the recipe where these are more; tensors whose range is known in advance keep theirs. It ends
            with the recipe's bits. A learned step is doubled with each bit taken away, a learned range (PACT, TQT) stays.

    Attributes:
        count: how many steps were done.

    Example:
        >>> schedule = fxquant.Schedule(prepared, bits={0: 8, 500: 4}, freeze_batchnorm=800)
        >>> optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
        >>> for images in loader:
        ...     prepared(images).square().mean().backward()
        ...     optimizer.step()
        ...     schedule.step()

    Raises:
        InputError: a number of steps is negative, the last bits are not the recipe's, or ``prepared`` has no quantizer.
        RecipeError: a rule has no grid of as many bits.
    """

    def __init__(
        self,
        prepared: nn.Module,
        *,
        round_activations: int = 0,
        stop_observing: int | None = None,
        freeze_batchnorm: int | None = None,
        bits: Mapping[int, int] | None = None,
    ) -> None:
        self.prepared, self.count = prepared, 0
        self.round_activations, self.stop_observing = round_activations, stop_observing
        self.freeze_batchnorm, self.bits = freeze_batchnorm, dict(sorted((bits or {}).items()))
        self._quantizers = {n: q for n, q in prepared.named_modules() if isinstance(q, FakeQuantize)}
        self._replaced: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        self._require_sense()
        for name, quantizer, wanted in self._changes():
            before = _state(quantizer)
            quantizer.set_bits(wanted)
            self._replaced[name] = before, _state(quantizer)
        self._apply(anew=True)

    def step(self) -> None:
        """Count one step of the optimizer, and change what changes there."""
        self.count += 1
        for _, quantizer, wanted in self._changes():
            quantizer.set_bits(wanted)
        self._apply(anew=False)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and the schedule itself, as plain data."""
        return {"count": self.count, "schedule": self._plain()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; the model's own state is to be loaded too, before or after.

        Raises:
            InputError: it is another schedule's.
        """
        own = self._plain()
        given = dict(state["schedule"])
        given["bits"] = {int(at): int(bits) for at, bits in given["bits"].items()}  # JSON makes keys strings
        if given != own:
            changed = ", ".join(
                f"{key}={given.get(key)!r} and not {value!r}" for key, value in own.items() if given.get(key) != value
            )
            raise InputError(
                f"this state is of a schedule with {changed}.\n  what to do: make the schedule as it was made then."
            )
        self.go_to(int(state["count"]))

    def go_to(self, count: int) -> None:
        """Set what holds after ``count`` steps, for a model whose state is that of then: no range is scaled."""
        self.count = count
        for name, quantizer, wanted in self._changes():
            before, after = self._replaced.get(name, ({}, {}))
            now = _state(quantizer)
            if after and all(torch.equal(now[key], value) for key, value in after.items()):
                _restore(quantizer, before)  # it was loaded before this schedule was made, which then changed it
            quantizer.scheme = replace(quantizer.scheme, bits=wanted)
        self._replaced.clear()
        self._apply(anew=True)

    def lightning_callback(self) -> Any:
        """A callback for Lightning's ``Trainer`` that steps with the optimizer, and is saved in its checkpoints.

        Raises:
            MissingPackageError: ``lightning`` is not installed.
        """
        from fxquant.training.callbacks import lightning_callback

        return lightning_callback(self)

    def trainer_callback(self) -> Any:
        """A callback for Hugging Face's ``Trainer``, whose number of steps the schedule follows, resumed runs included.

        Raises:
            MissingPackageError: ``transformers`` is not installed.
        """
        from fxquant.training.callbacks import trainer_callback

        return trainer_callback(self)

    def _plain(self) -> dict[str, Any]:
        names = ("round_activations", "stop_observing", "freeze_batchnorm")
        return {**{name: getattr(self, name) for name in names}, "bits": dict(self.bits)}

    def _apply(self, *, anew: bool) -> None:
        """Set what begins at this step; ``anew``, all that has begun."""

        def begins(at: int | None) -> bool:
            return at is not None and (self.count >= at if anew else self.count == at)

        tensors = [q for q in self._quantizers.values() if not isinstance(q, WeightQuantize)]
        for quantizer in tensors:
            quantizer.delayed = self.count < self.round_activations
            if (
                begins(self.stop_observing)
                and quantizer.fixed_range is None
                and not isinstance(quantizer, LearnedRange)
            ):
                quantizer.tracking = False
        if begins(self.freeze_batchnorm):
            freeze_norms(self.prepared)

    def _changes(self) -> Iterator[tuple[str, FakeQuantize, int]]:
        """The quantizers that do not have the bits of now, by name, and how many these are."""
        begun = [bits for at, bits in self.bits.items() if at <= self.count]
        if begun:
            for name, quantizer in self._scheduled():
                wanted = max(quantizer.own_bits, begun[-1])
                if wanted != quantizer.scheme.bits:
                    yield name, quantizer, wanted

    def _scheduled(self) -> Iterator[tuple[str, FakeQuantize]]:
        for name, quantizer in self._quantizers.items():
            if type(quantizer) is not FakeQuantize or quantizer.fixed_range is None:
                yield name, quantizer

    def _require_sense(self) -> None:
        if not self._quantizers:
            raise InputError(
                f"a {type(self.prepared).__name__} without quantizers: give what fxquant.prepare returned."
            )
        numbers = (self.round_activations, self.stop_observing, self.freeze_batchnorm, *self.bits)
        if any(number is not None and number < 0 for number in numbers):
            raise InputError(f"a schedule counts steps from 0, and was given {self._plain()}.")
        for name, quantizer in self._scheduled() if self.bits else ():
            last = list(self.bits.values())[-1]
            if last > quantizer.own_bits:
                raise InputError(
                    f"the schedule ends with {last} bits, and the recipe has {quantizer.own_bits} for {name}.\n"
                    f"  what to do: end it with {quantizer.own_bits}; layers that the recipe gives more keep theirs."
                )
            self._require_grids(name, quantizer)

    def _require_grids(self, name: str, quantizer: FakeQuantize) -> None:
        kind = "weight" if isinstance(quantizer, WeightQuantize) else "tensor"
        for bits in {max(quantizer.own_bits, bits) for bits in self.bits.values()} - {quantizer.scheme.bits}:
            rule = RULES[quantizer.scheme.quantizer]
            refused = rule.refusal(replace(quantizer.scheme, bits=bits), kind)
            if isinstance(quantizer, WeightQuantize) and quantizer.integers is not None:
                refused = Refusal("its rounding is pinned: unpin it, or leave bits out")
            if quantizer.keeps_bits:
                refused = Refusal(quantizer.keeps_bits)
            if refused is not None:
                raise RecipeError(f"{name} cannot have {bits} bits on the way: {refused}.")


def _tensors(quantizer: FakeQuantize) -> dict[str, Tensor]:
    return {**dict(quantizer.named_parameters(recurse=False)), **dict(quantizer.named_buffers(recurse=False))}


def _state(quantizer: FakeQuantize) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(quantizer).items()}


@torch.no_grad()
def _restore(quantizer: FakeQuantize, state: dict[str, Tensor]) -> None:
    for name, tensor in _tensors(quantizer).items():
        tensor.copy_(state[name])
    quantizer.read_state()
