"""equalize and smooth leave alone what else is read, and try ops as copies: the float function of awkward models stays."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.algorithms import correct_biases, equalize, smooth
from fxquant.errors import CalibrationError


def smoothed(prepared: Any, x: Tensor) -> Any:
    return smooth(prepared, [x], progress=False)


def equalized(prepared: Any, x: Tensor) -> Any:
    return equalize(prepared, absorb=False)


VERBS: dict[str, Callable[[Any, Tensor], Any]] = {"equalize": equalized, "smooth": smoothed}


class Read(nn.Module):
    """Two layers, of which ``forward`` reads a parameter a second time."""

    def __init__(self, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.read = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6), read
        with torch.no_grad():
            self.norm.weight.uniform_(0.2, 5.0)
            self.a.weight.mul_(torch.logspace(-1, 1, 6)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(self.norm(x)))) + self.read(self, x)


READ = {
    "the first weight": (lambda m, x: F.linear(x, m.a.weight), "reads its weight too"),
    "the second weight": (lambda m, x: F.linear(x, m.b.weight), "reads its weight too"),
    "a bias": (lambda m, x: x * m.a.bias, "reads its bias too"),
    "a norm's weight": (lambda m, x: x * m.norm.weight, "reads its weight too"),
    "nothing": (lambda m, x: x, None),
}


def run_float(prepared: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        return prepared(x)


def changed_by(verb: str, model: nn.Module, x: Tensor) -> tuple[set[str], str, float]:
    """Which parameters a verb changes, what it says, and how far the float function moves, as a share of its largest value.

    The user's model, its mode and the random state have to stay.
    """
    state, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    prepared = fxquant.prepare(model, x)
    before, y, random = copy.deepcopy(prepared.state_dict()), run_float(prepared, x), torch.get_rng_state()
    mode = [part.training for part in prepared.modules()]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        VERBS[verb](prepared, x)
    assert torch.equal(random, torch.get_rng_state())
    assert mode == [part.training for part in prepared.modules()]
    assert modes == [part.training for part in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in prepared.modules())
    moved = float((run_float(prepared, x) - y).abs().max() / y.abs().max())
    after = prepared.state_dict()
    return {n for n in before if not torch.equal(before[n], after[n])}, " ".join(str(w.message) for w in told), moved


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", READ)
def test_parameters_that_are_read_elsewhere_stay(verb, kind):
    torch.manual_seed(0)
    read, reason = READ[kind]
    changed, said, moved = changed_by(verb, Read(read).eval(), torch.randn(8, 6))
    assert moved < 1e-5
    if reason is None:
        assert "a.weight" in changed and not said
    elif kind != "a norm's weight":
        assert not {"a.bias", "b.weight"} & changed and reason in said
    elif verb == "smooth":
        assert "norm.weight" not in changed and reason in said


def test_a_norm_that_stays_in_float_is_smoothed_too():
    """Between RMSNorm and the layer stands the quantizer of the layer's input. Factors as in SmoothQuant, eq. 4, by hand."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 4)).eval(), torch.randn(8, 3, 6)
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-1, 2, 6))
        factor = model[0](x).abs().amax((0, 1)).sqrt() / model[1].weight.abs().amax(0).sqrt()
    changed, said, moved = changed_by("smooth", model, x)
    assert changed == {"0.weight", "1.weight"} and moved < 1e-5 and not said
    prepared = smoothed(fxquant.prepare(model, x), x)
    torch.testing.assert_close(prepared.get_submodule("0").weight, model[0].weight / factor)
    torch.testing.assert_close(prepared.get_submodule("1").weight, model[1].weight * factor)


@pytest.mark.parametrize("other", [lambda h: h, lambda h: h * h], ids=["it leaves", "an op reads it"])
def test_a_norm_that_something_else_reads_is_not_smoothed(other):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a = nn.RMSNorm(6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.norm(x)
            return self.a(h), other(h)

    torch.manual_seed(0)
    prepared = fxquant.prepare(Two().eval(), torch.randn(8, 6))
    with pytest.warns(UserWarning, match="nothing was smoothed"):
        smoothed(prepared, torch.randn(8, 6))
    assert torch.equal(prepared.norm.weight, torch.ones(6))


@pytest.mark.parametrize("verb", VERBS)
def test_tied_parameters_of_norms_and_layers_stay(verb):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.other, self.a, self.b, self.c = nn.LayerNorm(6), nn.LayerNorm(6), *self.layers()
            self.other.weight, self.c.bias = self.norm.weight, self.a.bias

        def layers(self) -> list[nn.Module]:
            return [nn.Linear(6, 6) for _ in range(3)]

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(self.norm(x)))) + self.c(F.silu(self.other(2 * x)))

    torch.manual_seed(0)
    changed, said, moved = changed_by(verb, Tied().eval(), torch.randn(8, 6))
    assert moved < 1e-5 and not changed & {"norm.weight", "a.bias", "b.weight"} and "another layer's too" in said


