"""The fast kernels against the reference: each op within one integer step, whole models, every way around them."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from comparisons import assert_close_to_scale, assert_same_bits
from digits import DigitsNet, test_images
from op_cases import COMPUTING, ROUNDED, calibrated, example_of, for_any_bytes, frozen_example, inputs_like, recipe_with
from torch import Tensor, nn

import fxquant
from fxquant import Scheme
from fxquant.graph.edit import Edit
from fxquant.graph.leveled import RUNNER
from fxquant.kernels import choice as choice_module
from fxquant.kernels import frozen as frozen_module
from fxquant.kernels import operators as operators_module
from fxquant.kernels import runner as runner_module
from fxquant.kernels import weighted as weighted_module
from fxquant.kernels.agreement import Agreement, agreement
from fxquant.kernels.frozen import Frozen, fastest
from fxquant.kernels.native.library import missing
from fxquant.kernels.operators import KINDS, Engine, Operators, operators
from fxquant.kernels.runner import Runner, on_torch
from fxquant.kernels.saturation import can_saturate, largest_pair, saturating_layers
from fxquant.kernels.storage import Storage, convert
from fxquant.nn.accumulating import IntegerWeighted

fast = pytest.mark.skipif(operators() is None, reason="torch has no int8 operators that are right on this machine")

needs_native = pytest.mark.skipif(missing() is not None, reason=f"native: {missing()}")
either = pytest.mark.parametrize("kernels", ["torch", pytest.param("auto", marks=needs_native)])
"""What is true of a call whatever computes it; ``auto`` is the native kernels."""

SIGNED = Scheme(bits=8, signed=True, symmetric=True)
NARROW = Scheme(bits=5)
FOUR_BITS = Scheme(bits=4, symmetric=True, signed=True, per_channel=True, narrow_range=True)
PER_TENSOR = Scheme(bits=8, symmetric=True, signed=True, narrow_range=True)


def converted(
    model: nn.Module,
    *inputs: Tensor,
    recipe: fxquant.Recipe | None = None,
    processor: str | None = None,
    **options: Any,
) -> Any:
    """The model, calibrated on ``inputs`` and converted for torch's operators, which its weights fit on any processor."""
    options.setdefault("kernels", "torch")
    prepared = fxquant.prepare(model.eval(), inputs, recipe=recipe, processor=processor)
    return fxquant.convert(for_any_bytes(fxquant.calibrate(prepared, [inputs], progress=False)), **options)


def of_reference(integer: Any) -> Any:
    """A copy that computes with the reference."""
    twin = copy.deepcopy(integer)
    twin.__dict__.pop(RUNNER, None)
    return twin


def require_agreement(found: list[Agreement], share: float = 0.999) -> None:
    """Every op within one step, float results within float32's rounding, and nearly all values equal."""
    assert found
    far = [a for a in found if a.worst > 1.0 or (a.equal < share * a.values - 1 and a.worst > 1e-5)]
    assert not far, far


def kernels_used(integer: Any) -> dict[str, str]:
    return next(reversed(runner_of(integer).programs.values())).kernels


def runner_of(integer: Any) -> Runner:
    runner = integer.__dict__[RUNNER]
    assert isinstance(runner, Runner)
    return runner


def signal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
    reference = {"same", "valid", "reflected", "transposed"}
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


