"""auto: try the ways to quantize a model from cheap to dear, and stop at the first that is good enough.

    nearest              ranges by the extrema, weights to the nearest integer
    chosen ranges        each range by what the layers that read it lose
    closed form          recover: roundings, scales and biases layer by layer
    equalized            cross-layer equalization, then the closed form
    reconstructed        residual units learned as a whole, from the closed form on
    mixed precision      bits per layer within the budget, then the closed form

Every rung is built on the same batches and judged by the caller's own measure on its integer model. What a rung found is
written down before the next begins, so that a run which was stopped goes on where it was.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from fxquant.algorithms.bits_per_layer import mixed_precision
from fxquant.algorithms.block_reconstruction import reconstruct
from fxquant.algorithms.equalization import equalize
from fxquant.algorithms.recover import kept_batches, recover
from fxquant.checkpoint import load, save
from fxquant.errors import InputError
from fxquant.flow import calibrate, convert, prepare
from fxquant.inputs import arguments_of, move_to
from fxquant.nn.fake_quantize import WeightQuantize
from fxquant.recipe import Recipe, Setting
from fxquant.targets import X86, Target, get

__all__ = ["Found", "Rung", "auto"]

_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Rung:
    """One way that was tried.

    Attributes:
        name: which one.
        accuracy: what ``evaluate`` said of its integer model; None where it was left out.
        drop: the float model's less that.
        seconds: for building it, without judging it.
        bits_per_weight: the mean over the weights of layers.
        weight_bytes: of all of these, packed.
        note: why it was left out, or what was warned of.
    """

    name: str
    accuracy: float | None
    drop: float | None
    seconds: float
    bits_per_weight: float | None
    weight_bytes: int | None
    note: str = ""


@dataclass(frozen=True)
class Found:
    """What ``auto`` returns; prints as a table.

    Attributes:
        model: the integer model with the least drop.
        prepared: the prepared model that it was made of.
        rungs: what was tried, in order.
        chosen: the name of the rung that ``model`` is of.
        float_accuracy: what ``evaluate`` said of the float model.
        max_drop: what was asked for.
    """

    model: Any
    prepared: Any
    rungs: tuple[Rung, ...]
    chosen: str
    float_accuracy: float
    max_drop: float

    @property
    def meets(self) -> bool:
        """Whether the drop is no more than what was asked for."""
        return any(
            rung.name == self.chosen and rung.drop is not None and rung.drop <= self.max_drop for rung in self.rungs
        )

    def __str__(self) -> str:
        rows = [
            [r.name, r.accuracy, r.drop, r.bits_per_weight, r.weight_bytes, round(r.seconds, 1), r.note]
            for r in self.rungs
        ]
        header = ["rung", "accuracy", "drop", "bits a weight", "weight bytes", "seconds", ""]
        verdict = "is within" if self.meets else "is the best, and not within"
        told = f"float: {self.float_accuracy:g}. {self.chosen!r} {verdict} a drop of {self.max_drop:g}."
        return f"{tabulate(rows, header, floatfmt='.4g')}\n{told}"


def auto(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    evaluate: Callable[[nn.Module], float],
    max_drop: float = 0.5,
    bits_per_weight: float | None = None,
    activation_bits: int = 8,
    target: str | Target = X86,
    forward: Callable[[Any, Any], Any] | None = None,
    batches: int | None = None,
    steps: int = 500,
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Found:
    """Quantize a model as cheaply as its accuracy allows: ways from cheap to dear, until one is good enough.

    Example:
        >>> found = fxquant.auto(model, loader, evaluate=top1, max_drop=0.5, bits_per_weight=4.2, state="runs/resnet")
        >>> print(found)
        >>> int8 = found.model

    Args:
        model: the float model; not touched.
        loader: batches as for ``calibrate``, without labels; all are kept in memory.
        evaluate: judges a model, the more the better; called with the float model and with integer ones.
        max_drop: how much less than the float model's is good enough, in the unit of ``evaluate``.
        bits_per_weight: the budget, as the mean over the weights of layers; None for 8 bits. All rungs but the last give
            every layer the whole number of bits below.
        activation_bits: bits of tensors between ops.
        target: where the model will run.
        forward: how to run one batch, as ``forward(model, batch)``, for batches of another form.
        batches: stop after that many.
        steps: of gradient descent for each residual unit, where it comes to that.
        state: a folder that keeps what was found; a run with the same model, data and settings goes on there.
        progress: show progress bars.

    Raises:
        InputError: the budget is below 2 bits; or ``state`` is of another model, other data or settings.
        CalibrationError: the loader is empty.
    """
    if bits_per_weight is not None and not 2 <= bits_per_weight <= 16:
        raise InputError(f"bits_per_weight={bits_per_weight!r}: a budget lies between 2 and 16 bits.")
    kept = kept_batches(loader, batches, "auto")
    ladder = _Ladder(model, kept, bits_per_weight, activation_bits, get(target), forward, steps, progress)
    record = _Record(None if state is None else Path(state), ladder.key())
    if record.float_accuracy is None:
        record.keep_float(float(evaluate(model)))
    done = _climbed(ladder, record, evaluate, max_drop)
    best = max(
        (i for i, rung in enumerate(done) if rung.accuracy is not None), key=lambda i: done[i].accuracy or -math.inf
    )
    chosen, accuracy = record.prepared[best], record.float_accuracy
    assert accuracy is not None
    return Found(convert(chosen), chosen, tuple(done), done[best].name, accuracy, max_drop)


def _climbed(ladder: _Ladder, record: _Record, evaluate: Callable[[nn.Module], float], max_drop: float) -> list[Rung]:
    """The rungs up to the first that is good enough; those that are known already are not built again."""
    ways = ladder.ways()
    done: list[Rung] = []
    with tqdm(total=len(ways), desc="auto", unit="rung", disable=not ladder.progress or None) as bar:
        for number, (name, way) in enumerate(ways.items()):
            bar.set_postfix_str(name)
            if number >= len(record.rungs):
                record.keep(*_tried(name, way, record, evaluate))
            record.restore(number, ladder.model)
            ladder.built[name] = record.prepared[number]
            done.append(record.rungs[number])
            bar.update(1)
            drop = done[-1].drop
            if drop is not None and drop <= max_drop:
                break
    return done


class _Ladder:
    """The ways to build a prepared model, and what they share."""

    def __init__(
        self,
        model: nn.Module,
        kept: list[Any],
        budget: float | None,
        activation_bits: int,
        target: Target,
        forward: Callable[[Any, Any], Any] | None,
        steps: int,
        progress: bool,
    ) -> None:
        self.model, self.kept, self.budget, self.activation_bits = model, kept, budget, activation_bits
        self.target, self.forward, self.steps, self.progress = target, forward, steps, progress
        self.uniform = 8 if budget is None else min(8, math.floor(budget))
        self.built: dict[str, Any] = {}
        self.example: Any = None
        if forward is None:
            args, kwargs = arguments_of(model, move_to(model, kept[0]))
            self.example = kwargs or args

    def ways(self) -> dict[str, Callable[[], Any]]:
        """By name, in order; each gives a calibrated model, or the reason why it has none."""
        found: dict[str, Callable[[], Any]] = {
            "nearest": lambda: self._calibrated(self._uniform("minmax")),
            "chosen ranges": lambda: self._calibrated(self._uniform("auto")),
            "closed form": lambda: self._recovered(self._calibrated(self._uniform("mse"))),
            "equalized": self._equalized,
            "reconstructed": self._reconstructed,
        }
        if self.budget is not None and self.budget < 8:
            found["mixed precision"] = self._mixed
        return found

    def key(self) -> str:
        """What a run is told by: the model's numbers, the data's, and all settings that change a rung."""
        digest = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for leaf in tree_leaves(self.kept):
            if isinstance(leaf, Tensor):
                digest.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        digest.update(
            repr((self.budget, self.activation_bits, self.target.name, self.target.processor, self.steps)).encode()
        )
        return digest.hexdigest()

    def _setting(self, estimator: str) -> Setting:
        weight = replace(self.target.weight, bits=self.uniform, estimator=estimator)
        activation = replace(self.target.activation, bits=self.activation_bits, estimator=estimator)
        return Setting(weight=weight, activation=activation)

    def _uniform(self, estimator: str) -> Recipe:
        return Recipe(default=self._setting(estimator))

    def _prepared(self, recipe: Recipe) -> Any:
        return prepare(self.model, self.example, recipe=recipe, target=self.target)

    def _calibrated(self, recipe: Recipe, before: Callable[[Any], Any] = lambda prepared: prepared) -> Any:
        prepared = before(self._prepared(recipe))
        return calibrate(prepared, self.kept, forward=self.forward, progress=self.progress)

    def _recovered(self, prepared: Any) -> Any:
        return recover(prepared, self.kept, forward=self.forward, progress=self.progress)

    def _equalized(self) -> Any:
        plain = self._prepared(self._uniform("mse"))
        before = {name: value.detach().clone() for name, value in plain.named_parameters()}
        equal = equalize(plain)
        if all(torch.equal(before[name], value) for name, value in equal.named_parameters()):
            return "there is no pair of layers to equalize"
        return self._recovered(calibrate(equal, self.kept, forward=self.forward, progress=self.progress))

    def _reconstructed(self) -> Any:
        start = copy.deepcopy(self.built["closed form"])
        return reconstruct(start, self.kept, steps=self.steps, forward=self.forward, progress=self.progress)

    def _mixed(self) -> Any:
        assert self.budget is not None
        found = mixed_precision(
            self.model,
            self.kept,
            bits=[bits for bits in _BITS if bits in self.target.weight_bits],
            bits_per_weight=self.budget,
            target=self.target,
            forward=self.forward,
            progress=self.progress,
        )
        usual = self._setting("mse")
        return self._recovered(self._calibrated(found.recipe(weight=usual.weight, activation=usual.activation)))


def _tried(
    name: str, way: Callable[[], Any], record: _Record, evaluate: Callable[[nn.Module], float]
) -> tuple[Rung, Any]:
    """Build and judge one rung."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prepared = way()
    seconds = time.perf_counter() - start
    if isinstance(prepared, str):
        return Rung(name, None, None, seconds, None, None, f"left out: {prepared}"), None
    note = "; ".join(str(warning.message).split("\n")[0] for warning in told if warning.category is UserWarning)
    accuracy = float(evaluate(convert(prepared)))
    if not math.isfinite(accuracy):
        raise InputError(f"evaluate gave {accuracy} for {name!r}: it has to give a finite number.")
    assert record.float_accuracy is not None
    bits, weights = _size(prepared)
    drop = record.float_accuracy - accuracy
    return Rung(name, accuracy, drop, seconds, bits / weights if weights else None, -(-bits // 8), note), prepared


def _size(prepared: nn.Module) -> tuple[int, int]:
    """Bits of all weights of layers, and how many there are."""
    found: dict[int, tuple[int, int]] = {}
    for part in prepared.modules():
        own, weight = getattr(part, "weight_quantizer", None), getattr(part, "weight", None)
        if isinstance(own, WeightQuantize) and isinstance(weight, Tensor):
            found[id(weight)] = (weight.numel() * own.scheme.bits, weight.numel())
    return sum(bits for bits, _ in found.values()), sum(count for _, count in found.values())


class _Record:
    """What was found, in memory, and in a folder where there is one: ``rungs.json``, and each rung's model."""

    def __init__(self, folder: Path | None, key: str) -> None:
        self.folder, self.key = folder, key
        self.float_accuracy: float | None = None
        self.rungs: list[Rung] = []
        self.prepared: dict[int, Any] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "rungs.json"
        if not file.exists():
            return
        held = json.loads(file.read_text(encoding="utf-8"))
        if held.get("key") != key:
            raise InputError(
                f"state={os.fspath(folder)!r} holds a run of another model, on other data or with other settings.\n"
                "  what to do: give an empty folder, or what it was begun with."
            )
        self.float_accuracy, self.rungs = held["float"], [Rung(**rung) for rung in held["rungs"]]

    def keep_float(self, accuracy: float) -> None:
        """Note what the float model reaches."""
        if not math.isfinite(accuracy):
            raise InputError(f"evaluate gave {accuracy} for the float model: it has to give a finite number.")
        self.float_accuracy = accuracy
        self._write()

    def keep(self, rung: Rung, prepared: Any) -> None:
        """Note a rung, its model first."""
        number = len(self.rungs)
        self.prepared[number] = prepared
        if self.folder is not None and prepared is not None:
            save(prepared, self.folder / f"{number}.pt")
        self.rungs.append(rung)
        self._write()

    def restore(self, number: int, model: nn.Module) -> None:
        """Have the model of a rung that an earlier run built."""
        if number not in self.prepared:
            file = None if self.folder is None else self.folder / f"{number}.pt"
            self.prepared[number] = load(model, file) if file is not None and file.exists() else None

    def _write(self) -> None:
        if self.folder is None:
            return
        content = {"key": self.key, "float": self.float_accuracy, "rungs": [asdict(rung) for rung in self.rungs]}
        new = self.folder / "rungs.json.new"
        new.write_text(json.dumps(content, indent=1), encoding="utf-8")
        new.replace(self.folder / "rungs.json")
