"""Real models and awkward ones: rewritten, they compute what they did, train as they did, and survive copying."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import zoo
from awkward import AWKWARD, FunctionalDropout, OptionalInput, ReusedConv, ReusedReLU, TiedWeights
from comparisons import assert_close_to_scale, assert_ops_agree, assert_same_bits
from op_cases import mostly_long
from torch import Tensor, nn

import fxquant
from fxquant.graph.leveled import LeveledModule
from fxquant.graph.text import graph_text, node_text
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize


def run(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    with torch.no_grad():
        return module(*copy.deepcopy(inputs))


def is_folded(module: LeveledModule) -> bool:
    return any(how == "folded" for n in module.graph.nodes for _, how in n.meta.get("absorbed", ()))


# Models of torchvision.


ZOO = mostly_long(zoo.NAMES, ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "convnext_tiny"))


@pytest.mark.parametrize("name", ZOO)
def test_quantizers_off_leaves_the_zoo_unchanged(name):
    model, x = zoo.build(name), zoo.images(3)
    expected = run(model, (x,))
    qat = fxquant.prepare(model, x[:2], qat=True)
    with fxquant.quantizers_off(qat):
        assert_same_bits(run(qat, (x,)), expected)
    ptq = fxquant.prepare(model, x[:2])
    with fxquant.quantizers_off(ptq):
        got = run(ptq, (x,))
    assert_close_to_scale(got, expected, 1e-4)
    if not is_folded(ptq):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_trains_as_it_did(name):
    """In train mode, under one seed: outputs, gradients and running statistics, dropout and stochastic depth included."""
    model, x = zoo.build(name).train(), zoo.images(2)
    prepared = fxquant.prepare(model, x, qat=True)
    assert [n for n, _ in prepared.named_parameters()] == [n for n, _ in model.named_parameters()]

    def step(module: nn.Module) -> Tensor:
        torch.manual_seed(7)
        y = module(x)
        y.square().mean().backward()
        return y.detach()

    with fxquant.quantizers_off(prepared):
        assert_same_bits(step(prepared), step(model))
    given, buffers = dict(prepared.named_parameters()), dict(prepared.named_buffers())
    for key, parameter in model.named_parameters():
        assert_same_gradient(given[key].grad, parameter.grad, key)
    for key, buffer in model.named_buffers():
        assert torch.equal(buffers[key], buffer), f"buffer {key} differs"


def assert_same_gradient(got: Tensor | None, expected: Tensor | None, what: str) -> None:
    assert (got is None) == (expected is None), f"{what}: one of the gradients is missing"
    if got is not None and expected is not None:
        assert torch.equal(got, expected), f"{what}: gradients differ by {float((got - expected).abs().max()):.3g}"


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_the_zoo_runs_in_integers(name):
    model, x = zoo.build(name), zoo.images(3)
    prepared = fxquant.calibrate(fxquant.prepare(model, x[:2]), [x], progress=False)
    frozen = fxquant.freeze(prepared)
    integer = fxquant.convert(frozen)
    assert_ops_agree(frozen, integer, (zoo.images(2, seed=5) * 1.2,), share=0.998)
    weights = [p for p in integer.modules() if type(p).__name__ == "IntegerWeighted"]
    assert weights and all(p.weight.dtype == torch.int8 for p in weights)
    assert not any("reason" in n.meta for n in integer.graph.nodes if n.meta.get("is_tensor"))


# Awkward models.


def awkward(name: str) -> tuple[nn.Module, tuple[Any, ...], tuple[Any, ...]]:
    torch.manual_seed(3)
    build, inputs = AWKWARD[name]
    return build().eval(), inputs(4), inputs(6)


@pytest.mark.parametrize("qat", [False, True], ids=["ptq", "qat"])
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_models_are_unchanged_with_quantizers_off(name, qat):
    model, example, other = awkward(name)
    prepared = fxquant.prepare(model, example, qat=qat, verify=True)
    for inputs in (example, other):
        with fxquant.quantizers_off(prepared):
            got, expected = run(prepared, inputs), run(model, inputs)
        if is_folded(prepared):
            assert_close_to_scale(got, expected, 1e-5)
        else:
            assert_same_bits(got, expected)


@pytest.mark.parametrize("name", [n for n in AWKWARD if n not in ("dict in and out", "tuple in and out")])
def test_awkward_models_can_do_without_an_example(name):
    model, example, _ = awkward(name)
    prepared = fxquant.prepare(model, qat=True)
    with fxquant.quantizers_off(prepared):
        assert_same_bits(run(prepared, example), run(model, example))


@pytest.mark.parametrize("qat", [False, True], ids=["ptq", "qat"])
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_models_run_in_integers(name, qat):
    model, example, other = awkward(name)
    prepared = fxquant.prepare(model, example, qat=qat)
    fxquant.calibrate(prepared, [example, other], progress=False)
    frozen = fxquant.freeze(prepared)
    integer = fxquant.convert(prepared)
    assert_ops_agree(frozen, integer, other, share=0.99)
    if not qat:  # a moving average of so few samples covers only part of the range
        assert_close_to_scale(run(integer, other), run(model, other), 0.12)


@pytest.mark.parametrize("name", [n for n in AWKWARD if n != "in place then read"])
def test_awkward_models_train_as_they_did(name):
    model, example, _ = awkward(name)
    model.train()
    prepared = fxquant.prepare(model, example, qat=True)
    used = {n for n, _ in prepared.named_parameters(remove_duplicate=False)}
    assert used <= {n for n, _ in model.named_parameters(remove_duplicate=False)}
    both = []
    for module in (prepared, model):
        torch.manual_seed(7)
        with fxquant.quantizers_off(prepared):
            output = module(*copy.deepcopy(example))
        tensors = list(flat(output))
        sum(t.square().mean() for t in tensors).backward()
        both.append([t.detach() for t in tensors])
    assert_same_bits(both[0], both[1])
    given = dict(prepared.named_parameters(remove_duplicate=False))
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if key in given:
            assert_same_gradient(given[key].grad, parameter.grad, key)
        else:
            assert parameter.grad is None, f"{key} trains in the model and is missing in the prepared one"


def flat(value: Any) -> Any:
    from comparisons import tensors_of

    return tensors_of(value)


def test_a_reused_relu_has_a_quantizer_for_each_call():
    x = torch.randn(2, 3, 8, 8)
    prepared = fxquant.prepare(ReusedReLU().eval(), x)
    relus = [n for n in prepared.graph.nodes if "QuantReLU" in node_text(n)]
    assert len(relus) == 2
    a, b = (prepared.get_submodule(n.target) for n in relus)
    assert a is not b and a.output_quantizer is not b.output_quantizer


def test_a_reused_conv_has_one_weight_and_a_quantizer_for_each_call():
    model, x = ReusedConv().eval(), torch.randn(2, 3, 8, 8)
    prepared = fxquant.prepare(model, x, qat=True)
    assert sorted(n for n, _ in prepared.named_parameters()) == sorted(n for n, _ in model.named_parameters())
    prepared.load_state_dict(model.state_dict(), strict=False)
    convs = [n for n in prepared.graph.nodes if n.meta.get("entry") is not None and n.meta["entry"].name == "conv2d"]
    assert len(convs) == 2 and len({n.target for n in convs}) == 2
    first, second = (prepared.get_submodule(n.target) for n in convs)
    assert first.weight_quantizer is second.weight_quantizer, "one weight, one grid"
    prepared.train()(x).square().mean().backward()
    assert dict(prepared.named_parameters())["conv.weight"].grad.abs().max() > 0


def test_tied_weights_stay_tied():
    model, x = TiedWeights(), torch.randn(6, 5)
    prepared = fxquant.prepare(model, x, qat=True)
    assert prepared.get_submodule("a").weight is prepared.get_submodule("b").weight
    again = copy.deepcopy(prepared)
    assert again.get_submodule("a").weight is again.get_submodule("b").weight
    loaded = pickle.loads(pickle.dumps(prepared))
    assert loaded.get_submodule("a").weight is loaded.get_submodule("b").weight


def test_an_optional_input_may_be_left_out():
    model, x = OptionalInput().eval(), torch.randn(4, 4)
    prepared = fxquant.prepare(model, x, qat=True)
    with fxquant.quantizers_off(prepared):
        assert_same_bits(run(prepared, (x,)), run(model, (x,)))


# Float checkpoints, layouts, dtypes, frozen parameters.


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_tiny"])
def test_a_float_checkpoint_loads_strictly(name):
    model, x = zoo.build(name), zoo.images(2)
    prepared = fxquant.prepare(model, x, qat=True)
    fxquant.calibrate(prepared, [x], progress=False)
    other = {k: v + 0.01 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    scales = {n: q.scale.clone() for n, q in prepared.named_modules() if type(q) is FakeQuantize}
    missing, unexpected = prepared.load_state_dict(other, strict=False)
    assert not unexpected and all("quantizer" in key for key in missing)
    prepared.load_state_dict(other, strict=True)
    model.load_state_dict(other)
    with fxquant.quantizers_off(prepared):
        assert_same_bits(run(prepared, (x,)), run(model, (x,)))
    for n, q in prepared.named_modules():
        if type(q) is FakeQuantize:
            assert torch.equal(q.scale, scales[n]) and q.ready


@pytest.mark.long
def test_channels_last_stays_channels_last():
    model = zoo.build("mobilenet_v2").to(memory_format=torch.channels_last)
    x = zoo.images(2).to(memory_format=torch.channels_last)
    prepared = fxquant.prepare(model, x, qat=True)
    with fxquant.quantizers_off(prepared):
        assert_same_bits(run(prepared, (x,)), run(model, (x,)))
    fxquant.calibrate(prepared, [x], progress=False)
    frozen = fxquant.freeze(prepared)
    assert frozen.get_submodule("features.0.0").weight.is_contiguous(memory_format=torch.channels_last)
    assert_ops_agree(frozen, fxquant.convert(frozen), (x,), share=0.998)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bfloat16", "float16", "float64"]
)
def test_other_float_types(dtype):
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        .eval()
        .to(dtype)
    )
    x = torch.randn(4, 3, 8, 8).to(dtype)
    for qat in (False, True):
        prepared = fxquant.prepare(model, x, qat=qat)
        with fxquant.quantizers_off(prepared):
            assert_close_to_scale(run(prepared, (x,)), run(model, (x,)), 0.0 if qat else 3e-2)
        fxquant.calibrate(prepared, [x], progress=False)
        assert run(prepared, (x,)).dtype == dtype
        integer = fxquant.convert(prepared)
        y = run(integer, (x,))
        assert y.dtype == dtype, "the integer model gives the dtype that the model gives"
        assert_close_to_scale(y, run(fxquant.freeze(prepared), (x,)), 4e-2)


def test_frozen_parameters_stay_frozen():
    model, x = zoo.build("mobilenet_v3_small").train(), zoo.images(2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name)
    prepared = fxquant.prepare(model, x, qat=True)
    assert {n: p.requires_grad for n, p in prepared.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    prepared(x).square().mean().backward()
    for name, parameter in prepared.named_parameters():
        assert (parameter.grad is not None) == ("classifier" in name), name


def test_modes_of_single_modules_are_kept():
    """A model in training with one part in eval mode, as people freeze a backbone's statistics."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 4, 3)).train()
    model[1].eval()
    x = torch.randn(3, 3, 8, 8)
    prepared = fxquant.prepare(model, x, qat=True)
    assert prepared.training and not prepared.get_submodule("1").training and prepared.get_submodule("2").training
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    with fxquant.quantizers_off(prepared):
        assert_same_bits(prepared(x).detach(), expected.detach())