class Mixed(nn.Module):
    """Convolutions, a residual add, squeeze and excitation, pools, cat, a hard swish and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.point, self.fc = nn.Conv2d(16, 16, 1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        y = F.hardswish(self.deep(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = F.relu(self.point(y * gate) + x)
        y = torch.cat([F.max_pool2d(y, 3, 2, 1), F.avg_pool2d(x, 2, ceil_mode=True)], 1)
        return self.fc(y.mean((2, 3)))


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


# --- life of a model ---------------------------------------------------------------------------------------------------


@fast
@either
def test_a_model_survives_every_copy(kernels, tmp_path):
    torch.manual_seed(1)
    model, x = Mixed(), signal(4, 3, 32, 32)
    integer = converted(model, x, kernels=kernels)
    want = integer(x)
    keys = set(of_reference(integer).state_dict())
    assert set(integer.state_dict()) == keys
    twin = copy.deepcopy(integer)
    assert not runner_of(twin).programs and runner_of(twin) is not runner_of(integer)
    assert_same_bits(twin(x), want)
    assert_same_bits(pickle.loads(pickle.dumps(integer))(x), want)
    buffer = io.BytesIO()
    torch.save(integer, buffer)
    buffer.seek(0)
    assert_same_bits(torch.load(buffer, weights_only=False)(x), want)
    fxquant.save(integer, tmp_path / "model.pt")
    loaded = fxquant.load(Mixed(), tmp_path / "model.pt")
    assert_same_bits(loaded(x), want)
    assert runner_of(loaded).programs


def test_the_choice_of_kernels_is_saved(tmp_path):
    x = signal(4, 3, 32, 32)
    integer = converted(Mixed(), x, kernels="reference")
    assert RUNNER not in integer.__dict__
    fxquant.save(integer, tmp_path / "model.pt")
    loaded = fxquant.load(Mixed(), tmp_path / "model.pt")
    assert RUNNER not in loaded.__dict__
    assert_same_bits(loaded(x), integer(x))


def test_unknown_kernels_are_an_error():
    prepared = fxquant.calibrate(fxquant.prepare(nn.Linear(3, 2)), [signal(2, 3)], progress=False)
    with pytest.raises(fxquant.FxquantError, match="auto, torch, reference"):
        fxquant.convert(prepared, kernels="fast")


@fast
@either
def test_new_numbers_are_seen(kernels):
    x = signal(4, 3, 32, 32)
    torch.manual_seed(1)
    integer, other = converted(Mixed(), x, kernels=kernels), converted(Mixed(), x, kernels=kernels)
    assert not torch.equal(integer(x), other(x))
    integer.load_state_dict(other.state_dict())
    assert_same_bits(integer(x), other(x))
    integer.stem.weight.neg_()
    assert_close_to_scale(integer(x), of_reference(integer)(x), 0.02)


@fast
@either
def test_hooks_are_called(kernels):
    integer, x, seen = converted(Mixed(), signal(4, 3, 32, 32), kernels=kernels), signal(2, 3, 32, 32), []
    integer(x)
    handle = integer.deep.register_forward_hook(lambda module, args, result: seen.append(result.dtype))
    integer(x)
    assert seen == [torch.uint8]
    handle.remove()
    integer(x)
    assert len(seen) == 1


@fast
@either
def test_gradients_take_the_reference(kernels):
    integer = converted(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), signal(8, 6), kernels=kernels)
    integer(signal(8, 6).requires_grad_())
    assert not runner_of(integer).programs


@fast
@either
def test_inference_mode_and_outside_of_it(kernels):
    integer, x = converted(Mixed(), signal(4, 3, 32, 32), kernels=kernels), signal(2, 3, 32, 32)
    with torch.inference_mode():
        first = integer(x)
    assert_same_bits(integer(x), first.clone())
    with torch.no_grad():
        assert_same_bits(integer(x), first.clone())


@fast
@either
def test_global_switches_change_nothing(kernels):
    integer, x = converted(Mixed(), signal(4, 3, 32, 32), kernels=kernels), signal(2, 3, 32, 32)
    want = integer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(integer(x), of_reference(integer)(x))
    with torch.device("meta"):
        assert_same_bits(integer(x), want)
        assert_same_bits(copy.deepcopy(integer)(x), want)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    integer(x)
    handle.remove()
    assert len(seen) > 5
    assert_same_bits(integer(x), want)


@fast
@either
def test_a_changed_graph_has_no_runner_of_another(kernels):
    class Runs(Mixed):
        runner = "the user's own"

        def __init__(self) -> None:
            super().__init__()
            self.runner = "the user's own, too"

    x = signal(2, 3, 32, 32)
    integer = converted(Runs(), x, kernels=kernels)
    integer(x)
    assert integer.runner == "the user's own, too"
    assert RUNNER not in Edit(integer, by="test").done().__dict__
    other = converted(Runs(), 3 * x, kernels=kernels)
    other.__dict__[RUNNER] = runner_of(integer)
    assert_close_to_scale(other(x), of_reference(other)(x), 0.02)


def _native(kernels: dict[str, str]) -> set[str]:
    return {path for path, kernel in kernels.items() if kernel == "native"}


@needs_native
def test_a_model_is_called_natively_with_the_reference_s_bits():
    integer, x = converted(Mixed(), signal(4, 3, 32, 32), kernels="auto"), signal(2, 3, 24, 40)
    expected = fxquant.coverage(integer).kernels
    assert set(expected.values()) == {"native"}, "known before it is called"
    for own in (x, x[:1], x.double().float(), signal(1, 3, 8, 9)):
        assert_same_bits(integer(own), of_reference(integer)(own))
    assert fxquant.coverage(integer).kernels == expected
    assert {type(program).__name__ for program in runner_of(integer).programs.values()} == {"_Natively"}


@needs_native
def test_what_the_native_kernels_lack_is_called_in_torch():
    """One op of 12 bits; the runner says why, and every other op is torch's."""
    recipe = fxquant.Recipe([("point", fxquant.Setting(activation=Scheme(bits=12)))])
    integer, x = converted(Mixed(), signal(4, 3, 32, 32), recipe=recipe, kernels="auto"), signal(2, 3, 24, 40)
    got = integer(x)
    assert_close_to_scale(got, of_reference(integer)(x), 0.02)
    assert not _native(fxquant.coverage(integer).kernels) and runner_of(integer).unfit
    assert fxquant.coverage(integer).kernels["fc"] in [engine.name for engine in operators().engines]


