"""report: everything there is to see of a quantized model, gathered once and shown as a page, as Markdown or as JSON."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxquant.analysis.batches import Forward, batches_of, left_alone, run_batch, same_randomness
from fxquant.analysis.errors import LayerErrors, errors_by_layer
from fxquant.analysis.faults import Fault
from fxquant.analysis.sensitivity import Sensitivity, checked_bits, sensitivity
from fxquant.capture.islands import graphs_of
from fxquant.errors import FxquantError, InputError
from fxquant.export.agreement import OutputAgreement
from fxquant.flow import convert, quantizers_off, require_level
from fxquant.page.agreement import agreement
from fxquant.page.compare import Comparison, Side, SideLayer, compared_with, sqnr_of
from fxquant.page.drawing import Drawn, drawn_graphs
from fxquant.page.file_report import FileReport, report_of_file
from fxquant.page.html import page_of
from fxquant.page.markdown import markdown_of
from fxquant.page.numbers import summary_numbers
from fxquant.page.recipe_text import code_of
from fxquant.page.saving import Page
from fxquant.reporting.coverage import Coverage, coverage
from fxquant.reporting.diff import Diff, diff
from fxquant.reporting.tabled import plain, versions

__all__ = ["Report", "report"]


@dataclass(frozen=True)
class Report(Page):
    """What ``report`` found. Prints as Markdown, shows itself in notebooks, and is saved as a page.

    Attributes:
        name: the model's class.
        title: what it is called on the page.
        faults: what is wrong, the worst first.
        outputs: how each output of the integer model agrees with the float one's, over all batches.
        accuracy: what ``evaluate`` gave for ``float`` and ``integer``; empty without it.
        bytes: of parameters and buffers, ``float`` and ``integer``.
        diff: what became of each node.
        coverage: of the integer model: shares, why-not list, islands, kernels and audit.
        errors: what each rounding costs.
        sensitivity: what each layer alone costs; None where it was not wanted.
        graphs: how the graphs are drawn.
        recipe: the call that makes such a model.
        versions: of what took part.
        sections: more that was given, as text by heading.
        notes: what could not be had, and why.
        seconds: what all this took.
    """

    name: str
    title: str
    faults: tuple[Fault, ...]
    outputs: tuple[OutputAgreement, ...]
    accuracy: dict[str, float]
    bytes: dict[str, int]
    diff: Diff
    coverage: Coverage
    errors: LayerErrors
    sensitivity: Sensitivity | None
    graphs: tuple[Drawn, ...]
    recipe: str
    versions: dict[str, str]
    sections: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def html(self) -> str:
        """The page: one file with all that it needs."""
        return page_of(self)

    def markdown(self) -> str:
        """The short form, for pull requests."""
        return markdown_of(self)

    def to_json(self, *, indent: int | None = None) -> str:
        """All of it as JSON; numbers that are not finite are null."""
        return json.dumps(plain(self), indent=indent, ensure_ascii=False)

    def side(self) -> Side:
        """What a comparison takes of it."""
        layers = {
            own.path: SideLayer(
                alone=sqnr_of(own.alone),
                accumulated=sqnr_of(own.accumulated),
                bits=own.bits,
                weight=sqnr_of(own.weight),
                weight_bits=own.weight_bits,
            )
            for own in self.errors.layers
        }
        numbers = {name: value for name, value, _ in summary_numbers(self)}
        return Side(self.title, numbers, self.faults, layers, self.recipe)

    def compare(self, other: Report | FileReport) -> Comparison:
        """This report beside ``other``: of another recipe, of training, of another target, of a file.

        Raises:
            InputError: ``other`` is no report.
        """
        return compared_with(self, other)

    def __str__(self) -> str:
        return self.markdown()


def report(
    model: nn.Module | str | os.PathLike[str],
    prepared: nn.Module | str | os.PathLike[str] | None = None,
    data: Any = None,
    *,
    title: str | None = None,
    evaluate: Callable[[Any], float] | None = None,
    bits: Sequence[int] | None = (8, 4),
    seconds: float = 15.0,
    sections: Mapping[str, Any] | None = None,
    forward: Forward | None = None,
    batches: int | None = 2,
    progress: bool = True,
) -> Report | FileReport:
    """Measure a quantized model, or look at a file, and show everything on one page.

    Example:
        >>> fxquant.report(model, prepared, loader).save("report.html")

    Args:
        model: the float model, as it was given to ``prepare``; or the path of an ONNX file, of our export or of another
            quantizer's, or of what ``save`` wrote.
        prepared: the calibrated or trained prepared model; not changed. For an ONNX file the prepared model that it was
            exported from, or the path of the float file that it was made of; None for what the file alone tells.
        data: batches as for ``calibrate``, without labels; or one tensor. They need not be those of the calibration. For a
            file they may be left out: then its grids are shown, and nothing is run.
        title: what the page is called; the model's class by default.
        evaluate: gives the accuracy of a model; called with the float one and the integer one.
        bits: what ``sensitivity`` tries; None leaves it out.
        seconds: what the sensitivity may take, layers with the largest errors first; those beyond are listed.
        sections: more to show, by heading: what ``bench`` or ``tune_placement`` gave, or any object that prints.
        forward: how to run one batch, as ``forward(model, batch)``, for batches of another form.
        batches: how many to use; None for all.
        progress: show progress bars.

    Raises:
        InputError: there is no data, or ``prepared`` was not made of ``model``, or ``bits`` or ``sections`` are no such; or
            a file cannot be read, or does not take the data.
        CalibrationError: the model has no ranges yet.
        LevelError: ``prepared`` is not a prepared model.
    """
    if isinstance(model, (str, os.PathLike)):
        return report_of_file(model, prepared, data, title=title, batches=batches, progress=progress)
    if data is None or not isinstance(prepared, nn.Module):
        raise InputError("report of a model needs its prepared one and data: fxquant.report(model, prepared, loader).")
    require_level(prepared, ("prepared",), "report")
    began, kept = time.perf_counter(), batches_of(data, batches, "report")
    limits = None if bits is None else {"bits": checked_bits(bits), "seconds": seconds}
    shown = _sections(prepared, sections)
    found = _measured(model, prepared, kept, {"forward": forward, "progress": progress}, limits)
    found["accuracy"] = _accuracy(model, found.pop("integer"), evaluate)
    name = found["diff"].name
    told: dict[str, Any] = {"recipe": code_of(prepared), "versions": versions(), "sections": shown}
    return Report(name=name, title=title or name, seconds=time.perf_counter() - began, **told, **found)


def _measured(
    model: nn.Module, prepared: Any, kept: Sequence[Any], options: dict[str, Any], limits: dict[str, Any] | None
) -> dict[str, Any]:
    """What is measured on data, by the names of a report's attributes; and the integer model."""
    errors: Any = errors_by_layer(prepared, kept, **options)
    notes: list[str] = []
    integer = _integer(prepared, notes)
    compared, after = _diff(model, prepared, integer, notes, partial(_same_shapes, model, prepared, kept, options))
    costs = None if limits is None else _sensitivity(prepared, kept, errors, notes, {**options, **limits})
    return {
        "integer": integer,
        "faults": errors.faults,
        "errors": errors,
        "sensitivity": costs,
        "outputs": () if integer is None else agreement(model, integer, kept, options["forward"], notes),
        "bytes": {name: _bytes(own) for name, own in (("float", model), ("integer", integer)) if own is not None},
        "diff": compared,
        "graphs": drawn_graphs(after, compared),
        "coverage": coverage(prepared if integer is None else integer),
        "notes": tuple(notes),
    }