class Body(nn.Module):
    """Two convolutions whose channels are out of balance."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)
        with torch.no_grad():
            self.a.weight.mul_(torch.logspace(-1, 1, 6)[:, None, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class Around(nn.Module):
    """Code that cannot be traced, around a part that can; it may read a weight of that part, by itself or with help."""

    def __init__(self, helped: bool, bound: float = 1e9) -> None:
        super().__init__()
        self.body, self.helped, self.bound = Body(), helped, bound

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if float(x.sum()) > self.bound:
            y = y * (read_by_helper(self.body.a) if self.helped else self.body.a.weight.abs().sum())
        return y


def read_by_helper(layer: nn.Conv2d) -> Tensor:
    return layer.weight.abs().sum()


class Plain(Around):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 1e9 else self.body(x)


class Naming(Plain):
    """Code that reads a weight of a layer that it makes up a name for."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y if float(x.sum()) < 1e9 else y * self.get_submodule(".".join(["body", "a"])).weight.sum()


@pytest.mark.parametrize("helped", [False, True])
def test_code_around_a_graph_that_may_read_its_parameters_keeps_them(helped):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5)
    changed, said, moved = changed_by("equalize", Around(helped).eval(), x)
    assert not changed and moved == 0 and "no pair of layers" in said
    changed, said, moved = changed_by("equalize", Around(helped, bound=-1e9).eval(), x)  # the example's run reads it
    assert not changed and moved == 0 and "no pair of layers" in said
    changed, said, moved = changed_by("equalize", Naming(helped).eval(), x)
    assert not changed and moved == 0 and "the code of Naming" in said
    changed, said, moved = changed_by("equalize", Plain(helped).eval(), x)
    assert "body.a.weight" in changed and moved < 1e-5 and not said


class Counting(nn.Module):
    """An op of the user's own between two layers: it counts, and takes no number above 100."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.calls, self.most = 0, most
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        if float(x.abs().max()) > self.most:
            raise ValueError("too large")
        return F.relu(x)


def between(op: nn.Module) -> nn.Module:
    """Two convolutions, whose channels differ by a factor of a thousand, with ``op`` between them."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), op, nn.Conv2d(6, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 1, 6)[:, None, None, None])
    return model


def test_an_op_is_tried_as_a_copy_and_what_it_raises_is_a_reason():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5)
    model = between(Counting(1e30))
    prepared = fxquant.prepare(model, x)
    (inner,) = [part for part in prepared.modules() if isinstance(part, Counting)]
    calls, seen = inner.calls, inner.seen.clone()
    equalize(prepared, absorb=False)
    assert inner.calls == calls and torch.equal(inner.seen, seen)
    changed, said, _ = changed_by("equalize", between(Counting(100.0)), x)
    assert changed <= {"1.seen"} and "does not run on random numbers (ValueError)" in said


NORMS: dict[str, Callable[[], nn.Module]] = {
    "its own statistics": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "statistics that training moves": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "groups": lambda: nn.GroupNorm(2, 6),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("training", [False, True])
def test_norms_between_layers_keep_their_statistics(kind, training):
    torch.manual_seed(0)
    x, model = torch.randn(4, 3, 5, 5), between(NORMS[kind]())
    prepared = fxquant.prepare(model, x).train(training)
    before = {name: value.clone() for name, value in prepared.named_buffers() if "running" in name}
    prepared.eval()
    y = run_float(prepared, x)
    prepared.train(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        equalize(prepared, absorb=False)
    assert all(torch.equal(value, before[name]) for name, value in prepared.named_buffers() if "running" in name)
    assert all(part.training == training for part in prepared.modules() if isinstance(part, nn.Conv2d))
    prepared.eval()
    assert float((run_float(prepared, x) - y).abs().max()) < 1e-5 * float(y.abs().max())


def test_a_norm_of_batch_statistics_in_front_of_a_layer_is_no_factor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 4)).eval()
    changed, said, _ = changed_by("smooth", model, torch.randn(8, 6))
    assert not changed and "nothing was smoothed" in said


def test_a_clamp_far_out_is_still_a_clamp():
    """Channels a hundred million times smaller than others would be scaled past it."""

    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            with torch.no_grad():
                self.a.weight.mul_(1e-8)
                self.a.bias.mul_(1e4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).clamp(0, 1e4))

    torch.manual_seed(0)
    for verb in VERBS:
        changed, said, moved = changed_by(verb, Far().eval(), torch.randn(8, 6))
        assert not changed and moved == 0 and ("it clamps at 10000" in said or verb == "smooth")


