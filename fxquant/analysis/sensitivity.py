"""sensitivity: what the model's output loses when one layer alone is rounded, to each of some bits; no labels needed.

    SQNR_l,b = 10 log10( Σ y² / Σ (y_l,b - y)² )              y the float output, y_l,b that with layer l alone at b bits
    KL_l,b   = mean over rows of Σ_c p_c (log p_c - log q_c)   p, q the softmax of y and y_l,b, in nats

A layer is a weighted op with the fused chain behind it: its weight and its result are rounded. Ops without a weight are
layers of their own, and so are inputs. Source: Nagel et al., 2106.08295, and AIMET's QuantAnalyzer (one layer at a time); KL
of the outputs as a measure of a layer: Cai et al., ZeroQ, 2001.00281.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from fxquant.analysis.batches import Forward, batches_of, left_alone, reals, require_ranges, run_batch, same_randomness
from fxquant.analysis.measures import Noise, divergence
from fxquant.analysis.other_bits import refusal, result_at, weight_at
from fxquant.analysis.spots import Spot, spots_of
from fxquant.capture.islands import level_of
from fxquant.errors import InputError, Refusal
from fxquant.flow import calibrate, prepare, quantizers_off, require_level
from fxquant.inputs import arguments_of, move_to
from fxquant.recipe import Recipe
from fxquant.reporting.tabled import Tabled, decibels
from fxquant.targets import X86, Target

__all__ = ["LayerSensitivity", "Sensitivity", "checked_bits", "sensitivity"]


@dataclass(frozen=True)
class LayerSensitivity:
    """What the output loses when this layer alone is rounded.

    Attributes:
        path, op: the layer: its weighted op, or the op that rounds.
        sqnr: of the model's output in dB, by bits; of several outputs the least. Bits that its quantizer rule cannot have
            are not there.
        kl: in nats, by bits; None where no output is logits (two axes, several classes).
        weights: how many numbers its weight has.
    """

    path: str
    op: str
    sqnr: dict[int, float]
    kl: dict[int, float] | None
    weights: int


@dataclass(frozen=True)
class Sensitivity(Tabled):
    """What ``sensitivity`` found; prints as a table, the most sensitive layer first.

    Attributes:
        name: the model's class.
        bits: what was tried.
        layers: one entry per layer, by the least bits, worst first.
        left_out: what was not measured, by path, and why; ``conv at 8 bits`` where it was at others.
        batches: how many were run for each.
    """

    name: str
    bits: tuple[int, ...]
    layers: tuple[LayerSensitivity, ...]
    left_out: dict[str, str]
    batches: int

    def __getitem__(self, path: str) -> LayerSensitivity:
        """The entry of the layer at ``path``."""
        for layer in self.layers:
            if layer.path == path:
                return layer
        raise KeyError(path)

    def header(self) -> Sequence[str]:
        has_kl = any(layer.kl is not None for layer in self.layers)
        kl = [f"{bits} bits [nats]" for bits in self.bits] if has_kl else []
        return ["layer", "op", "weights [1]", *(f"{bits} bits [dB]" for bits in self.bits), *kl]

    def cells(self) -> Sequence[Sequence[str]]:
        has_kl = any(layer.kl is not None for layer in self.layers)
        rows = []
        for layer in self.layers:
            nats = [(layer.kl or {}).get(bits) for bits in self.bits] if has_kl else []
            kl = ["" if value is None else f"{value:.2g}" for value in nats]
            sqnr = [decibels(layer.sqnr.get(bits)) for bits in self.bits]
            rows.append([layer.path, layer.op, f"{layer.weights or ''}", *sqnr, *kl])
        return rows

    def title(self) -> str:
        kl = " and KL" if any(layer.kl is not None for layer in self.layers) else ""
        return f"{self.name}: SQNR{kl} of the output with one layer alone rounded, most sensitive first"

    def notes(self) -> Sequence[str]:
        reasons: dict[str, list[str]] = {}
        for path, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(path)
        more = {reason: f" and {len(paths) - 4} more" if len(paths) > 4 else "" for reason, paths in reasons.items()}
        return [f"not measured: {', '.join(paths[:4])}{more[reason]}: {reason}" for reason, paths in reasons.items()]

    def records(self) -> list[dict[str, Any]]:
        rows = []
        for layer in self.layers:
            row: dict[str, Any] = {"layer": layer.path, "op": layer.op, "weights": layer.weights}
            row |= {f"sqnr_{bits}": layer.sqnr.get(bits) for bits in self.bits}
            row |= {f"kl_{bits}": (layer.kl or {}).get(bits) for bits in self.bits}
            rows.append(row)
        return rows


def sensitivity(
    model: nn.Module,
    data: Any,
    *,
    bits: Sequence[int] = (8, 4),
    recipe: Recipe | None = None,
    target: str | Target = X86,
    forward: Forward | None = None,
    batches: int | None = None,
    seconds: float | None = None,
    first: Sequence[str] = (),
    progress: bool = True,
) -> Sensitivity:
    """Round one layer alone, everything else in float, and measure the model's output: which layers need their bits.

    Ranges are those of the calibrated model; at each number of bits the grid of a result covers the same range, and that of
    a weight what its quantizer rule finds in it. Roundings that an algorithm has pinned count at their own bits. A rule
    that cannot have some bits (ternary weights at 8) is listed with its reason.

    Example:
        >>> print(fxquant.sensitivity(prepared, loader, bits=(8, 4), batches=2))

    Args:
        model: a calibrated or trained prepared model, or a float model, which is then prepared and calibrated on ``data``.
            It is not changed.
        data: batches as for ``calibrate``, without labels; or one tensor.
        bits: what to try, each 2 to 16.
        recipe, target: as of ``prepare``, for a float model.
        forward: how to run one batch, as ``forward(model, batch)``, for batches of another form.
        batches: stop after that many.
        seconds: stop after about so long; what was not reached is in ``left_out``. The model runs once a layer, number of
            bits and batch.
        first: paths of layers to begin with, for when the seconds do not last.
        progress: show a progress bar.

    Raises:
        InputError: there is no data, or ``bits`` is nothing that can be tried, or the model has no output of real numbers.
        CalibrationError: the model has no ranges yet.
    """
    tried = checked_bits(bits)
    kept = batches_of(data, batches, "sensitivity")
    if isinstance(model, nn.Module) and level_of(model) is None:
        model = _prepared(model, kept, recipe, target, forward)
    require_level(model, ("prepared",), "sensitivity")
    require_ranges(model, "sensitivity")
    session, place = _Session(model, kept, forward), {path: i for i, path in enumerate(first)}
    units = sorted(_units(model), key=lambda unit: place.get(unit.path, len(place)))
    bar = tqdm(units, desc="sensitivity", unit="layer", disable=not progress or None)
    with left_alone(model), quantizers_off(model):
        found, left_out = session.measure_all(bar, tried, seconds)
    order = sorted(found, key=lambda layer: layer.sqnr[min(layer.sqnr)])
    return Sensitivity(type(model).__name__, tried, tuple(order), left_out, len(kept))


def checked_bits(bits: Sequence[int]) -> tuple[int, ...]:
    """Each of ``bits`` once.

    Raises:
        InputError: they are nothing that can be tried.
    """
    given = tuple(bits) if isinstance(bits, (tuple, list, range)) else ()
    if not given or any(isinstance(b, bool) or not isinstance(b, int) or not 2 <= b <= 16 for b in given):
        raise InputError(f"bits={bits!r}: give some numbers of bits, each 2 to 16, as (8, 4).")
    return tuple(dict.fromkeys(given))


def _prepared(model: nn.Module, kept: Sequence[Any], recipe: Any, target: Any, forward: Forward | None) -> Any:
    example = None
    if forward is None:
        args, kwargs = arguments_of(model, move_to(model, kept[0]))
        example = kwargs or args
    prepared = prepare(model, example, recipe=recipe, target=target)
    return calibrate(prepared, kept, forward=forward, progress=False)


@dataclass(frozen=True, eq=False)
class _Unit:
    """A weighted op and the rounding at the end of its chain, or either alone."""

    weighted: tuple[Spot, ...]
    rounding: Spot | None

    @property
    def first(self) -> Spot:
        first = self.weighted[0] if self.weighted else self.rounding
        assert first is not None
        return first

    @property
    def path(self) -> str:
        return self.first.path

    @property
    def spots(self) -> tuple[Spot, ...]:
        return self.weighted if self.rounding is None else (*self.weighted, self.rounding)

    def refusal(self, bits: int) -> Refusal | None:
        """Why one of its parts cannot be rounded to ``bits``; None where all can."""
        return next((why for spot in self.spots if (why := refusal(spot, bits)) is not None), None)


def _units(model: nn.Module) -> list[_Unit]:
    together: dict[tuple[str, str], list[Spot]] = {}
    for spot in spots_of(model):
        together.setdefault(spot.key, []).append(spot)
    units = []
    for spots in together.values():
        rounding = [spot for spot in spots if spot.rounds]
        units.append(
            _Unit(tuple(spot for spot in spots if spot.weight is not None), rounding[-1] if rounding else None)
        )
    return units


class _Session:
    """A model whose quantizers are off, with its outputs in float."""

    def __init__(self, model: Any, kept: Sequence[Any], forward: Forward | None) -> None:
        self.model, self.kept, self.forward = model, kept, forward
        self.exact: list[list[Tensor]] = []
        self.reached: set[Any] = set()

    def run_in_float(self) -> None:
        """Take the outputs that all others are held against, and see which parts of the model take part.

        Raises:
            InputError: there is none.
        """
        parts = {spot.part for spot in spots_of(self.model)}
        hooks = [part.register_forward_hook(lambda part, *_: self.reached.add(part)) for part in parts]
        try:
            self.exact = [self._outputs(batch) for batch in self.kept]
        finally:
            for hook in hooks:
                hook.remove()
        if not any(self.exact):
            raise InputError(f"sensitivity: {type(self.model).__name__} has no output of real numbers to measure.")

    def measure_all(
        self, units: Iterable[_Unit], bits: Sequence[int], seconds: float | None
    ) -> tuple[list[LayerSensitivity], dict[str, str]]:
        """What each of ``units`` costs, and what could not be measured, and why."""
        began = time.perf_counter()
        found: list[LayerSensitivity] = []
        left_out: dict[str, str] = {}
        self.run_in_float()
        for unit in units:
            if seconds is not None and time.perf_counter() - began > seconds:
                left_out[unit.path] = f"the {seconds:.3g} seconds were used up"
            elif not any(spot.part in self.reached for spot in unit.spots):
                left_out[unit.path] = "no batch reaches it"
            else:
                refused = {width: str(why) for width in bits if (why := unit.refusal(width)) is not None}
                left_out |= {f"{unit.path} at {width} bits": why for width, why in refused.items()}
                if len(refused) == len(bits):
                    continue
                measured = self.measure(unit, [width for width in bits if width not in refused])
                if measured is None:
                    left_out[unit.path] = "outputs have other shapes than in float, and cannot be compared one by one"
                else:
                    found.append(measured)
        return found, left_out

    def _outputs(self, batch: Any) -> list[Tensor]:
        with same_randomness():
            return [output.detach().clone() for output in reals(run_batch(self.model, batch, self.forward))]

    def measure(self, unit: _Unit, bits: Sequence[int]) -> LayerSensitivity | None:
        """The output with ``unit`` alone at each number of ``bits``; None where it has another shape than in float."""
        sqnr: dict[int, float] = {}
        kl: dict[int, float] = {}
        for width in bits:
            noise: list[Noise] = []
            lost = [0.0, 0]
            with _rounded(unit, width):
                for batch, exact in zip(self.kept, self.exact, strict=True):
                    actual = self._outputs(batch)
                    if [y.shape for y in actual] != [y.shape for y in exact]:
                        return None
                    noise += [Noise() for _ in range(len(exact) - len(noise))]
                    for counted, own, other in zip(noise, actual, exact, strict=False):
                        counted.add(own, other)
                        lost = [a + b for a, b in zip(lost, _divergence(own, other), strict=True)]
            errors = [counted.error() for counted in noise]
            sqnr[width] = min((error.sqnr for error in errors if error is not None), default=math.nan)
            if lost[1]:
                kl[width] = lost[0] / lost[1]
        weights = sum(_count(spot) for spot in unit.weighted)
        return LayerSensitivity(unit.path, unit.first.op, sqnr, kl or None, weights)


def _divergence(actual: Tensor, expected: Tensor) -> tuple[float, int]:
    """The sum over rows of KL(p || q) in nats, and their number; nothing for what is no logits."""
    if expected.ndim != 2 or expected.shape[1] < 2:
        return 0.0, 0
    return divergence(actual, expected), expected.shape[0]


def _count(spot: Spot) -> int:
    weight = spot.part._parameters.get("weight")
    return 0 if weight is None else weight.numel()


@contextmanager
def _rounded(unit: _Unit, bits: int) -> Iterator[None]:
    """Inside, the weights and the result of ``unit`` are rounded to ``bits``."""
    with ExitStack() as stack:
        for spot in unit.weighted:
            stack.enter_context(weight_at(spot, bits))
        if unit.rounding is not None:
            quantizer = result_at(unit.rounding, bits)
            hook = unit.rounding.part.register_forward_hook(
                lambda part, args, y: quantizer(y) if isinstance(y, Tensor) else y
            )
            stack.callback(hook.remove)
        yield
