"""What could overflow, saturate or vanish in an integer model, layer by layer, whatever its inputs.

For an input that is held as bytes ``u`` (signed ones 128 higher) and stands for ``d = q - z`` within ``[d_lo, d_hi]``, an
output channel with weights ``w`` and bias ``b`` accumulates

    b + Σ d w   between   b + Σ min(d_lo w, d_hi w)   and   b + Σ max(d_lo w, d_hi w)
    Σ u w       between   255 Σ min(w, 0)             and   255 Σ max(w, 0)

the first in the reference, the second in kernels that take the zero point off later. Both have to stay within 32 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant import processor
from fxquant.capture.islands import graphs_of
from fxquant.graph.leveled import LeveledModule
from fxquant.kernels.runner import kernel_of
from fxquant.kernels.saturation import (
    INT32,
    largest_pair,
    largest_sum,
    narrowed_channels,
    one_sided_sums,
)
from fxquant.nn.accumulating import IntegerWeighted, channels_first, weight_rows
from fxquant.nn.integer import Dequantize, IntegerOp, Multipliers, Quantize, multiplies

__all__ = ["Audit", "AuditFinding", "LayerAudit", "audit", "saturates_here"]

_FITTED_BIAS = 2**29
"""``freeze`` raises weight scales until a bias is at most 2^30; one beyond half of that was made to fit."""
_SHOWN = 12


@dataclass(frozen=True)
class LayerAudit:
    """One layer with integer weights.

    Attributes:
        path: where it is in the model.
        accumulator: the largest magnitude that its sums can reach, with these weights and this bias, for any input.
        pair: the largest magnitude of the sum of two weights of one sign in an output channel.
        zero_channels: output channels whose weights are all 0, which is sound.
        kernel: what runs it on this machine, where shapes allow it.
        channels: how many output channels it has.
        narrowed: of how many the weight scale was raised, so that sums of two products stay within 16 bits.
        limited: whether pairs were to stay there, for inputs as calibration saw them.
    """

    path: str
    accumulator: int
    pair: int
    zero_channels: int
    kernel: str
    channels: int = 0
    narrowed: int = 0
    limited: bool = False

    @property
    def int32_share(self) -> float:
        """The share of the int32 range that its sums can use; above 1 they overflow."""
        return self.accumulator / INT32

    @property
    def pairs_saturate(self) -> bool:
        """Whether inputs exist for which sums of two products leave 16 bits on x86 without VNNI."""
        return self.pair * 255 > 2**15 - 1


@dataclass(frozen=True)
class AuditFinding:
    """Something that could go wrong.

    Attributes:
        path: where.
        kind: ``accumulator``, ``bias`` or ``scale``.
        what: what was found.
        repair: what is done about it, or has to be done.
    """

    path: str
    kind: str
    what: str
    repair: str


@dataclass(frozen=True)
class Audit:
    """What ``audit`` found.

    Attributes:
        layers: every layer with integer weights.
        findings: what is not sound; empty where all is well.
    """

    layers: tuple[LayerAudit, ...] = ()
    findings: tuple[AuditFinding, ...] = ()

    @property
    def saturating(self) -> tuple[str, ...]:
        """Layers whose sums of pairs leave 16 bits on x86 without VNNI, for inputs within what calibration saw.

        ONNX Runtime and OpenVINO are wrong there; in PyTorch such layers run by the reference.
        """
        return tuple(layer.path for layer in self.layers if layer.pairs_saturate and not layer.limited)

    def __str__(self) -> str:
        if not self.layers and not self.findings:
            return ""
        lines = [f"  {f.path}: {f.what}; {f.repair}" for f in self.findings[:_SHOWN]]
        more = len(self.findings) - len(lines)
        return "\n".join([self._summary(), *lines, *([f"  and {more} more"] if more else [])])

    def _summary(self) -> str:
        facts = []
        if self.findings:
            facts.append(f"{len(self.findings)} finding{'s' if len(self.findings) > 1 else ''}")
        if self.layers:
            most = max(self.layers, key=lambda layer: layer.accumulator)
            facts.append(f"sums use at most {100 * most.int32_share:.2g} % of 32 bits ({most.path})")
        zero = sum(layer.zero_channels for layer in self.layers)
        if zero:
            facts.append(f"{zero} output channel{'s' if zero > 1 else ''} with weights all 0, which is sound")
        facts += self._pairs()
        return f"audit: {', '.join(facts)}"

    def _pairs(self) -> Iterator[str]:
        """What was done about sums of two products in 16 bits, or has to be."""
        if self.saturating:
            share = f"{len(self.saturating)} of {len(self.layers)} layers"
            yield f"on x86 without VNNI {share} saturate in ONNX Runtime and OpenVINO (prepare(processor='any') repairs it)"
        narrowed = [layer for layer in self.layers if layer.narrowed]
        if narrowed:
            channels = f"{sum(own.narrowed for own in narrowed)} of {sum(own.channels for own in self.layers)}"
            yield (
                f"{channels} output channels, in {len(narrowed)} of {len(self.layers)} layers, have weights of less than "
                "8 bits so that x86 without VNNI is right (processor='vnni' keeps all 8)"
            )


def audit(graphs: Iterable[LeveledModule]) -> Audit:
    """Go over integer graphs, by their numbers alone.

    Args:
        graphs: the graphs of a converted model; in others there is nothing to find.
    """
    layers: list[LayerAudit] = []
    findings: list[AuditFinding] = []
    for graph in graphs:
        prefix = graph.meta.get("path", "")
        for node in graph.graph.nodes:
            part: Any = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            if not isinstance(part, (IntegerOp, Quantize, Dequantize)):
                continue
            path = f"{prefix}.{node.target}" if prefix else str(node.target)
            found = list(_scales(part))
            if multiplies(part) == "weights":
                layers.append(_layer(graph, node, part, path))
                found += [*_sums(layers[-1]), *_bias(part)]
            findings += [AuditFinding(path, kind, what, repair) for kind, what, repair in found]
    return Audit(tuple(layers), tuple(findings))


_Found = Iterator[tuple[str, str, str]]


def _layer(graph: LeveledModule, node: fx.Node, part: Any, path: str) -> LayerAudit:
    low, high = _bounds(graph, node.args[0])
    zero = int(part.offset[0])
    reach = _reach(part, low - zero, high - zero)
    held = largest_sum(part) if high - low < 256 else 0
    pair = largest_pair(channels_first(part)) if part.weight.dtype == torch.int8 else 0
    zeros = int((weight_rows(part) == 0).all(1).sum())
    limited = bool(getattr(graph.settings.get("target"), "limits_pairs", False))
    own = channels_first(part).flatten(1)
    short = narrowed_channels(own, part.weight_scheme) if limited and pair else 0
    sizes: dict[str, Any] = {"channels": own.shape[0], "narrowed": short, "limited": limited}
    return LayerAudit(path, max(reach, held), pair, zeros, kernel_of(graph, node), **sizes)


def _reach(part: IntegerWeighted, low: int, high: int) -> int:
    """The largest magnitude of ``b + Σ d w`` for any ``d`` within the bounds, and 0 where a border is padded."""
    low, high = min(low, 0), max(high, 0)
    up, down = one_sided_sums(part)
    bias = torch.zeros_like(up) if part.bias is None else part.bias.to(torch.int64)
    most, least = high * up - low * down + bias, low * up - high * down + bias
    return int(torch.maximum(most.abs(), least.abs()).max())


def _bounds(graph: LeveledModule, source: Any) -> tuple[int, int]:
    """The smallest and largest integer that a value can hold: of the op that made it, or of what passed it on."""
    while isinstance(source, fx.Node):
        part: Any = graph.get_submodule(str(source.target)) if source.op == "call_module" else None
        if isinstance(part, Quantize):
            return part.scheme.qmin, part.scheme.qmax
        if isinstance(part, IntegerOp) and part.output_dtype is not None:
            return int(part.low), int(part.high)
        if source.meta.get("integer_constant"):
            held = graph.get_buffer(str(source.target))
            return int(held.min()), int(held.max())
        source = source.args[0] if source.args else None
        source = source[0] if isinstance(source, (tuple, list)) and source else source
    return -(2**15), 2**15 - 1


def _sums(layer: LayerAudit) -> _Found:
    if layer.accumulator > INT32:
        what = f"its sums can reach {layer.accumulator:.3g}, {layer.int32_share:.3g} times what 32 bits hold"
        yield "accumulator", what, "runs by the reference, which sums in float64; other runtimes may overflow"


def _bias(part: Any) -> _Found:
    if part.bias is None:
        return
    largest = int(part.bias.to(torch.int64).abs().max())
    if largest > INT32:
        what = f"its bias reaches {largest:.3g} and does not fit into 32 bits"
        yield "bias", what, "the reference adds it in 64 bits; convert the model anew for anything else"
    elif largest >= _FITTED_BIAS:
        channels = part.bias.to(torch.int64).abs() >= _FITTED_BIAS
        weights = int(weight_rows(part)[channels].abs().max())
        what = f"the bias of {int(channels.sum())} of its channels did not fit into 32 bits"
        repair = "their weight scales were raised until it did, which leaves them integers up to"
        yield "bias", what, f"{repair} {weights}"


def _scales(part: nn.Module) -> _Found:
    for name in ("scale", "output_scale", "input_scale", "ratio"):
        scale = getattr(part, name, None)
        if isinstance(scale, Tensor) and (wrong := _wrong(scale, unused=name == "input_scale")):
            yield "scale", f"its {name.replace('_', ' ')} is {wrong}", "convert the model anew, with data of its range"
    shift, own = getattr(part, "shift", None), part.requantized_by() if isinstance(part, IntegerOp) else None
    if isinstance(shift, Tensor) and own is not None:
        yield from _multipliers(own, shift)


def _wrong(scale: Tensor, *, unused: bool) -> str | None:
    """What is wrong with a scale; an operand that is not quantized has 0."""
    real = scale.double()
    tiny = torch.finfo(torch.float32).tiny
    if not bool(torch.isfinite(real).all()):
        return "not finite"
    if bool((real < 0).any()) or (bool((real == 0).any()) and not unused):
        return "not positive"
    return "too small for float32" if bool(((real > 0) & (real < tiny)).any()) else None


def _multipliers(own: Multipliers, shift: Tensor) -> _Found:
    """``quantize_multiplier`` gives 0 below 2^-32, and its largest pair above 2^30."""
    lost = (own.values == 0) & own.needed
    if bool(lost.any()):
        which = (
            f"{int(lost.sum())} of its {lost.numel()} multipliers vanish"
            if lost.numel() > 1
            else "its multiplier vanishes"
        )
        yield "scale", f"{which}: below 2^-32 beside the scale of its result", own.without
    if bool((shift >= 30).any()):
        yield "scale", "its multiplier is cut off at 2^30", "its results are at the bounds of their grid"


def saturates_here(int8: nn.Module) -> bool:
    """Whether kernels of this processor add pairs in 16 bits, and ``int8`` was not made for such."""
    return processor.adds_pairs_in_16_bits() and bool(audit(graphs_of(int8).values()).saturating)
