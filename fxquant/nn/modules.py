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

import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize

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


class _Quantized(nn.Module):
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
            inplace: whether the value to round is a buffer that nobody else reads.
            observes: whether the quantizer's range follows this module's values; False where it follows its input's.
        """
        self.output_quantizer, self.applies, self.inplace, self.observes = quantizer, applies, inplace, observes

    def _quantize(self, y: Any) -> Any:
        if self.output_quantizer is None or not self.applies:
            return y
        return self.output_quantizer(y, inplace=self.inplace, observes=self.observes)


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
        y = quantizer(operands[0], *self.clamp, inplace=self.inplace, observes=self.observes)
        return y if quantizer.active else self.entry.function(y, **self.attributes)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.attributes.items())


class QuantWeightedOp(QuantOp):
    """A call of a weighted function (``F.conv2d``, ``F.linear``) whose weight is a parameter of the graph."""

    weight_quantizer: WeightQuantize

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **dynamic: Any) -> Any:
        y = self.entry.function(x, self.weight_quantizer(weight), bias, **self.attributes, **dynamic)
        return self._quantize(y)


class QuantParametric(_Quantized):
    """Mixin for modules that have parameters but no weight to quantize; put it before the float class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._quantize(super().forward(*args, **kwargs))


class QuantWeighted(_Quantized):
    """Mixin for modules with a weight to quantize; put it before the float class."""

    weight: Tensor
    weight_quantizer: WeightQuantize

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._quantize(self._weighted(x, self.weight_quantizer(self.weight), *args, **kwargs))

    def _weighted(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError


class _Conv(QuantWeighted):
    def _weighted(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)


class _ConvTranspose(QuantWeighted):
    def _weighted(self, x: Tensor, weight: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims = len(self.kernel_size)
        padding = self._output_padding(x, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation)
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return function(x, weight, self.bias, self.stride, self.padding, padding, self.groups, self.dilation)


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

    def _weighted(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class _BatchNorm(QuantParametric):
    """Batch normalization whose statistics can be held still while the rest trains (*frozen* mode)."""

    statistics_frozen = False

    def forward(self, x: Tensor) -> Any:
        if not (self.statistics_frozen and self.training):
            return super().forward(x)
        self._check_input_dim(x)
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self._quantize(y)

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
