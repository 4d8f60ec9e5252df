"""Batch norms folded before weights are rounded (``batch_norm="whitepaper"``), against torch and the paper's equations."""

from __future__ import annotations

import copy
from typing import Any

import digits
import pytest
import torch
import torch.nn.functional as F
from comparisons import assert_close_to_scale, assert_same_bits
from torch import Tensor, nn

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.errors import LevelError
from fxquant.nn.fake_quantize import FakeQuantize
from fxquant.nn.folding import batch_variance
from fxquant.nn.modules import QuantWeighted
from fxquant.passes.fold_trained_batchnorm import fold_trained_batchnorm

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def pair(layer: nn.Module, norm: nn.Module, seed: int = 0) -> nn.Sequential:
    """A layer and its batch norm, with gains of both signs and one of zero, and statistics away from their defaults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=generator) * 0.4)
        norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) * 2 + 0.1)
        if norm.weight is not None:
            norm.weight.copy_(torch.randn(norm.weight.shape, generator=generator))
            norm.weight[0], norm.weight[1] = 0.0, -1.3
            norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator))
    return nn.Sequential(layer, norm, nn.ReLU())


CASES: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, dilation=2), lambda: nn.BatchNorm2d(6, eps=1e-2), (5, 4, 9, 8)),
    "no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False, stride=2), lambda: nn.BatchNorm2d(6), (5, 4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6, momentum=0.3), (5, 4, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), lambda: nn.BatchNorm2d(8, eps=1e-2), (5, 4, 9, 8)),
    "reflect": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        lambda: nn.BatchNorm2d(6),
        (5, 4, 9, 8),
    ),
    "not affine": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6, affine=False), (5, 4, 9, 8)),
    "cumulative": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6, momentum=None), (5, 4, 9, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, groups=2), lambda: nn.BatchNorm1d(6, eps=1e-2), (5, 4, 19)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, bias=False), lambda: nn.BatchNorm3d(4, eps=1e-2), (5, 2, 4, 5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1), lambda: nn.BatchNorm2d(4), (5, 6, 5, 4)),
    "transposed grouped": (
        lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2, output_padding=1),
        lambda: nn.BatchNorm2d(4, eps=1e-2),
        (5, 6, 5, 4),
    ),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), lambda: nn.BatchNorm1d(6), (5, 4, 9)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, bias=False), lambda: nn.BatchNorm3d(3), (4, 2, 3, 4, 3)),
    "linear": (lambda: nn.Linear(7, 5), lambda: nn.BatchNorm1d(5, eps=1e-2), (19, 7)),
    "linear no bias": (lambda: nn.Linear(7, 5, bias=False), lambda: nn.BatchNorm1d(5), (19, 7)),
}


def made(name: str, bits: int = 8, **settings: Any) -> tuple[nn.Sequential, Any, Tensor]:
    """The float model, the prepared one, and an input."""
    layer, norm, shape = CASES[name]
    model = pair(layer(), norm()).train()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    recipe = Setting(weight=Scheme.weight(bits, **settings), activation=Scheme.activation(8))
    return model, fxquant.prepare(model, x, qat=True, batch_norm="whitepaper", recipe=recipe), x


def gradients(model: nn.Module, x: Tensor, run: Any = None) -> dict[str, Tensor]:
    """Of a loss that weighs every number differently, by parameter, and that of the input."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = (model if run is None else run)(x)
    (y * torch.linspace(-1, 2, y.numel()).reshape(y.shape).to(y.dtype)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "input": x.grad}


@pytest.mark.parametrize("name", CASES)
def test_without_quantizers_it_is_the_float_network_bit_for_bit(name):
    model, prepared, x = made(name)
    assert prepared.get_submodule("0").folded_norm is prepared.get_submodule("1")
    with fxquant.quantizers_off(prepared):
        for step in range(2):
            expected, found = gradients(model, x + step), gradients(prepared, x + step)
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                assert torch.equal(found[key], value), key
        for mode in (True, False):
            assert_same_bits(prepared.train(mode)(x), model.train(mode)(x))
    for key, value in model.state_dict().items():
        assert torch.equal(prepared.state_dict()[key], value), key


