"""The fake-quant modules of a prepared graph.

``QuantOp`` stands for a function call (``F.relu`` becomes ``QuantReLU``, ``a + b`` becomes ``QuantAdd``); the ``op`` table
makes one named subclass per entry. Modules with parameters become a subclass of their own class, with the parameters at
the same names: ``nn.Conv2d`` → ``QuantConv2d``.

Each has an ``output_quantizer``, which is one of: its own; the one object that it shares with the module whose values
pass through it (``applies`` is then False, since those values are on the grid already); or None, where a fused chain
(conv → bn → relu) goes on and its last link quantizes, or where the accumulator leaves the graph as a float.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import LevelError
from fxquant.graph.edit import clone_module
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.nn.folding import Folding, folded_forward
from fxquant.nn.leaf import Leaf
from fxquant.nn.shipped_bias import rounded_bias
from fxquant.nn.switch import Switch, Switched

_GLOBAL_HOOKS = nn.modules.module._global_forward_hooks
_GLOBAL_PRE_HOOKS = nn.modules.module._global_forward_pre_hooks

__all__ = [
    "Described",
    "QuantInput",
    "QuantOp",
    "QuantParametric",
    "QuantWeighted",
    "QuantWeightedOp",
    "float_class_of",
    "quant_class_of",
]


class Described(Protocol):
    """What a module needs to know of its op: see ``ops.entry.OpEntry``."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def function(self) -> Callable[..., Any]: ...


class _Quantized(Leaf):
    """What all fake-quant modules share."""

    entry: Any = None
    output_quantizer: FakeQuantize | None
    applies: bool
    inplace: bool
    observes = True

    def attach(
        self, quantizer: FakeQuantize | None, *, applies: bool = True, inplace: bool = False, observes: bool = True
    ) -> None:
        """Set the output quantizer.

        Args:
            quantizer: the quantizer of this module's output, or None.
            applies: whether this module rounds; False where the values are on the grid already.
            inplace: whether the value to round is a buffer that nobody else reads, unless a hook does.
            observes: whether the quantizer's range follows this module's values; False where it follows its input's.
        """
        self.output_quantizer, self.applies, self.inplace, self.observes = quantizer, applies, inplace, observes

    def ships_bias(self, source: FakeQuantize | None, weighted: nn.Module | None = None) -> None:
        """Let the bias be rounded as it will ship: a weighted op's own, or that which it gets from a batch norm behind it.

        The two are held without being registered: they have their names elsewhere.

        Args:
            source: the quantizer of the weighted op's input; None lets the bias be.
            weighted: the weighted op that this batch norm will be folded into.
        """
        self.__dict__["_bias_of"] = None if source is None else (source, weighted)

    def shipped(self, bias: Tensor | None) -> Tensor | None:
        """``bias`` as a weighted op will have it."""
        part: Any = self
        source, weighted = self.__dict__.get("_bias_of") or (None, None)
        if isinstance(part.weight_quantizer, WeightQuantize):
            bias = part.weight_quantizer.bias_for(bias)
        if bias is None or source is None or weighted is not None or not source.active:
            return bias
        return source.where_known(rounded_bias(bias, source.scale, part.weight_quantizer.scale), bias)

    def _quantize(self, y: Any) -> Any:
        if self.output_quantizer is None or not self.applies:
            if hasattr(y, "is_leaf") and not (self._forward_hooks or _GLOBAL_HOOKS):
                y._fxquant_unread = True
            return y
        return self.output_quantizer(y, inplace=self.inplace, observes=self.observes)

    def _may_overwrite(self, x: Any) -> bool:
        """Whether ``x``, made by the link before in a chain, is this module's to overwrite: no hook has seen it."""
        unread = bool(self.inplace and getattr(x, "_fxquant_unread", False))
        if unread:
            x._fxquant_unread = False
        return unread and not (self._forward_pre_hooks or _GLOBAL_PRE_HOOKS)

    def train(self, mode: bool = True) -> Any:
        """As torch's, but that ``eval`` does not stop the quantizers in here: the whole graph's does.

        A part alone is put into eval mode to hold batch norms or a stage still, while what comes in goes on changing.
        """
        following = [part for part in self.children() if isinstance(part, FakeQuantize) and part.training]
        super().train(mode)
        for part in following:
            part.training = True
        return self

    def replaced_by(self, new: Any, name: str) -> nn.Module:
        """What stands in the graph when the user's code puts ``new`` in this module's place.

        Raises:
            LevelError: the graph cannot go on with it.
        """
        if isinstance(new, _Quantized):
            return new
        raise LevelError(
            f"{name!r} is a {type(self).__name__} of a prepared graph, which counts on its grid, and a "
            f"{type(new).__name__} was put in its place.\n"
            "  what to do: change the model's layers (adapters, wrappers, conversions) before fxquant.prepare."
        )


