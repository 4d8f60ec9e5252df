"""fxquant's own kernels: every way to call them, and the library that they are compiled into."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparisons import assert_same_bits
from native_oracle import ROUNDED, Function, integers_of, signal
from native_parts import FORMS, conv, mixed, weighted
from torch import Tensor, nn

import fxquant
from fxquant.errors import InputError, Refusal, SpecializationError
from fxquant.kernels.native import library
from fxquant.kernels.native.model import NativeModel

REASON = library.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels here: {REASON}")


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    x = signal(2, 3, 31, 33)
    return integers_of(mixed(), x), x


def test_thread_counts_give_the_same_bits(digits, threads):
    integer, _ = digits
    x = signal(5, 3, 63, 61, seed=4)
    expected = integer(x)
    native = NativeModel(integer)
    for count in (1, 2, 3, 2, 1, 5):
        threads(count)
        for _ in range(5):
            assert_same_bits(native(x), expected)


def test_two_callers_at_once(digits):
    """Threads of Python that call one model, with shapes that differ."""
    integer, _ = digits
    native, wrong = NativeModel(integer), list[str]()
    calls = [signal(1 + i % 3, 3, 9 + i, 21 - i, seed=i) for i in range(6)]
    with torch.no_grad():
        expected = [integer(x) for x in calls]

    def work(offset: int) -> None:
        for i in range(40):
            at = (i * offset) % len(calls)
            if not torch.equal(native(calls[at]), expected[at]):
                wrong.append(f"call {i}")

    callers = [threading.Thread(target=work, args=(offset,)) for offset in (1, 5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_two_models_at_once(digits, threads):
    integer, x = digits
    expected, wrong = integer(x), list[int]()
    models = [NativeModel(integer) for _ in range(2)]

    def work(native: NativeModel) -> None:
        torch.set_num_threads(2)
        wrong.extend(i for i in range(30) if not torch.equal(native(x), expected))

    callers = [threading.Thread(target=work, args=(native,)) for native in models]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
    threads(1)


def test_many_shapes_in_turn(digits):
    """More than are kept, twice over."""
    integer, _ = digits
    native = NativeModel(integer)
    calls = [signal(1 + i % 3, 3, 8 + i, 30 - i, seed=i) for i in range(12)]
    with torch.no_grad():
        expected = [integer(x) for x in calls]
    for _ in range(2):
        for x, y in zip(calls, expected, strict=True):
            assert_same_bits(native(x), y)


def test_results_are_the_callers_own(digits):
    """A later call does not write into them, and what is done to them or to the input does not matter later."""
    integer, x = digits
    native = NativeModel(integer)
    expected = integer(x)
    first = native(x)
    native(signal(2, 3, 31, 33, seed=9))
    assert_same_bits(first, expected)
    first.fill_(7)
    given = x.clone()
    assert_same_bits(native(given), expected)
    assert torch.equal(given, x), "the input was changed"
    given.zero_()
    assert_same_bits(native(x), expected)


def test_any_order_of_memory_and_any_float(digits):
    integer, x = digits
    native, expected = NativeModel(integer), integer(x)
    wide = torch.zeros(4, 3, 62, 33)
    wide[::2, :, ::2] = x
    for given in (
        x.contiguous(memory_format=torch.channels_last),
        wide[::2, :, ::2],
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.flip(3).flip(3),
        x.clone().requires_grad_(),
        nn.Parameter(x),
    ):
        found = native(given)
        assert_same_bits(found, expected)
        assert not found.requires_grad and found.is_contiguous()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert_same_bits(native(x.to(dtype)), integer(x.to(dtype)))
    one = signal(1, 3, 31, 33)
    assert_same_bits(native(one.expand(3, -1, -1, -1)), integer(one.expand(3, -1, -1, -1)))
    with torch.inference_mode():
        assert_same_bits(native(x), expected)


def attempt(model: Any, *call: Any) -> Any:
    """What a call gives, or the error that it raises."""
    try:
        with torch.no_grad():
            return model(*call)
    except Exception as error:
        return error


IMAGE = (1, 3, 31, 33)
BAD_CALLS: dict[str, tuple[tuple[int, ...], ...]] = {
    "channels": ((1, 4, 31, 33), (1, 1, 31, 33), (2, 300, 31, 33)),
    "axes": ((3, 31, 33), (31, 33), (), (1, 1, 3, 31, 33)),
    "nothing": ((0, 3, 31, 33), (1, 0, 31, 33), (1, 3, 0, 33)),
    "sizes": ((1, 3, 1, 1), (1, 3, 2, 40), (1, 3, 3, 3)),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("form", [*FORMS, "flattened", "pooled", "norm", "all"])
def test_shapes_that_do_not_fit_are_errors(form, name):
    """Where the reference raises, the native model does too, and never computes from what is not there."""
    models: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "flattened": (lambda: nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(3132, 3)), IMAGE),
        "pooled": (
            lambda: Function(lambda m, x: torch.sigmoid(F.max_pool2d(F.avg_pool2d(torch.relu(x), 3), 5))),
            IMAGE,
        ),
        "norm": (lambda: Function(lambda m, x: m.norm(torch.relu(x)), norm=nn.BatchNorm2d(3)), IMAGE),
        "all": (mixed, IMAGE),
    }
    build, shape = (FORMS | models)[form]
    model = build().eval()
    integer = integers_of(model, signal(*shape))
    native = NativeModel(integer)
    for bad in BAD_CALLS[name]:
        require_same_or_error(model, integer, native, signal(*bad))
        assert_same_bits(native(signal(*shape)), integer(signal(*shape)), "after an error")


ERRORS = (Refusal, InputError, RuntimeError, IndexError)
"""What a call that torch refuses may raise."""


def require_same_or_error(model: nn.Module, integer: Any, native: NativeModel, *call: Any) -> None:
    """A call that the float model takes is right or refused; one that it does not take is an error, or right."""
    found = attempt(native, *call)
    if isinstance(found, Tensor):
        assert_same_bits(found, attempt(integer, *call))
        return
    taken = attempt(model, *call)
    is_empty = not isinstance(taken, Tensor) or not taken.numel()
    assert isinstance(found, ERRORS if is_empty else Refusal), f"{[tuple(x.shape) for x in call]}: {found!r}"


@pytest.mark.parametrize(
    "op",
    [
        "cat",
        "add",
        "mul",
        "cat of convolutions",
        "residual",
    ],
)
def test_inputs_that_do_not_fit_each_other_are_errors(op):
    function: dict[str, Callable[..., Tensor]] = {
        "cat": lambda m, x, y: torch.cat([F.relu(x), F.relu(y)], 1),
        "add": lambda m, x, y: x + y,
        "mul": lambda m, x, y: x * y,
        "cat of convolutions": lambda m, x, y: m.b(torch.cat([m.a(x), F.relu(y)], 1)),
        "residual": lambda m, x, y: m.c(x) + y,
    }
    parts = {"a": conv(3, 5), "b": conv(8, 4, 3), "c": conv(3, 3)}
    x, y = signal(1, 3, 8, 8), signal(1, 3, 8, 8, seed=4)
    model = Function(function[op], **parts)
    integer = integers_of(model, x, y)
    native = NativeModel(integer)
    for bad in ((1, 3, 4, 4), (1, 3, 80, 80), (2, 3, 8, 8), (1, 3, 8, 9), (1, 1, 8, 8), (1, 3, 1, 1), (3, 8, 8)):
        for call in ((x, signal(*bad)), (signal(*bad), y)):
            require_same_or_error(model, integer, native, *call)
    assert_same_bits(native(x, y), integer(x, y), "after errors")


def test_calls_that_are_none(digits):
    native = NativeModel(digits[0])
    x = digits[1]
    for call in ((), (x, x), (None,), ("x",), (x.to(torch.complex64),), (x.to("meta"),), ([x],)):
        found = attempt(native, *call)
        assert isinstance(found, (TypeError, InputError, SpecializationError, Refusal)), repr(found)


class Named(nn.Module):
    """Arguments by name, a default, and a dataclass-like result."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 5, 3), conv(3, 5)

    def forward(self, pixels: Tensor, other: Tensor | None = None) -> dict[str, Tensor]:
        y = F.relu(self.a(pixels))
        return {"first": y, "second": y if other is None else y + self.b(other)}