def test_functional_dropout_follows_the_mode_at_run_time():
    model, x = FunctionalDropout().eval(), torch.randn(64, 4)
    prepared = fxquant.prepare(model, x, qat=True)
    with fxquant.quantizers_off(prepared):
        assert_same_bits(run(prepared, (x,)), run(model, (x,)))
        prepared.train(), model.train()
        torch.manual_seed(9)
        expected = run(model, (x,))
        torch.manual_seed(9)
        assert_same_bits(run(prepared, (x,)), expected)
        prepared.eval(), model.eval()
        assert_same_bits(run(prepared, (x,)), run(model, (x,)))


def test_ptq_of_a_model_in_train_mode_gives_eval_behaviour():
    model, x = zoo.build("mobilenet_v3_small"), zoo.images(2)
    expected = run(model, (x,))
    prepared = fxquant.prepare(model.train(), x)
    assert not prepared.training and model.training
    with fxquant.quantizers_off(prepared):
        assert_close_to_scale(run(prepared, (x,)), expected, 1e-4)


# Copies: every way, at every level.


COPIED = {
    "mobilenet_v3_small": lambda: (zoo.build("mobilenet_v3_small"), (zoo.images(2),)),
    "shufflenet_v2_x0_5": lambda: (zoo.build("shufflenet_v2_x0_5"), (zoo.images(2),)),
    **{
        n: (lambda n=n: awkward(n)[:2])
        for n in (
            "reused conv",
            "tied weights",
            "dict in and out",
            "attention",
            "named tuple out",
            "residual in place",
            "functional dropout",
            "buffers",
            "ids",
        )
    },
}
LEVELS = ("prepared", "qat", "frozen", "integer")