class QuantInput(_Quantized):
    """Quantizes a tensor that enters the quantized region: a graph input, a parameter, or a float op's result."""

    def __init__(self, quantizer: FakeQuantize) -> None:
        super().__init__()
        self.attach(quantizer)

    def forward(self, x: Tensor) -> Tensor:
        return self._quantize(x)


class QuantOp(_Quantized):
    """A function call whose result is quantized.

    Args:
        entry: the op.
        attributes: its arguments that are neither tensors nor computed in the graph.
        clamp: ``(lower, upper)`` for a clamping op, which is then done by the quantizer while that is active.
    """

    def __init__(
        self, entry: Described, attributes: dict[str, Any], clamp: tuple[float | None, float | None] | None = None
    ) -> None:
        super().__init__()
        self.entry, self.attributes, self.clamp = entry, attributes, clamp
        self.attach(None)

    def forward(self, *operands: Any, **dynamic: Any) -> Any:
        if self.clamp is None:
            return self._quantize(self.entry.function(*operands, **self.attributes, **dynamic))
        quantizer = self.output_quantizer
        if quantizer is None or not self.applies:
            return self.entry.function(*operands, **self.attributes)
        inplace = self._may_overwrite(operands[0])
        y = quantizer(operands[0], *self.clamp, inplace=inplace, observes=self.observes)
        return y if quantizer.active else self.entry.function(y, **self.attributes)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.attributes.items())


class QuantWeightedOp(QuantOp):
    """A call of a weighted function (``F.conv2d``, ``F.linear``) whose weight is a parameter of the graph."""

    weight_quantizer: WeightQuantize

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **dynamic: Any) -> Any:
        weight = self.weight_quantizer(weight)
        bias = self.shipped(bias)
        return self._quantize(self.entry.function(x, weight, bias, **self.attributes, **dynamic))


class QuantParametric(_Quantized):
    """Mixin for modules that have parameters but no weight to quantize; put it before the float class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._quantize(super().forward(*args, **kwargs))


class QuantWeighted(Folding, _Quantized):
    """Mixin for modules with a weight to quantize; put it before the float class."""

    weight: Tensor
    bias: Tensor | None
    weight_quantizer: WeightQuantize

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (norm := self.folded_norm) is not None:
            return self._quantize(folded_forward(self, norm, x, *args, **kwargs))
        weight = self.weight_quantizer(self.weight)
        return self._quantize(self.weighted(x, weight, self.shipped(self.bias), *args, **kwargs))

    def weighted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The op itself, with other parameters than the module's."""
        raise NotImplementedError


class _Conv(QuantWeighted):
    def weighted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class _ConvTranspose(QuantWeighted):
    def weighted(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None) -> Tensor:
        dims = len(self.kernel_size)
        padding = self._output_padding(x, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation)
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return function(x, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation)


class QuantConv1d(_Conv, nn.Conv1d):
    """``nn.Conv1d`` with a fake-quantized weight and output."""


class QuantConv2d(_Conv, nn.Conv2d):
    """``nn.Conv2d`` with a fake-quantized weight and output."""


class QuantConv3d(_Conv, nn.Conv3d):
    """``nn.Conv3d`` with a fake-quantized weight and output."""


class QuantConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with a fake-quantized weight and output."""


class QuantConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with a fake-quantized weight and output."""


class QuantConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with a fake-quantized weight and output."""


class QuantLinear(QuantWeighted, nn.Linear):
    """``nn.Linear`` with a fake-quantized weight and output."""

    def weighted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class _BatchNorm(Switched, QuantParametric, nn.modules.batchnorm._BatchNorm):
    """Batch normalization whose statistics can be held still while the rest trains (*frozen* mode)."""

    statistics_frozen = Switch("holds_statistics", initial=False)

    def reset_running_stats(self) -> None:
        """As torch's; refused where the statistics are frozen, since nothing would take them anew."""
        if self.statistics_frozen:
            raise LevelError(
                "the statistics of this batch norm are frozen: set back to mean 0 and variance 1, they would stay so.\n"
                "  what to do: fxquant.reestimate_batchnorm(model, loader) takes frozen statistics anew; or "
                "fxquant.freeze_batchnorm(model, False) first."
            )
        super().reset_running_stats()

    def forward(self, x: Tensor) -> Any:
        return self._quantize(self.normalized(x)) if "_folded_into" not in self.__dict__ else self._hand_on(x)

    def normalized(self, x: Tensor) -> Tensor:
        """Batch normalization alone, with the batch's statistics or those that are frozen."""
        if self.running_mean is None or (self.training and not self.statistics_frozen):
            return super(QuantParametric, self).forward(x)
        self._check_input_dim(x)
        bias = self._folded_bias()
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, bias, False, 0.0, self.eps)

    def _hand_on(self, x: Tensor) -> Any:
        """``x``, which the module before has normalized, rounded here where this is the last link of the chain."""
        unread = self._may_overwrite(x)
        if self.output_quantizer is None or not self.applies:
            return self._quantize(x) if unread else x
        return self.output_quantizer(x, inplace=unread, observes=self.observes)

    def _folded_bias(self) -> Tensor | None:
        """β, moved by what rounding takes off the bias that this norm gives the weighted op before it.

        Folded, that op has the weight scale |k|·s_w and the bias k·b + β - k·μ, k = γ / sqrt(σ² + ε): see ``passes.freeze``.
        """
        source, weighted = self.__dict__.get("_bias_of") or (None, None)
        if source is None or weighted is None or not source.active:
            return self.bias
        assert self.running_mean is not None and self.running_var is not None
        with torch.no_grad():
            gain = torch.rsqrt(self.running_var.double() + float(self.eps))
            gain = gain if self.weight is None else gain * self.weight.double()
            offset = -self.running_mean.double() * gain
            offset = offset if self.bias is None else offset + self.bias.double()
            offset = offset if weighted.bias is None else offset + gain * weighted.bias.double()
            scale = weighted.weight_quantizer.scale.double() * gain.abs()
        moved = (source.where_known(rounded_bias(offset, source.scale, scale), offset) - offset).to(self.running_mean)
        return moved if self.bias is None else self.bias + moved

    def replaced_by(self, new: Any, name: str) -> nn.Module:
        """A converted batch norm (to ``SyncBatchNorm``, to a frozen one) takes over the quantizer of this one."""
        cls = quant_class_of(new)
        if cls is not None and issubclass(cls, _BatchNorm):
            made: Any = clone_module(new, cls)
            made._modules.pop("output_quantizer", None)
            made.entry = self.entry
        elif type(new).__name__ == "FrozenBatchNorm2d":
            made = clone_module(self, eps=new.eps)
            for key in ("weight", "bias"):
                made._parameters[key] = nn.Parameter(getattr(new, key).detach().clone(), requires_grad=False)
            for key in ("running_mean", "running_var"):
                made._buffers[key] = getattr(new, key).detach().clone()
            made._buffers.pop("holds_statistics", None)
        else:
            return super().replaced_by(new, name)
        made.attach(self.output_quantizer, applies=self.applies, inplace=self.inplace, observes=self.observes)
        made.__dict__["_bias_of"] = self.__dict__.get("_bias_of")
        if (weighted := self.__dict__.get("_folded_into")) is not None:
            weighted.fold(made)
        made.add_switches()
        made.statistics_frozen = self.statistics_frozen or type(new).__name__ == "FrozenBatchNorm2d"
        replacement: nn.Module = made
        return replacement

    def extra_repr(self) -> str:
        return super().extra_repr() + (", statistics frozen" if self.statistics_frozen else "")


class QuantBatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` of a QAT graph: trains as ever, folded into weight scales when frozen."""


class QuantBatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` of a QAT graph: trains as ever, folded into weight scales when frozen."""


class QuantBatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` of a QAT graph: trains as ever, folded into weight scales when frozen."""


class QuantSyncBatchNorm(_BatchNorm, nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` of a QAT graph."""


class QuantLayerNorm(QuantParametric, nn.LayerNorm):
    """``nn.LayerNorm`` with a fake-quantized output."""


class QuantPReLU(QuantParametric, nn.PReLU):
    """``nn.PReLU`` with a fake-quantized output."""


class QuantDropout(QuantParametric, nn.Dropout):
    """``nn.Dropout``: values pass through in eval mode."""


class QuantDropout1d(QuantParametric, nn.Dropout1d):
    """``nn.Dropout1d``: values pass through in eval mode."""


class QuantDropout2d(QuantParametric, nn.Dropout2d):
    """``nn.Dropout2d``: values pass through in eval mode."""


class QuantDropout3d(QuantParametric, nn.Dropout3d):
    """``nn.Dropout3d``: values pass through in eval mode."""


class QuantEmbedding(QuantParametric, nn.Embedding):
    """``nn.Embedding`` whose rows are fake-quantized as they are looked up."""


_CLASSES: dict[type[nn.Module], type[_Quantized]] = {
    base: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, (QuantWeighted, QuantParametric)) and cls.__name__.startswith("Quant")
    for base in cls.__bases__
    if base.__module__.startswith("torch.nn")
}


def quant_class_of(module: nn.Module) -> type[_Quantized] | None:
    """The fake-quant subclass of ``module``'s own class, if there is one."""
    return _CLASSES.get(type(module))


def float_class_of(module: nn.Module) -> type[nn.Module] | None:
    """The float class of a fake-quant module with parameters; None for any other module."""
    return next((base for base, cls in _CLASSES.items() if type(module) is cls), None)
