"""ABC-Net, weighed codebooks, binary activations with thresholds, QSGD and DoReFa's gradients, by their criteria."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.errors import CalibrationError, InputError, LevelError, RecipeError
from fxquant.quantizers import RULES
from fxquant.quantizers.abc_net import binary_bases
from fxquant.quantizers.binary_tensor import thresholds
from fxquant.quantizers.kmeans import KMeansWeight
from fxquant.training import QSGD, GradientRounding, weigh_codebooks
from fxquant.training.gradient_rounding import rounded_gradient

W = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 0.5, 6)[:, None]
G = torch.randn(W.shape, generator=torch.Generator().manual_seed(1))


def abc(bits: int, *, per_channel: bool = True) -> Any:
    scheme = Scheme.weight(bits, per_channel=per_channel, quantizer="abc")
    return RULES["abc"].weight(scheme, axis=0 if per_channel else None, channels=6 if per_channel else None).train()


# ABC-Net


def test_the_residual_falls_with_every_base_and_one_base_is_xnor():
    errors = []
    for count in range(1, 7):
        bases, factors = binary_bases(W, count)
        errors.append((W - (bases @ factors[..., None]).squeeze(2)).square().sum(1))
        assert set(bases.unique().tolist()) == {-1.0, 1.0}
    assert all(bool((b < a).all()) for a, b in itertools.pairwise(errors))
    balanced = torch.cat([W, -W], 1)  # mean 0
    bases, factors = binary_bases(balanced, 1)
    assert torch.equal(bases.squeeze(2), balanced.sign().double())
    assert torch.allclose(factors[:, 0], balanced.abs().double().mean(1))


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_factors_are_the_least_squares_and_the_gradient_their_sum(per_channel):
    quantizer, rows = abc(3, per_channel=per_channel), W if per_channel else W.reshape(1, -1)
    x = W.clone().requires_grad_()
    y = quantizer(x)
    y.backward(G)
    for row, found, gradient, incoming in zip(rows, *(t.reshape(rows.shape) for t in (y, x.grad, G)), strict=True):
        wide = row.double()
        shifts = (-1.0, 0.0, 1.0)
        spread = float((wide - wide.mean()).square().mean().sqrt())
        bases = torch.stack([torch.where(wide - wide.mean() + u * spread < 0, -1.0, 1.0) for u in shifts], 1).double()
        factors = torch.linalg.lstsq(bases, wide[:, None]).solution
        assert torch.allclose(found.detach().double(), (bases @ factors)[:, 0], atol=1e-6)
        assert torch.allclose(gradient.double(), incoming.double() * factors.sum(), rtol=1e-5, atol=1e-7)


# Codebooks


def labelled(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    xs = torch.randn(count, 8, 6, generator=random) * torch.tensor([3.0, 1.0, 0.3, 0.1, 0.03, 0.0])
    return [(x, torch.randint(3, (8,), generator=random)) for x in xs]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_weighed_codebooks_cost_less_than_plain_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)).train()
    scheme = Scheme.weight(2, per_channel=False, quantizer="kmeans")
    prepared = fxquant.prepare(model, labelled(1, 0)[0][0], qat=True, recipe=Recipe(default=Setting(weight=scheme)))
    batches = labelled(12, 1)
    prepared(batches[0][0])
    prepared.train()
    layers = [prepared.get_submodule(name) for name in ("0", "3")]
    plain = [layer.weight_quantizer(layer.weight).detach().clone() for layer in layers]
    statistics = prepared.get_submodule("1").running_mean.clone()
    assert weigh_codebooks(prepared, batches, cross_entropy) is prepared
    assert torch.equal(prepared.get_submodule("1").running_mean, statistics) and prepared.training
    assert all(parameter.grad is None for parameter in prepared.parameters())
    model.load_state_dict({n: v for n, v in prepared.state_dict().items() if n in model.state_dict()})
    model.eval()
    gains = []
    for i, layer in enumerate(layers):
        weight = (model[0], model[3])[i].weight.requires_grad_()
        squares = [torch.autograd.grad(cross_entropy(model, batch), weight)[0].double().square() for batch in batches]
        h = sum(squares) / len(squares)
        found = layer.weight_quantizer(layer.weight).detach()
        assert len(found.unique()) <= 4
        costs = [float((h * (layer.weight.detach() - y).double().square()).sum()) for y in (plain[i], found)]
        assert costs[1] <= costs[0] * (1 + 1e-6)
        gains.append(costs[1] / costs[0])
        numbers = layer.weight.detach()
        clusters = torch.stack([(numbers - c).abs() for c in layer.weight_quantizer.centers]).argmin(0)
        for k, center in enumerate(layer.weight_quantizer.centers):
            share = h[clusters == k]
            if float(share.sum()) > 0:
                mean = (share * numbers[clusters == k]).sum() / share.sum()
                assert float(center) == pytest.approx(float(mean), rel=1e-4, abs=1e-6)
    assert min(gains) < 0.9, "weights that little depends on give way"


def test_weighing_needs_codebooks_and_batches():
    prepared = fxquant.prepare(nn.Linear(6, 3), labelled(1, 0)[0][0], qat=True)
    with pytest.raises(InputError, match="has a codebook"):
        weigh_codebooks(prepared, labelled(1, 0), cross_entropy)
    recipe = Recipe(default=Setting(weight=Scheme.weight(2, per_channel=False, quantizer="kmeans")))
    prepared = fxquant.prepare(nn.Linear(6, 3), labelled(1, 0)[0][0], qat=True, recipe=recipe)
    with pytest.raises(CalibrationError, match="no batches"):
        weigh_codebooks(prepared, [], cross_entropy)
    assert isinstance(next(m for m in prepared.modules() if isinstance(m, KMeansWeight)), KMeansWeight)


# Binary activations


def test_thresholds_are_the_sign_behind_a_batch_norm_of_any_gain():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 9, 3).double(), nn.BatchNorm2d(9).double().eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -1, 0.5, -0.5, 2, -2, 0, 0, -1e-6]))
        norm.bias.copy_(torch.tensor([0.1, 0.1, -0.3, 0.3, 0, 0, 0.2, -0.2, 0.0]))
        norm.running_mean.normal_(0, 2)
        norm.running_var.uniform_(0.2, 3)
        integers = torch.randint(-7, 8, conv.weight.shape).double()
        conv.weight.copy_(integers * 0.05)
    x = torch.randint(0, 256, (4, 3, 9, 9)).double()
    accumulator = F.conv2d(x, integers).to(torch.int64)
    scale = torch.tensor(0.05 * 0.01, dtype=torch.float64)
    gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    offset = norm.bias + (conv.bias - norm.running_mean) * gain
    wanted = norm(conv(x * 0.01))
    found = thresholds(scale, gain.detach(), offset.detach()).sign(accumulator)
    clear = wanted.abs() > 1e-9  # elsewhere float64 itself does not know the sign
    assert clear.double().mean() > 0.99 and torch.equal(
        found[clear], torch.where(wanted < 0, -1, 1).to(torch.int8)[clear]
    )
    for exact in range(-5, 6):  # gain · n + offset is exactly 0 at n = exact: the sign is 1 there
        for slope in (2.0, -2.0):
            edge = thresholds(torch.tensor(1.0), torch.tensor([slope]), torch.tensor([-slope * exact]))
            n = torch.arange(-8, 9)
            assert torch.equal(
                edge.sign(n[:, None])[:, 0], torch.where(slope * n - slope * exact < 0, -1, 1).to(torch.int8)
            )


def binary_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Hardtanh(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)]
    return nn.Sequential(*layers).train()


SIGN = Scheme.activation(2, signed=True, quantizer="sign")


def test_signs_have_the_gradient_of_a_hard_tanh_and_are_told_from_integers():
    x = torch.tensor([-2.0, -1.0, -0.3, 0.0, 0.7, 1.0, 1.5], requires_grad=True)
    y = RULES["sign"].tensor(SIGN).train()(x)
    y.backward(torch.arange(1.0, 8.0))
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1] and x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]
    recipe = Recipe({"2": Setting(activation=SIGN), "1": Setting(activation=SIGN), "0": Setting(activation=SIGN)})
    model, images = binary_net(), torch.randn(4, 2, 8, 8)
    prepared = fxquant.prepare(model, images, qat=True, recipe=recipe)
    seen: list[Tensor] = []
    prepared.get_submodule("3").register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    prepared(images).sum().backward()
    assert set(seen[0].unique().tolist()) == {-1.0, 1.0}
    assert "simulated by sign" in str(fxquant.diff(model, prepared))
    with pytest.raises(LevelError, match="sign"):
        fxquant.freeze(prepared)


def test_signs_behind_a_relu_and_of_other_grids_are_refused():
    images = torch.randn(4, 2, 8, 8)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).train()
    prepared = fxquant.prepare(model, images, qat=True, recipe={"0": Setting(activation=SIGN)})
    with pytest.raises(InputError, match="take the ReLU out"):
        prepared(images)
    for scheme in (Scheme.activation(2, quantizer="sign"), Scheme.activation(4, signed=True, quantizer="sign")):
        with pytest.raises(RecipeError, match="signed 2-bit grid"):
            fxquant.prepare(model, images, qat=True, recipe={"0": Setting(activation=scheme)})


# Gradients


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_qsgd_is_unbiased_and_within_its_bound(bits):
    torch.manual_seed(0)
    qsgd, v, tries = QSGD(bits=bits, piece=64), torch.randn(128), 4000
    sent, norms = qsgd.encode(v.repeat(tries))
    got = qsgd.decode(sent, norms, 128 * tries).double().reshape(tries, 128)
    mean, error = got.mean(0), float((got - v).square().sum(1).mean())
    s, pieces = qsgd.levels, v.split(64)
    assert sent.dtype == torch.uint8 and sent.numel() == tries * 128 * bits // 8 and norms.shape == (2 * tries,)
    assert error <= sum(min(64 / s**2, math.sqrt(64) / s) * float(p.square().sum()) for p in pieces)
    spread = torch.cat([torch.full_like(p, float(p.norm()) / s / 2) for p in pieces]).double()  # the most it can be
    assert bool(((mean - v).abs() < 5 * spread / math.sqrt(tries)).all())
    assert torch.equal(qsgd.decode(*qsgd.encode(torch.zeros(70)), 70), torch.zeros(70))


def test_qsgd_rounds_as_its_formula_says():
    qsgd, v = QSGD(bits=4, piece=8), torch.tensor([3.0, -4.0, 0.0, 12.0, 0.5, -0.25, 1.0, 2.0, 5.0])
    noise = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.99, 0.2, 0.7, 0.6, 0.4])
    found = qsgd.decode(*qsgd.encode(v, noise), 9)
    for i, (x, u) in enumerate(zip(v.tolist(), noise.tolist(), strict=True)):
        norm = math.sqrt(sum(w * w for w in (v[:8] if i < 8 else v[8:]).tolist()))
        wanted = math.copysign(math.floor(7 * abs(x) / norm + u), x) * norm / 7
        assert float(found[i]) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def _train_with_qsgd(rank: int, folder: str) -> None:
    import warnings

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        model = nn.Linear(16, 8, bias=False)
        wrapped, qsgd = nn.parallel.DistributedDataParallel(model), QSGD(bits=4, piece=32)
        qsgd.register(wrapped)
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(100 + rank)
        mean, tries = torch.zeros(8, 16), 300
        for _ in range(tries):
            model.zero_grad()
            wrapped(x[rank::2]).square().sum().backward()
            mean += model.weight.grad / tries
        found = {"mean": mean, "last": model.weight.grad, "sent": qsgd.bytes_sent, "saved": qsgd.bytes_saved}
        torch.save(found, f"{folder}/{rank}.pt")
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.long
def test_two_processes_exchange_few_bytes_and_the_mean_is_right(tmp_path):
    torch.multiprocessing.spawn(_train_with_qsgd, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["last"], second["last"])
    each = 128 // 2 + 4 * (128 // 32)  # half a byte a number, a float32 for each of four pieces
    assert first["sent"] == 300 * each and first["saved"] == 300 * (4 * 128 - each)
    torch.manual_seed(0)
    model = nn.Linear(16, 8, bias=False)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for rank in range(2):
        model.zero_grad()
        model(x[rank::2]).square().sum().backward()
        gradients.append(model.weight.grad.clone())
    wanted = sum(gradients) / 2
    step = max(float(g.reshape(-1, 32).norm(dim=1).max()) for g in gradients) / 7
    assert bool(((first["mean"] - wanted).abs() < 5 * step / 2 / math.sqrt(2 * 300)).all())


@pytest.mark.parametrize("bits", [2, 6])
def test_dorefas_gradients_are_unbiased_and_on_their_grid(bits):
    torch.manual_seed(0)
    g, tries = torch.randn(3, 40) * torch.tensor([1.0, 1e-4, 0.0])[:, None], 4000
    mean = rounded_gradient(g.repeat(tries, 1), bits).double().reshape(tries, 3, 40).mean(0)
    m, steps = g.abs().amax(1, keepdim=True).double(), 2**bits - 1
    levels = (rounded_gradient(g, bits)[:2].double() / (2 * m[:2]) + 0.5) * steps
    assert (
        torch.allclose(levels, levels.round(), atol=1e-4)
        and 0 <= float(levels.min()) <= float(levels.max()) <= steps + 1e-4
    )
    inside = g.abs() < m * (1 - 1 / steps)  # at the ends noise is cut off, as in the paper
    bound = 5 * (2 * m / steps / 2) / math.sqrt(tries)
    assert bool(((mean - g).abs() <= bound)[inside].all())
    noise = torch.rand(g.shape)
    found = rounded_gradient(g, bits, noise)[:2].double()
    wanted = 2 * m * ((((g.double() / (2 * m) + 0.5) * steps + (noise - 0.5)).round().clamp(0, steps)) / steps - 0.5)
    assert torch.allclose(found, wanted[:2], rtol=1e-4, atol=1e-7)
    assert float(rounded_gradient(g, bits)[2].abs().max()) == 0


def test_rounded_gradients_of_a_model_come_and_go():
    torch.manual_seed(0)
    model, images = binary_net(), torch.randn(8, 2, 8, 8)
    prepared = fxquant.prepare(model, images, qat=True)
    prepared(images)

    def gradients() -> list[Tensor]:
        prepared.zero_grad()
        prepared(images).square().mean().backward()
        return [part.weight.grad.clone() for name in ("0", "3", "5") for part in [prepared.get_submodule(name)]]

    plain = gradients()
    rounding = GradientRounding(prepared, bits=8)
    rounded = gradients()
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(plain, rounded, strict=True)]
    assert all(1e-5 < error < 0.2 for error in errors)
    rounding.remove()
    assert all(torch.allclose(a, b, rtol=0.05, atol=1e-4) for a, b in zip(plain, gradients(), strict=True))
    with pytest.raises(InputError, match="2 to 16 bits"):
        GradientRounding(prepared, bits=1)
    with pytest.raises(InputError, match="no weighted layer"):
        GradientRounding(nn.Linear(2, 2), bits=4)
    with pytest.raises(InputError, match="bits are 2, 4 or 8"):
        QSGD(bits=3)


def test_abc_is_told_from_integers():
    images = torch.randn(4, 2, 8, 8)
    scheme = Scheme.weight(3, quantizer="abc")
    model = binary_net()
    prepared = fxquant.prepare(model, images, qat=True, recipe=Recipe(default=Setting(weight=scheme)))
    prepared(images).square().mean().backward()
    assert "simulated by abc" in str(fxquant.diff(model, prepared))
    with pytest.raises(LevelError, match="several factors"):
        fxquant.convert(prepared)
    with pytest.raises(RecipeError, match="8 or fewer"):
        recipe = Recipe(default=Setting(weight=Scheme.weight(9, quantizer="abc")))
        fxquant.prepare(model, images, qat=True, recipe=recipe)