def test_an_op_without_a_kernel_of_torchs_says_why():
    """Those that run by the reference are exactly those that are refused, each with the op, and the reason in words."""
    recipe = fxquant.Recipe([("point", fxquant.Setting(activation=Scheme(bits=12)))])
    integer, x = converted(Mixed(), signal(4, 3, 32, 32), recipe=recipe, kernels="torch"), signal(2, 3, 24, 40)
    integer(x)
    (program,) = runner_of(integer).programs.values()
    plain = {name for name, kernel in program.kernels.items() if kernel.startswith("reference")}
    assert plain and plain == set(program.refusals)
    assert all(refusal.where == name for name, refusal in program.refusals.items())
    assert str(program.refusals["point"]) == "point: its result is torch.int16"


@needs_native
def test_what_a_model_refuses_it_refuses_with_its_own_words():
    integer = converted(Mixed(), signal(4, 3, 32, 32), kernels="auto")
    for wrong in (signal(2, 4, 32, 32), signal(2, 3)):
        with pytest.raises(Exception) as of_reference_:
            of_reference(integer)(wrong)
        with pytest.raises(type(of_reference_.value), match=re.escape(str(of_reference_.value).splitlines()[0][:40])):
            integer(wrong)
    assert_same_bits(integer(signal(2, 3, 32, 32)), of_reference(integer)(signal(2, 3, 32, 32)))


@fast
@needs_native
def test_a_fault_of_the_native_kernels_is_said(monkeypatch):
    def fails(*_: Any) -> Any:
        raise RuntimeError("planted")

    integer, x = converted(Mixed(), signal(4, 3, 32, 32), kernels="auto"), signal(2, 3, 24, 40)
    monkeypatch.setattr(runner_module.NativeModel, "run", fails)
    with pytest.warns(UserWarning, match=r"native kernels failed.*RuntimeError\('planted'\)"):
        got = integer(x)
    assert_close_to_scale(got, of_reference(integer)(x), 0.02)


@needs_native
def test_torch_can_be_asked_for():
    x = signal(4, 3, 32, 32)
    integer = converted(Mixed(), x, kernels="auto")
    want = integer(x)
    compiled = fxquant.compile(integer, x, runtime="torch")
    assert_close_to_scale(compiled(x), want, 0.02)
    assert fxquant.coverage(integer).kernels["point"] == "native", "the model that was compiled is as it was"
    twin = on_torch(integer)
    assert twin is not integer and twin.point.weight is integer.point.weight
    assert fxquant.coverage(twin).kernels["point"] == operators().engines[0].name
    assert on_torch(twin) is twin


@fast
def test_coverage_names_the_kernels():
    integer = converted(Mixed(), signal(4, 3, 32, 32))
    expected = fxquant.coverage(integer).kernels
    integer(signal(1, 3, 32, 32))
    used = fxquant.coverage(integer).kernels
    assert expected["point"] == used["point"] == operators().engines[0].name
    assert used["squeeze"] == operators().engines[-1].name
    assert not [path for path, kernel in used.items() if kernel.startswith("reference")]
    assert "float32 inside" in str(fxquant.coverage(integer))
    twelve = fxquant.Recipe(default=fxquant.Setting(activation=Scheme(bits=12)))
    wide = fxquant.coverage(converted(Mixed(), signal(4, 3, 32, 32), recipe=twelve)).kernels
    assert wide["point"] == "reference: its result is torch.int16"


