"""READ FIRST: the method as tuples of passes, and the verbs that run them.

    captured ──canonical──▶ canonical ──ptq / qat──▶ prepared ──freeze──▶ frozen ──to_integer──▶ integer
     capture                            prepare       calibrate, train     freeze      convert

From an integer graph ``to_qdq`` and ``to_decomposed`` make the forms that ``export`` writes for other runtimes.

Every pass is a pure function from graph module to graph module; after each, the laws of its level are checked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from fxquant.calibration import (
    Counted,
    activation_quantizers,
    as_before_on_failure,
    begin_together,
    end_together,
    length_of,
    observing,
    read_weights,
    run_batches,
)
from fxquant.capture.calls import Call
from fxquant.capture.capture import capture
from fxquant.capture.islands import Model, graphs_of, level_of, map_graphs
from fxquant.capture.models import deep_copy
from fxquant.capture.values import unchanged
from fxquant.choose_ranges import choose_ranges, without_range
from fxquant.collapse import warn_of_collapse
from fxquant.errors import CalibrationError, InputError, LevelError
from fxquant.graph.leveled import LeveledModule
from fxquant.inputs import arguments_of, describe_inputs, move_to
from fxquant.kernels.runner import KERNELS, use_kernels
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.nn.folding import Folding
from fxquant.nn.processes import broadcast_state
from fxquant.numerics.requantize import ROUNDINGS
from fxquant.ops.table import TABLE
from fxquant.passes.apply_recipe import apply_recipe, require_fit
from fxquant.passes.canonicalize import canonicalize
from fxquant.passes.choose_regions import choose_regions
from fxquant.passes.drop_noops import drop_noops
from fxquant.passes.finite import require_finite
from fxquant.passes.fold_batchnorm import fold_batchnorm
from fxquant.passes.fold_trained_batchnorm import fold_trained_batchnorm
from fxquant.passes.freeze import freeze as freeze_graph
from fxquant.passes.keep_accumulators import keep_accumulators
from fxquant.passes.leave_unrounded import leave_unrounded
from fxquant.passes.levels import check
from fxquant.passes.merge_clamps import merge_clamps
from fxquant.passes.place_quantizers import place_quantizers
from fxquant.passes.round_for_readers import round_for_readers
from fxquant.passes.scale_groups import scale_groups
from fxquant.passes.settle_quantizers import settle_quantizers
from fxquant.passes.to_integer import to_integer
from fxquant.passes.verification import verify_against
from fxquant.quantizers.registry import RULES, refusal_of
from fxquant.reach import keep_reach, seen_by_all, watching
from fxquant.recipe import Recipe
from fxquant.targets import X86, Target
from fxquant.targets.fitting import fit_target

__all__ = ["calibrate", "convert", "freeze", "prepare", "quantize", "quantizers_off"]

Pass = Callable[[LeveledModule], LeveledModule]

BATCH_NORM_MODES = ("late", "whitepaper", "frozen")


def passes_of(*, recipe: Recipe, qat: bool, target: Target = X86, folds_first: bool = False) -> tuple[Pass, ...]:
    """The way from a captured graph to a prepared one, in order."""
    return (
        canonicalize,
        partial(drop_noops, keep_dropout=qat),
        *(() if qat else (fold_batchnorm,)),
        *placing_passes(recipe, target, folds_first=folds_first),
    )


def placing_passes(recipe: Recipe, target: Target, *, folds_first: bool = False) -> tuple[Pass, ...]:
    """The part of that way that decides what is quantized, and puts quantizers there."""
    return (
        partial(apply_recipe, recipe=recipe, target=target),
        partial(leave_unrounded, recipe=recipe),
        choose_regions,
        partial(merge_clamps, folds_first=folds_first),
        partial(keep_accumulators, target=target),
        partial(round_for_readers, recipe=recipe, target=target),
        partial(scale_groups, recipe=recipe, target=target),
        partial(place_quantizers, recipe=recipe, target=target, folds_first=folds_first),
    )


def prepare(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    qat: bool = False,
    recipe: Recipe | None = None,
    target: str | Target = X86,
    processor: str | None = None,
    batch_norm: str = "late",
    verify: bool = False,
    leaves: Iterable[str | type] = (),
) -> nn.Module:
    """Make a model ready for quantization: its ops become fake-quant modules. The model itself is not touched.

    After training, batch norms are folded and the result is in eval mode; calibrate it next. With ``qat`` it trains like the
    model did, its parameters at the same names. A submodule that cannot be traced runs its own code (see ``coverage``).

    Example:
        >>> prepared = fxquant.prepare(model, images, target="openvino", recipe={"head": None})

    Args:
        model: any ``nn.Module``, unmodified.
        example_inputs: one call: a tensor, the tuple of its arguments, or the dict of its keyword arguments. Optional;
            answers what Python asks about shapes, adds them to reports, tells integer tensors from real ones.
        qat: make it trainable with quantizers that follow the ranges.
        recipe: what is quantized how: a ``Recipe``, its dict, or a preset's name; what it leaves open is the target's.
        target: where the model will run: a name of ``fxquant.targets.TARGETS``, or a ``Target`` of your own.
        processor: what it shall be right on, a name of ``fxquant.targets.PROCESSORS``; None for the target's (``"any"``).
        batch_norm: in QAT, ``"late"`` trains batch norms behind the quantized weights and folds them into the weight
            scales at conversion, exactly; ``"frozen"`` does the same with statistics that stay as they are;
            ``"whitepaper"`` folds them before weights are rounded, in every pass (see ``nn.folding``).
        verify: run the model and the graph after every pass on ``example_inputs`` and compare, quantizers off.
        leaves: paths or classes of modules that stay in float and run their own code.

    Returns:
        A ``LeveledModule`` (an ``fx.GraphModule``); where the top module cannot be traced, one of its class with graphs
        inside. Both are called as the model is, trained, saved and converted alike.

    Raises:
        InputError: the model or ``example_inputs`` cannot be used.
        CaptureError: no part of the model can be traced; says where and why.
        RecipeError: the recipe does not fit the model, or asks for what the target does not have.
    """
    if batch_norm not in BATCH_NORM_MODES:
        raise InputError(f"batch_norm={batch_norm!r} is not known. Choose one of {', '.join(BATCH_NORM_MODES)}.")
    if verify and example_inputs is None:
        raise InputError("verify=True compares outputs: give example_inputs to run on.")
    how: Any = {"estimator": "moving_average" if qat else None, "processor": processor, "refusal": refusal_of}
    target, recipe = fit_target(target, Recipe.of(recipe), ops=TABLE, **how)
    captured = capture(model, example_inputs, for_training=qat, leaves=leaves)
    call, named = captured.call, list(captured.leaves)
    for graph in captured.graphs:
        check(graph, by="capture").settings.update(
            qat=qat, batch_norm=batch_norm, recipe=recipe, target=target, inputs=describe_inputs(call), leaves=named
        )
    steps = passes_of(recipe=recipe, qat=qat, target=target, folds_first=qat and batch_norm == "whitepaper")
    prepared = run_passes(captured.model, steps, call if verify else None)
    require_fit(graphs_of(prepared).values(), recipe, name=type(captured.model).__name__, alone=captured.is_layer)
    return _ready_to_train(prepared, batch_norm, call) if qat else prepared.eval()


def run_passes(model: nn.Module, steps: Iterable[Pass], verify_on: Call | None) -> nn.Module:
    """``model`` after ``steps``, with the laws of every graph checked, and on request its outputs."""
    for step in steps:
        changed = map_graphs(model, partial(_checked, step))
        if verify_on is not None:
            verify_against(model, changed, verify_on.args, verify_on.kwargs, by=_name(step))
        model = changed
    return model


def _checked(step: Pass, graph: LeveledModule) -> LeveledModule:
    return check(step(graph), by=_name(step))


def _ready_to_train(module: nn.Module, batch_norm: str, call: Call | None) -> nn.Module:
    if not isinstance(module, LeveledModule) and "num_items_in_batch" not in (call.kwargs if call else {}):
        module.__dict__["accepts_loss_kwargs"] = False  # see LeveledModule.accepts_loss_kwargs
    for part in module.modules():
        if isinstance(part, FakeQuantize) and not isinstance(part, WeightQuantize) and part.fixed_range is None:
            part.tracking = True
        if batch_norm == "frozen" and hasattr(part, "statistics_frozen"):
            part.statistics_frozen = True  # type: ignore[assignment]
    return module


def _name(step: Pass) -> str:
    return getattr(getattr(step, "func", step), "__name__", str(step))


def calibrate(
    prepared: Model,
    loader: Iterable[Any],
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    batches: int | None = None,
    progress: bool = True,
) -> Model:
    """Run data through a prepared model and set every quantizer's range from what it saw.

    Example:
        >>> fxquant.calibrate(prepared, loader, batches=32)

    Args:
        prepared: what ``prepare`` returned; its ranges are changed in place, and it is returned. The model's own state
            (streams, caches, counters) is afterwards what it was before.
        loader: any iterable of batches: tensors, or tuples, lists or dicts that start with the model's inputs (labels
            behind them are ignored). Of several processes each its own share, after ``fxquant.training.synchronize``.
        forward: how to run one batch, as ``forward(model, batch)``, for batches of another form.
        batches: stop after that many.
        progress: show a progress bar.

    Warns:
        UserWarning: 8 bits leave next to nothing of an output on the last batch or the first; says at which op it is lost.

    Raises:
        CalibrationError: the loader is empty, or NaN or infinity was seen, in a batch or in a weight; then all ranges are
            as they were before.
        LevelError: the model is not a prepared one.
    """
    require_level(prepared, ("prepared",), "calibrate")
    for graph in graphs_of(prepared).values():
        require_finite(graph)
    if loader is None:
        raise CalibrationError(
            "calibrate was given no data.\n  what to do: give some batches, without labels; or, for a model with batch "
            "norms, those that fxquant.algorithms.synthesize(model, example_inputs) makes of their statistics."
        )
    quantizers, fresh = activation_quantizers(prepared), without_range(prepared)
    with (
        as_before_on_failure(quantizers) as saved,
        unchanged(prepared, but=FakeQuantize),
        observing(quantizers.values()),
        watching(prepared) as seen,
        torch.no_grad(),
    ):
        prepared.eval()
        begin_together(quantizers)
        runs = run_batches(prepared, quantizers, loader, forward, batches, progress)
        if end_together(quantizers, saved):
            seen = seen_by_all(prepared, seen)
    for quantizer in quantizers.values():
        quantizer.update_scale()
    choose_ranges(prepared, runs[0], lambda: quantizers_off(prepared), fresh)
    broadcast_state(quantizer for quantizer in quantizers.values() if quantizer.synchronized)
    keep_reach(prepared, seen)
    read_weights(prepared)
    warn_of_collapse(prepared, runs, lambda: quantizers_off(prepared))
    return prepared


def freeze(prepared: nn.Module) -> nn.Module:
    """A copy of a calibrated or trained model with every number final, still computing in floats.

    It shares nothing with ``prepared``: training on, or running either, leaves the other as it is.
    It rounds exactly as the integer model does, and is the reference that ``convert`` is held against.

    Example:
        >>> frozen = fxquant.freeze(prepared)

    Raises:
        CalibrationError: some quantizers have no range yet; names them.
        LevelError: a quantizer of a user's own rounds otherwise than its grid, see ``passes.settle_quantizers``.
    """
    require_level(prepared, ("prepared",), "freeze")
    missing = [n for n, q in activation_quantizers(prepared).items() if not q.ready]
    whole = [n for n, q in activation_quantizers(prepared).items() if not q.ready and q.seen_dtype is not None]
    if whole:
        raise CalibrationError(
            f"{len(whole)} of the model's quantizers saw whole numbers, which have no range: {', '.join(whole[:8])}.\n"
            "  what to do: prepare with example_inputs, which tell integer tensors from real ones."
        )
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise CalibrationError(
            f"{len(missing)} of the model's quantizers have no range yet: {shown}.\n"
            "  what to do: run fxquant.calibrate(prepared, loader), or train it, first; a branch that no batch "
            "reaches needs data that reaches it, or a recipe that keeps it in float."
        )
    folds = any(isinstance(part, Folding) and part.folded_norm is not None for part in prepared.modules())
    first = (fold_trained_batchnorm,) if folds else ()
    return deep_copy(run_passes(prepared, (*first, settle_quantizers, freeze_graph), None))


def convert(prepared: nn.Module, *, rounding: str | None = None, kernels: str = "auto") -> nn.Module:
    """The integer model: int8 weights, int32 biases, integers between quantize and dequantize.

    Example:
        >>> int8 = fxquant.convert(prepared)
        >>> logits = int8(images)

    Args:
        prepared: a calibrated or trained model; not touched.
        rounding: how accumulators are requantized: ``single`` (one fixed-point rounding), ``double`` (TFLite's and
            gemmlowp's two), or ``float`` (multiply and round half to even); None for the quantizer's, where it has one
            (``tqt``), or the target's own, ``single`` on x86.
        kernels: what computes the model when it is called. ``auto``: each graph on the native kernels, whose
            integers are the reference's (but for what attention, layer norm and softmax evaluate in float32), where this
            machine has them (Linux; a wheel brings them, else they are compiled once, when first used) and they have all of
            its ops; else as with ``torch``. ``torch``: torch's int8 operators for this machine, within one integer step
            of the reference at each op, and the reference for the rest; the first call warns of layers that it computes.
            ``reference``: the exact one everywhere. ``print(fxquant.coverage(model))`` names each op's. None changes the
            graph, its numbers or what is saved.

    Raises:
        CalibrationError: some quantizers have no range yet; names them.
        LevelError: the model is not a prepared or frozen one.
    """
    if rounding is not None and rounding not in ROUNDINGS:
        raise InputError(f"rounding={rounding!r} is not known. Choose one of {', '.join(ROUNDINGS)}.")
    if kernels not in KERNELS:
        raise InputError(f"kernels={kernels!r} is not known. Choose one of {', '.join(KERNELS)}.")
    require_level(prepared, ("prepared", "frozen"), "convert")
    frozen = deep_copy(prepared) if level_of(prepared) == "frozen" else freeze(prepared)
    settings = next(iter(graphs_of(frozen).values())).settings
    rounding = rounding or _rounding_of(frozen) or settings.get("target", X86).rounding
    integer = run_passes(frozen, (partial(to_integer, rounding=rounding),), None).eval()
    for graph in graphs_of(integer).values():
        graph.meta["settings"] = {**graph.settings, "rounding": rounding, "kernels": kernels}
        use_kernels(graph, kernels)
    return integer


def _rounding_of(frozen: nn.Module) -> str | None:
    """How the rules that a frozen model was made with want accumulators requantized; None where they do not care."""
    names = {part.scheme.quantizer for part in frozen.modules() if isinstance(part, FakeQuantize)}
    wanted = (RULES[name].rounding for name in sorted(names) if name in RULES)
    return next((rounding for rounding in wanted if rounding is not None), None)


def quantize(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    example_inputs: Any = None,
    recipe: Recipe | None = None,
    target: str | Target = X86,
    processor: str | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    batches: int | None = None,
    progress: bool = True,
) -> nn.Module:
    """``prepare``, ``calibrate`` and ``convert`` in one: the integer model, calibrated on ``loader``.

    The first batch serves as example inputs unless others are given. Arguments and errors as of the three verbs.

    Example:
        >>> int8 = fxquant.quantize(model, loader)
    """
    iterator = iter(loader)
    first = next(iterator, None)
    if first is None:
        raise CalibrationError("quantize was given an empty loader: no range can be set.")
    if example_inputs is None and forward is None:
        args, kwargs = arguments_of(model, move_to(model, first))
        example_inputs = kwargs or args
    prepared = prepare(model, example_inputs, recipe=recipe, target=target, processor=processor)
    every = Counted(itertools.chain([first], iterator), length_of(loader))
    calibrate(prepared, every, forward=forward, batches=batches, progress=progress)
    return convert(prepared)


@contextmanager
def quantizers_off(prepared: nn.Module) -> Iterator[None]:
    """Inside, the rewritten graph computes in float: no rounding, no observing.

    Example:
        >>> with fxquant.quantizers_off(prepared):
        ...     logits = prepared(images)
    """
    before = {part: part.enabled for part in prepared.modules() if isinstance(part, FakeQuantize)}
    for part in before:
        part.enabled = False
    try:
        yield
    finally:
        for part, enabled in before.items():
            part.enabled = enabled


def require_level(module: Any, levels: tuple[str, ...], verb: str) -> None:
    """Raise ``LevelError`` unless ``module`` is whole and at one of ``levels``; ``verb`` is who asks."""
    level = level_of(module) if isinstance(module, nn.Module) else None
    if level in levels:
        parts = next((name for name, one in module.named_parameters() if hasattr(one, "full_tensor")), None)
        if parts is not None:
            raise LevelError(
                f"{verb} takes whole parameters, and {parts!r} is spread over processes (fully_shard).\n"
                "  what to do: calibrate before fully_shard; afterwards load torch.distributed.checkpoint.state_dict."
                "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) into a model prepared alike."
            )
        return
    what = f"a {type(module).__name__}" if level is None else f"a model at level {level!r}"
    raise LevelError(
        f"{verb} takes a model at level {' or '.join(levels)}, and was given {what}.\n"
        f"  what to do: {verb} what fxquant.prepare(model, example_inputs) returns."
    )
