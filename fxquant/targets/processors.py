"""Where an integer model will run, as far as that decides which integers are right: one table.

What differs between processors of one family is how their kernels add products of bytes. Dot products add four of them into
32 bits and need nothing. Without them two are added in 16 bits first:

- x86 multiplies unsigned by signed bytes and saturates (``vpmaddubsw``): ``2 · 255 · 127`` is twice what 16 bits hold,
  so that weights have to be chosen with care (see ``numerics.pairs``).
- ARM multiplies signed by signed bytes (``smull``, ``smlal``): ``2 · 128 · 127`` fits, and only two products of -128 with
  -128 do not. So kernels (gemmlowp, XNNPACK's ``neon-mlal``) ask for weights without -128, a narrow range.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PROCESSORS", "Processor"]


@dataclass(frozen=True)
class Processor:
    """A family of processors.

    Example:
        >>> PROCESSORS["avx2"].adds_pairs
        True

    Attributes:
        name: how ``prepare`` is told of it.
        title: how people call it.
        adds_pairs: whether kernels add two products of an unsigned and a signed byte in 16 bits, with saturation.
        narrow_weights: whether kernels add two products of signed bytes in 16 bits, which weights without -128 never leave.
        source: where this is written down.
    """

    name: str
    title: str
    adds_pairs: bool
    narrow_weights: bool
    source: str


_INTEL = "Intel 64 and IA-32 Architectures Software Developer's Manual"

PROCESSORS = {
    own.name: own
    for own in (
        Processor("any", "any processor", True, True, "what any of the others needs"),
        Processor("vnni", "x86 with dot products (VNNI)", False, False, f"{_INTEL}, VPDPBUSD"),
        Processor("avx2", "x86 without dot products", True, False, f"{_INTEL}, PMADDUBSW"),
        Processor("arm_dotprod", "ARM with dot products", False, False, "Arm A-profile Architecture, SDOT and UDOT"),
        Processor("arm", "ARM without dot products", False, True, "Jacob et al., 1712.05877, appendix B"),
    )
}
"""Every processor by name; the first is what a model is protected for unless said otherwise."""