def at_level(model: nn.Module, inputs: tuple[Any, ...], level: str) -> LeveledModule:
    prepared = fxquant.prepare(model, inputs, qat=level == "qat")
    fxquant.calibrate(prepared, [inputs], progress=False)
    prepared.eval()
    verbs = {"frozen": fxquant.freeze, "integer": fxquant.convert}
    return verbs[level](prepared) if level in verbs else prepared


def by_pickle(module: LeveledModule) -> LeveledModule:
    return pickle.loads(pickle.dumps(module))


def by_torch_save(module: LeveledModule) -> LeveledModule:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle, by_torch_save], ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", mostly_long(COPIED, set(COPIED) - {"mobilenet_v3_small", "shufflenet_v2_x0_5"}))
def test_a_copy_is_the_same_model(name, level, how):
    model, inputs = COPIED[name]()
    module = at_level(model, inputs, level)
    other = how(module)
    assert type(other) is not type(module) or other is not module
    assert other.level == module.level and graph_text(other) == graph_text(module)
    assert_same_bits(run(other, inputs), run(module, inputs))
    assert [(n.name, repr(sorted(n.meta))) for n in other.graph.nodes] == [
        (n.name, repr(sorted(n.meta))) for n in module.graph.nodes
    ]
    assert sharing(other) == sharing(module), "what was shared is shared still"
    assert not {id(t) for t in other.state_dict(keep_vars=True).values()} & {
        id(t) for t in module.state_dict(keep_vars=True).values()
    }
    if level == "qat":
        assert_same_training(module, other, inputs)
    if level in ("prepared", "qat"):
        assert_same_bits(run(fxquant.convert(other), inputs), run(fxquant.convert(module), inputs))