def test_arguments_by_name():
    x, y = signal(2, 3, 6, 7), signal(2, 3, 6, 7, seed=8)
    prepared = fxquant.prepare(Named().eval(), {"pixels": x, "other": y}, recipe=ROUNDED)
    integer = fxquant.convert(
        fxquant.calibrate(prepared, [{"pixels": x, "other": y}], progress=False), kernels="reference"
    )
    native = NativeModel(integer)
    for found in (native(x, y), native(x, other=y), native(other=y, pixels=x)):
        assert_same_bits(found, integer(x, y))
        assert type(found) is dict


def test_copies_and_files(digits, tmp_path):
    """A copied, pickled, saved and loaded model has the same kernels; so has one whose plans exist already."""
    integer, x = digits
    expected = integer(x)
    native = NativeModel(integer)
    native(x)
    twin = copy.deepcopy(integer)
    for part in weighted(twin):
        part.weight.zero_()
    assert_same_bits(native(x), expected)
    assert_same_bits(NativeModel(copy.deepcopy(integer))(x), expected)
    prepared = fxquant.prepare(Plain().eval(), signal(2, 3, 9, 9))
    saved = fxquant.convert(fxquant.calibrate(prepared, [signal(2, 3, 9, 9)], progress=False))
    fxquant.save(saved, tmp_path / "int8.pt")
    loaded = fxquant.load(Plain(), tmp_path / "int8.pt")
    reference = fxquant.convert(prepared, kernels="reference")
    y = signal(3, 3, 12, 8)
    assert_same_bits(NativeModel(loaded)(y), reference(y))


