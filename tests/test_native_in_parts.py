"""Models that the native kernels do not have as a whole: what they have of them runs natively, with the reference's bits."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_kernels import needs_native, runner_of

import fxquant
from fxquant.errors import ExportError
from fxquant.kernels.runner import by_reference, on_torch
from fxquant.numerics.scheme import Scheme

pytestmark = needs_native


def block(a: int, b: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1))


class Between(nn.Module):
    """Two blocks with something between them that no native kernel computes."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.middle, self.second, self.head = block(3, 8), middle, block(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.middle(self.first(x))).mean((2, 3)))


class ByData(nn.Module):
    """An island: it decides by its data."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 1e9 else x.flip(3)


class Counting(nn.Module):
    """An island with a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if float(x.abs().max()) >= 0:
            self.calls += 1
        return x + 0.001 * self.calls


class Sizes(nn.Module):
    """Numbers that were read off shapes in one part are used in another; one of four parts of a tensor is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(3, 8), block(4, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        x = self.first(x)
        size = x.shape
        y = torch.special.erfcx(x.chunk(2, 1)[1] * 0.1)
        return self.second(y).reshape(size[0], -1).view(size[0], 8, *size[2:]), size[-1]


def signal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def converted(model: nn.Module, x: Tensor, recipe: Any = None) -> Any:
    torch.manual_seed(0)
    prepared = fxquant.prepare(model.eval(), x, recipe=recipe)
    return fxquant.convert(fxquant.calibrate(prepared, [x], progress=False))


def parts_of(integer: Any) -> list[bool]:
    """Whether each part that ran last ran natively."""
    program = next(reversed(runner_of(integer).programs.values()))
    return [
        {type(own).__name__ for own in runner.programs.values()} == {"_Natively"} if part.native else False
        for part, runner in zip(program.parts.parts, program.runners, strict=True)
    ]


class RefusesThree(nn.Module):
    """An island with a state that takes no batch of three."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if float(x.abs().max()) >= 0 and len(x) == 3:
            raise ValueError("no three")
        return x.flip(3)


FLOATS = [
    ("a function of floats", lambda x: torch.special.erfcx(x * 0.1)),
    ("in place", lambda x: torch.special.erfcx(x * 0.1).mul_(2.0)),
    ("an island", ByData()),
    ("sorted", lambda x: x.sort(dim=1).values),
    ("an island that counts", Counting()),
]


@pytest.mark.parametrize("middle", [own for _, own in FLOATS], ids=[name for name, _ in FLOATS])
def test_what_lies_before_and_behind_runs_natively(middle):
    integer = converted(Between(middle), signal(4, 3, 16, 16))
    for x in (signal(4, 3, 16, 16), signal(1, 3, 16, 16), signal(2, 3, 12, 20), signal(4, 3, 16, 16)):
        state = [buffer.clone() for buffer in integer.buffers()]
        got = integer(x)
        for buffer, before in zip(integer.buffers(), state, strict=True):
            buffer.copy_(before)
        with by_reference(integer):
            assert torch.equal(got, integer(x))
        assert parts_of(integer) == [True, False, True]
    kernels = fxquant.coverage(integer).kernels
    assert all(kernels[name] == "native" for name in ("first.0", "first.3", "second.0", "second.3", "head"))


class Writing(nn.Module):
    """What a layer gave is read, written into and read again; a mask is filled in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(3, 8), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[2:])
        mask[2:-1, 1:] = 1
        y = self.a(x)
        before = self.b(y)
        y[:, :2] = 0.25
        return self.c(y) * mask + self.b(before)


def test_what_is_written_in_place_is_read_in_order():
    integer = converted(Writing(), signal(2, 3, 8, 8))
    for x in (signal(2, 3, 8, 8), signal(1, 3, 12, 12)):
        got = integer(x)
        with by_reference(integer):
            want = integer(x)
        assert float((got - want).abs().max()) <= 0.02 * float(want.abs().max())
    assert parts_of(integer).count(True) >= 2


def test_a_call_that_the_model_refuses_is_made_once():
    """A second try on torch's operators would move the model's state again."""
    integer = converted(Between(RefusesThree()), signal(2, 3, 8, 8))
    for count in (1, 2):
        with pytest.raises(ValueError, match="no three"):
            integer(signal(3, 3, 8, 8))
        assert int(integer.get_buffer("middle.calls")) == count
    assert integer(signal(2, 3, 8, 8)).shape == (2, 5) and parts_of(integer) == [True, False, True]


def test_sixteen_bits_and_three_dimensions_between():
    """Bytes pass from a native part to one of torch's, and back."""
    recipe = fxquant.Recipe([("first.3", fxquant.Setting(activation=Scheme(bits=16)))])
    wide = converted(Between(nn.Identity()), signal(4, 3, 16, 16), recipe)
    deep = converted(Between(lambda x: nn.functional.avg_pool3d(x[:, None], (1, 2, 2))[:, 0]), signal(4, 3, 16, 16))
    for integer in (wide, deep):
        x = signal(2, 3, 20, 12)
        got = integer(x)
        with by_reference(integer):
            want = integer(x)
        assert float((got - want).abs().max()) <= 0.02 * float(want.abs().max())
        assert True in parts_of(integer)