def sharing(module: nn.Module) -> list[list[str]]:
    """Which module paths hold one and the same quantizer."""
    paths: dict[int, list[str]] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, FakeQuantize):
            paths.setdefault(id(part), []).append(path)
    return sorted(sorted(p) for p in paths.values())


def assert_same_training(a: nn.Module, b: nn.Module, inputs: tuple[Any, ...]) -> None:
    for module in (a, b):
        torch.manual_seed(1)
        module.train()
        sum(t.square().mean() for t in flat(module(*copy.deepcopy(inputs)))).backward()
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert_same_gradient(q.grad, p.grad, name)
    a.eval(), b.eval()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", mostly_long(COPIED, set(COPIED) - {"mobilenet_v3_small", "shufflenet_v2_x0_5"}))
def test_saving_and_loading_rebuilds_the_model_from_the_float_class(name, level, tmp_path):
    model, inputs = COPIED[name]()
    module = at_level(model, inputs, level)
    fxquant.save(module, tmp_path / "model.pt")
    assert torch.load(tmp_path / "model.pt", weights_only=True)["level"] == module.level
    fresh, _ = COPIED[name]()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(0.3)
    other = fxquant.load(fresh, tmp_path / "model.pt")
    assert other.level == module.level and graph_text(other) == graph_text(module)
    assert_same_bits(run(other.eval(), inputs), run(module, inputs))
    assert sharing(other) == sharing(module)


