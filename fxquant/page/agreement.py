"""How the outputs of two models agree, over all batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxquant.analysis.batches import Forward, left_alone, run_batch, same_randomness
from fxquant.export.agreement import OutputAgreement, compare_output

__all__ = ["agreement"]


def agreement(
    model: nn.Module, integer: Any, kept: Sequence[Any], forward: Forward | None, notes: list[str]
) -> tuple[OutputAgreement, ...]:
    """Each output of the integer model against the float one's, all batches together."""
    pairs: list[tuple[list[Tensor], list[Tensor]]] = []
    with left_alone(model), left_alone(integer):
        for batch in kept:
            results = []
            for own in (integer, model):
                with same_randomness():
                    results.append([y for y in tree_leaves(run_batch(own, batch, forward)) if isinstance(y, Tensor)])
            pairs.append((results[0], results[1]))
    if any([y.shape for y in actual] != [y.shape for y in expected] for actual, expected in pairs):
        notes.append("outputs have other shapes than in float (as detections do), and are not compared one by one")
        return ()
    found = []
    for i, other in enumerate(pairs[0][1]):
        joined = other.ndim > 0 and len({y[1][i].shape[1:] for y in pairs}) == 1
        own = [torch.cat([y[side][i] for y in pairs]) if joined else pairs[0][side][i] for side in (0, 1)]
        if own[1].numel():
            found.append(compare_output(f"output {i}" if len(pairs[0][1]) > 1 else "output", own[0], own[1], None))
    return tuple(found)