# --- frozen ------------------------------------------------------------------------------------------------------------


@fast
def test_frozen_programs_give_the_programs_bits():
    integer = converted(Mixed(), signal(4, 3, 32, 32))
    run = fastest(integer, signal(2, 3, 32, 32))
    assert isinstance(run, Frozen)
    for batch, size in ((2, 32), (1, 32), (1, 40), (2, 9), (1, 33), (3, 20), (2, 32), (1, 33)):
        x = signal(batch, 3, size, size, seed=size)
        for _ in range(2):
            assert_same_bits(run(x), integer(x))
    integer.stem.weight.neg_()
    x = signal(2, 3, 32, 32)
    for _ in range(2):
        assert_same_bits(run(x), integer(x))


@fast
def test_frozen_programs_of_the_last_shapes_are_kept(monkeypatch):
    made = []
    freeze = frozen_module._freeze
    monkeypatch.setattr(frozen_module, "_freeze", lambda *args: made.append(1) or freeze(*args))
    integer = converted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), signal(4, 3, 8, 8))
    run = fastest(integer, signal(1, 3, 8, 8))
    assert isinstance(run, Frozen)
    for size in (*range(8, 16), 8, 16):  # 8 is used again, so that 9 goes when 16 comes
        assert_same_bits(run(signal(1, 3, size, size)), integer(signal(1, 3, size, size)))
    assert len(made) == 9 and len(run._made) == 8
    for size in (8, 10, 16):
        run(signal(1, 3, size, size))
    assert len(made) == 9, "these were kept"
    assert_same_bits(run(signal(1, 3, 9, 9)), integer(signal(1, 3, 9, 9)))
    assert len(made) == 10 and len(run._made) == 8


@fast
def test_frozen_programs_keep_the_users_signature():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor, *, gain: Tensor, double: bool = False) -> dict[str, Tensor]:
            y = F.relu(self.fc(x)) * gain
            return {"y": y * 2 if double else y, "x": x}

    x, gain = signal(5, 6), signal(5, 4)
    prepared = fxquant.prepare(Named(), {"x": x, "gain": gain})
    integer = fxquant.convert(fxquant.calibrate(prepared, [{"x": x, "gain": gain}], progress=False), kernels="torch")
    run = fastest(integer, x, gain=gain)
    assert_same_bits(run(x, gain=gain), integer(x, gain=gain))
    assert_same_bits(run(gain=gain, x=x), integer(x=x, gain=gain))


@fast
def test_without_torchscript_the_model_is_called(monkeypatch):
    def gone(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("TorchScript was removed")

    monkeypatch.setattr(frozen_module.torch.jit, "trace", gone)
    integer, x = converted(Mixed(), signal(4, 3, 32, 32)), signal(2, 3, 32, 32)
    assert_same_bits(fastest(integer, x)(x), integer(x))


def test_what_has_no_program_is_its_own_fastest():
    integer, x = converted(Mixed(), signal(4, 3, 32, 32), kernels="reference"), signal(2, 3, 32, 32)
    assert fastest(integer, x) is integer


# --- machines ----------------------------------------------------------------------------------------------------------


def test_the_largest_pair_of_weights():
    weight = torch.tensor([[100, -3, 28, 5], [-60, -69, 127, 0]], dtype=torch.int8)
    assert largest_pair(weight) == 129 and can_saturate(weight)
    assert largest_pair(weight[:1]) == 128 and not can_saturate(weight[:1])
    assert not can_saturate(torch.tensor([[127]], dtype=torch.int8))


def test_without_operators_the_reference_runs(monkeypatch):
    monkeypatch.setattr(operators_module, "_find", lambda *_: None)
    assert operators_module.operators.__wrapped__() is None
    monkeypatch.setattr(runner_module, "operators", lambda: None)
    x = signal(2, 3, 32, 32)
    integer = converted(Mixed(), x)
    assert RUNNER not in integer.__dict__
    assert set(fxquant.coverage(integer).kernels.values()) == {"reference"}
    assert_same_bits(integer(x), of_reference(integer)(x))


@fast
def test_an_engine_that_errs_is_not_used(monkeypatch):
    monkeypatch.setattr(operators_module, "_is_exact", lambda *_: False)
    assert operators_module.operators.__wrapped__() is None


@fast
def test_where_pairs_saturate_only_small_weights_go_fast(monkeypatch):
    found = operators()
    limited = tuple(Engine(engine.name, frozenset(KINDS)) for engine in found.engines)
    monkeypatch.setattr(runner_module, "operators", lambda: Operators(**{**vars(found), "engines": limited}))
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), signal(2, 3, 9, 9)
    seven_bits = Scheme(bits=7, symmetric=True, signed=True, per_channel=True, narrow_range=True)
    kernels = []
    for weight in (None, seven_bits):
        integer = converted(model, x, recipe=recipe_with(None, weight), processor="vnni")
        integer(x)
        kernels.append(kernels_used(integer)["_0"])
        assert list(saturating_layers(integer)) == (["0", "2"] if weight is None else [])
    assert kernels == ["reference", found.engines[0].name]


