"""Choose, for each tensor with ``estimator="auto"``, the estimator with which the layers that read it lose least.

For every candidate range of a tensor x, with its roundings x̂:

    loss = Σ_readers ‖W∗x - W∗x̂‖² / ‖W∗x‖²  +  ‖x - x̂‖² / ‖x‖²  where an op without weights reads it too

and for a weight, each channel for itself, ‖W∗x - Ŵ∗x‖². x̂ is what the quantizer's own rule makes of x (TQT's has scales
that are powers of two), in float32 where the model is in half precision. What is read is the float network's, on the last
batch of calibration. The candidates begin with ``minmax`` and ``mse``: by this measure the choice is never worse.

Source: a layer's output as the measure: Li et al., BRECQ, 2102.05426, §3.2 (layer-wise reconstruction); the
candidates of Nagel et al., 2106.08295, §3.1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.behaviour import Weighted
from fxquant.capture.islands import graphs_of
from fxquant.capture.values import unchanged
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.nn.modules import QuantWeighted, QuantWeightedOp
from fxquant.numerics.affine import in_float32
from fxquant.numerics.ranges import ESTIMATOR, Auto
from fxquant.ops.calls import behaviour_of, call_of

__all__ = ["choose_ranges", "without_range"]

_AUTO = Auto()


@torch.no_grad()
def choose_ranges(
    prepared: nn.Module, run: Callable[[], Any], off: Callable[[], Any], fresh: Collection[WeightQuantize] = ()
) -> None:
    """Set the choice of every quantizer whose scheme says ``auto``, and its grid, or where the one that it learns starts.

    Args:
        prepared: a model whose ranges have been observed; its quantizers are changed in place.
        run: runs one batch through it.
        off: a context in which quantizers do not round.
        fresh: what ``without_range`` gave before batches were run. The learned range of another weight belongs to the
            optimizer, and stays as it is; that of a tensor is what calibration has just seen.
    """
    if not any(_is_auto(part) for part in prepared.modules()):
        return
    losses = _Losses(fresh)
    hooks = [hook for graph in graphs_of(prepared).values() for hook in _hooks(graph, losses)]
    try:
        with unchanged(prepared, but=FakeQuantize), off():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for quantizer, loss in losses.found.items():
        _AUTO.choose(quantizer.range_state(), loss.nan_to_num(nan=torch.inf).argmin(0))
        if isinstance(quantizer, WeightQuantize):
            quantizer.read_range(losses.weights[quantizer])
        else:
            quantizer.update_scale()


def without_range(prepared: Any) -> set[WeightQuantize]:
    """The weights' quantizers whose learned range is still to start, which the next forward pass does."""
    return {
        part for part in prepared.modules() if isinstance(part, WeightQuantize) and _learns(part) and not part.ready
    }


def _learns(quantizer: FakeQuantize) -> bool:
    """Whether a range belongs to the optimizer once it has started."""
    return any(True for _ in quantizer.parameters(recurse=False))


def _is_auto(quantizer: Any) -> bool:
    return (
        isinstance(quantizer, FakeQuantize)
        and quantizer.takes_estimator
        and quantizer.fixed_range is None
        and not getattr(quantizer, "pinned", False)
        and isinstance(ESTIMATOR[quantizer.scheme.estimator], Auto)
    )


class _Losses:
    """Sums, by quantizer, of what each candidate loses; and the weights that were read."""

    def __init__(self, fresh: Collection[WeightQuantize]) -> None:
        self.fresh, self.found, self.weights = fresh, dict[FakeQuantize, Tensor](), dict[FakeQuantize, Tensor]()

    def wants(self, quantizer: Any) -> bool:
        """Whether there is an estimator to choose: the learned range of a weight has one only where it starts."""
        started = isinstance(quantizer, WeightQuantize) and _learns(quantizer) and quantizer not in self.fresh
        return _is_auto(quantizer) and not started

    def add(self, quantizer: FakeQuantize, loss: Tensor, weight: Tensor | None = None) -> None:
        self.found[quantizer] = self.found[quantizer] + loss if quantizer in self.found else loss
        if weight is not None:
            self.weights[quantizer] = weight


