"""How a step's work is shared among threads: units small enough to keep all busy, that read what is in cache."""

from __future__ import annotations

from fxquant.kernels.native.library import FLAGS, KINDS, Step, TensorView

__all__ = ["cut"]

_UNIT = 2**18
"""Multiplications that are worth a unit of work of their own, at least."""
_WEIGHTS_IN_CACHE = 2**18
_PIXELS_IN_CACHE = 2**16
_UNITS = 32
"""Units that a large step should have at least, for threads to end together."""
_HEADS = 8


def cut(step: Step) -> None:
    """Write how many units a step has."""
    y, kind = step.y, step.kind
    pixels = y.n * y.h * y.w
    if kind == KINDS["convolution"]:
        _cut_convolution(step, pixels)
    elif kind == KINDS["depthwise three"]:
        step.units = min(-(-y.n * y.h // step.groups), max(1, min(2 * _UNITS, pixels * y.c // 2**13)))
    elif kind == KINDS["quantize"]:
        step.units = y.n * y.h
    elif kind == KINDS["dequantize"]:
        step.units = step.x.n * -(-step.x.c // 16)
    elif kind == KINDS["average"]:
        step.units = y.n * y.h * -(-y.c // 64)
    elif kind == KINDS["attention"]:
        heads = step.x.n * step.x.h
        step.groups = max(1, min(-(-_HEADS // heads), step.x.w // 24))
        step.units = heads * step.groups
    elif kind == KINDS["copy"]:
        step.units = _UNITS
    elif kind in (KINDS["winograd"], KINDS["winograd input"]):
        assert step.units, "cut by what wrote it: its scratch memory is for units of that size"
    else:
        cost = y.c * (step.taps if kind == KINDS["depthwise"] else step.window.kernel[0] * step.window.kernel[1] or 1)
        step.units = -(-pixels // max(1, 2**14 // max(1, cost), -(-pixels // _UNITS)))


def _cut_convolution(step: Step, pixels: int) -> None:
    per_pixel = step.taps * step.depth * step.y.c // step.groups
    columns = -(-step.blocks // 4) * step.groups
    weights = step.blocks * 16 * step.groups * step.taps * step.depth
    stride = step.window.stride[0] * step.window.stride[1]
    if step.taps == 1 and _is_row(step):
        step.flags |= FLAGS["linear"]
    step.outer = int(weights > _WEIGHTS_IN_CACHE)
    in_cache = _PIXELS_IN_CACHE // max(1, step.x.c * stride) * (4 if step.outer else 1)
    share = columns if step.outer else 1
    fair = -(-pixels * share // _UNITS)
    enough = -(-_UNIT * share // max(1, per_pixel))
    step.units = -(-pixels // max(24, min(max(in_cache, 24), max(enough, fair)))) * share


def _is_row(step: Step) -> bool:
    """Whether pixel i of the result depends on pixel i alone, and the pixels of all tensors follow each other."""
    tensors = [step.x, step.y, *([step.z] if step.flags & FLAGS["adds"] else [])]
    if any((t.n, t.h, t.w) != (step.y.n, step.y.h, step.y.w) for t in tensors):
        return False
    return step.window.padding[:] == [0, 0] and all(_follow(t) for t in tensors)


def _follow(t: TensorView) -> bool:
    expected = t.pixel * t.w
    if t.h > 1 and t.row != expected:
        return False
    return t.n == 1 or t.image == expected * t.h