class Plain(nn.Sequential):
    """A network that can be built anew."""

    def __init__(self) -> None:
        generator = torch.get_rng_state()
        torch.manual_seed(5)
        super().__init__(conv(3, 17, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(17, 4))
        torch.set_rng_state(generator)


def test_the_model_may_go(digits):
    """Nothing that the kernels read belongs to the integer model alone."""
    integer, x = copy.deepcopy(digits[0]), digits[1]
    expected = integer(x)
    native = NativeModel(integer)
    del integer
    gc.collect()
    rubbish = [torch.full((n,), 0x55, dtype=torch.uint8) for n in range(1, 4000, 7)]
    assert_same_bits(native(x), expected)
    del rubbish


def test_what_is_no_integer_graph_is_refused():
    model = Plain().eval()
    prepared = fxquant.calibrate(fxquant.prepare(model, signal(2, 3, 9, 9)), [signal(2, 3, 9, 9)], progress=False)
    for other in (prepared, fxquant.freeze(prepared)):
        with pytest.raises(Refusal):
            NativeModel(other)(signal(2, 3, 9, 9))


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Asks for the library as a process would that has an empty cache, with other environment variables."""

    def ask(**environment: str) -> str | None:
        for name, value in {"XDG_CACHE_HOME": str(tmp_path), **environment}.items():
            monkeypatch.setenv(name, value)
        library._attempt.cache_clear()
        refusal = library.missing()
        return None if refusal is None else str(refusal)

    yield ask
    monkeypatch.undo()
    library._attempt.cache_clear()


def test_without_a_compiler_there_is_a_reason(fresh, tmp_path):
    assert "/nonexistent/compiler" in str(fresh(CXX="/nonexistent/compiler"))
    assert "no C++ compiler" in str(fresh(PATH="", CXX=""))
    assert not list(tmp_path.glob("fxquant/*")), "something was left behind"


def test_the_reason_reaches_the_user(fresh, digits):
    fresh(CXX="/nonexistent/compiler")
    with pytest.raises(Refusal, match="/nonexistent/compiler"):
        NativeModel(digits[0])


def test_a_compiler_that_fails_is_a_reason(fresh, tmp_path):
    assert "could not compile" in str(fresh(CXX="false"))
    lazy = tmp_path / "lazy"
    lazy.write_text("#!/bin/sh\nexit 0\n")
    lazy.chmod(0o755)
    assert "could not be compiled" in str(fresh(CXX=str(lazy)))
    talking = tmp_path / "talking"
    talking.write_text("#!/bin/sh\necho 'plan.cpp:1: error: no such instruction' >&2\nexit 1\n")
    talking.chmod(0o755)
    assert "no such instruction" in str(fresh(CXX=str(talking)))
    assert not list(tmp_path.glob("fxquant/*")), "something was left behind"


def test_a_cache_that_cannot_be_written_is_a_reason(fresh, tmp_path):
    (tmp_path / "fxquant").write_text("a file where the folder would be")
    assert str(tmp_path / "fxquant") in str(fresh())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_is_read_only_is_a_reason(fresh, tmp_path):
    tmp_path.chmod(0o500)
    assert str(tmp_path / "fxquant") in str(fresh())
    tmp_path.chmod(0o700)


def test_a_broken_library_is_a_reason_or_made_anew(fresh, tmp_path):
    """As a machine that went off while writing leaves it."""
    writer = tmp_path / "writer"
    writer.write_text('#!/bin/sh\nfor last; do :; done\n: > "$last"\n')
    writer.chmod(0o755)
    found = fresh(CXX=str(writer))
    assert found is not None and "library" in found, found


ASK = "from fxquant.kernels.native import library; print(repr(library.missing()))"


@pytest.mark.long
def test_two_processes_compile_at_once(tmp_path):
    everything = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([sys.executable, "-c", ASK], env=everything, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate(timeout=300)[0].strip() for process in both] == [b"None", b"None"]
    assert len(list(tmp_path.glob("fxquant/*.so"))) == 1
    assert len(list(tmp_path.glob("fxquant/*"))) == 1, "something was left behind"


class Two(nn.Module):
    """Two inputs that are never combined before they are integers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.a(x).relu() * 2 + self.b(y).relu()).mean((2, 3)) * 1.5


def test_a_first_call_on_parts_of_a_tensor_says_nothing_of_later_ones():
    """Where an input began in its memory, and what shared it, was once taken for the model's own."""
    torch.manual_seed(0)
    images = torch.randn(6, 3, 8, 8)
    example = images[:1].clone(), images[1:2].clone()
    int8 = fxquant.convert(fxquant.calibrate(fxquant.prepare(Two().eval(), example), [example]), kernels="reference")
    calls = [(images[i : i + 1], images[j : j + 1]) for i, j in ((4, 5), (2, 2), (0, 1), (3, 0))]
    for first in calls:
        native = NativeModel(int8)
        for x, y in (first, *calls):
            assert torch.equal(native(x, y), int8(x, y))


def test_a_plan_keeps_nothing_of_its_first_inputs():
    """An input, or a copy of it, was once held for as long as the model was."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    x = torch.randn(2, 3, 16, 16)
    native = NativeModel(integers_of(model, x))
    native(x)
    (plan,) = native._plans.values()
    assert not any(isinstance(value, Tensor) and value.shape == x.shape for value in plan.values)
