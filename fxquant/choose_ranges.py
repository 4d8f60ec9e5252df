"""Choose, for each tensor with ``estimator="auto"``, the estimator with which the layers that read it lose least.

For every candidate range of a tensor x, with its roundings x̂:

    loss = Σ_readers ‖W∗x - W∗x̂‖² / ‖W∗x‖²  +  ‖x - x̂‖² / ‖x‖²  where an op without weights reads it too

and for a weight, each channel for itself, ‖W∗x - Ŵ∗x‖². What is read is the float network's, on the last batch of
calibration. The candidates begin with ``minmax`` and ``mse``: by this measure the choice is never worse than either.

Source: a layer's output as the measure: Li et al., BRECQ, 2102.05426, §3.2 (layer-wise reconstruction); the
candidates of Nagel et al., 2106.08295, §3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.capture.islands import graphs_of
from fxquant.capture.values import unchanged
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.nn.modules import QuantWeighted, QuantWeightedOp
from fxquant.numerics.affine import dequantize, quantize, scale_and_zero_point
from fxquant.numerics.ranges import ESTIMATOR, Auto
from fxquant.ops.behaviour import Weighted
from fxquant.ops.calls import behaviour_of, call_of

__all__ = ["choose_ranges"]


@torch.no_grad()
def choose_ranges(prepared: Any, run: Callable[[], Any], off: Callable[[], Any]) -> None:
    """Set the choice of every quantizer whose scheme says ``auto``, and its grid.

    Args:
        prepared: a model whose ranges have been observed; its quantizers are changed in place.
        run: runs one batch through it.
        off: a context in which quantizers do not round.
    """
    if not any(_is_auto(part) for part in prepared.modules()):
        return
    losses: dict[FakeQuantize, Tensor] = {}
    hooks = [hook for graph in graphs_of(prepared).values() for hook in _hooks(graph, losses)]
    try:
        with unchanged(prepared, but=FakeQuantize), off():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for quantizer, loss in losses.items():
        quantizer.range_state()["choice"].copy_(loss.nan_to_num(nan=torch.inf).argmin(0))
        if not isinstance(quantizer, WeightQuantize):
            quantizer.update_scale()


def _is_auto(quantizer: Any) -> bool:
    return (
        type(quantizer) in (FakeQuantize, WeightQuantize)
        and quantizer.fixed_range is None
        and not getattr(quantizer, "pinned", False)
        and isinstance(ESTIMATOR[quantizer.scheme.estimator], Auto)
    )


def _hooks(graph: Any, losses: dict[FakeQuantize, Tensor]) -> Iterator[Any]:
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
        if _is_auto(own) and part.applies and not all(isinstance(behaviour_of(user), Weighted) for user in node.users):
            yield part.register_forward_hook(
                lambda part, args, x, own=own: _add(losses, own, _inputs_loss(own, x, None))
            )


def _reader(node: fx.Node, part: Any, entering: Any, losses: dict[FakeQuantize, Tensor]) -> Callable[..., None]:
    """Adds what a weighted op's output loses by the rounding of its input, and by that of its weight."""
    call, behaviour = call_of(node, part), behaviour_of(node)
    assert isinstance(behaviour, Weighted)
    fixed = {name: value for name, value in call.attributes.items() if not isinstance(value, fx.Node)}

    def output_of(x: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = call.entry.function(x, weight, None, **fixed)
        return result

    def hook(part: Any, args: tuple[Any, ...]) -> None:
        x, weight = args[0], args[1] if isinstance(part, QuantWeightedOp) else part.rounded_parameters()[0]
        if _is_auto(entering):
            _add(losses, entering, _inputs_loss(entering, x, lambda error: output_of(error, weight)))
        if _is_auto(part.weight_quantizer):
            axis = -1 if behaviour.channels_last else 1 if x.ndim == weight.ndim else 0
            _add(losses, part.weight_quantizer, _weights_loss(part.weight_quantizer, weight, x, output_of, axis))

    return hook


def _add(losses: dict[FakeQuantize, Tensor], quantizer: FakeQuantize, loss: Tensor) -> None:
    losses[quantizer] = losses[quantizer] + loss if quantizer in losses else loss


def _rounded(quantizer: FakeQuantize, x: Tensor, state: dict[str, Tensor]) -> Iterator[Tensor]:
    """``x`` on the grid of each candidate."""
    estimator: Any = ESTIMATOR[quantizer.scheme.estimator]
    for name in estimator.candidates(state):
        scale, zero_point = scale_and_zero_point(*ESTIMATOR[name].range(state, quantizer.scheme), quantizer.scheme)
        q = quantize(x, scale, zero_point, quantizer.scheme.qmin, quantizer.scheme.qmax, axis=quantizer.axis)
        yield dequantize(q, scale, zero_point, axis=quantizer.axis).to(x.dtype)


def _inputs_loss(quantizer: FakeQuantize, x: Tensor, output_of: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Of each candidate the lost share of ``x``'s power, or of its linear image's."""
    through = output_of or (lambda error: error)
    power = _power(through(x)).clamp(min=torch.finfo(torch.float64).tiny)
    rounded = _rounded(quantizer, x, quantizer.range_state())
    return torch.stack([_power(through(x - y)) for y in rounded]) / power


def _weights_loss(
    quantizer: FakeQuantize, weight: Tensor, x: Tensor, output_of: Callable[..., Tensor], axis: int
) -> Tensor:
    """Of each candidate the error of the output, ``(candidates,)`` or ``(candidates, channels of the scales)``."""
    estimator: Any = ESTIMATOR[quantizer.scheme.estimator]
    state = estimator.initial_state(quantizer.channels, device=weight.device)
    estimator.update(state, weight, axis=quantizer.axis)
    found = []
    for rounded in _rounded(quantizer, weight, state):
        error = output_of(x, weight - rounded).double().square().movedim(axis, 0).flatten(1).sum(1)
        if quantizer.channels is None:
            error = error.sum()
        elif error.numel() != quantizer.channels:  # a scale stands for one channel in every group
            error = error.reshape(-1, quantizer.channels).sum(0)
        found.append(error)
    return torch.stack(found)


def _power(x: Tensor) -> Tensor:
    return x.double().square().sum()
