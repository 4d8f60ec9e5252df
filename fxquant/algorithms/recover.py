"""The verb: choose the roundings of a calibrated model's weights, layer by layer, from data without labels."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxquant.algorithms.adaround import adaround
from fxquant.algorithms.bias_correction import bias_correction
from fxquant.algorithms.closed_form import closed_form
from fxquant.algorithms.engine import Layer, Sweep
from fxquant.calibration import activation_quantizers, require_batches
from fxquant.capture.islands import Model, graphs_of
from fxquant.capture.values import unchanged
from fxquant.errors import CalibrationError, InputError, LevelError, Refusal
from fxquant.flow import require_level
from fxquant.inputs import arguments_of, move_to
from fxquant.nn.fake_quantize import FakeQuantize

__all__ = [
    "METHODS",
    "buffers_of",
    "kept_batches",
    "learning",
    "recover",
    "require_ready",
    "restore",
    "run_batch",
    "tell",
]

Algorithm = Callable[[Layer, torch.Generator], Refusal | None]

METHODS: dict[str, Algorithm] = {
    "closed_form": closed_form,
    "adaround": adaround,
    "bias_correction": bias_correction,
}
"""What chooses the rounding of one layer, by name: it pins the layer's weight, or says why it does not."""


def recover(
    prepared: Model,
    loader: Iterable[Any],
    *,
    method: str = "closed_form",
    forward: Callable[[Any, Any], Any] | None = None,
    batches: int | None = None,
    steps: int | None = None,
    memory: float = 2.0,
    seed: int = 0,
    progress: bool = True,
) -> Model:
    """Choose the rounding of every weight so that each layer gives what it gave in float, without training.

    Each layer in turn gets the integers, the scales and the bias with which it gives its float output best, reading what the
    quantized layers before it really give; then the range of its own output is taken anew.

    Example:
        >>> prepared = fxquant.prepare(model, images, recipe=fxquant.Setting(weight=fxquant.Scheme.weight(4)))
        >>> fxquant.calibrate(prepared, loader)
        >>> int8 = fxquant.convert(fxquant.recover(prepared, loader))

    Args:
        prepared: a calibrated model for post-training quantization. Its quantizers are changed in place, and it is returned:
            integers are *pinned* in the weights' quantizers, see ``fxquant.nn.pinning``. Parameters stay as they are.
        loader: batches as for ``calibrate``; some hundreds of samples, without labels. All are kept in memory.
        method: ``"closed_form"``, ``"adaround"``, which learns to round up or down on the scales that there are, or
            ``"bias_correction"``, which keeps integers and corrects means; see the files of these names in
            ``fxquant.algorithms``. They may follow one another.
        forward: how to run one batch, as ``forward(model, batch)``, for batches of another form.
        batches: stop after that many.
        steps: of gradient descent a layer, for a method that learns; None for its own default.
        memory: gigabytes of activations to hold in memory; what is more goes to a temporary folder.
        seed: of the choice of positions in large feature maps.
        progress: show a progress bar.

    Raises:
        CalibrationError: the model is not calibrated, the loader is empty, or a batch is not finite; then the model is as it
            was before.
        LevelError: the model is not a prepared one, or one for training.
        InputError: there is no such method, or it takes no ``steps``; or the loader is no iterable of batches.

    Source: Frantar et al., GPTQ, 2210.17323, §3–4; targets from the float network: Nagel et al., 2004.10568, §3.3, eq. 25.
    """
    algorithm = _algorithm(method, steps)
    require_ready(prepared, "recover")
    kept = kept_batches(loader, batches, "recover")
    run = partial(run_batch, prepared, kept, forward)
    label = method.replace("_", " ") if progress else None
    sweep = Sweep(prepared, run, len(kept), refit=True, memory=memory * 2**30, progress=label)
    before = buffers_of(prepared)
    try:
        with learning(prepared, "adaround") if method == "adaround" else nullcontext():
            _choose(sweep, algorithm, torch.Generator().manual_seed(seed))
    except BaseException:
        restore(before)
        raise
    tell(sweep.left_out)
    return prepared


def _choose(sweep: Sweep, algorithm: Algorithm, generator: torch.Generator) -> None:
    """Let an algorithm visit every layer; the model's own state is afterwards what it was."""
    with unchanged(sweep.prepared, but=FakeQuantize), torch.no_grad():
        sweep.prepared.eval()
        with closing(iter(sweep)) as layers:
            for layer in layers:
                if (refusal := algorithm(layer, generator)) is not None:
                    sweep.left_out[layer.name] = refusal.at(layer.name)