@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-12), (torch.float16, 1e-6), (torch.bfloat16, 1e-6)])
@pytest.mark.parametrize("verb", VERBS)
def test_other_precisions(verb, dtype, most):
    """Where products would be rounded to less than float32, factors are powers of two, and nothing is rounded at all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.PReLU(8), nn.Linear(8, 6)).eval()
    with torch.no_grad():
        model[1].weight.mul_(torch.logspace(-1, 1, 8)[:, None])
    model = model.to(dtype)
    changed, _, moved = changed_by(verb, model, torch.randn(8, 6).to(dtype))
    assert "3.weight" in changed and moved <= most


def test_half_precision_does_not_overflow():
    """A channel of weights near nothing, whose bias would be multiplied past 65504."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6)).eval()
    with torch.no_grad():
        model[0].weight[1] = 6e-8
        model[0].bias[1] = 900.0
    _, _, moved = changed_by("equalize", model.half(), torch.randn(8, 6).half())
    assert moved < 1e-3


@pytest.mark.parametrize("verb", VERBS)
def test_parameters_without_a_range_stay(verb):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval()
    with torch.no_grad():
        model[0].weight[2, 0] = float("inf")
    prepared = fxquant.prepare(model, torch.randn(4, 6))
    with pytest.warns(UserWarning, match="its weight holds NaN or infinity"):
        VERBS[verb](prepared, torch.randn(4, 6))
    assert torch.equal(prepared.get_submodule("2").weight, model[2].weight)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_data_without_a_range_is_an_error_and_the_model_stays(value):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)).eval(), [torch.randn(4, 6) for _ in range(2)]
    prepared = fxquant.prepare(model, data[0])
    data[1][0, 0] = value
    with pytest.raises(CalibrationError, match="reads NaN or infinity"):
        smooth(prepared, data, progress=False)
    assert torch.equal(prepared.get_submodule("0").weight, model[0].weight)
    assert torch.equal(prepared.get_submodule("1").weight, model[1].weight)


@pytest.mark.parametrize("dims", [1, 3])
def test_without_example_inputs_shapes_follow_from_weights(dims):
    torch.manual_seed(0)
    conv, pool = getattr(nn, f"Conv{dims}d"), getattr(nn, f"MaxPool{dims}d")
    model, x = nn.Sequential(conv(3, 6, 1), pool(2), conv(6, 3, 1)).eval(), torch.randn(2, 3, *[4] * dims)
    prepared = fxquant.prepare(model)
    y = run_float(prepared, x)
    equalize(prepared, absorb=False)
    assert not torch.equal(prepared.get_submodule("0").weight, model[0].weight)
    assert float((run_float(prepared, x) - y).abs().max()) < 1e-5 * float(y.abs().max())


def biased(model: nn.Module, data: list[Tensor], *, smooth_first: bool = False) -> Any:
    setting = fxquant.Setting(weight=fxquant.Scheme.weight(4))
    prepared = fxquant.prepare(model, data[0], recipe=setting)
    if smooth_first:
        smooth(prepared, data, progress=False)
    return fxquant.calibrate(prepared, data, progress=False)


def normed() -> tuple[nn.Module, list[Tensor]]:
    """Linear layers whose inputs have the statistics of the batch norms between them, by construction."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    data = [torch.randn(256, 6) for _ in range(4)]
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 1.5)
        model[1].bias.uniform_(0.2, 1.5)
        model[1].momentum = None
        for x in data:
            model.train()(x)
    return model.eval(), data


def corrected(prepared: Any, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the first layer nothing is known
        return correct_biases(prepared, **settings)


def pinned_bias(prepared: Any, name: str = "3") -> Tensor:
    part = prepared.get_submodule(name)
    return part.weight_quantizer.bias_for(part.bias).detach().clone()


@pytest.mark.parametrize("first", [None, "bias_correction", "adaround", "closed_form"])
def test_correcting_biases_twice_is_correcting_them_once(first):
    model, data = normed()
    prepared = biased(model, data)
    if first is not None:
        steps = {"steps": 5} if first == "adaround" else {}
        fxquant.recover(prepared, data, method=first, progress=False, **steps)
    once = pinned_bias(corrected(prepared))
    part = prepared.get_submodule("3")
    with torch.no_grad():
        mean = torch.cat([model[:3](x) for x in data]).double().mean(0)
        wanted = part.bias.double() - (part.weight_quantizer(part.weight).double() - part.weight.double()) @ mean
        # the mean of a clipped normal variable stands for that of 1024 samples: within a fifth of what is corrected
        assert float((once - wanted).norm()) < 0.2 * float((wanted - part.bias.double()).norm())
    assert torch.equal(pinned_bias(corrected(prepared)), once)


def test_means_follow_what_smoothing_divides():
    model, data = normed()
    prepared = biased(model, data, smooth_first=True)
    part = prepared.get_submodule("3")
    corrected(prepared)
    with torch.no_grad(), fxquant.quantizers_off(prepared):
        read: list[Tensor] = []
        hook = part.register_forward_pre_hook(lambda part, args: read.append(args[0]))
        for x in data:
            prepared(x)
        hook.remove()
    with torch.no_grad():
        lost = part.weight_quantizer(part.weight).double() - part.weight.double()
        wanted = part.bias.double() - lost @ torch.cat(read).double().mean(0)
        assert float((pinned_bias(prepared) - wanted).norm()) < 0.2 * float((wanted - part.bias.double()).norm())
