"""Every op of the table, every view and real models: fxquant's own kernels are right, or refuse as the table has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from comparisons import assert_same_bits
from native_coverage import covered
from native_oracle import ROUNDED, Function, integers_of, require_same, signal
from native_parts import REFUSED, SIGNED, conv, linear_parts, require_same_or_reason
from op_cases import COMPUTING, example_of, inputs_like, rounded
from torch import Tensor, nn

import fxquant
from fxquant import Scheme
from fxquant.errors import Refusal
from fxquant.kernels.native import library
from fxquant.kernels.native.model import NativeModel

REASON = library.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels here: {REASON}")


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("name", COMPUTING)
def test_every_op_is_right_or_refused(name, signed):
    """What the op table knows, on its own example: the same bits at several batch sizes, or the reason why not."""
    example = example_of(name)
    recipe = rounded(name, Scheme(signed=True, symmetric=True) if signed else None)
    prepared = fxquant.calibrate(fxquant.prepare(example.module, example.inputs, recipe=recipe), [example.inputs])
    integer, reasons = fxquant.convert(prepared, kernels="reference"), set[str]()
    for rows in (1, 3):
        call = inputs_like(example, rows, seed=5)
        try:
            found = NativeModel(integer)(*call)
        except Refusal as reason:
            assert REFUSED.match(str(reason)), reason
            reasons.add(str(reason))
            continue
        with torch.no_grad():
            assert_same_bits(found, integer(*call))
    assert_accounted(name, integer, example.inputs)
    covered(f"op: {name}, {'signed' if signed else 'unsigned'}", integer, reasons)


NATIVE_OPS = (
    "conv2d", "linear", "add", "sub", "mul", "cat", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean", "relu",
    "hardswish", "sigmoid", "silu", "flatten", "batch_norm",
)  # fmt: skip


def assert_accounted(name: str, integer: Any, inputs: tuple[Any, ...]) -> None:
    """The ops that the kernels are for are not among the refused ones."""
    if name in NATIVE_OPS:
        NativeModel(integer)(*inputs)


VIEWS: dict[str, Callable[[Any, Tensor], Any]] = {
    "halves": lambda m, x: (lambda p: m.ten(torch.cat([p[1], p[0]], 1)))(m.even(x).chunk(2, 1)),
    "a slice of channels": lambda m, x: m.five(m.even(x)[:, 3:8]),
    "a slice of pixels": lambda m, x: m.c(m.a(x)[:, :, 1:-1, ::2]),
    "a slice of images": lambda m, x: m.c(m.a(x)[1:]) + m.c(m.b(x)[:-1]),
    "one image": lambda m, x: torch.sigmoid(m.a(x)[0]),
    "a shuffle": lambda m, x: m.ten(
        m.even(x).view(x.shape[0], 2, 5, x.shape[2], x.shape[3]).transpose(1, 2).flatten(1, 2)
    ),
    "turned": lambda m, x: m.c(m.a(x).transpose(2, 3)),
    "channels last": lambda m, x: m.row(m.a(x).permute(0, 2, 3, 1)),
    "sequences": lambda m, x: m.row(m.a(x).flatten(2).transpose(1, 2)),
    "sequences and back": lambda m, x: m.c(
        m.row(m.a(x).flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape[0], 11, *x.shape[2:])
    ),
    "reshaped": lambda m, x: torch.sigmoid(m.a(x).reshape(x.shape[0], -1)),
    "as rows": lambda m, x: m.row(m.a(x).mean((2, 3)).reshape(-1, 11)),
    "an axis more": lambda m, x: torch.sigmoid(m.a(x).unsqueeze(1)).squeeze(1),
    "spread": lambda m, x: m.a(x) + m.b(x).mean((2, 3), keepdim=True).expand(-1, -1, x.shape[2], x.shape[3]),
    "padded": lambda m, x: m.c(F.pad(m.a(x), (1, 2, 0, 3))),
    "rolled": lambda m, x: m.c(torch.roll(m.a(x), (1, 2), (2, 3))),
    "flipped": lambda m, x: m.c(torch.flip(m.a(x), (3,))),
    "stacked": lambda m, x: torch.sigmoid(torch.stack([m.a(x), m.b(x)], 1)),
    "a part of a part": lambda m, x: m.five(torch.cat([m.even(x)[:, 2:], m.a(x)], 1)[:, 6:11]),
    "a part and the whole": lambda m, x: (lambda y: torch.cat([y, torch.relu(y[:, :3]), y[:, 8:]], 1))(m.a(x)),
    "norm of rows": lambda m, x: m.row(m.layer(m.a(x).permute(0, 2, 3, 1))),
    "softmax": lambda m, x: torch.softmax(m.a(x).flatten(2), -1),
    "upsampled": lambda m, x: m.c(F.interpolate(m.a(x), scale_factor=2)),
    "a gate by channels of a part": lambda m, x: (lambda y: y[:, :5] * torch.sigmoid(y[:, 5:]))(m.even(x)),
}


@pytest.mark.parametrize("recipe", [ROUNDED, SIGNED], ids=["unsigned", "signed"])
@pytest.mark.parametrize("name", VIEWS)
def test_views_are_right_or_refused(name, recipe):
    parts = linear_parts() | {
        "even": conv(5, 10),
        "five": conv(5, 7, 3),
        "ten": conv(10, 6, 3),
        "row": nn.Linear(11, 11),
    }
    parts["layer"] = nn.LayerNorm(11)
    x = signal(2, 5, 6, 7)
    integer, reasons = integers_of(Function(VIEWS[name], **parts), x, recipe=recipe), set[str]()
    for call in (x, signal(3, 5, 4, 9), signal(2, 5, 5, 3)):
        try:
            require_same(integer, (call,))
        except Refusal as reason:
            assert REFUSED.match(str(reason)), reason
            reasons.add(str(reason))
    covered(f"view: {name}, {'signed' if recipe is SIGNED else 'unsigned'}", integer, reasons)


class Attention(nn.Module):
    """Self-attention written out, as transformers do."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(y.transpose(1, 2).reshape(n, t, c))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "width, heads, length", [(12, 3, 5), (64, 2, 17), (40, 1, 70), (32, 4, 1), (66, 1, 197), (70, 1, 13)]
)
def test_attention(width, heads, length, causal):
    """Keys of one block, of a tile of four and of more; heads of fewer numbers than a vector and of more."""
    model = nn.Sequential(nn.Linear(7, width), Attention(width, heads, causal), nn.GELU(), nn.Linear(width, 3))
    x = signal(2, length, 7)
    for recipe in (ROUNDED, SIGNED):
        require_same(integers_of(model, x, recipe=recipe), (x,), (signal(1, length + 3, 7),))