def paper(prepared: Any, x: Tensor, *, frozen: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Equations 10 to 16 of the paper in float64, written with F.conv and the weight's rounding alone, and their gradients.

    What is rounded is taken as W_f + constant inside the range, which is the straight-through estimate.
    """
    part, norm = prepared.get_submodule("0"), prepared.get_submodule("1")
    leaves = {n: p.detach().double().requires_grad_() for n, p in prepared.named_parameters() if p.requires_grad}
    weight, eps, channels = leaves["0.weight"], norm.eps, len(norm.running_mean)
    gamma = leaves.get("1.weight", torch.ones(channels, dtype=torch.float64))
    beta = leaves.get("1.bias", torch.zeros(channels, dtype=torch.float64))
    bias = leaves.get("0.bias", torch.zeros(channels, dtype=torch.float64))
    x = x.double().requires_grad_()

    def op(w: Tensor) -> Tensor:
        if isinstance(part, nn.Linear):
            return F.linear(x, w)
        if isinstance(part, nn.modules.conv._ConvTransposeNd):
            call = getattr(F, f"conv_transpose{x.ndim - 2}d")
            return call(x, w, None, part.stride, part.padding, part.output_padding, part.groups, part.dilation)
        padded = x
        if part.padding_mode != "zeros":
            padded = F.pad(x, part._reversed_padding_repeated_twice, mode=part.padding_mode)
        padding = part.padding if part.padding_mode == "zeros" else 0
        call = getattr(F, f"conv{x.ndim - 2}d")
        return call(padded, w, None, part.stride, padding, part.dilation, part.groups)

    first = op(weight)
    dims, shape = [i for i in range(first.ndim) if i != 1], [1, -1, *[1] * (first.ndim - 2)]
    mean, variance = first.mean(dims) + bias, first.var(dims, correction=0)
    running_mean, running_variance = norm.running_mean.double(), norm.running_var.double()
    gain = gamma / torch.sqrt(running_variance + eps)
    if isinstance(part, nn.modules.conv._ConvTransposeNd):
        per_group = gain.reshape(part.groups, -1).repeat_interleave(weight.shape[0] // part.groups, 0)
        folded = weight * per_group.reshape(*per_group.shape, *[1] * (weight.ndim - 2))
    else:
        folded = weight * gain.reshape(-1, *[1] * (weight.ndim - 1))
    rounded = part.weight_quantizer(folded.detach().float()).double()
    inside = folded + (rounded - folded).detach()
    if frozen:
        y = op(inside) + (beta + (bias - running_mean) * gain).reshape(shape)
    else:
        sigma = torch.sqrt(variance + eps)
        correction = torch.sqrt(running_variance + eps) / sigma
        y = op(inside) * correction.reshape(shape) + (beta + gamma * (bias - mean) / sigma).reshape(shape)
    y = y.relu()
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    return y.detach(), {**{n: p.grad for n, p in leaves.items()}, "input": x.grad}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_it_computes_the_papers_equations(name, frozen):
    """Outputs and gradients with weights of 4 bits; min-max ranges clip nothing, so that the estimate passes everywhere."""
    _, prepared, x = made(name, bits=4)
    for part in prepared.modules():
        if isinstance(part, FakeQuantize) and part is not prepared.get_submodule("0").weight_quantizer:
            part.enabled = False
    fxquant.freeze_batchnorm(prepared, frozen)
    found = gradients(prepared, x)
    y, expected = paper(prepared, x, frozen=frozen)  # with the running statistics that the pass has left
    if frozen:
        assert_close_to_scale(prepared(x).detach().double(), y, 1e-5)
        bias = expected.get("0.bias")
    else:
        norm = prepared.get_submodule("1")
        norm.momentum = 0.0  # the statistics stay, so that a second pass has those that were compared
        assert_close_to_scale(prepared(x).detach().double(), y, 1e-5)
        bias = None  # the batch's mean takes it out: both are rounding noise about zero
    for key, value in expected.items():
        if key == "0.bias" and bias is None:
            assert float(found[key].detach().abs().max()) <= 1e-4 * float(expected["0.weight"].abs().max())
        else:
            assert_close_to_scale(found[key].double(), value, 1e-4, key)


@pytest.mark.parametrize("name", CASES)
def test_frozen_statistics_compute_what_ships(name):
    """Train and eval mode are one bit for bit, and so is the graph in which nothing is folded any more."""
    _, prepared, x = made(name, bits=4)
    prepared(x)
    fxquant.freeze_batchnorm(prepared)
    for part in prepared.modules():
        if isinstance(part, FakeQuantize):
            part.tracking = False
    trained = prepared(x).detach()
    assert_same_bits(prepared.eval()(x), trained)
    folded = fold_trained_batchnorm(prepared)
    assert not any("BatchNorm" in type(part).__name__ for part in folded.modules())
    assert_same_bits(folded(x), trained)
    assert_same_bits(fxquant.freeze(prepared)(x), trained)
    assert_close_to_scale(fxquant.convert(prepared)(x), trained, 1e-6)  # the accumulator leaves as a float


@pytest.mark.parametrize(("rule", "bits"), [("observed", 8), ("lsq", 3)])
def test_training_converts_to_what_was_trained(rule, bits, tmp_path):
    weight, activation = Scheme.weight(bits, quantizer=rule), Scheme.activation(max(bits, 4), quantizer=rule)
    settings = {"qat": True, "batch_norm": "whitepaper", "recipe": Setting(weight=weight, activation=activation)}
    torch.manual_seed(0)
    images = digits.data()[0][:64]
    prepared = fxquant.prepare(digits.trained().train(), images[:2], **settings)
    fxquant.calibrate(prepared, [images], progress=False)
    digits.train(prepared, epochs=1, rate=0.01)
    fxquant.freeze_batchnorm(prepared)
    digits.train(prepared, epochs=1, rate=0.002)
    assert digits.accuracy(prepared) > 90
    with torch.no_grad():
        assert_same_bits(fxquant.freeze(prepared)(images), prepared.eval()(images))
    assert digits.accuracy(fxquant.convert(prepared)) == pytest.approx(digits.accuracy(prepared), abs=0.5)
    fxquant.save(prepared, tmp_path / "model.pt")
    loaded = fxquant.load(digits.DigitsNet(), tmp_path / "model.pt")
    assert_same_bits(loaded.eval()(images), prepared(images))
    copied = copy.deepcopy(prepared)
    norms = [part.folded_norm for part in copied.modules() if isinstance(part, QuantWeighted) and part.folded_norm]
    assert norms and all(norm in set(copied.modules()) for norm in norms)


def test_a_batch_norm_behind_two_layers_is_folded_into_both():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.ConvTranspose2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.b(F.relu(self.bn(self.a(x)))))

    torch.manual_seed(0)
    model, x = Shared().train(), torch.randn(3, 4, 6, 6)
    prepared = fxquant.prepare(model, x, qat=True, batch_norm="whitepaper")
    assert prepared.a.folded_norm is not None and prepared.b.folded_norm is not None
    with fxquant.quantizers_off(prepared):
        expected, found = gradients(model, x), gradients(prepared, x)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert torch.equal(prepared.state_dict()["bn.running_var"], model.bn.running_var)
    fxquant.calibrate(prepared, [x], progress=False)
    assert_same_bits(fxquant.freeze(prepared)(x), prepared.eval()(x))


def test_the_diff_says_when_it_folds():
    model, prepared, _ = made("conv2d")
    assert "folds in every pass" in str(fxquant.diff(model, prepared))
    model, prepared, _ = made("transposed grouped")
    assert "not folded" not in str(fxquant.diff(model, prepared))


def test_conversions_of_the_norm_keep_the_fold():
    from timm.utils.model import freeze_batch_norm_2d

    _, prepared, x = made("conv2d")
    prepared(x)
    expected = prepared.eval()(x)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(prepared))
    norm = synced.get_submodule("1")
    assert type(norm).__name__ == "QuantSyncBatchNorm" and synced.get_submodule("0").folded_norm is norm
    assert_same_bits(synced.eval()(x), expected)
    assert_same_bits(synced.train()(x), copy.deepcopy(prepared).train()(x))
    frozen = freeze_batch_norm_2d(copy.deepcopy(prepared))
    assert frozen.get_submodule("0").folded_norm is frozen.get_submodule("1")
    assert_same_bits(frozen.eval()(x), expected)
    assert torch.equal(frozen.get_submodule("1").running_mean, prepared.get_submodule("1").running_mean)


def test_hooks_keep_their_own_values():
    _, prepared, x = made("conv2d")
    prepared(x)
    seen: list[tuple[Tensor, Tensor]] = []
    for name in ("0", "1"):
        prepared.get_submodule(name).register_forward_hook(lambda part, args, y: seen.append((y, y.detach().clone())))
    prepared.eval()(x)
    assert len(seen) == 2 and all(torch.equal(kept, then) for kept, then in seen)


def test_statistics_are_taken_anew():
    """Of the first convolution, whose weight is the float one: those of the float network in training mode."""
    model, prepared, _ = made("conv2d")
    batches = [torch.randn(8, 4, 9, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    fxquant.freeze_batchnorm(prepared)
    for part in prepared.modules():
        if isinstance(part, FakeQuantize) and part is not prepared.get_submodule("0").weight_quantizer:
            part.enabled = False
    fxquant.reestimate_batchnorm(prepared, batches)
    model[1].reset_running_stats()
    model[1].momentum = None
    for batch in batches:
        model(batch)
    for key in ("running_mean", "running_var"):
        assert torch.equal(getattr(prepared.get_submodule("1"), key), getattr(model[1], key))
    assert prepared.get_submodule("1").statistics_frozen


def test_half_precision_and_autocast_train():
    _, prepared, x = made("conv2d", bits=4)
    expected = prepared(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = prepared(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in prepared.parameters())
    # Operands, both convolutions, the norm and the sum are rounded to 8 bits, 2^-9 of each: some 2^-6 of the largest.
    assert_close_to_scale(y.detach().float(), expected, 2**-6)


def test_compiled_without_graph_breaks():
    """With learned ranges, whose forward pass asks the device nothing."""
    layer, norm, shape = CASES["depthwise"]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    schemes = {"weight": Scheme.weight(4, quantizer="lsq"), "activation": Scheme.activation(4, quantizer="lsq")}
    model = pair(layer(), norm()).train()
    prepared = fxquant.prepare(model, x, qat=True, batch_norm="whitepaper", recipe=Setting(**schemes))
    prepared(x)
    other = copy.deepcopy(prepared)
    torch._dynamo.reset()
    found = gradients(other, x, torch.compile(other, backend="aot_eager", fullgraph=True))
    for key, value in gradients(prepared, x).items():
        assert_close_to_scale(found[key], value, 1e-5, key)


def _variance_in_group(rank: int, folder: str) -> None:
    import os

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        y = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(2)) + 3
        own = (y[:2] if rank == 0 else y[2:]).clone().requires_grad_()
        variance = batch_variance(own, torch.distributed.group.WORLD)
        (variance * torch.tensor([1.0, -2.0, 3.0])).sum().div(2).backward()  # the sum of both losses is the whole one
        torch.save([variance.detach(), own.grad], f"{folder}/{rank}.pt")
        torch.distributed.barrier()  # neither leaves while the other still waits for it
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.long
def test_the_variance_of_two_processes_is_that_of_both_batches(tmp_path):
    torch.multiprocessing.spawn(_variance_in_group, (str(tmp_path),), nprocs=2)
    y = (torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(2)) + 3).double().requires_grad_()
    variance = y.var((0, 2), correction=0)
    (variance * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for found, _ in parts:
        assert_close_to_scale(found.double(), variance.detach(), 1e-6)
    assert_close_to_scale(torch.cat([grad for _, grad in parts]).double(), y.grad, 1e-6)


def test_a_quantizer_without_a_grid_is_refused_by_name():
    _, prepared, x = made("conv2d")
    prepared(x)
    prepared.get_submodule("0").weight_quantizer = nn.Identity()
    with pytest.raises(LevelError, match=r"0\.weight_quantizer, a Identity, is no FakeQuantize with a grid"):
        fxquant.freeze(prepared)


def test_recipes_leave_float_layers_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    x = torch.randn(4, 3, 9, 9)
    recipe = Recipe({"0": None, "1": None})
    prepared = fxquant.prepare(model.train(), x, qat=True, batch_norm="whitepaper", recipe=recipe)
    assert type(prepared.get_submodule("1")) is nn.BatchNorm2d
    assert prepared.get_submodule("3").folded_norm is prepared.get_submodule("4")
    with fxquant.quantizers_off(prepared):
        assert_same_bits(prepared(x), model(x))
