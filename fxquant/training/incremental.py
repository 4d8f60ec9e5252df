"""Weights quantized share by share: the largest are frozen on their powers of two, the rest makes up for it (INQ).

At each partition the largest weights of each layer that are not frozen yet become what their rule makes of them, so that the
given share of all is frozen; they stay so bit for bit, whatever the optimizer does. The others train on in float.
Source: Zhou et al., Incremental Network Quantization, 1702.03044, §2.2 and algorithm 1 (pruning-inspired partition).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import InputError
from fxquant.quantizers.inq import INQWeight
from fxquant.training.weights import weights_of

__all__ = ["IncrementalQuantization"]


class IncrementalQuantization:
    """Freezes weights of the rule ``inq`` share by share. Call ``step()`` after each step of the optimizer.

    Args:
        prepared: what ``prepare(..., qat=True)`` returned, with ``Scheme.weight(4, per_channel=False, quantizer="inq")``.
        shares: from numbers of steps to the share of each layer's weights that is frozen from then on, rising to 1; the
            paper's are ``{0: 0.5, n: 0.75, 2 * n: 0.875, 3 * n: 1.0}``.

    Attributes:
        count: how many steps were done.

    Raises:
        InputError: there is no such weight, or the shares do not rise to 1.
    """

    def __init__(self, prepared: nn.Module, shares: Mapping[int, float]) -> None:
        self.shares, self.count = dict(sorted(shares.items())), 0
        rising = [0.0, *self.shares.values()]
        if not self.shares or min(self.shares) < 0 or rising[-1] != 1.0 or rising != sorted(rising):
            raise InputError(f"shares={dict(shares)!r}: they rise to 1.0 with the number of steps.")
        found = [
            (name, part, w) for name, part, w in weights_of(prepared) if isinstance(part.weight_quantizer, INQWeight)
        ]
        folded = [name for name, part, _ in found if getattr(part, "folded_norm", None) is not None]
        if not found or folded:
            what = "has no weight of the rule inq" if not found else f"folds a batch norm before {folded[0]} is rounded"
            raise InputError(
                f"this {type(prepared).__name__} {what}.\n  what to do: prepare(..., qat=True) with weights of "
                'Scheme.weight(4, per_channel=False, quantizer="inq"), and batch norms late or frozen.'
            )
        self._weights: dict[str, tuple[INQWeight, Tensor]] = {n: (part.weight_quantizer, w) for n, part, w in found}
        self._frozen = {name: torch.zeros_like(w, dtype=torch.bool) for name, (_, w) in self._weights.items()}
        self._values = {name: w.detach().clone() for name, (_, w) in self._weights.items()}
        self._before = {name: value.clone() for name, value in self._values.items()}
        for quantizer, _ in self._weights.values():
            quantizer.partial = True
        self._partition()
        self._after = {name: w.detach().clone() for name, (_, w) in self._weights.items()}

    @property
    def frozen(self) -> dict[str, Tensor]:
        """Where weights are frozen, by path."""
        return {name: mask.clone() for name, mask in self._frozen.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Put back what is frozen, and freeze more where a share begins."""
        self.count += 1
        for name, (_, weight) in self._weights.items():
            weight.copy_(torch.where(self._frozen[name], self._values[name], weight))
        self._partition()

    @torch.no_grad()
    def _partition(self) -> None:
        share = self.shares.get(self.count)
        if share is None:
            return
        for name, (quantizer, weight) in self._weights.items():
            quantizer.refresh(weight)
            frozen = self._frozen[name].flatten()
            more = round(share * weight.numel()) - int(frozen.sum())
            sizes = weight.detach().abs().flatten().masked_fill(frozen, -1.0)
            frozen[sizes.topk(more).indices] = True
            self._values[name] = torch.where(self._frozen[name], quantizer.on_powers(weight.detach()), weight.detach())
            weight.copy_(self._values[name])
            quantizer.partial = share < 1.0

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, the shares, and what is frozen where."""
        tensors = {"frozen": self._frozen, "values": self._values}
        copies = {kind: {name: t.clone() for name, t in held.items()} for kind, held in tensors.items()}
        return {"count": self.count, "shares": dict(self.shares), **copies}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; the model's own is to be loaded too, before or after.

        Raises:
            InputError: it has other shares or weights.
        """
        if dict(state["shares"]) != self.shares or set(state["frozen"]) != set(self._weights):
            raise InputError("this state has other shares or weights: make the object as it was made then.")
        self.count = int(state["count"])
        begun = [share for at, share in self.shares.items() if at <= self.count]
        for name, (quantizer, weight) in self._weights.items():
            if name in self._after and torch.equal(weight, self._after[name]):
                weight.copy_(self._before[name])  # it was loaded before this object was made, which then froze some
            self._frozen[name] = state["frozen"][name].to(weight.device, copy=True)
            self._values[name] = state["values"][name].to(weight.device, copy=True)
            weight.copy_(torch.where(self._frozen[name], self._values[name], weight))
            quantizer.partial = not begun or begun[-1] < 1.0
        self._before, self._after = {}, {}
