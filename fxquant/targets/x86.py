"""fxquant's own integer models in PyTorch on a CPU: unsigned tensors, signed weights, every op of the table."""

from __future__ import annotations

from fxquant.targets.target import Target

__all__ = ["X86"]

X86 = Target(
    name="x86",
    title="PyTorch on a CPU",
    activation_bits=tuple(range(2, 17)),
    weight_bits=tuple(range(2, 17)),
)
"""What is not among torch's int8 operators, the exact reference computes: nothing is refused, and nothing stays in float."""
