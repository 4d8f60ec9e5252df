"""Scale and zero point of a quantizer, in buffers that can be saved, copied and averaged.

An average of models (EMA) that began before the first range averages these buffers too, from zeros on: after n steps of
decay d each holds the share 1 - d^n of its value, ``known`` as well, which is 1 where there is a range. Hence
scale / known is the average over the steps that had one; the zero point, which no average of integers gives, is kept as a
real number too: zero_point = round(origin / known).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.errors import InputError
from fxquant.nn.switch import Switched

__all__ = ["GridState"]


class GridState(Switched):
    """The part of a quantizer that holds its grid; buffers as of ``FakeQuantize``."""

    scale: Tensor
    zero_point: Tensor
    origin: Tensor
    known: Tensor
    averages = True

    def make_grid(self, shape: tuple[int, ...]) -> None:
        """Register what holds scale and zero point, of ``shape``: ``()`` or ``(channels,)``."""
        self.register_buffer("scale", torch.zeros(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
        if self.averages:
            self.register_buffer("origin", torch.zeros(shape))
            self.register_buffer("known", torch.zeros(()))
        self._ready, self._version = False, _version(self.scale)

    @torch.no_grad()
    def take_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Write scale and zero point, of the shape that they have here, into their buffers."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self._has_grid()

    @torch.no_grad()
    def follow_grid(self, scale: Tensor, zero_point: Tensor, holds: Tensor) -> None:
        """``take_grid`` where ``holds``, a bool ``()``; asks the device nothing, as a graph that is compiled must not."""
        self.scale.copy_(torch.where(holds, scale, self.scale))
        self.zero_point.copy_(torch.where(holds, zero_point, self.zero_point))
        if self.averages:
            self.origin.copy_(self.zero_point)
            self.known.copy_(torch.where(holds, torch.ones_like(self.known), self.known))

    def where_known(self, y: Tensor, x: Tensor) -> Tensor:
        """``y``, or ``x`` in a compiled graph that runs before there is a range."""
        if self._ready or not torch.compiler.is_compiling():
            return y
        return torch.where((self.scale > 0).all(), y, x)

    @property
    def ready(self) -> bool:
        """Whether there is a range to round to. It asks the device only as long as there is none.

        While a graph is compiled it is taken to be there, and ``where_known`` chooses.
        """
        if torch.compiler.is_compiling():
            return True
        self._settle()
        if not self._ready:
            self._ready = bool(((self.scale > 0) & torch.isfinite(self.scale)).all())
        return self._ready

    @ready.setter
    @torch.no_grad()
    def ready(self, value: bool) -> None:
        """False forgets the grid; what makes one ready is a range."""
        if value:
            raise InputError("a quantizer is ready when it has a range: calibrate, train, set_range or set_grid.")
        for name in ("scale", "known"):
            if name in self._buffers:
                self.get_buffer(name).zero_()
        self._ready, self._version = False, _version(self.scale)

    @torch.no_grad()
    def set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take over a given scale and zero point; a per-tensor grid becomes per channel where the scale is."""
        self.scale, self.zero_point = scale.float().clone(), zero_point.to(torch.int32).clone()
        self._has_grid()

    def _has_grid(self) -> None:
        """Note that scale and zero point were set here, and are whole."""
        if torch.compiler.is_compiling():
            return
        if self.averages:
            self.origin = self.zero_point.float()
            self.known.fill_(1.0)
        self._ready, self._version = True, _version(self.scale)

    @torch.no_grad()
    def _settle(self) -> None:
        """Make a grid of what an average of models has left in the buffers; on the device, without waiting for it."""
        if torch.compiler.is_compiling() or not self.averages or "scale" not in self._buffers:
            return
        if _version(self.scale) == self._version:
            return
        knows = self.known > 0
        share = torch.where(knows, self.known, torch.ones_like(self.known))
        self.scale.div_(share)
        self.origin.div_(share)
        self.known.copy_(knows.float())
        self.zero_point.copy_(torch.where(knows, torch.round(self.origin).to(torch.int32), self.zero_point))
        self._version = _version(self.scale)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_version": _version(self.scale) == self._version}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's tensors count their changes anew: it is to be settled where what it was copied from was."""
        super().__setstate__(state)
        self._version = _version(self.scale) if self._version else -2

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As torch's (``to``, ``half``, ``cuda``), but that grids, and what they come from, stay float32."""
        self._settle()
        super()._apply(lambda tensor: _moved(tensor, fn(tensor)), recurse)
        if "scale" in self._buffers:
            self._version = _version(self.scale)
        return self

    def read_state(self) -> None:
        """Follow buffers that were replaced from outside."""
        self.read_switches()
        self._ready, self._version = False, _version(self.scale)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._settle()
        super()._save_to_state_dict(*args, **kwargs)

    @torch.no_grad()
    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *args: Any
    ) -> None:
        """Restores readiness with the scale; a float model's checkpoint, which knows no quantizer, loads as it is."""
        if not any(key.startswith(prefix) for key in state_dict):
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)
        lacks = [prefix + name for name in ("origin", "known") if self.averages and prefix + name not in state_dict]
        if lacks:  # written before there were these buffers
            missing[:] = [key for key in missing if key not in lacks]
            self.origin.copy_(self.zero_point)
            self.known.fill_(float((self.scale > 0).all()))
            self._version = _version(self.scale)
        self._ready = False
        self._settle()


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """``after`` where it has the type of ``before``; else ``before`` on the device of ``after``."""
    same = after.dtype == before.dtype or not before.is_floating_point()
    return after if same else before.to(after.device)


def _version(tensor: Tensor) -> int:
    """How often ``tensor`` was changed in place; inference tensors do not count."""
    return -1 if tensor.is_inference() else tensor._version
