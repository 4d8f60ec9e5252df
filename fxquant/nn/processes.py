"""One range for all processes: what each of them saw, put together with PyTorch's collectives.

Each process sees its own share of a global batch. In training the ranges of all processes are what one process would have
found on the whole batch, its samples in the order of ``DistributedSampler``: the first of every process, then the second
of every process, and so on. After calibration, histograms and extrema are added up, which is exact in any order.

Every process has to come by: one that waits for others which never call waits for ever. Hence it is asked for, by
``fxquant.training.synchronize``, as PyTorch's own ``SyncBatchNorm`` is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.numerics.histogram import Histogram, MinMax, sample_extrema
from fxquant.numerics.ranges import ESTIMATOR, MovingAverage, RangeEstimator

__all__ = [
    "broadcast_state",
    "can_be_merged",
    "fold_of_all",
    "merge_calibrations",
    "of_all",
    "several",
    "warn_if_alone",
]


def several() -> bool:
    """Whether this is one of several processes of a group."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def warn_if_alone() -> None:
    """Say that each process follows its own batches, where several train together."""
    if several():
        warnings.warn(
            "several processes train this model, and each follows the ranges of its own batches: DistributedDataParallel "
            "keeps those of the first process, other wrappers let them drift apart.\n"
            "  what to do: fxquant.training.synchronize(prepared), in every process.",
            stacklevel=3,
        )


def of_all(value: Any) -> list[Any]:
    """Each process's ``value``, anything that pickles, by rank; of one process alone, its own."""
    if not several():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


@torch.no_grad()
def fold_of_all(
    estimator: RangeEstimator, state: dict[str, Tensor], x: Tensor, *, lower: float | None, upper: float | None
) -> None:
    """``estimator.update`` of one range with what all processes have for ``x``.

    Every process calls it, with an empty ``x`` too.

    Args:
        estimator, state, x, lower, upper: as of ``numerics.ranges.RangeEstimator.update``. ``state`` is the same in all
            processes before, and after.
    """
    if isinstance(estimator, Histogram):
        own = estimator.initial_state(None, device=x.device)
        estimator.update(own, x, axis=None, lower=lower, upper=upper)
        names = [name for name in own if name != "auto"]
        for parts in zip(*(_gathered(own[name]) for name in names), strict=True):
            estimator.merge(state, dict(zip(names, parts, strict=True)))
        return
    # The extrema of a sample's extrema are the sample's.
    estimator.update(state, _sample_extrema_of_all(x), axis=None, lower=lower, upper=upper)


def _sample_extrema_of_all(x: Tensor) -> Tensor:
    """Least and greatest value of each sample of the global batch, float32 ``(n, 2)``."""
    own = torch.stack(sample_extrema(x), 1) if x.numel() else torch.zeros(0, 2, device=x.device)
    counts = torch.stack(_gathered(torch.tensor(own.shape[0], device=x.device)))
    padded = own.new_zeros(int(counts.max()), 2)
    padded[: own.shape[0]] = own
    rows = torch.stack(_gathered(padded), 1)
    return rows[torch.arange(rows.shape[0], device=x.device)[:, None] < counts]


def _gathered(value: Tensor) -> list[Tensor]:
    """Each process's ``value``, all of one shape, by rank."""
    if not several():
        return [value]
    values = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(values, value.contiguous())
    return values


def can_be_merged(quantizer: Any) -> bool:
    """Whether what several processes know of a quantizer's range can be put together: extrema and histograms, no more."""
    estimator = ESTIMATOR[quantizer.scheme.estimator]
    known = isinstance(estimator, Histogram) or type(estimator) in (MinMax, MovingAverage)
    return known and set(quantizer.range_state()) == set(estimator.initial_state(None))


@torch.no_grad()
def merge_calibrations(
    estimator: RangeEstimator, state: dict[str, Tensor], founds: Iterable[Mapping[str, Tensor]]
) -> None:
    """Make ``state`` the one after all of ``founds``, each found from nothing on data of its own."""
    for found in founds:
        estimator.merge(state, {name: found[name].to(value.device) for name, value in state.items()})


@torch.no_grad()
def broadcast_state(parts: Iterable[nn.Module]) -> None:
    """Give every process the first one's buffers and parameters of ``parts``."""
    if several():
        for part in parts:
            for tensor in (*part.buffers(recurse=False), *part.parameters(recurse=False)):
                torch.distributed.broadcast(tensor.detach(), src=0)
