"""Programs frozen for the sizes at hand, which give the same bits."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from comparisons import assert_same_bits
from torch import Tensor, nn
from torch_kernels import (
    Mixed,
    converted,
    fast,
    signal,
)

import fxquant
from fxquant.kernels import frozen as frozen_module
from fxquant.kernels.frozen import Frozen, fastest


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