def test_sizes_and_tuples_pass_between_parts():
    integer = converted(Sizes(), signal(2, 3, 8, 8))
    for x in (signal(2, 3, 8, 8), signal(3, 3, 8, 12)):
        (got, width), whole = integer(x), parts_of(integer)
        with by_reference(integer):
            want, size = integer(x)
        assert torch.equal(got, want) and width == size == x.shape[-1]
        assert whole.count(True) == 2


class Remembers(nn.Module):
    """A buffer is read natively before and after it is written; another one is set by the user."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Linear(6, 6), nn.Linear(6, 4)
        self.register_buffer("sum", torch.zeros(6))
        self.register_buffer("offset", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        before = self.fc(self.a(x) + self.sum)
        self.sum.add_(x[0].detach())
        return self.fc(self.a(x) + self.sum) - before + torch.special.erfcx(self.offset[:4])


def test_buffers_are_read_as_they_stand():
    integer = converted(Remembers(), signal(3, 6))
    for k, x in enumerate((signal(3, 6), signal(3, 6), -signal(3, 6))):
        state = integer.sum.clone()
        got = integer(x)
        integer.sum.copy_(state)
        with by_reference(integer):
            assert torch.equal(got, integer(x))
        integer.offset = torch.full((6,), k + 1.0)
    assert True in parts_of(integer)


class OwnScale(nn.Module):
    """A parameter of the model's own is read between native parts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = block(3, 8), block(8, 8), nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.special.erfcx(self.a(x) * 0.1) * torch.special.erfcx(self.scale))


def test_parameters_between_parts_leave_them_fast():
    integer = converted(OwnScale(), signal(2, 3, 8, 8))
    integer(signal(2, 3, 8, 8))
    assert all(runner.programs for runner in next(iter(runner_of(integer).programs.values())).runners)


class Joins(nn.Module):
    """Bytes of another part are joined with nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.special.erfcx(x * 0.1).mean(-1, keepdim=True)
        return self.fc(torch.relu(torch.cat([y, y[:, :0]], 1)))


def test_bytes_from_outside_that_are_joined_with_nothing_are_read_in_each_call():
    """They were taken for constants: random networks found it."""
    integer = converted(Joins(), signal(3, 16))
    for x in (signal(3, 16), 2 * signal(3, 16), signal(5, 16), -signal(3, 16), 0.5 * signal(5, 16)):
        got = integer(x)
        with by_reference(integer):
            assert torch.equal(got, integer(x))


@pytest.mark.parametrize("bits", [8, 4])
def test_signed_bytes_pass_between_parts(bits):
    """Symmetric activations are signed; a dilated transposed convolution reads and gives them by the reference."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = block(3, 8), nn.ConvTranspose2d(8, 8, 2, stride=2, dilation=2), block(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    recipe = fxquant.Recipe(default=fxquant.Setting(activation=Scheme(bits=bits, symmetric=True, signed=True)))
    integer = converted(Net(), signal(2, 3, 8, 8), recipe)
    with pytest.warns(UserWarning, match="transposed convolution"):
        got = integer(signal(2, 3, 8, 8))
    with by_reference(integer):
        assert torch.equal(got, integer(signal(2, 3, 8, 8)))
    assert parts_of(integer).count(True) == 2


def test_compile_takes_parts_and_auto_measures_them():
    integer, x = converted(Between(ByData()), signal(2, 3, 16, 16)), signal(2, 3, 16, 16)
    compiled = fxquant.compile(integer, x, runtime="native")
    with by_reference(integer):
        assert torch.equal(compiled(x), integer(x))
        assert torch.equal(compiled(x[:1]), integer(x[:1]))
    assert {timing.runtime for timing in fxquant.compile(integer, x).report if timing.milliseconds} >= {"native"}
    torch_alone = converted(
        nn.Sequential(nn.ConvTranspose2d(2, 4, 3, stride=2, dilation=2), nn.ReLU()), signal(1, 2, 5, 5)
    )
    with pytest.raises(ExportError, match="a dilation"):
        fxquant.compile(torch_alone, signal(1, 2, 5, 5), runtime="native")


def test_copies_and_changed_weights_are_read_again():
    integer, x = converted(Between(ByData()), signal(2, 3, 16, 16)), signal(2, 3, 16, 16)
    before = integer(x)
    assert torch.equal(pickle.loads(pickle.dumps(integer))(x), before)
    assert float((on_torch(integer)(x) - before).abs().max()) < 0.02 * float(before.abs().max())
    with torch.no_grad():
        integer.second.get_submodule("0").weight.neg_()
    changed = integer(x)
    with by_reference(integer):
        assert torch.equal(changed, integer(x)) and not torch.equal(changed, before)


def test_threads_share_a_model():
    integer = converted(Between(ByData()), signal(2, 3, 16, 16))
    inputs = [signal(2, 3, 16, 16) * k for k in (1.0, 0.5, 0.25)]
    with by_reference(integer):
        wanted = [integer(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(20) if not torch.equal(integer(inputs[i]), wanted[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_part_with_little_to_do_stays_in_torch():
    """A rounding and a table between floats is not worth a call."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = block(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.erfcx(torch.special.erfcx(self.a(x) * 0.1).sigmoid())

    integer, x = converted(Net(), signal(2, 3, 8, 8)), signal(2, 3, 8, 8)
    got = integer(x)
    with by_reference(integer):
        assert torch.equal(got, integer(x)) or float((got - integer(x)).abs().max()) < 0.02
    assert parts_of(integer) == [True, False]
