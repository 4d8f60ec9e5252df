"""Switches of a module that live in its buffers, so that whatever copies a model's state copies them.

``state_dict``, ``save``, ``deepcopy``, pickle and the averages of weights (torch's ``AveragedModel``, timm's and
Lightning's) carry buffers, and nothing else. A buffer on an accelerator cannot be asked in every forward pass without
waiting for the device, so each switch has a mirror in Python: written with the buffer, and read off it again whenever the
mode changes (``train``, ``eval``) and a state is loaded. All switches steer training mode only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["Switch", "Switched"]


class Switch:
    """A bool attribute of a ``Switched`` module, stored as 0 or 1 in a float buffer.

    Averages of models take the differences of buffers, which bools do not have.

    Args:
        buffer: the buffer's name in the state dict.
        initial: its value in a new module.
    """

    def __init__(self, buffer: str, *, initial: bool) -> None:
        self.buffer, self.initial = buffer, initial

    def __get__(self, module: Any, owner: type) -> bool:
        return self.initial if module is None else bool(module.__dict__.get(f"_{self.buffer}", self.initial))

    def __set__(self, module: Any, value: bool) -> None:
        device = next((b.device for b in module._buffers.values() if b is not None), None)
        if self.buffer not in module._buffers:
            module.register_buffer(self.buffer, torch.tensor(float(value), device=device))
        else:
            module._buffers[self.buffer].fill_(float(value))
        module.__dict__[f"_{self.buffer}"] = bool(value)

    def read(self, module: nn.Module) -> None:
        """Let the mirror follow the buffer."""
        buffer = module._buffers.get(self.buffer)
        if buffer is not None and buffer.device.type != "meta":
            module.__dict__[f"_{self.buffer}"] = float(buffer) > 0.5


class Switched(nn.Module):
    """A module with switches; put it before the float class. A state without them, of a float model, loads as it is."""

    def switches(self) -> list[Switch]:
        """The switches that the class has."""
        return [value for cls in type(self).__mro__ for value in vars(cls).values() if isinstance(value, Switch)]

    def add_switches(self) -> None:
        """Give a module that was made of another class's the buffers that it lacks."""
        for switch in self.switches():
            if switch.buffer not in self._buffers:
                switch.__set__(self, switch.initial)

    def read_switches(self) -> None:
        """Let every mirror follow its buffer."""
        for switch in self.switches():
            switch.read(self)

    def train(self, mode: bool = True) -> Any:
        self.read_switches()
        return super().train(mode)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)
        own = {prefix + switch.buffer for switch in self.switches()}
        missing[:] = [key for key in missing if key not in own]
        self.read_switches()