@fast
def test_coverage_says_why_a_layer_is_slow(monkeypatch):
    found = operators()
    limited = tuple(Engine(engine.name, frozenset(KINDS)) for engine in found.engines)
    monkeypatch.setattr(choice_module, "operators", lambda: Operators(**{**vars(found), "engines": limited}))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    integer = converted(model, signal(2, 3, 9, 9), recipe=ROUNDED, processor="vnni")
    assert fxquant.coverage(integer).kernels["0"].endswith("could overflow 16 bits on this machine")


@fast
def test_depthwise_weights_never_saturate():
    """fbgemm adds pairs of products in 16 bits there, on every x86: whatever runs must not."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False))
    with torch.no_grad():
        model[1].weight.fill_(1.0)
    integer = converted(model, signal(2, 3, 9, 9), recipe=ROUNDED)
    for batch, size in ((2, 9), (1, 3), (1, 40)):
        require_agreement(agreement(integer, 3 * signal(batch, 3, size, size)))


def test_forms_share_memory():
    x = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    held = convert(x[:, 1:], Storage(0.5, 7), False)
    assert held.data_ptr() == x[:, 1:].data_ptr() and (held.q_scale(), held.q_zero_point()) == (0.5, 7)
    assert_same_bits(convert(held, None, False), x[:, 1:])
    signed = torch.arange(-128, 128, dtype=torch.int8)
    held = convert(signed, Storage(1.0, 128), True)
    assert_same_bits(held.dequantize(), signed.float())
    assert_same_bits(convert(held, None, True), signed)


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


def of_three_dimensions(kernels: str) -> tuple[nn.Module, Tensor]:
    """Two layers by the reference, and a last one, whose sums leave as floats, in float32."""
    layers = (nn.Conv3d(3, 16, 3), nn.ReLU(), nn.Conv3d(16, 8, 1), nn.ReLU(), nn.Conv3d(8, 2, 1))
    model, x = nn.Sequential(*layers), torch.randn(2, 3, 5, 5, 5)
    return converted(model, x, kernels=kernels), x


@fast
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_layers_by_the_reference_are_named_once_with_their_cost(kernels):
    integer, x = of_three_dimensions(kernels)
    words = (
        r"2 layers of the model run by the exact reference, [\d.]+ ms of this call: \d \([\d.]+ ms: it has three dim"
    )
    with pytest.warns(UserWarning, match=words) as heard:
        integer(x)
    (warning,) = heard
    assert warning.filename == __file__, "it points at the line that called the model"
    assert ("The native kernels do not have the model: " in str(warning.message)) == (kernels == "auto")
    assert "coverage(model)" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integer(x[:1])  # another shape, another program
        copy.deepcopy(integer)(x)
        pickle.loads(pickle.dumps(integer))(x)


def test_a_reference_that_was_asked_for_is_no_warning():
    integer, x = of_three_dimensions("reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integer(x)


def test_a_model_that_runs_by_the_reference_alone_is_a_warning(monkeypatch):
    monkeypatch.setattr(runner_module, "operators", lambda: None)
    integer, x = of_three_dimensions("auto")
    with pytest.warns(UserWarning, match="the whole model runs by the exact reference: .*no native kernels"):
        integer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integer(x)
