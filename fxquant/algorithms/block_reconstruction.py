"""Block reconstruction: learn all roundings, biases and activation steps of a residual unit from what the unit gives.

    min over V, b, s of  E‖y - ŷ‖² / e  +  λ·Σ_layers mean R(V)

(Li et al., BRECQ, 2102.05426, §3.2, eq. 10 with the identity in the place of the Fisher matrix, as the authors' code has
it.) y is the unit's float output; ŷ what it gives with soft roundings Ŵ(V) (see ``soft_rounding``), on what the quantized
units before it really give; e is the error that the unit has to begin with, so that λ means the same for every unit.

While it learns, each number that passes a quantizer, and each that enters the unit, stays as the float network has it with
probability ½ (Wei et al., QDrop, 2203.05740, §3.3). The step of each activation is learned with them, with LSQ's gradient
(Esser et al., 1902.08153, §2.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from fxquant.algorithms.blocks import Block, BlockSweep
from fxquant.algorithms.recover import buffers_of, kept_batches, learning, require_ready, restore, run_batch, tell
from fxquant.algorithms.soft_rounding import SoftRounding, annealed
from fxquant.capture.islands import Model
from fxquant.capture.values import unchanged
from fxquant.errors import InputError
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize

__all__ = ["reconstruct"]

_RATE = 2e-2
_RATE_OF_BIASES = 1e-3
_RATE_OF_STEPS = 1e-3
"""Of the logarithms of activation steps."""
_LAMBDA = 1.0


def reconstruct(
    prepared: Model,
    loader: Iterable[Any],
    *,
    steps: int = 500,
    batch_size: int = 32,
    keep: float = 0.5,
    learn_steps: bool = True,
    forward: Callable[[Any, Any], Any] | None = None,
    batches: int | None = None,
    memory: float = 2.0,
    seed: int = 0,
    progress: bool = True,
) -> Model:
    """Learn the roundings of each residual unit together, without labels; what ``recover`` has pinned is where it starts.

    A unit stays as it was unless its error is less afterwards, on the last quarter of the batches, which it does not
    learn from (on all of them where there are fewer than four).

    Example:
        >>> fxquant.recover(prepared, loader)
        >>> int8 = fxquant.convert(reconstruct(prepared, loader, steps=1000))

    Args:
        prepared: a calibrated model for post-training quantization; its quantizers are changed in place, and it is returned.
        loader: batches as for ``recover``, without labels. All are kept in memory.
        steps: of Adam, for each unit. The papers take 20,000.
        batch_size: samples of one step.
        keep: the probability with which a number is left as the float network has it while learning; 0 is BRECQ.
        learn_steps: also learn the steps of activations; False takes their ranges anew when the unit is done.
        forward, batches, memory, seed, progress: as of ``recover``.

    Raises:
        CalibrationError: the model is not calibrated, the loader is empty, or a batch is not finite; then the model is as it
            was before.
        InputError: ``keep`` lies outside of [0, 1), or a number is below 1.
        LevelError: the model is not a prepared one, or one for training.

    Source: Li et al., BRECQ, 2102.05426, §3; Wei et al., QDrop, 2203.05740, §3.3.
    """
    _require(steps, batch_size, keep)
    require_ready(prepared, "reconstruct")
    kept = kept_batches(loader, batches, "reconstruct")
    before = buffers_of(prepared)
    learner = _Learner(steps, batch_size, keep, learn_steps, torch.Generator().manual_seed(seed))
    try:
        with learning(prepared, "reconstruct"), unchanged(prepared, but=FakeQuantize), torch.no_grad():
            prepared.eval()
            run = partial(run_batch, prepared, kept, forward)
            label = "reconstruct" if progress else None
            sweep = BlockSweep(prepared, run, len(kept), refit=not learn_steps, memory=memory * 2**30, progress=label)
            with closing(iter(sweep)) as blocks:
                for block in blocks:
                    learner.reconstruct(cast(Any, block))
    except BaseException:
        restore(before)
        raise
    tell(sweep.left_out)
    return prepared


def _require(steps: Any, batch_size: Any, keep: Any) -> None:
    """Raise unless ``reconstruct`` can go on with these."""
    whole = all(isinstance(number, int) and number >= 1 for number in (steps, batch_size))
    if not whole or not 0.0 <= keep < 1.0:
        raise InputError(
            f"keep={keep!r} lies in [0, 1), steps={steps!r} and batch_size={batch_size!r} are whole numbers, at least 1."
        )


class _Learner:
    """Settings of a run, and one block's learning."""

    def __init__(self, steps: int, batch_size: int, keep: float, learn_steps: bool, generator: torch.Generator) -> None:
        self.steps, self.batch_size, self.keep, self.learn_steps = steps, batch_size, keep, learn_steps
        self.generator = generator

    def reconstruct(self, block: Block) -> None:
        """Pin what is learned for one block, where it is better than what there was."""
        own = [*block.weights, *block.steps]
        before = {part: {name: value.clone() for name, value in part.named_buffers(recurse=False)} for part in own}
        held_out = (
            range(block.batches - block.batches // 4, block.batches) if block.batches > 3 else range(block.batches)
        )
        learned = range(held_out.start or block.batches)
        with block.without_overwriting():
            error, unit = self._error(block, held_out), max(self._error(block, learned), 1e-30)
            soft = {part: SoftRounding(part, weight) for part, (weight, _) in block.weights.items()}
            biases = self._biases(block, soft)
            scales = {part: part.scale.detach().log().requires_grad_() for part in block.steps if self.learn_steps}
            with torch.enable_grad():
                self._learn(block, soft, biases, scales, learned, unit)
            for part, rounding in soft.items():
                bias = biases.get(part)
                part.pin(rounding.integers(), part.scale, None if bias is None else bias.detach())
            for step, scale in scales.items():
                step.set_grid(scale.detach().exp(), step.zero_point)
            if not self._error(block, held_out) < error:
                restore(before)

    def _biases(self, block: Block, soft: dict[WeightQuantize, SoftRounding]) -> dict[WeightQuantize, Tensor]:
        """What stands for each bias while learning: a leaf in the quantizer's place for it."""
        found = {}
        for part, (_, bias) in block.weights.items():
            now = None if bias is None else part.bias_for(bias)
            part.pin(soft[part].start, part.scale, now)
            if now is not None:
                found[part] = part._buffers["bias"] = now.detach().clone().requires_grad_()
        return found

    def _learn(
        self,
        block: Block,
        soft: dict[WeightQuantize, SoftRounding],
        biases: dict[WeightQuantize, Tensor],
        scales: dict[FakeQuantize, Tensor],
        learned: range,
        unit: float,
    ) -> None:
        roundings = torch.optim.Adam([rounding.v for rounding in soft.values()], lr=_RATE)
        real = [
            {"params": [*biases.values()], "lr": _RATE_OF_BIASES},
            {"params": [*scales.values()], "lr": _RATE_OF_STEPS},
        ]
        others = torch.optim.Adam([group for group in real if group["params"]] or [{"params": [torch.zeros(())]}])
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(others, self.steps)
        leaves = [rounding.v for rounding in soft.values()] + [*biases.values(), *scales.values()]
        with self._hooks(block, soft, scales):
            for step in range(self.steps):
                values, target = self._sample(block, learned)
                loss, beta = _lost(target, block.run(values)) / unit, annealed(step, self.steps)
                if beta is not None:
                    loss = loss + _LAMBDA * sum(
                        rounding.penalty(beta) / rounding.v.numel() for rounding in soft.values()
                    )
                for leaf in leaves:
                    leaf.grad = None
                loss.backward(inputs=leaves)
                roundings.step()
                others.step()
                slower.step()

    @contextmanager
    def _hooks(self, block: Block, soft: dict[WeightQuantize, SoftRounding], scales: dict[FakeQuantize, Tensor]) -> Any:
        """Inside, weights are soft, and activations are rounded with the scales that are learned, or not at all."""
        hooks = [part.register_forward_hook(partial(_soft, rounding)) for part, rounding in soft.items()]
        for step in block.steps:
            hooks.append(step.register_forward_hook(partial(self._dropped, scales.get(step)), with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _dropped(
        self, scale: Tensor | None, part: FakeQuantize, args: Any, kwargs: dict[str, Any], y: Tensor
    ) -> Tensor:
        x = args[0]
        lower, upper = (*args[1:], None, None)[:2] if len(args) > 1 else (kwargs.get("lower"), kwargs.get("upper"))
        x = x if lower is None and upper is None else x.clamp(lower, upper)
        y = y if scale is None else _learned(x, scale, part)
        return self._mixed(x, y)

    def _mixed(self, real: Tensor, rounded: Tensor) -> Tensor:
        if not self.keep:
            return rounded
        at = torch.rand(real.shape, generator=self.generator).to(real.device) < self.keep
        return torch.where(at, real, rounded)

    def _sample(self, block: Block, learned: range) -> tuple[list[Any], Tensor]:
        """What enters a block, floats and rounded numbers mixed, and what shall leave it, for some samples of one batch."""
        batch = int(torch.randint(len(learned), (1,), generator=self.generator))
        (floats, quantized), target, count = block.inputs(batch), block.target(batch), block.samples(batch)
        at: Any = None
        if count is not None and count > self.batch_size:
            at = torch.randperm(count, generator=self.generator)[: self.batch_size].to(target.device)
            target = target[at]
        values = []
        for node, real, rounded in zip(block.entering, floats, quantized, strict=True):
            if not isinstance(real, Tensor) or node.op == "get_attr" or not real.is_floating_point():
                values.append(rounded)
            elif at is None:
                values.append(self._mixed(real, rounded) if real.shape == rounded.shape else rounded)
            else:
                values.append(self._mixed(real[at], rounded[at]))
        return values, target

    def _error(self, block: Block, batches: range) -> float:
        """The error of a block as it would ship, the mean over ``batches``."""
        total = 0.0
        for batch in batches:
            _, quantized = block.inputs(batch)
            total += float(_lost(block.target(batch), block.run(quantized)).detach())
        return total / len(batches)


def _soft(rounding: SoftRounding, part: WeightQuantize, args: Any, y: Tensor) -> Tensor:
    return rounding.soft().to(y.dtype)


def _learned(x: Tensor, scale: Tensor, part: FakeQuantize) -> Tensor:
    """``x`` on the grid of the scale with the logarithm ``scale``, with LSQ's gradient for both."""
    scale, zero_point = scale.exp(), part.zero_point
    t = x / scale
    t = t + (torch.round(t) - t).detach()
    return (torch.clamp(t + zero_point, part.scheme.qmin, part.scheme.qmax) - zero_point) * scale


def _lost(target: Tensor, given: Tensor) -> Tensor:
    """The squared difference, summed over channels and averaged over the rest."""
    lost = (target.detach() - given).square()
    return lost.sum(1).mean() if lost.ndim > 1 else lost.mean()
