"""What quantization-aware training adds to a training loop: batch norm statistics, and the optimizer's groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fxquant.calibration import activation_quantizers
from fxquant.errors import CalibrationError, InputError
from fxquant.graph.leveled import LeveledModule
from fxquant.inputs import arguments_of, move_to
from fxquant.nn.fake_quantize import FakeQuantize
from fxquant.nn.processes import can_be_merged

__all__ = ["freeze_batchnorm", "parameter_groups", "reestimate_batchnorm", "synchronize"]


def freeze_batchnorm(prepared: nn.Module, frozen: bool = True) -> nn.Module:
    """Hold the statistics of every quantized batch norm still, in training mode too; γ and β go on training.

    For the last part of training, so that it sees the numbers that will be deployed (Krishnamoorthi, 1806.08342, §3.2).

    Example:
        >>> prepared = fxquant.prepare(model, images, qat=True).train()
        >>> fxquant.freeze_batchnorm(prepared)  # for the last epochs
    """
    parts: list[Any] = list(prepared.modules())
    for part in parts:
        if hasattr(part, "statistics_frozen"):
            part.statistics_frozen = frozen
    return prepared


@torch.no_grad()
def reestimate_batchnorm(
    prepared: LeveledModule,
    loader: Iterable[Any],
    *,
    batches: int = 100,
    forward: Callable[[LeveledModule, Any], Any] | None = None,
) -> LeveledModule:
    """Take the running statistics anew, as the mean over ``batches`` batches with quantizers on.

    Quantized weights drift from the averages that training kept; do this before converting, at 4 bits and below above
    all (Nagel et al., 2203.11086, §4.2). Ranges and weights stay as they are. Frozen statistics are taken anew too, and
    stay frozen afterwards.

    Example:
        >>> prepared = fxquant.prepare(model, images, qat=True).train()
        >>> fxquant.reestimate_batchnorm(prepared, loader, batches=50)

    Raises:
        CalibrationError: the loader is empty; then, and where a batch fails, nothing has changed.
    """
    norms: list[Any] = [part for part in prepared.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    frozen = [norm for norm in norms if getattr(norm, "statistics_frozen", False)]
    saved = [(n.training, n.momentum, {k: b.clone() for k, b in n.named_buffers(recurse=False)}) for n in norms]
    modes = {part: part.training for part in prepared.modules()}
    prepared.eval()
    count, complete = 0, False
    for norm in frozen:
        norm.statistics_frozen = False
    for norm in norms:
        norm.reset_running_stats()
        norm.training, norm.momentum = True, None
    try:
        for _, batch in zip(range(batches), loader, strict=False):
            args, kwargs = arguments_of(prepared, move_to(prepared, batch)) if forward is None else ((), {})
            prepared(*args, **kwargs) if forward is None else forward(prepared, batch)
            count += 1
        complete = count > 0
    finally:
        for norm in frozen:
            norm.statistics_frozen = True
        for norm, (_, momentum, buffers) in zip(norms, saved, strict=True):
            norm.momentum = momentum
            if not complete:
                for name, value in buffers.items():
                    getattr(norm, name).copy_(value)
        for part, mode in modes.items():
            part.training = mode
    if not count:
        raise CalibrationError("reestimate_batchnorm was given an empty loader; the statistics are as they were.")
    return prepared


def synchronize(prepared: nn.Module, synchronized: bool = True) -> nn.Module:
    """Let every range follow what all processes of the default group see, in training and in ``calibrate``.

    Call it in every process, before or after ``DistributedDataParallel`` or ``fully_shard``; it holds for this run and is
    not saved. Ranges are then those of one process that trains on the global batch (samples in the order of
    ``DistributedSampler``), and ``calibrate`` of a loader's shares gives the ranges of the whole loader; with
    ``estimator="moving_average"`` the widest of the processes' ranges. Each quantizer asks the others twice a step, so every
    process has to run every forward pass in training mode, as with ``torch.nn.SyncBatchNorm``, which does the same for the
    statistics of batch norms: ``SyncBatchNorm.convert_sync_batchnorm(prepared)``.

    Args:
        prepared: what ``prepare`` returned, wrapped or not; it is changed and returned.
        synchronized: False takes it back.

    Raises:
        InputError: nothing in it has a range, or one is found by a rule or an estimator whose state cannot be merged
            (``log_entropy``, estimators of your own); then nothing has changed.
    """
    quantizers = [part for part in prepared.modules() if isinstance(part, FakeQuantize)]
    if not quantizers:
        raise InputError(f"synchronize was given a {type(prepared).__name__} without quantizers: prepare it first.")
    follows = {name: one for name, one in activation_quantizers(prepared).items() if one.fixed_range is None}
    alone = [name for name, one in follows.items() if not can_be_merged(one)]
    if alone and synchronized:
        scheme = follows[alone[0]].scheme
        raise InputError(
            f"{len(alone)} ranges cannot be those of all processes, first that of {alone[0]!r}: what quantizer="
            f"{scheme.quantizer!r} with estimator={scheme.estimator!r} has seen cannot be merged.\n"
            "  what to do: name another rule or estimator in the recipe; or calibrate in one process before training."
        )
    for quantizer in quantizers:
        quantizer.synchronized = synchronized
    return prepared


def parameter_groups(
    prepared: nn.Module, groups: Iterable[Any] | None = None, *, lr: float | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """An optimizer's parameter groups, with one of its own for what quantizers learn: no weight decay, its learning rate.

    Args:
        prepared: what ``prepare`` returned.
        groups: parameters or groups, as the optimizer would be given them; what quantizers learn is taken out of them, and
            their other settings stay. By default one group of all other parameters.
        lr: the learning rate of what quantizers learn; the optimizer's own where it is left out.
        settings: other settings of that group. Its ``weight_decay`` is 0, unless it stands here.

    Returns:
        The groups, that of the quantizers last, where they learn anything. Parameters whose method wants weight decay
        (PACT) are in a group of their own behind it, without ``weight_decay``, which is then the optimizer's.

    Example:
        >>> torch.optim.SGD(fxquant.parameter_groups(prepared, lr=1e-3), lr=1e-2, momentum=0.9, weight_decay=1e-4)

    Raises:
        InputError: ``groups`` are neither parameters nor groups.
    """
    learned, decaying = dict[int, nn.Parameter](), dict[int, nn.Parameter]()
    for part in prepared.modules():
        if isinstance(part, FakeQuantize):
            chosen = decaying if getattr(part, "decays", False) else learned
            chosen.update({id(parameter): parameter for parameter in part.parameters() if parameter.requires_grad})
    given = list(prepared.parameters()) if groups is None else list(groups)
    given = [{"params": given}] if not any(isinstance(group, dict) for group in given) else given
    made = []
    for group in given:
        if not isinstance(group, dict) or "params" not in group:
            raise InputError(f"parameter_groups takes parameters or dicts with 'params', and was given {type(group)}.")
        held = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
        if not all(isinstance(one, torch.Tensor) for one in held):
            raise InputError("parameter_groups takes parameters, not pairs of names and parameters.")
        others = [one for one in held if id(one) not in learned and id(one) not in decaying]
        made.append({**group, "params": others})
    own = {} if lr is None else {"lr": lr}
    if learned:
        made.append({"params": list(learned.values()), **own, "weight_decay": 0.0, **settings})
    if decaying:
        made.append({"params": list(decaying.values()), **own, **settings})
    return [group for group in made if group["params"]]
