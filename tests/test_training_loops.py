"""Training loops as people write them: averages of weights, frozen norms, overflows, conversions, hooks, resuming."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fxquant
from fxquant.calibration import activation_quantizers
from fxquant.errors import CalibrationError, LevelError
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize


class Block(nn.Module):
    """A batch norm that ends in a sum, and one that goes on into a ReLU; max_pool shares its quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3, eps=1e-3)
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(self.bn(self.conv(x)) + x))
        return self.head(nn.functional.max_pool2d(torch.relu(y), 2))


def data(seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * scale


def prepared_block(**options: Any) -> Any:
    torch.manual_seed(0)
    return fxquant.prepare(Block().train(), data()[:2], qat=True, **options)


def train(model: Any, steps: int = 6, after: Callable[[], Any] = lambda: None, scale: float = 1.0) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        model(data(step, scale)).square().mean().backward()
        optimizer.step()
        after()
    return model


def sqnr(reference: Tensor, actual: Tensor) -> float:
    noise = (reference.double() - actual.double()).square().mean()
    return float(10 * torch.log10(reference.double().square().mean() / noise.clamp_min(1e-30)))


def unrounded(model: Any, x: Tensor) -> float:
    """SQNR of a model in eval mode against itself with quantizers off."""
    model.eval()
    with torch.no_grad(), fxquant.quantizers_off(model):
        reference = model(x)
    with torch.no_grad():
        return sqnr(reference, model(x))


AVERAGES: dict[str, Callable[[Any], Any]] = {
    "torch, weights only": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    "torch, buffers too": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
    "torch, plain mean": lambda m: AveragedModel(m, use_buffers=True),
    "timm v2": lambda m: ModelEmaV2(m, decay=0.9),
    "timm v3": lambda m: ModelEmaV3(m, decay=0.9, foreach=True),
    "timm v3, one by one": lambda m: ModelEmaV3(m, decay=0.9, foreach=False),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_begun_before_the_first_step_rounds_and_converts(kind: str) -> None:
    """Its scales are averages of scales, and its zero points whole numbers near the model's."""
    model = prepared_block()
    average = AVERAGES[kind](model)
    update = average.update_parameters if isinstance(average, AveragedModel) else average.update
    history: dict[str, list[tuple[float, int]]] = {}

    def after() -> None:
        update(model)
        for name, quantizer in activation_quantizers(model).items():
            history.setdefault(name, []).append((float(quantizer.scale), int(quantizer.zero_point)))

    train(model, 12, after)
    ema = average.module
    for name, quantizer in activation_quantizers(ema).items():
        scales, zero_points = zip(*history[name], strict=True)
        assert quantizer.ready, name
        assert min(scales) * 0.999 <= float(quantizer.scale) <= max(scales) * 1.001, name
        assert min(zero_points) <= int(quantizer.zero_point) <= max(zero_points), name
    x = data(99)
    assert unrounded(ema, x) > 20.0
    loaded = prepared_block()
    loaded.load_state_dict(ema.state_dict())
    integer = fxquant.convert(ema)
    with torch.no_grad():
        assert torch.equal(ema(x), loaded.eval()(x))
        assert sqnr(ema(x), integer(x)) > 35.0


def test_the_share_of_an_average_that_has_no_range_is_taken_out() -> None:
    """After n steps of decay d an average that began at zero holds 1 - d^n of a value: exactly that is divided out."""
    quantizer = FakeQuantize(fxquant.Scheme())
    average = copy.deepcopy(quantizer)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(2.0))
    for _ in range(20):
        for own, other in zip(average.buffers(), quantizer.buffers(), strict=True):
            own.copy_(0.99 * own + 0.01 * other if own.is_floating_point() else 0.99 * own.double() + 0.01 * other)
    assert average.ready and float(average.known) == 1.0
    assert torch.allclose(average.scale, quantizer.scale, rtol=1e-5)
    assert int(average.zero_point) == int(quantizer.zero_point) == 85


def test_a_tensor_has_one_name_and_old_states_load() -> None:
    from safetensors.torch import load, save

    model = train(prepared_block())
    state = model.state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    again = prepared_block()
    again.load_state_dict(load(save({k: v.clone() for k, v in state.items()})))
    old = {k: v for k, v in state.items() if k.split(".")[-1] not in ("origin", "known", "follows", "holds_statistics")}
    old = {k: v for k, v in old.items() if k.split(".")[-1] != "is_pinned"}
    for name, value in model.named_buffers(remove_duplicate=False):  # a shared quantizer under all its names
        old.setdefault(name, value) if name.split(".")[-1] in ("scale", "zero_point") else None
    older = prepared_block()
    older.load_state_dict(old)
    x = data(5)
    for other in (again, older):
        assert torch.equal(model.eval()(x), other.eval()(x))


def test_tied_weights_have_one_name_and_a_checkpoint_with_both_loads() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.out = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(torch.relu(self.mid(self.embed(ids))))

    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(6).reshape(2, 3)
    prepared = fxquant.prepare(model, ids, qat=True)
    state = prepared.state_dict()
    assert ("embed.weight" in state) != ("out.weight" in state)
    assert not prepared.load_state_dict(Tied().state_dict(), strict=False).unexpected_keys
    prepared.load_state_dict(state)
    assert prepared.embed.weight is prepared.out.weight


def test_a_file_of_format_1_loads(tmp_path: Path) -> None:
    """As it was written before: shared quantizers under each name, and no switches."""
    model = train(prepared_block())
    fxquant.save(model, tmp_path / "new.pt")
    content = torch.load(tmp_path / "new.pt", weights_only=True)
    news = ("origin", "known", "follows", "is_pinned", "holds_statistics")
    content["fxquant"] = 1
    content["state"] = {k: v for k, v in content["state"].items() if k.split(".")[-1] not in news}
    for name, value in model.named_buffers(remove_duplicate=False):
        if name.split(".")[-1] not in news:
            content["state"].setdefault(name, value)
    torch.save(content, tmp_path / "old.pt")
    loaded = fxquant.load(Block(), tmp_path / "old.pt")
    x = data(5)
    assert torch.equal(model.eval()(x), loaded.eval()(x))
    assert torch.equal(fxquant.convert(model)(x), fxquant.convert(loaded)(x))


def saved(model: Any, folder: Path) -> Any:
    fxquant.save(model, folder / "model.pt")
    return fxquant.load(Block().train(), folder / "model.pt")


def state_loaded(model: Any, folder: Path) -> Any:
    twin = prepared_block()
    twin.load_state_dict(model.state_dict())
    return twin


COPIES: dict[str, Callable[[Any, Path], Any]] = {
    "save and load": saved,
    "state_dict": state_loaded,
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("way", COPIES)
def test_frozen_statistics_and_stopped_ranges_survive(way: str, tmp_path: Path) -> None:
    model = train(prepared_block(), 3)
    fxquant.freeze_batchnorm(model)
    stopped = activation_quantizers(model)["add"]
    stopped.tracking = False
    twin = COPIES[way](model, tmp_path).train()
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    with torch.no_grad():
        twin(data(7, 5.0) + 2)
    after = twin.state_dict()
    for name, value in before.items():
        if "running" in name or name.startswith("add."):
            assert torch.equal(value, after[name]), name
    assert not torch.equal(before["x_quantizer.output_quantizer.scale"], after["x_quantizer.output_quantizer.scale"])


def test_the_switches_are_in_the_state() -> None:
    model = train(prepared_block(), 1)
    fxquant.freeze_batchnorm(model)
    state = model.state_dict()
    assert bool(state["bn.holds_statistics"]) and bool(state["add.output_quantizer.follows"])
    fxquant.freeze_batchnorm(model, False)
    assert not bool(model.state_dict()["bn.holds_statistics"])


def test_norms_in_eval_mode_do_not_stop_quantizers() -> None:
    """``bn.eval()`` after every ``train()``: all quantizers follow, the norm's own included."""
    model = prepared_block()
    for step in range(4):
        model.train()
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        model(data(step)).sum().backward()
    assert all(q.ready and q.training for q in activation_quantizers(model).values())
    with torch.no_grad():
        model.bn.weight.mul_(6.0)
        for step in range(30):
            model(data(step))
    assert unrounded(model, data(50)) > 30.0
    assert not any(q.training for q in activation_quantizers(model).values())


@pytest.mark.parametrize("stage", ["conv", "stem", "norm"])
def test_a_frozen_stage_follows_what_comes_in(stage: str) -> None:
    model = train(prepared_block(), 3)
    fxquant.freeze_batchnorm(model.train())
    model.get_submodule(stage).eval()
    with torch.no_grad():
        for step in range(3):
            model(data(step, 20.0))
    assert unrounded(model, data(50, 20.0)) > 25.0


def test_training_in_eval_mode_is_said() -> None:
    model = train(prepared_block(), 2).eval()
    with pytest.warns(UserWarning, match="their ranges do not follow"):
        model(data()).sum().backward()
    with torch.no_grad():
        model(data())  # nothing to say where nothing trains


BAD = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("estimator", ["moving_average", "minmax", "percentile"])
def test_a_batch_that_is_not_finite_is_passed_over(kind: str, estimator: str) -> None:
    """The range of a tensor that holds NaN or infinity stays; what is clipped to a grid is finite for those behind it."""
    recipe = fxquant.Recipe(default=fxquant.Setting(activation=fxquant.Scheme(estimator=estimator)))
    model = train(prepared_block(recipe=recipe), 2)
    fxquant.freeze_batchnorm(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bad = data(1)
    bad[0, 0, 0, 0] = BAD[kind]
    with torch.no_grad():
        model(bad)
    watched = "x_quantizer.output_quantizer" if kind != "nan" else "output_quantizer"
    first = [name for name in before if watched in name]
    assert first and all(torch.equal(before[name], model.state_dict()[name]) for name in first)
    train(model, 3)
    assert unrounded(model, data(9)) > 25.0
    assert all(torch.isfinite(value).all() for name, value in model.state_dict().items() if name.endswith("scale"))


def test_no_finite_batch_is_named_at_once() -> None:
    model = prepared_block()
    with pytest.warns(UserWarning, match="NaN or infinity in the first batch"):
        model(data() * float("inf"))
    with pytest.raises(CalibrationError, match="no range yet: x_quantizer"):
        fxquant.convert(model)
    model = train(prepared_block(), 2)
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"weight of stem holds NaN or infinity"):
        fxquant.convert(model)


def test_a_range_of_nan_is_taken_anew() -> None:
    """What an average of infinities leaves, or a file of a version that let NaN in."""
    model = train(prepared_block(), 2)
    state = model.state_dict()
    for name, value in state.items():
        if name.startswith("add.") and name.split(".")[-1] in ("range_low", "range_high", "scale"):
            value.fill_(float("nan"))
    model.load_state_dict(state)
    model.train()(data())
    assert unrounded(model, data()) > 30.0


@pytest.mark.parametrize("way", ["freeze_batchnorm", "frozen mode"])
def test_frozen_statistics_are_taken_anew(way: str) -> None:
    model = train(prepared_block(batch_norm="frozen" if way == "frozen mode" else "late"), 3)
    fxquant.freeze_batchnorm(model)
    plain = copy.deepcopy(model)
    fxquant.freeze_batchnorm(plain, False)
    batches = [data(step, 3.0) for step in range(4)]
    for one in (model, plain):
        fxquant.reestimate_batchnorm(one, batches)
    for name in ("bn.running_mean", "bn.running_var", "norm.running_mean", "norm.running_var"):
        assert torch.equal(model.state_dict()[name], plain.state_dict()[name])
    assert model.bn.statistics_frozen and not plain.bn.statistics_frozen
    assert float(model.bn.running_var.min()) != 1.0
    with pytest.raises(LevelError, match="reestimate_batchnorm"):
        torch.optim.swa_utils.update_bn(batches, model)


def test_sync_batch_norm_after_prepare_keeps_quantizers_and_switches() -> None:
    model = train(prepared_block(), 3)
    fxquant.freeze_batchnorm(model)
    x = data(9)
    expected = model.eval()(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted.bn).__name__ == "QuantSyncBatchNorm" and converted.bn.statistics_frozen
    assert torch.equal(converted.eval()(x), expected)
    assert torch.equal(fxquant.convert(converted)(x), fxquant.convert(model)(x))


def test_frozen_batch_norms_after_prepare() -> None:
    from timm.utils.model import freeze_batch_norm_2d

    model = train(prepared_block(), 3)
    x = data(9)
    expected = model.eval()(x)
    frozen = freeze_batch_norm_2d(model)
    assert torch.equal(frozen.eval()(x), expected)
    before = frozen.bn.running_mean.clone()
    train(frozen.train(), 2)
    assert torch.equal(frozen.bn.running_mean, before) and not frozen.bn.weight.requires_grad
    fxquant.convert(frozen)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.base_layer = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


@pytest.mark.parametrize("name", ["conv", "head", "add", "relu"])
def test_another_module_in_a_layers_place_is_refused(name: str) -> None:
    model = prepared_block()
    old = model.get_submodule(name)
    with pytest.raises(LevelError, match=f"(?s){name!r} is a Quant.* before fxquant.prepare"):
        setattr(model, name, Wrapped(old))
    with pytest.raises(LevelError, match="was put in its place"):
        model.add_module(name, nn.Identity())
    assert model.get_submodule(name) is old


def test_hooks_keep_their_own_values() -> None:
    """Before a ReLU, on the ReLU, and for all modules at once."""
    model = train(prepared_block(), 2)
    x = data(3)

    def kept(register: Callable[[Callable[..., Any]], Any]) -> list[tuple[Tensor, Tensor]]:
        seen: list[tuple[Tensor, Tensor]] = []

        def keep(part: nn.Module, *values: Any) -> None:
            tensors = [t for value in values for t in (value if isinstance(value, tuple) else (value,))]
            seen.extend((t.detach(), t.clone()) for t in tensors if isinstance(t, Tensor))

        handle = register(keep)
        model(x)
        handle.remove()
        return seen

    for register in (
        model.norm.register_forward_hook,
        model.relu.register_forward_pre_hook,
        model.bn.register_forward_hook,
        nn.modules.module.register_module_forward_hook,
    ):
        pairs = kept(register)
        assert pairs and all(torch.equal(now, then) for now, then in pairs)


def test_a_part_that_is_not_called_refuses_hooks_and_calls() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 2, 1))
    model = fxquant.prepare(net, data()[:2], qat=True)
    part = model.get_submodule("0")
    with pytest.raises(LevelError, match="call the whole model"):
        part(data())
    with pytest.raises(LevelError, match=r"before fxquant\.prepare"):
        part.register_forward_hook(print)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_observes_once(reentrant: bool) -> None:
    one, two = prepared_block(), prepared_block()
    fxquant.freeze_batchnorm(one)
    fxquant.freeze_batchnorm(two)
    for step in range(3):
        x = data(step).requires_grad_()
        one(x).square().sum().backward()
        checkpoint(two, x, use_reentrant=reentrant).square().sum().backward()
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    for (name, value), other in zip(one.named_parameters(), two.parameters(), strict=True):
        assert value.grad is not None and torch.equal(value.grad, other.grad), name  # type: ignore[arg-type]


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    one, two = (train(prepared_block(), 2) for _ in range(2))
    for model in (one, two):
        fxquant.freeze_batchnorm(model.train())
        for quantizer in activation_quantizers(model).values():
            quantizer.tracking = False
        model.zero_grad()
    one(data(4)).square().sum().backward()
    for part in data(4).split(2):
        two(part).square().sum().backward()
    for (name, value), other in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.allclose(value.grad, other.grad, rtol=1e-4, atol=1e-5), name  # type: ignore[arg-type]


