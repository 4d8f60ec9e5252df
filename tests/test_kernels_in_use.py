"""A model with fast kernels in use: copied, saved, hooked, changed; which kernels it is called on, and what says so."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from comparisons import assert_close_to_scale, assert_same_bits
from torch import Tensor, nn
from torch_kernels import (
    Mixed,
    converted,
    either,
    fast,
    needs_native,
    of_reference,
    runner_of,
    signal,
)

import fxquant
from fxquant import Scheme
from fxquant.graph.edit import Edit
from fxquant.graph.leveled import RUNNER
from fxquant.kernels import runner as runner_module
from fxquant.kernels.operators import operators
from fxquant.kernels.runner import on_torch


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
    """One op of 12 bits; the runner says why, and all before it and behind the sum that reads it runs natively."""
    recipe = fxquant.Recipe([("point", fxquant.Setting(activation=Scheme(bits=12)))])
    integer, x = converted(Mixed(), signal(4, 3, 32, 32), recipe=recipe, kernels="auto"), signal(2, 3, 24, 40)
    expected = fxquant.coverage(integer).kernels
    got = integer(x)
    assert_close_to_scale(got, of_reference(integer)(x), 0.02)
    found = fxquant.coverage(integer).kernels
    assert set(found) - _native(found) == {"point", "add"} and runner_of(integer).unfit
    assert _native(expected) == _native(found), "known before it is called"
    assert not _native(fxquant.coverage(on_torch(integer)).kernels)


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


def of_layers_by_the_reference(kernels: str) -> tuple[nn.Module, Tensor]:
    """Two layers by the reference, and a last one, whose sums leave as floats, in float32."""
    options = {"stride": 2, "dilation": 2}
    first, second, last = (nn.ConvTranspose2d(*sides, 2, **options) for sides in ((3, 16), (16, 8), (8, 2)))
    model, x = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last), torch.randn(2, 3, 5, 5)
    return converted(model, x, kernels=kernels), x


@fast
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_layers_by_the_reference_are_named_once_with_their_cost(kernels):
    integer, x = of_layers_by_the_reference(kernels)
    words = (
        r"2 layers of the model run by the exact reference, [\d.]+ ms of this call: \d \([\d.]+ ms: it is a transposed"
    )
    with pytest.warns(UserWarning, match=words) as heard:
        integer(x)
    (warning,) = heard
    assert warning.filename == __file__, "it points at the line that called the model"
    assert ("The native kernels do not have the whole model: " in str(warning.message)) == (kernels == "auto")
    assert "coverage(model)" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integer(x[:1])  # another shape, another program
        copy.deepcopy(integer)(x)
        pickle.loads(pickle.dumps(integer))(x)


def test_a_reference_that_was_asked_for_is_no_warning():
    integer, x = of_layers_by_the_reference("reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integer(x)


def test_a_model_that_runs_by_the_reference_alone_is_a_warning(monkeypatch):
    monkeypatch.setattr(runner_module, "operators", lambda: None)
    integer, x = of_layers_by_the_reference("auto")
    with pytest.warns(UserWarning, match="the whole model runs by the exact reference: .*no native kernels"):
        integer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integer(x)
