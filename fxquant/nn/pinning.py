"""Roundings that an algorithm has chosen for a weight, kept in the buffers of its quantizer.

Rounding to nearest is one choice among many. An algorithm that finds a better one *pins* it: the quantizer then gives
``scale · integers`` whatever the parameter is, and the parameter itself stays the float network's, so that
``quantizers_off`` still runs that network. As buffers, the integers go wherever a state dict goes; ``freeze`` makes
them the weight that ships.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import InputError

__all__ = ["PINNED", "Pinned"]

PINNED = ("integers", "bias")
"""The buffers of a pinned rounding; a quantizer whose rounding nobody has pinned has none of them."""


class Pinned(nn.Module):
    """Mixin of weight quantizers; put it before the class that has scheme, axis, ``set_grid`` and the switch ``pinned``.

    Buffers, once something was pinned:
        integers: of the weight's shape, in the scheme's storage dtype.
        bias: what takes the place of the op's bias, of its shape; only where the op has a bias.
    """

    @property
    def integers(self) -> Tensor | None:
        """The integers that are pinned; None where the weight is rounded to nearest."""
        part: Any = self
        return self._buffers.get("integers") if part.pinned else None

    def pin(self, integers: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        """Give ``scale · integers`` from now on, whatever the weight.

        Args:
            integers: of the weight's shape, whole numbers of the scheme's grid.
            scale: ``()`` or one per channel of the quantizer's axis; positive.
            bias: what takes the place of the op's bias; None leaves it.

        Raises:
            InputError: the integers are not on the grid, or the scale does not fit them.
        """
        part: Any = self
        low, high = part.scheme.qmin, part.scheme.qmax
        on_grid = (integers == integers.round()) & (integers >= low) & (integers <= high)
        if not bool(on_grid.all()):
            raise InputError(f"pin was given integers outside of {low}…{high} ({part.scheme}), or that are not whole.")
        channels = () if part.axis is None else (integers.shape[part.axis],)
        if tuple(scale.shape) not in ((), channels) or not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise InputError(
                f"pin takes a positive scale of shape {channels} or (), and was given {tuple(scale.shape)}."
            )
        self._buffers["integers"] = integers.detach().to(part.scheme.storage_dtype).clone()
        self._buffers.pop("bias", None)
        if bias is not None:
            self._buffers["bias"] = bias.detach().clone()
        part.set_grid(scale, torch.zeros_like(scale))
        part.pinned = True

    def unpin(self) -> None:
        """Round to nearest again, on a grid that follows the weight."""
        part: Any = self
        for name in PINNED:
            self._buffers.pop(name, None)
        part.pinned = False

    def as_pinned(self, weight: Tensor) -> Tensor:
        """``scale · integers`` in the dtype of ``weight``, with a gradient as if ``weight`` had not been rounded."""
        part: Any = self
        shape = [1] * weight.ndim
        if part.axis is not None and part.scale.ndim:
            shape[part.axis] = -1
        rounded = (part._buffers["integers"].to(part.scale.dtype) * part.scale.reshape(shape)).to(weight.dtype)
        return rounded + (weight - weight.detach()) if weight.requires_grad else rounded

    def bias_for(self, bias: Tensor | None) -> Tensor | None:
        """What takes the place of ``bias`` while the quantizer is on."""
        part: Any = self
        own = self._buffers.get("bias") if part.pinned and part.enabled else None
        if own is None or bias is None:
            return bias
        own = own.to(bias.dtype)
        return own + (bias - bias.detach()) if bias.requires_grad else own

    def make_room(self, state: dict[str, Any], prefix: str) -> None:
        """Have the buffers that ``state`` holds for this quantizer, and no others of a pinned rounding.

        A quantizer with several names has its buffers in the state under the first; under the others ``state`` only says
        that it is pinned.
        """
        pinned = bool(torch.as_tensor(state.get(f"{prefix}is_pinned", 0.0)) > 0.5)
        for name in PINNED:
            saved = state.get(f"{prefix}{name}")
            if saved is not None:
                before = self._buffers.get(name)
                if before is None or before.shape != saved.shape:
                    device = next((b.device for b in self._buffers.values() if b is not None), None)
                    self._buffers[name] = torch.zeros_like(saved, device=device)
            elif not pinned or f"{prefix}integers" in state:
                self._buffers.pop(name, None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            self.make_room(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing: list[str] = args[2]
        missing[:] = [key for key in missing if key not in {f"{prefix}{name}" for name in PINNED}]
