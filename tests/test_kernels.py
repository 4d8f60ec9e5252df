"""The fast kernels against the reference: each op within one integer step, at any size and order of memory; whole models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from comparisons import assert_close_to_scale, assert_same_bits
from digits import DigitsNet, test_images
from op_cases import COMPUTING, ROUNDED, calibrated, example_of, frozen_example, inputs_like, recipe_with
from torch import Tensor, nn
from torch_kernels import (
    Mixed,
    converted,
    either,
    fast,
    kernels_used,
    of_reference,
    require_agreement,
    runner_of,
    signal,
)

import fxquant
from fxquant import Scheme
from fxquant.graph.leveled import RUNNER
from fxquant.kernels import weighted as weighted_module
from fxquant.kernels.agreement import agreement
from fxquant.kernels.frozen import fastest
from fxquant.kernels.operators import operators
from fxquant.kernels.runner import Runner
from fxquant.nn.accumulating import IntegerWeighted

SIGNED = Scheme(bits=8, signed=True, symmetric=True)
NARROW = Scheme(bits=5)
FOUR_BITS = Scheme(bits=4, symmetric=True, signed=True, per_channel=True, narrow_range=True)
PER_TENSOR = Scheme(bits=8, symmetric=True, signed=True, narrow_range=True)


# --- ops ---------------------------------------------------------------------------------------------------------------


@fast
@pytest.mark.parametrize("name", COMPUTING)
def test_an_op_agrees_with_the_reference(name):
    integer = fxquant.convert(frozen_example(name), kernels="torch")
    inputs = inputs_like(example_of(name), 3, seed=5)
    require_agreement(agreement(integer, *inputs))
    want, got = of_reference(integer)(*inputs), integer(*inputs)
    assert runner_of(integer).programs, "the fast way was not taken"
    for x, y in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, want)), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
    for _ in range(2):
        assert_same_bits(integer(*inputs), got)


@fast
@pytest.mark.parametrize("activation, weight", [(SIGNED, None), (NARROW, FOUR_BITS), (None, PER_TENSOR)])
@pytest.mark.parametrize(
    "name", ["conv2d", "linear", "addmm", "add", "mul", "max_pool2d", "cat", "hardswish", "mean", "matmul"]
)
def test_other_schemes_of_a_byte_agree(name, activation, weight):
    example = example_of(name)
    integer = fxquant.convert(calibrated(example, recipe_with(activation, weight)), kernels="torch")
    require_agreement(agreement(integer, *inputs_like(example, 3, seed=6)), share=0.995)


@pytest.mark.parametrize("name", ["conv2d", "linear", "add", "cat", "sigmoid", "mean", "softmax"])
def test_wider_activations_take_the_reference(name):
    example = example_of(name)
    integer = fxquant.convert(calibrated(example, recipe_with(Scheme(bits=12))), kernels="torch")
    inputs = inputs_like(example, 2, seed=7)
    assert_same_bits(integer(*inputs), of_reference(integer)(*inputs))


WEIGHTED: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(8, 12, 3),
    "padded": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "pointwise": lambda: nn.Conv2d(8, 12, 1, bias=False),
    "strided": lambda: nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(1, 2)),
    "dilated": lambda: nn.Conv2d(8, 12, 3, dilation=(1, 2), padding=2),
    "grouped": lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1),
    "depthwise": lambda: nn.Conv2d(8, 8, 5, groups=8, padding=2, bias=False),
    "depthwise, two each": lambda: nn.Conv2d(8, 16, 3, groups=8, padding=1),
    "same": lambda: nn.Conv2d(8, 12, 3, padding="same"),
    "valid": lambda: nn.Conv2d(8, 12, 3, padding="valid"),
    "reflected": lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"),
    "transposed": lambda: nn.ConvTranspose2d(8, 12, 3, stride=2),
    "one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 12, 3, stride=2, padding=2, groups=2)),
    "one dimension, depthwise": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 3, padding=1, groups=8)),
    "linear": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    "linear, four dimensions": lambda: nn.Linear(7, 9, bias=False),
}


@fast
@pytest.mark.parametrize("relu", [True, False], ids=["behind relu", "zero point not 0"])
@pytest.mark.parametrize("form", WEIGHTED)
def test_weighted_forms_agree(form, relu):
    first = nn.ReLU() if relu else nn.Identity()
    model = nn.Sequential(nn.Conv2d(3, 8, 1), first, WEIGHTED[form](), nn.ReLU6())
    x = signal(2, 3, 9, 7)
    integer = converted(model, x, recipe=ROUNDED)
    for batch in (1, 2, 5):
        require_agreement(agreement(integer, signal(batch, 3, 9, 7, seed=batch)), share=0.998)
    integer(x)
    reference = {"reflected", "transposed"}
    assert any(kernel != "reference" for kernel in kernels_used(integer).values())
    assert (kernels_used(integer).get("_2") == "reference") == (form in reference)


@fast
@pytest.mark.parametrize("form", ["padded", "strided", "dilated", "grouped", "one dimension"])
def test_a_border_is_written_where_weights_are_many(form, monkeypatch):
    monkeypatch.setattr(weighted_module, "_MANY_WEIGHTS", -(2**30))
    borders = []
    behind = weighted_module._behind_border
    monkeypatch.setattr(weighted_module, "_behind_border", lambda *args: borders.append(1) or behind(*args))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), WEIGHTED[form](), nn.ReLU6())
    integer = converted(model, signal(2, 3, 9, 7), recipe=ROUNDED)
    for batch in (1, 3):
        require_agreement(agreement(integer, signal(batch, 3, 9, 7, seed=batch)), share=0.998)
    assert borders


@fast
@pytest.mark.parametrize("clamp", [nn.Identity(), nn.Hardtanh(-0.2, 0.4)], ids=["open", "clamped"])
@pytest.mark.parametrize("form", [name for name in WEIGHTED if not name.startswith("linear")])
def test_a_convolution_that_leaves_as_float_agrees(form, clamp):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), WEIGHTED[form](), clamp)
    integer = converted(model, signal(2, 3, 9, 7))
    require_agreement(agreement(integer, signal(3, 3, 9, 7, seed=8)))
    x = signal(2, 3, 9, 7, seed=9)
    expected = fxquant.coverage(integer).kernels
    got, want = integer(x), of_reference(integer)(x)
    assert got.is_contiguous() and got.dtype == want.dtype
    assert_close_to_scale(got, want, 0.02)
    assert list(kernels_used(integer).values())[-1] == list(expected.values())[-1] == "float32 inside"


@fast
@pytest.mark.parametrize("last", [False, True], ids=["bytes", "leaves as float"])
@pytest.mark.parametrize("channels", [1, 4], ids=["one channel", "a channel a group"])
@pytest.mark.parametrize("kernel", [3, (1, 5)])
@pytest.mark.parametrize("stride", [(1, 2), (1, 3), 2])
def test_a_result_one_pixel_wide_is_not_misread(stride, kernel, channels, last):
    """oneDNN of torch 2.14 computes such a convolution wrongly on images in channels last; random networks found it."""
    layer = nn.Conv2d(channels, 8, kernel, stride=stride, groups=channels)
    model = nn.Sequential(nn.Conv2d(3, channels, 1), layer, *([] if last else [nn.ReLU(), nn.Conv2d(8, 4, 1)]))
    width = 5 if kernel == (1, 5) else 3
    integer = converted(model, signal(2, 3, 9, width))
    for batch in (1, 2, 40):
        x = signal(batch, 3, 9, width, seed=batch).to(memory_format=torch.channels_last)
        assert_close_to_scale(integer(x), of_reference(integer)(x), 0.02)
        require_agreement(agreement(integer, x), share=0.99)


@fast
@pytest.mark.parametrize("channels, out", [(16, 32), (16, 16), (4, 12), (1, 8)])
@pytest.mark.parametrize("kernel, padding", [((2, 2), 2), ((1, 2), (2, 0)), ((2, 1), (2, 2))])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_windows_that_lie_in_the_padding_are_not_misread(stride, kernel, padding, channels, out):
    """oneDNN of torch 2.15 computes such a convolution of bytes wrongly, by up to 255; random networks found it."""
    layer = nn.Conv2d(channels, out, kernel, stride=stride, padding=padding, groups=channels)
    model = nn.Sequential(nn.Conv2d(3, channels, 1), layer, nn.ReLU(), nn.Conv2d(out, 4, 1))
    integer = converted(model, signal(2, 3, 14, 14))
    for batch, size in ((1, 14), (2, 7), (40, 5)):
        x = signal(batch, 3, size, size, seed=batch)
        assert_close_to_scale(integer(x), of_reference(integer)(x), 0.02)
        require_agreement(agreement(integer, x), share=0.99)


@fast
def test_a_transposed_and_grouped_one_too():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 12, 3, stride=2, groups=4, output_padding=1))
    integer = converted(model, signal(2, 3, 9, 7))
    require_agreement(agreement(integer, signal(3, 3, 9, 7, seed=8)))


@fast
def test_one_layer_without_a_batch_takes_the_reference():
    integer = converted(nn.Conv2d(3, 8, 3, padding=1), signal(3, 9, 9), recipe=ROUNDED)
    x = signal(3, 9, 9, seed=4)
    assert_same_bits(integer(x), of_reference(integer)(x))


# --- shapes ------------------------------------------------------------------------------------------------------------


@fast
def test_batch_and_image_size_stay_free():
    integer = converted(Mixed(), signal(4, 3, 32, 32))
    reference = of_reference(integer)
    sizes = [(4, 32, 32), (1, 32, 32), (2, 17, 41), (1, 64, 48), (3, 20, 20), (1, 5, 5), (4, 32, 32)]
    for batch, height, width in sizes:
        x = signal(batch, 3, height, width, seed=height)
        got = integer(x)
        assert_close_to_scale(got, reference(x), 0.02)
        assert_same_bits(integer(x), got)
        require_agreement(agreement(integer, x), share=0.99)
    for width in range(20, 60, 2):
        assert_same_bits(integer(signal(1, 3, 8, width)), integer(signal(1, 3, 8, width)))
    assert len(runner_of(integer).programs) == 16, "the cache is bounded"
    packs = {id(packed) for program in runner_of(integer).programs.values() for packed in program.packed}
    layers = sum(isinstance(part, IntegerWeighted) for part in integer.modules())
    assert len(packs) <= 2 * layers, "shapes share their weights"


@fast
@either
def test_any_order_of_memory_gives_the_same(kernels):
    integer, x = converted(Mixed(), signal(4, 3, 32, 32), kernels=kernels), signal(2, 3, 32, 32)
    want = integer(x)
    assert_same_bits(integer(x.contiguous(memory_format=torch.channels_last)), want)
    assert_same_bits(integer(signal(2, 32, 32, 3).permute(0, 3, 1, 2).copy_(x)), want)
    wide = torch.zeros(2, 3, 40, 32)
    wide[:, :, 4:36] = x
    assert_same_bits(integer(wide[:, :, 4:36]), want)


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("shift", [-0.9, 0.0, 0.9])
def test_numbers_far_beyond_the_range_stay_at_its_end(shift, kernels):
    """From 2³¹ steps on, where integers of 32 bits end."""
    x = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1 + shift
    prepared = fxquant.calibrate(fxquant.prepare(nn.Linear(4, 4), x), [x], progress=False)
    reference = fxquant.convert(prepared, kernels="reference")
    is_native = kernels == "native"
    other = fxquant.compile(reference, x, runtime="native") if is_native else fxquant.convert(prepared, kernels="torch")
    for scale in (1.0, 1e3):
        for far in (1e8, 1e20, 3.4e38, math.inf):
            y = (x * scale).index_fill(1, torch.tensor(0), far).index_fill(1, torch.tensor(1), -far)
            torch.testing.assert_close(other(y), reference(y))


MOVES = {
    "interpolation": lambda x: F.interpolate(x, scale_factor=2.0),
    "maximum": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "interpolated volume": lambda x: F.interpolate(x.unsqueeze(-1), scale_factor=2.0),
    "maximum over volumes": lambda x: F.max_pool3d(x.unsqueeze(3), 3, stride=1, padding=1),
}


class Permuted(nn.Module):
    """Axes in another order, along some of which there is one element."""

    def __init__(self, order: tuple[int, ...], move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.order, self.move, self.conv = order, move, nn.Conv2d(4, 5, 1)
        self.gains = nn.Parameter(torch.rand(5, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.move((self.conv(x) * self.gains).permute(self.order))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2), (0, 2, 1, 3), (0, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("name", MOVES)
def test_axes_of_one_element_in_any_order_are_not_misread(name, order, sizes):
    model = Permuted(order, MOVES[name]).eval()
    x = torch.randn(3, 4, *sizes, generator=torch.Generator().manual_seed(0))
    prepared = fxquant.calibrate(fxquant.prepare(model, x), [x], progress=False)
    integer = fxquant.convert(prepared, kernels="torch")
    found = agreement(integer, x)
    assert any(own.node.startswith(("interpolate", "max_pool")) for own in found)
    assert all(own.worst <= 1 for own in found), found
    assert_close_to_scale(integer(x), of_reference(integer)(x), 0.05)


@fast
@either
def test_an_empty_batch_takes_the_reference(kernels):
    integer = converted(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), signal(2, 3, 8, 8), kernels=kernels
    )
    assert integer(signal(0, 3, 8, 8)).shape == (0, 2, 6, 6)
    assert not runner_of(integer).programs


@fast
@either
def test_results_are_contiguous_as_those_of_the_reference(kernels):
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

        def forward(self, x: Tensor) -> Any:
            y = F.relu(self.conv(x))
            return self.fc(y.view(y.size(0), -1)), y.sin().view(y.size(0), -1), y

    x = signal(2, 3, 8, 8)
    integer = converted(Viewed(), x, kernels=kernels)
    for got, want in zip(integer(x), of_reference(integer)(x), strict=True):
        assert got.is_contiguous()
        assert_close_to_scale(got, want, 0.02)


@fast
@either
def test_thread_counts_give_the_same_bits(kernels):
    integer, x = converted(Mixed(), signal(4, 3, 32, 32), kernels=kernels), signal(2, 3, 32, 32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(integer(x))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


# --- models ------------------------------------------------------------------------------------------------------------


def test_a_runner_is_made_where_there_are_operators():
    integer = converted(nn.Linear(3, 2), signal(2, 3))
    assert isinstance(integer.__dict__.get(RUNNER), Runner) == (operators() is not None)


@fast
def test_the_digits_net_agrees():
    images, _ = test_images()
    integer = converted(DigitsNet(), images[:64])
    require_agreement(agreement(integer, images[64:128]))
    assert_close_to_scale(integer(images[:50]), of_reference(integer)(images[:50]), 0.02)


@fast
@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"]
)
def test_image_models_agree(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    x = signal(8, 3, 64, 64)
    with torch.no_grad():
        model.train()(x)
    integer = converted(model, x)
    found = agreement(integer, x[:2])
    require_agreement(found, share=0.998)
    steps = [a for a in found if a.worst >= 1.0 or a.equal == a.values]
    assert sum(a.equal for a in steps) >= 0.9999 * sum(a.values for a in steps)
    want, got = of_reference(integer)(x), integer(x)
    assert_close_to_scale(got, want, 0.05)
    assert_same_bits(fastest(integer, x)(x), got)


class Branching(nn.Module):
    """A layer, and then something that depends on the data: in a module of its own, or as a number."""

    def __init__(self, asks: nn.Module) -> None:
        super().__init__()
        self.stem, self.asks, self.fc = nn.Conv2d(3, 4, 3), asks, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.asks(F.relu(self.stem(x))).mean((2, 3)))


class Negates(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x if x.mean() > 0.5 else x


class Scales(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.max().item()


@pytest.mark.parametrize("asks", [Negates, Scales])
def test_a_decision_by_data_is_made_anew_in_each_call(asks):
    low, high = torch.full((2, 3, 8, 8), -1.0), torch.rand(2, 3, 8, 8) * 9
    prepared = fxquant.prepare(Branching(asks()).eval(), high)
    fxquant.calibrate(prepared, [low, high], progress=False)
    int8 = fxquant.convert(prepared, kernels="torch")
    run = fastest(int8, high)
    for x in (high, low, high, low):
        assert torch.equal(run(x), int8(x))
    exact = fxquant.convert(prepared, kernels="reference")
    assert all(torch.allclose(run(x), exact(x), atol=0.1 * float(exact(x).abs().max())) for x in (high, low))
