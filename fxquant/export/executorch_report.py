"""What there is to say of an ExecuTorch program."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxquant.export.agreement import OutputAgreement

__all__ = ["ExecutorchReport"]


@dataclass
class ExecutorchReport:
    """What was written, and how it agrees with the integer model.

    Attributes:
        path: the file.
        size: bytes.
        inputs, outputs: shapes by name; the free batch is ``batch``.
        largest_batch: the most rows that it takes: ExecuTorch plans its memory for them.
        delegates: how many parts run in XNNPACK.
        delegated: how many operators of each kind are in them.
        outside: how many of each kind ExecuTorch's portable kernels compute.
        agreement: one entry per output and run, against the integer model; empty without ``verify``.
        notes: what could not be had.
    """

    path: str
    size: int
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    largest_batch: int
    delegates: int
    delegated: dict[str, int]
    outside: dict[str, int]
    agreement: list[OutputAgreement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether XNNPACK computes all of it."""
        return not self.outside

    def __str__(self) -> str:
        def shapes(named: dict[str, list[int | str]]) -> str:
            return ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in named.items())

        def counts(kinds: dict[str, int]) -> str:
            return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing"

        parts = f"{self.delegates} part{'' if self.delegates == 1 else 's'}"
        lines = [
            f"{self.path}: {self.size / 1e6:.2f} MB, {sum(self.delegated.values())} operators in {parts} for XNNPACK",
            f"  inputs   {shapes(self.inputs)}, at most {self.largest_batch} rows",
            f"  outputs  {shapes(self.outputs)}",
            f"  XNNPACK  {counts(self.delegated)}",
            f"  portable {counts(self.outside)}",
            *(f"  {own}" for own in self.agreement),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)
