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
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from fxquant.algorithms.bits_per_layer import mixed_precision
from fxquant.algorithms.block_reconstruction import reconstruct
from fxquant.algorithms.equalization import equalize
from fxquant.algorithms.recover import kept_batches, recover
from fxquant.algorithms.weights import weighted_calls
from fxquant.capture.values import unchanged
from fxquant.checkpoint import load_model, save
from fxquant.errors import InputError, Refusal
from fxquant.flow import calibrate, convert, prepare
from fxquant.inputs import arguments_of, move_to
from fxquant.recipe import Recipe, Setting
from fxquant.targets import X86, Target, get
from fxquant.tuning.evaluation import judged, require_settings
from fxquant.tuning.fingerprint import fingerprint

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
        evaluate: judges a model, the more the better; called with the float model and with integer ones, in eval mode.
        max_drop: how much less than the float model's is good enough, in the unit of ``evaluate``.
        bits_per_weight: the budget, as the mean over the weights of layers; None for 8 bits. All rungs but the last give
            every layer the most bits within it that the target has.
        activation_bits: bits of tensors between ops.
        target: where the model will run.
        forward: how to run one batch, as ``forward(model, batch)``, for batches of another form.
        batches: stop after that many.
        steps: of gradient descent for each residual unit, where it comes to that.
        state: a folder that keeps what was found; a run with the same model, data and settings goes on there, and does not
            ask ``evaluate`` again what it has said.
        progress: show progress bars.

    Raises:
        InputError: the budget is below 2 bits, or below what the target has; ``evaluate`` is no function, or gives no finite
            number; or ``state`` is of another model, other data or settings.
        CalibrationError: the loader is empty.
    """
    require_settings(evaluate, max_drop, bits_per_weight, steps)
    kept = kept_batches(loader, batches, "auto")
    ladder = _Ladder(model, kept, bits_per_weight, activation_bits, get(target), forward, steps, progress)
    record = _Record(None) if state is None else _Record(Path(state), ladder.key())
    if record.float_accuracy is None:
        with unchanged(model):
            record.keep_float(judged(evaluate, model.eval(), "the float model"))
    done = _climbed(ladder, record, evaluate, max_drop)
    accuracies = {i: rung.accuracy for i, rung in enumerate(done) if rung.accuracy is not None}
    best = max(accuracies, key=accuracies.__getitem__)
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
        allowed = [bits for bits in target.weight_bits if bits <= min(8, 8 if budget is None else budget)]
        if not allowed:
            raise InputError(
                f"bits_per_weight={budget!r}: {target.title} takes weights of {min(target.weight_bits)} bits."
            )
        self.uniform = max(allowed)
        self.built: dict[str, Any] = {}
        self.example: Any = None
        if forward is None:
            args, kwargs = arguments_of(model, move_to(model, kept[0]))
            self.example = kwargs or args

    def ways(self) -> dict[str, Callable[[], Any]]:
        """By name, in order; each gives a calibrated model, or refuses."""
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
        """What a run is told by: the model, the data, and all settings that change a rung."""
        settings = (self.budget, self.activation_bits, self.target, self.steps, self.forward is None)
        return fingerprint(self.model, self._prepared(self._uniform("minmax")), self.kept, settings)

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
            return Refusal("there is no pair of layers to equalize")
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
    if isinstance(prepared, Refusal):
        return Rung(name, None, None, seconds, None, None, f"left out: {prepared}"), None
    note = "; ".join(str(warning.message).split("\n")[0] for warning in told if warning.category is UserWarning)
    accuracy = judged(evaluate, convert(prepared), repr(name))
    assert record.float_accuracy is not None
    bits, weights = _size(prepared)
    drop = record.float_accuracy - accuracy
    return Rung(name, accuracy, drop, seconds, bits / weights if weights else None, -(-bits // 8), note), prepared


def _size(prepared: nn.Module) -> tuple[int, int]:
    """Bits of all weights of layers, and how many there are; a weight that several calls read counts once."""
    found = {id(call.weight): (call.weight.numel(), call.quantizer.scheme.bits) for call in weighted_calls(prepared)}
    return sum(count * bits for count, bits in found.values()), sum(count for count, _ in found.values())


class _Record:
    """What was found, in memory, and in a folder where there is one: ``rungs.json``, and each rung's model."""

    def __init__(self, folder: Path | None, key: str = "") -> None:
        self.folder, self.key = folder, key
        self.float_accuracy: float | None = None
        self.rungs: list[Rung] = []
        self.prepared: dict[int, Any] = {}
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"state={os.fspath(folder)!r} is no folder, and none can be made there.") from error
        file = folder / "rungs.json"
        if not file.exists():
            return
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            key_held, self.float_accuracy = held["key"], held["float"]
            self.rungs = [Rung(**rung) for rung in held["rungs"]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"state={os.fspath(folder)!r}: its rungs.json cannot be read ({error}).\n  what to do: give an empty folder."
            ) from error
        if key_held != key:
            raise InputError(
                f"state={os.fspath(folder)!r} holds a run of another model, on other data or with other settings.\n"
                "  what to do: give an empty folder, or what it was begun with."
            )
        self._drop_lost(folder)

    def _drop_lost(self, folder: Path) -> None:
        """Forget the first rung whose model is not there any more, and what came after it."""
        for number, rung in enumerate(self.rungs):
            if rung.accuracy is not None and not (folder / f"{number}.pt").exists():
                warnings.warn(f"{folder / f'{number}.pt'} is gone: {rung.name!r} is built again.", stacklevel=4)
                self.rungs = self.rungs[:number]
                return

    def keep_float(self, accuracy: float) -> None:
        """Note what the float model reaches."""
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
            self.prepared[number] = load_model(model, file) if file is not None and file.exists() else None

    def _write(self) -> None:
        if self.folder is None:
            return
        content = {"key": self.key, "float": self.float_accuracy, "rungs": [asdict(rung) for rung in self.rungs]}
        new = self.folder / "rungs.json.new"
        new.write_text(json.dumps(content, indent=1), encoding="utf-8")
        new.replace(self.folder / "rungs.json")