def _algorithm(method: str, steps: int | None) -> Algorithm:
    if method not in METHODS:
        raise InputError(f"method={method!r} is not known. Choose one of {', '.join(METHODS)}.")
    if steps is None:
        return METHODS[method]
    if METHODS[method] is not adaround or isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(
            f"steps={steps!r}: a number of steps, at least 1, for method='adaround'; {method!r} was asked for."
        )
    return partial(adaround, steps=steps)


@contextmanager
def learning(prepared: nn.Module, verb: str) -> Iterator[None]:
    """Inside, gradients can be had, whatever mode the caller is in.

    Raises:
        InputError: tensors of ``prepared`` were made in inference mode, and have none.
    """
    made = [name for name, value in prepared.state_dict(keep_vars=True).items() if value.is_inference()]
    if made:
        raise InputError(
            f"{verb} learns by gradients, and {made[0]!r} was made in torch.inference_mode(), which has none.\n"
            "  what to do: make, prepare and calibrate the model outside of it, or in torch.no_grad()."
        )
    with torch.inference_mode(False):
        yield


def require_ready(prepared: Any, verb: str) -> None:
    """Raise unless ``prepared`` is for inference and calibrated."""
    require_level(prepared, ("prepared",), verb)
    if any(graph.settings.get("qat") for graph in graphs_of(prepared).values()):
        raise LevelError(
            f"{verb} works after training, and was given a model prepared with qat=True, whose batch norms are not folded.\n"
            "  what to do: prepare the float model, or the trained one, without qat=True."
        )
    missing = [name for name, quantizer in activation_quantizers(prepared).items() if not quantizer.ready]
    if missing:
        raise CalibrationError(
            f"{len(missing)} of the model's quantizers have no range yet: {', '.join(missing[:4])}.\n"
            "  what to do: run fxquant.calibrate(prepared, loader) first."
        )


def kept_batches(loader: Iterable[Any], batches: int | None, verb: str) -> list[Any]:
    """The first ``batches`` of a loader, or all; raises where there is none."""
    require_batches(loader, batches, verb)
    kept = list(itertools.islice(loader, batches))
    if not kept:
        raise CalibrationError(
            f"{verb} was given an empty loader. Check that the data set is not empty and that a generator was not used up "
            f"before: calibrate and {verb} each need the batches."
        )
    return kept


def run_batch(prepared: nn.Module, kept: list[Any], forward: Callable[[Any, Any], Any] | None, number: int) -> None:
    """Send one of ``kept`` through the model."""
    batch = move_to(prepared, kept[number])
    if forward is not None:
        forward(prepared, batch)
    else:
        args, kwargs = arguments_of(prepared, batch)
        _require_finite((args, kwargs), number)
        prepared(*args, **kwargs)


def buffers_of(prepared: nn.Module) -> dict[FakeQuantize, dict[str, Tensor]]:
    """What the buffers of every quantizer hold, copied."""
    quantizers = [part for part in prepared.modules() if isinstance(part, FakeQuantize)]
    return {part: {name: value.clone() for name, value in part.named_buffers(recurse=False)} for part in quantizers}


def _require_finite(tree: Any, batch: int) -> None:
    for value in tree_leaves(tree):
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CalibrationError(
                f"batch {batch + 1} holds NaN or infinity. The model is as it was before.\n"
                "  what to do: check this batch's inputs."
            )


def restore(before: dict[FakeQuantize, dict[str, Tensor]]) -> None:
    """Give every quantizer the buffers that it had."""
    for part, buffers in before.items():
        for name in [name for name in part._buffers if name not in buffers]:
            del part._buffers[name]
        for name, value in buffers.items():
            part._buffers[name] = value
        part.read_state()


def tell(left_out: dict[str, Refusal]) -> None:
    """Warn of what was left out, at the line that called a verb."""
    if left_out:
        shown = "; ".join(map(str, itertools.islice(left_out.values(), 4)))
        more = f"; and {len(left_out) - 4} more" if len(left_out) > 4 else ""
        warnings.warn(f"{len(left_out)} parts of the model are rounded as before: {shown}{more}.", stacklevel=3)