def test_weights_pinned_by_freezing_survive(tmp_path: Path) -> None:
    model = train(prepared_block(), 2)
    frozen = fxquant.freeze(model)
    fxquant.save(frozen, tmp_path / "frozen.pt")
    loaded = fxquant.load(Block(), tmp_path / "frozen.pt")
    quantizers = [part for part in loaded.modules() if isinstance(part, WeightQuantize)]
    assert quantizers and all(part.pinned for part in quantizers)
    assert torch.equal(loaded(data(3)), frozen(data(3)))


class LowBits(nn.Module):
    """A convolution without a norm, with one, transposed with groups, and a linear layer: every kind of bias."""

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.act = act
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps=1e-3)
        self.mid = nn.Conv2d(8, 8, 3, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.fc = nn.Linear(576, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(x)))
        return self.fc(torch.relu(self.up(torch.relu(self.mid(x)))).flatten(1))


def low_bit_recipe(weight_bits: int, activation_bits: int) -> fxquant.Recipe:
    weight = fxquant.Scheme(
        bits=weight_bits, symmetric=True, signed=True, per_channel=True, narrow_range=weight_bits > 2, estimator="mse"
    )
    return fxquant.Recipe(
        default=fxquant.Setting(weight=weight, activation=fxquant.Scheme(bits=activation_bits, estimator="minmax"))
    )