def test_attention_that_looks_for_what_is_unlike_is_refused():
    x = signal(2, 3, 9, 16)
    attention = Function(lambda m, x: F.scaled_dot_product_attention(x, x + 1, x, scale=-0.3))
    reason = require_same_or_reason(integers_of(attention, x), (x,))
    assert reason is not None and "negative" in reason


def test_rows_in_another_order():
    """Batch and tokens change places, as attention of torch's own has them."""
    layers = {"a": nn.Linear(6, 70), "b": nn.Linear(70, 5), "norm": nn.LayerNorm(70)}
    model = Function(lambda m, x: m.b(m.norm(m.a(x.transpose(0, 1)))) + 1, **layers)
    x = signal(3, 11, 6)
    require_same(integers_of(model, x), (x,), (signal(1, 5, 6),), (signal(7, 2, 6),))


NATIVE_MODELS = {
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "googlenet", "densenet121", "squeezenet1_1", "efficientnet_b0",
    "regnet_y_400mf", "mnasnet0_5",
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", [*zoo.NAMES, "resnext50_32x4d"])
def test_models(name):
    """torchvision's own, at another batch and another image size; those of ``NATIVE_MODELS`` have to have kernels."""
    x = zoo.images(2)[:, :, :48, :48] if name not in ("vgg11_bn",) else zoo.images(2)
    model = zoo.build(name)
    integer = fxquant.convert(fxquant.calibrate(fxquant.prepare(model, x), [x], progress=False), kernels="reference")
    try:
        native = NativeModel(integer)
        native(x)
    except Refusal as reason:
        assert name not in NATIVE_MODELS and REFUSED.match(str(reason)), reason
        return
    for call in (x, zoo.images(1, seed=5), zoo.images(3, seed=6)[:, :, :40, :56]):
        with torch.no_grad():
            assert_same_bits(native(call), integer(call))
