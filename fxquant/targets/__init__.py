"""Targets: what each runtime lacks, which integers it takes, and where it wants tensors rounded. Data only.

fxquant.prepare(model, example, target="tensorrt")
mine = dataclasses.replace(fxquant.targets.get("onnxruntime"), name="mine", integer_ops=frozenset({"conv2d", "relu"}))
fxquant.prepare(model, example, target=mine)
"""

from __future__ import annotations

import difflib

from fxquant.errors import InputError
from fxquant.targets.processors import PROCESSORS, Processor
from fxquant.targets.target import Target
from fxquant.targets.x86 import X86

__all__ = ["PROCESSORS", "TARGETS", "Processor", "Target", "X86", "get"]

TARGETS: dict[str, Target] = {X86.name: X86}
"""Every target by name; the first is the default. Those of runtimes are entered by ``fxquant.runtimes.register``."""


def get(target: str | Target) -> Target:
    """A target by name; a ``Target`` of your own as it is.

    Example:
        >>> fxquant.targets.get("tensorrt").activation_signs
        (True,)

    Raises:
        InputError: there is none of that name.
    """
    if isinstance(target, Target):
        return target
    if isinstance(target, str) and target in TARGETS:
        return TARGETS[target]
    near = difflib.get_close_matches(str(target), TARGETS, n=1)
    raise InputError(
        f"target={target!r} is not known.{f' Did you mean {near[0]!r}?' if near else ''}\n"
        f"  what to do: give one of {', '.join(TARGETS)}, or a fxquant.targets.Target of your own."
    )