@pytest.mark.parametrize("level", LEVELS)
def test_state_dicts_load_with_weights_only(level, tmp_path):
    model, inputs = COPIED["mobilenet_v3_small"]()
    module = at_level(model, inputs, level)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    expected = run(module, inputs)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_() if tensor.is_floating_point() else None
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert_same_bits(run(other, inputs), expected)


@pytest.mark.parametrize("estimator", ["minmax", "moving_average", "percentile", "mse"])
def test_recipes_are_saved_whole(estimator, tmp_path):
    model, inputs = COPIED["residual in place"]()
    weight = fxquant.Scheme(bits=4, symmetric=True, signed=True, per_channel=True)
    setting = fxquant.Setting(weight=weight, activation=fxquant.Scheme(bits=7, estimator=estimator))
    recipe = fxquant.Recipe([("b", setting), (nn.ReLU, setting), (fxquant.Op("mean"), None)], quantize_outputs=True)
    prepared = fxquant.calibrate(fxquant.prepare(model, inputs, recipe=recipe), [inputs], progress=False)
    for module in (prepared, fxquant.freeze(prepared), fxquant.convert(prepared, rounding="double")):
        fxquant.save(module, tmp_path / "model.pt")
        other = fxquant.load(COPIED["residual in place"]()[0], tmp_path / "model.pt")
        assert graph_text(other) == graph_text(module) and repr(other) == repr(module)
        assert_same_bits(run(other, inputs), run(module, inputs))


def test_calibration_goes_on_after_loading(tmp_path):
    model, inputs = COPIED["residual in place"]()
    prepared = at_level(model, inputs, "prepared")
    fxquant.save(prepared, tmp_path / "model.pt")
    other = fxquant.load(model, tmp_path / "model.pt")
    more = [(inputs[0] * 3,)]
    a, b = (fxquant.calibrate(m, more, progress=False) for m in (prepared, other))
    assert_same_bits(run(a, inputs), run(b, inputs))


@pytest.mark.long
def test_ranges_do_not_depend_on_how_data_is_cut_into_batches():
    model, x = zoo.build("mobilenet_v3_small"), zoo.images(6)
    by_one, by_six = (fxquant.prepare(model, x) for _ in range(2))
    fxquant.calibrate(by_one, list(x.split(1)), progress=False)
    fxquant.calibrate(by_six, [x], progress=False)
    for (name, a), (_, b) in zip(by_one.named_modules(), by_six.named_modules(), strict=True):
        if isinstance(a, FakeQuantize) and not isinstance(a, WeightQuantize):
            assert abs(float(a.scale - b.scale)) <= 1e-4 * float(b.scale), name


# Another device.


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "convnext_tiny"])
def test_integers_on_cuda_are_the_cpus(name):
    model, x = zoo.build(name), zoo.images(2)
    prepared = fxquant.calibrate(fxquant.prepare(model, x), [x], progress=False)
    frozen = fxquant.freeze(prepared)
    integer = fxquant.convert(frozen)
    on_cuda = copy.deepcopy(integer).cuda()
    assert_close_to_scale(run(on_cuda, (x.cuda(),)).cpu(), run(integer, (x,)), 1e-5)
    assert_ops_agree(copy.deepcopy(frozen).cuda(), on_cuda, (x.cuda(),), share=0.998)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_cuda_goes_the_whole_way_there():
    model, x = zoo.build("mobilenet_v3_small").cuda(), zoo.images(2).cuda()
    prepared = fxquant.prepare(model, x, qat=True)
    prepared.train()(x).square().mean().backward()
    fxquant.calibrate(prepared, [x.cpu()], progress=False)
    integer = fxquant.convert(prepared)
    assert all(t.is_cuda for t in integer.state_dict().values())
    assert run(integer, (x,)).is_cuda
