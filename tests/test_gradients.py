"""Fake quantization against a plain straight-through composition of autograd's own ops. All comparisons are exact."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.numerics.affine import dequantize, quantize
from fxquant.numerics.gradients import _interval, fake_quantize

CLAMPS = [(None, None), (0.0, None), (0.0, 6.0), (-1.0, 1.0), (None, 0.5), (0.3, 0.4), (-0.05, None)]
GRIDS = [(0.0173, 0, 0, 255), (0.05, 128, 0, 255), (0.031, 0, -127, 127), (0.5, 3, 0, 15), (1e-4, 30000, 0, 65535)]


def clamp_op(x: Tensor, lower: float | None, upper: float | None) -> Tensor:
    """The clamp with the gradient of the functions users write."""
    if (lower, upper) == (0.0, None):
        return F.relu(x)
    return F.hardtanh(x, -torch.inf if lower is None else lower, torch.inf if upper is None else upper)


def reference(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    *,
    axis: int | None = None,
    lower: float | None = None,
    upper: float | None = None,
) -> Tensor:
    """Clamp, then a straight-through rounding that is masked by whether the level lies on the grid."""
    clamped = clamp_op(x.float(), lower, upper)
    exact = dequantize(quantize(clamped, scale, zero_point, qmin, qmax, axis=axis), scale, zero_point, axis=axis)
    # The gradient asks for the level of the *unclamped* number.
    level = quantize(x.float(), scale, zero_point, -(2**30), 2**30, axis=axis)
    inside = (level >= qmin) & (level <= qmax)
    through = torch.where(inside, clamped, clamped.detach())
    return _Straight.apply(through, exact).to(x.dtype)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):  # type: ignore[no-untyped-def]
        return y.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None


@pytest.fixture(params=[0, 1 << 14], ids=["piecewise", "whole"])
def small(request, monkeypatch):
    """Small tensors take a way with fewer calls; tests take both ways."""
    monkeypatch.setattr("fxquant.numerics.gradients._SMALL", request.param)


def one_scale(scale: float, zero_point: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)


def hard_numbers(
    scale: float, zero_point: int, qmin: int, qmax: int, lower: float | None, upper: float | None
) -> Tensor:
    """Numbers at and around every place where something changes."""
    levels = torch.tensor([qmin, qmin + 1, zero_point, qmax - 1, qmax]).float() - zero_point
    centers = torch.cat([(levels + half) * torch.tensor(scale) for half in (-0.5, 0.0, 0.5)])
    bounds = [0.0, *(b for b in (lower, upper) if b is not None)]
    centers = torch.cat([centers, torch.tensor(bounds)])
    up, down = torch.full_like(centers, torch.inf), torch.full_like(centers, -torch.inf)
    near = [centers]
    for step in (up, down):
        moved = centers
        for _ in range(3):
            moved = torch.nextafter(moved, step)
            near.append(moved)
    far = torch.tensor([1e30, -1e30, torch.inf, -torch.inf, -0.0, 1e-40, -1e-40])
    return torch.cat([*near, far, torch.randn(4000) * scale * (qmax - qmin) / 4])


def run(function, x: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    leaf = x.clone().requires_grad_()
    y = function(leaf, *args, **kwargs)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@pytest.mark.parametrize("lower, upper", CLAMPS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_composition(grid, lower, upper, dtype, small):
    torch.manual_seed(0)
    scale, zero_point, qmin, qmax = grid
    x = hard_numbers(scale, zero_point, qmin, qmax, lower, upper).to(dtype)
    args = (*one_scale(scale, zero_point), qmin, qmax)
    y, grad = run(fake_quantize, x, *args, lower=lower, upper=upper)
    expected_y, expected_grad = run(reference, x, *args, lower=lower, upper=upper)
    assert y.dtype == dtype and grad.dtype == dtype
    assert torch.equal(y, expected_y)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("lower, upper", CLAMPS)
def test_both_ways_of_computing_agree(lower, upper):
    """A vector of one scale takes the way by levels, a scalar scale the way by interval."""
    torch.manual_seed(0)
    x = hard_numbers(0.05, 100, 0, 255, lower, upper)
    scale, zero_point = one_scale(0.05, 100)
    by_interval = run(fake_quantize, x[:, None], scale, zero_point, 0, 255, lower=lower, upper=upper)
    pair = torch.stack([x, x], dim=1)
    by_level = run(fake_quantize, pair, scale.expand(2), zero_point.expand(2), 0, 255, axis=1, lower=lower, upper=upper)
    assert torch.equal(by_interval[0][:, 0], by_level[0][:, 0])
    expected = run(reference, pair, scale.expand(2), zero_point.expand(2), 0, 255, axis=1, lower=lower, upper=upper)
    assert torch.equal(by_level[0], expected[0])
    assert torch.equal(by_level[1], expected[1])


@pytest.mark.parametrize("lower, upper", CLAMPS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
def test_in_place_and_layouts(lower, upper, inplace, memory_format, small):
    torch.manual_seed(0)
    x = torch.randn(3, 8, 5, 7).contiguous(memory_format=memory_format)
    args = (*one_scale(0.011, 60), 0, 255)
    kwargs = {"lower": lower, "upper": upper}
    memory: list[int] = []

    def quantized(leaf: Tensor) -> Tensor:
        h = leaf * 1.0
        y = fake_quantize(h, *args, inplace=inplace, **kwargs)
        assert (y.data_ptr() == h.data_ptr()) == inplace
        assert y.stride() == x.stride()
        memory.append(y.data_ptr())
        return y

    y, grad = run(quantized, x)
    expected_y, expected_grad = run(reference, x, *args, **kwargs)
    assert memory and torch.equal(y, expected_y) and torch.equal(grad, expected_grad)


@pytest.mark.parametrize("inplace", [False, True])
def test_many_pieces(inplace, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("fxquant.numerics.gradients._SMALL", 0)
    monkeypatch.setattr("fxquant.numerics.memory._ELEMENTS_PER_THREAD", 100)
    x = torch.randn(4, 3, 16, 17).permute(0, 2, 3, 1)
    args = (*one_scale(0.011, 60), 0, 255)
    for dtype in (torch.float32, torch.bfloat16):
        y, grad = run(lambda v: fake_quantize(v * 1.0, *args, lower=0.0, inplace=inplace), x.to(dtype))
        expected_y, expected_grad = run(reference, x.to(dtype), *args, lower=0.0)
        assert torch.equal(y, expected_y) and torch.equal(grad, expected_grad)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_per_channel(axis, dtype):
    torch.manual_seed(0)
    w = torch.randn(6, 6, 3, 6).to(dtype)
    scale, zero_point = torch.rand(6) * 0.02 + 0.001, torch.zeros(6, dtype=torch.int32)
    y, grad = run(fake_quantize, w, scale, zero_point, -127, 127, axis=axis)
    expected_y, expected_grad = run(reference, w, scale, zero_point, -127, 127, axis=axis)
    assert torch.equal(y, expected_y) and torch.equal(grad, expected_grad)


def test_grad_of_another_layout_and_expanded_grad(small):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    args = (*one_scale(0.01, 100), 0, 255)
    fake_quantize(x, *args).sum().backward()
    inside = reference(x, *args)
    (expected,) = torch.autograd.grad(inside.sum(), x)
    assert torch.equal(x.grad, expected)
    incoming = torch.randn(2, 3, 4, 5)
    (got,) = torch.autograd.grad(fake_quantize(x, *args), x, incoming)
    assert torch.equal(got, torch.where(expected > 0, incoming, 0.0))


def test_incoming_gradient_is_not_changed(small):
    x = torch.randn(100, requires_grad=True)
    incoming = torch.randn(100)
    kept = incoming.clone()
    fake_quantize(x, *one_scale(0.01, 128), 0, 255, lower=0.0).backward(incoming)
    assert torch.equal(incoming, kept)


def test_second_derivative_is_that_of_a_linear_map():
    x = torch.randn(50, requires_grad=True)
    y = fake_quantize(x**2, *one_scale(0.01, 0), 0, 255)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, torch.where(first != 0, 2.0, 0.0))


def test_shared_input_raises_rather_than_corrupts():
    """ReLU keeps its result for the backward pass: overwriting it must be noticed."""
    x = torch.randn(100, requires_grad=True)
    h = torch.relu(x)
    y = fake_quantize(h, *one_scale(0.01, 0), 0, 255, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_use_of_an_input_out_of_place():
    x = torch.randn(100, requires_grad=True)
    args = (*one_scale(0.01, 128), 0, 255)
    (twice,) = torch.autograd.grad((fake_quantize(x, *args) + fake_quantize(x, *args, lower=0.0)).sum(), x)
    (a,) = torch.autograd.grad(reference(x, *args).sum(), x)
    (b,) = torch.autograd.grad(reference(x, *args, lower=0.0).sum(), x)
    assert torch.equal(twice, a + b)


def test_in_place_is_declined_where_unsafe():
    args = (*one_scale(0.1, 0), 0, 255)
    leaf = torch.randn(4, 6, requires_grad=True)
    base = torch.randn(4, 6)
    with torch.inference_mode():
        inference = torch.randn(4, 6)
    expanded = torch.randn(1, 6).expand(4, 6)
    for x in (leaf, base[:, :3], base.t(), base.view(-1).view(4, 6), inference, expanded):
        before = x.detach().clone()
        y = fake_quantize(x, *args, inplace=True)
        assert y.data_ptr() != x.data_ptr()
        assert torch.equal(x.detach(), before)
        assert torch.equal(y, reference(before, *args))


def test_tensors_with_gaps():
    torch.manual_seed(0)
    args = (*one_scale(0.01, 90), 0, 255)
    x = torch.randn(5, 8, 6)
    y, grad = run(lambda v: fake_quantize(v[:, ::2, 1:], *args, lower=0.0, inplace=True), x)
    expected_y, expected_grad = run(lambda v: reference(v[:, ::2, 1:], *args, lower=0.0), x)
    assert torch.equal(y, expected_y) and torch.equal(grad, expected_grad)


@pytest.mark.parametrize("inplace", [False, True])
def test_without_gradient_nothing_is_saved(inplace):
    x = torch.randn(10, 10)
    args = (*one_scale(0.05, 128), 0, 255)
    expected = reference(x, *args)
    with torch.no_grad():
        y = fake_quantize(x, *args, inplace=inplace)
    assert y.grad_fn is None and torch.equal(y, expected)
    assert (y is x) == inplace


def test_empty_nan_and_learned_scale():
    scale, zero_point = one_scale(0.05, 128)
    assert fake_quantize(torch.empty(0, 3), scale, zero_point, 0, 255).shape == (0, 3)
    x = torch.tensor([float("nan"), 1.0], requires_grad=True)
    y = fake_quantize(x, scale, zero_point, 0, 255)
    assert y[0].isnan() and not y[1].isnan()
    assert not fake_quantize(x.detach(), scale.requires_grad_(), zero_point, 0, 255).requires_grad


@pytest.mark.parametrize("scale", [1e-30, 1e-38, 3e38, 1e-44])
def test_extreme_scales(scale):
    x = torch.tensor([0.0, 1.0, -1.0, 3e38, -3e38, 1e-38, 1e-45]).requires_grad_()
    args = (*one_scale(scale, 100), 0, 255)
    assert torch.equal(fake_quantize(x, *args), reference(x, *args))


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 0.0173, 2.0**-7, 1e-5, 123.0])
def test_interval_ends_exactly(scale):
    """Oracle in fractions: ends round onto the grid, their neighbours do not."""
    scale = float(torch.tensor(scale))
    low, high = _interval(scale, -100, 155, None, None)
    for end, level, outwards in ((low, -100, -torch.inf), (high, 155, torch.inf)):
        next_out = float(torch.nextafter(torch.tensor(end), torch.tensor(outwards)))
        rounded = [round(Fraction(float(torch.tensor(v) / torch.tensor(scale)))) for v in (end, next_out)]
        assert rounded == [level, level + (1 if outwards > 0 else -1)]


def test_float64():
    x = torch.randn(200, dtype=torch.float64, requires_grad=True)
    y = fake_quantize(x, *one_scale(0.05, 60), 0, 255, lower=0.0)
    assert y.dtype == torch.float64
    s = float(torch.tensor(0.05))
    expected = torch.tensor([min(max(round(max(v, 0.0) / s), -60), 195) * s for v in x.tolist()], dtype=torch.float64)
    assert torch.equal(y, expected)