def _hooks(graph: Any, losses: _Losses) -> Iterator[Any]:
    """Hooks on what reads or makes tensors that are to be chosen for; they add up losses while a batch runs in float."""
    parts: dict[fx.Node, Any] = {
        node: graph.get_submodule(str(node.target)) for node in graph.graph.nodes if node.op == "call_module"
    }
    for node, part in parts.items():
        if isinstance(part, (QuantWeighted, QuantWeightedOp)):
            source: Any = node.args[0]
            entering = getattr(parts.get(source), "output_quantizer", None)
            yield part.register_forward_pre_hook(_reader(node, part, entering, losses))
        own = getattr(part, "output_quantizer", None)
        if losses.wants(own) and part.applies and not all(isinstance(behaviour_of(u), Weighted) for u in node.users):
            yield part.register_forward_hook(
                lambda part, args, x, own=own: losses.add(own, _inputs_loss(own, in_float32(x), None))
            )


def _reader(node: fx.Node, part: Any, entering: Any, losses: _Losses) -> Callable[..., None]:
    """Adds what a weighted op's output loses by the rounding of its input, and by that of its weight."""
    call, behaviour = call_of(node, part), behaviour_of(node)
    assert isinstance(behaviour, Weighted)
    fixed = {name: value for name, value in call.attributes.items() if not isinstance(value, fx.Node)}

    def output_of(x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            result: Tensor = call.entry.function(x, weight, None, **fixed)
        return result

    def hook(part: Any, args: tuple[Any, ...]) -> None:
        held = args[1] if isinstance(part, QuantWeightedOp) else part.rounded_parameters()[0]
        x, weight, own = in_float32(args[0]), in_float32(held), part.weight_quantizer
        if losses.wants(entering):
            losses.add(entering, _inputs_loss(entering, x, lambda error: output_of(error, weight)))
        if losses.wants(own):
            axis = -1 if behaviour.channels_last else 1 if x.ndim == weight.ndim else 0
            losses.add(own, _weights_loss(own, weight, x, output_of, axis), held)

    return hook


def _rounded(quantizer: FakeQuantize, x: Tensor) -> Iterator[Tensor]:
    """``x`` as the quantizer would round it, on the range of each candidate."""
    trial: Any = copy.deepcopy(quantizer).eval()
    trial.enabled, trial.observing = True, False
    if isinstance(trial, WeightQuantize):
        trial.pinned, trial.out_axis = True, None
    state = trial.range_state()
    for i in range(len(_AUTO.candidates(state))):
        _AUTO.choose(state, torch.tensor(i, device=x.device))
        trial.read_range(x) if isinstance(trial, WeightQuantize) else trial.update_scale()
        yield trial(x)


def _inputs_loss(quantizer: FakeQuantize, x: Tensor, output_of: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Of each candidate the lost share of ``x``'s power, or of its linear image's."""
    through = output_of or (lambda error: error)
    power = _power(through(x)).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.stack([_power(through(x - y)) for y in _rounded(quantizer, x)]) / power


def _weights_loss(
    quantizer: FakeQuantize, weight: Tensor, x: Tensor, output_of: Callable[..., Tensor], axis: int
) -> Tensor:
    """Of each candidate the error of the output, ``(candidates,)`` or ``(candidates, channels of the scales)``."""
    found = []
    for rounded in _rounded(quantizer, weight):
        squares = output_of(x, weight - rounded).double().square()
        error = squares.movedim(axis, 0).reshape(squares.shape[axis], -1).sum(1)
        if quantizer.channels is None:
            error = error.sum()
        elif error.numel() != quantizer.channels:  # a scale stands for one channel in every group
            error = error.reshape(-1, quantizer.channels).sum(0)
        found.append(error)
    return torch.stack(found)


def _power(x: Tensor) -> Tensor:
    return x.double().square().sum()