def _diff(
    model: nn.Module, prepared: Any, integer: Any, notes: list[str], are_alike: Callable[[], bool]
) -> tuple[Diff, Any]:
    """The diff that begins at the float model, where that can be captured again from what is recorded of the example.

    Otherwise (inputs of the user's own classes, code that does not run on zeros) the one from the prepared model on.
    """
    try:
        return diff(model, prepared), prepared
    except InputError as error:
        if integer is None or type(model).__name__ != type(prepared).__name__ or not are_alike():
            raise
        notes.append(f"the diff begins at the prepared model: {str(error).splitlines()[0]}")
        return diff(prepared, integer), integer


def _same_shapes(model: nn.Module, prepared: Any, kept: Sequence[Any], options: dict[str, Any]) -> bool:
    """Whether both give tensors of the same shapes where nothing is rounded; a trained model may select others by now."""
    if any(graph.settings.get("qat") for graph in graphs_of(prepared).values()):
        return True
    found = []
    with left_alone(model), left_alone(prepared), quantizers_off(prepared):
        for own in (model, prepared):
            with same_randomness():
                tensors = tree_leaves(run_batch(own, kept[0], options["forward"]))
            found.append([y.shape for y in tensors if isinstance(y, Tensor)])
    return found[0] == found[1]


def _integer(prepared: Any, notes: list[str]) -> Any:
    try:
        return convert(prepared)
    except FxquantError as error:
        notes.append(f"there is no integer model to look at: {error}")
        return None


def _sensitivity(
    prepared: nn.Module, kept: Sequence[Any], errors: LayerErrors, notes: list[str], options: Any
) -> Sensitivity | None:
    try:
        return sensitivity(prepared, kept[:1], first=[layer.path for layer in errors.layers], **options)
    except InputError as error:
        notes.append(str(error))
        return None


def _accuracy(model: nn.Module, integer: Any, evaluate: Callable[[Any], float] | None) -> dict[str, float]:
    if evaluate is None:
        return {}
    found = {}
    for name, own in (("float", model), ("integer", integer)):
        if own is not None:
            with left_alone(own):
                given = evaluate(own)
            try:
                found[name] = float(given)
            except (TypeError, ValueError):
                raise InputError(f"evaluate gave a {type(given).__name__}; it has to give one number.") from None
    return found


def _bytes(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _sections(prepared: Any, given: Mapping[str, Any] | None) -> dict[str, str]:
    if given is not None and not isinstance(given, Mapping):
        raise InputError(
            f"sections={type(given).__name__}: give a dict of headings and what is to be shown below them."
        )
    found = {str(heading): str(shown) for heading, shown in (given or {}).items()}
    placement = prepared.__dict__.get("placement")
    if placement is not None:
        found.setdefault("Placement", str(placement))
    return found