@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 2), (4, 8), (2, 8), (4, 16)], ids=lambda b: f"w{b[0]}a{b[1]}")
@pytest.mark.parametrize("qat", [True, False], ids=["qat", "ptq"])
def test_below_eight_bits_the_frozen_model_is_the_one_that_was_trained(bits: tuple[int, int], qat: bool) -> None:
    """Biases are rounded in the prepared model as they ship, those that a batch norm makes too."""
    torch.manual_seed(0)
    model = LowBits().train()
    with torch.no_grad():
        for _ in range(10):
            model(data() * 2 + 1)
        model.bn.bias.uniform_(-1, 1)
    model.train(qat)
    prepared = fxquant.prepare(model, data()[:2], qat=qat, recipe=low_bit_recipe(*bits))
    train(prepared, 4) if qat else fxquant.calibrate(prepared, [data(s) for s in range(3)], progress=False)
    x = torch.cat([data(seed) for seed in range(20, 28)])
    frozen, integer = fxquant.freeze(prepared.eval()), fxquant.convert(prepared, kernels="reference")
    with torch.no_grad():
        expected, actual, integers = prepared(x), frozen(x), integer(x)
    assert sqnr(expected, actual) > 100.0 and sqnr(expected, integers) > 60.0
    best = integers.gather(1, expected.argmax(1, keepdim=True))[:, 0]
    assert torch.allclose(best, integers.amax(1), rtol=0.0, atol=1e-6)  # at 2 bits logits may be equal


def test_biases_rounded_in_training_have_the_gradient_of_others() -> None:
    torch.manual_seed(0)
    prepared = fxquant.prepare(nn.Sequential(nn.Linear(6, 4)), torch.randn(2, 6), qat=True)
    x = torch.randn(16, 6)
    prepared(x)
    prepared.zero_grad()
    prepared(x).sum().backward()
    assert torch.equal(prepared.get_parameter("0.bias").grad, torch.full((4,), 16.0))
    with fxquant.quantizers_off(prepared):
        assert torch.equal(prepared(x), nn.functional.linear(x, *prepared.get_submodule("0").parameters()))


def test_a_trainer_is_told_whether_the_graph_takes_num_items_in_batch() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return self.fc(x) / kwargs.get("num_items_in_batch", 1)

    x = torch.randn(3, 4)
    plain = fxquant.prepare(Model(), {"x": x}, qat=True)
    told = fxquant.prepare(Model(), {"x": x, "num_items_in_batch": torch.tensor(3)}, qat=True)
    assert not plain.accepts_loss_kwargs and told.accepts_loss_kwargs
    assert told(x=x, num_items_in_batch=torch.tensor(6)).shape == (3, 2)
