"""Instruction sets that this processor lacks, under an emulator or sanitizers: the reference's bits from each of them.

ARM's sets need what ``apt-get install g++-aarch64-linux-gnu qemu-user`` brings.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from typing import Any

import native_parts
import pytest
import test_native_sets
import torch
from comparisons import assert_same_bits
from native_oracle import ROUNDED, integers_of, require_same, signal
from op_cases import COMPUTING, example_of, inputs_like, rounded
from plan_memory import Memory
from programs import PROGRAMS, Program, computing_with
from torch import nn

import fxquant
from fxquant import Recipe
from fxquant.errors import Refusal
from fxquant.kernels.native import compiler, sets
from fxquant.kernels.native.library import Step
from fxquant.kernels.native.model import NativeModel

MODELS = {**test_native_sets.MODELS, "mixed": (native_parts.mixed, (2, 3, 15, 17))}
SIGNED = test_native_sets.SIGNED


def program(name: str) -> Program:
    """A program of this machine's, or a skip that says what it lacks."""
    found = PROGRAMS[name]
    lacking = found.missing()
    if lacking is not None:
        pytest.skip(f"{name}: this machine lacks {lacking}")
    return found


@pytest.fixture(scope="module", params=PROGRAMS)
def foreign(request, tmp_path_factory):
    return program(request.param).library(tmp_path_factory.mktemp("foreign"))


@cache
def model_of(name: str, signed: bool) -> Any:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    return integers_of(make(), signal(*shape, offset=0.3), recipe=SIGNED if signed else ROUNDED)


@pytest.mark.long
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("name", MODELS)
def test_the_reference_s_bits(foreign, name, signed):
    shape = MODELS[name][1]
    calls = (signal(*shape, offset=0.3),), (signal(1, *shape[1:], seed=5),)
    with computing_with(foreign):
        native = require_same(model_of(name, signed), *calls, values=5)
    assert native.program.library is foreign and foreign.runs


@cache
def op_of(name: str) -> Any:
    example = example_of(name)
    prepared = fxquant.prepare(example.module, example.inputs, recipe=rounded(name))
    fxquant.calibrate(prepared, [example.inputs], progress=False)
    return fxquant.convert(prepared, kernels="reference")


def native_or_none(integer: Any, call: tuple[Any, ...]) -> Any:
    try:
        return NativeModel(integer)(*call)
    except Refusal:
        return None


@pytest.mark.long
@pytest.mark.parametrize("name", COMPUTING)
def test_every_op(foreign, name):
    """What the op table knows: what this processor's set gives, or nothing where it gives nothing."""
    integer, call = op_of(name), inputs_like(example_of(name), 3, seed=5)
    expected = native_or_none(integer, call)
    with computing_with(foreign):
        found = native_or_none(integer, call)
    assert (found is None) == (expected is None)
    if expected is not None:
        assert_same_bits(found, expected)


@pytest.mark.long
def test_floats_inside(foreign):
    """Attention, layer norm and softmax, whose float32 has one order of additions for all sets."""
    shapes = [(2, 37, 66), (1, 130, 66)]
    torch.manual_seed(0)
    integer = integers_of(test_native_sets.Block(), signal(*shapes[0], gain=2.0), recipe=Recipe(quantize_outputs=True))
    calls = [signal(*shape, gain=gain, seed=7) for shape in shapes for gain in (0.5, 30.0)]
    expected = [NativeModel(integer)(x) for x in calls]
    with computing_with(foreign):
        native = NativeModel(integer)
        for x, right in zip(calls, expected, strict=True):
            assert_same_bits(native(x), right)


@pytest.mark.long
def test_numbers_at_the_edge(foreign):
    with computing_with(foreign):
        test_native_sets.test_floats_at_the_border(None)
        for sign in (1.0, -1.0):
            conv = nn.Conv2d(700, 18, 1)
            conv.weight.data = torch.full_like(conv.weight, 0.02 * sign)
            x = signal(2, 700, 2, 3).abs() + 3
            require_same(integers_of(conv, x), (x,), (torch.full_like(x, 100.0),), values=1)


@cache
def vocabulary(name: str, folder: Any) -> dict[str, str]:
    own = Program(sets.SETS[0]) if name == "plain" else program(name)
    lines = own.run(own.compiled("vocabulary.cpp", folder)).decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines)


HERE = {row.name: Program(row, needs=row.name) for row in sets.SETS[1:] if row.name.startswith("avx")}


@pytest.mark.long
@pytest.mark.parametrize("name", [*PROGRAMS, *HERE])
def test_the_vocabulary_s_meaning(name, tmp_path, monkeypatch):
    """Each operation of a header, on random numbers and at the edges, is what isa_plain.h says, to the bit."""
    monkeypatch.setattr("test_foreign_sets.PROGRAMS", PROGRAMS | HERE)
    found, right = vocabulary(name, tmp_path), vocabulary("plain", tmp_path.parent)
    assert found == right, [operation for operation in right if found.get(operation) != right[operation]]


def test_all_of_the_vocabulary_is_tried():
    """What both isa_plain.h and another header define stands in vocabulary.cpp."""
    texts = [(compiler.SOURCE / name).read_text() for name in ("isa_plain.h", "isa_256_bits.h", "isa_neon_dot.h")]
    defined = [set(re.findall(r"^(?:inline \w+|FXQUANT_EACH_\w+\() ?(\w+)[(,]", text, re.M)) for text in texts]
    words = defined[0] & (defined[1] | defined[2]) - {"load", "load_floats", "load_doubles", "store", "store_floats"}
    assert len(words) > 45
    tried = (compiler.SOURCE.parents[3] / "tests/foreign/vocabulary.cpp").read_text()
    missing = {
        word for word in words - {"pause", "keep", "runs_here", "doubles_of"} if not re.search(rf"\b{word}\b", tried)
    }
    assert not missing


@pytest.mark.long
@pytest.mark.parametrize("cpu", ["cortex-a53", "cortex-a76"])
def test_a_program_knows_what_it_runs_on(tmp_path, cpu):
    """A header asks the auxiliary vector for what its instructions need."""
    made = program("neon_i8mm").compiled("run_plan.cpp", tmp_path)
    lesser = Program(PROGRAMS["neon_i8mm"].row, emulator=("qemu-aarch64", "-cpu", cpu))
    assert "runs_here 0" in lesser.run(made, "about").decode()
    with pytest.raises(AssertionError, match="this processor lacks the set"):
        lesser.run(made)


@pytest.mark.long
@pytest.mark.parametrize("name", ["plain, sanitized", "avx2, sanitized"])
def test_a_sanitizer_sees_one_byte_too_few(tmp_path, name):
    """Its verdict is worth something: the last byte of a layer's bias taken away is found."""
    found, short = program(name).library(tmp_path), 0

    class Short(Memory):
        def __init__(self, steps: Any, count: int) -> None:
            nonlocal short
            super().__init__(steps, count)
            bias = next(step.bias for step in steps if step.bias)
            at = next(i for i, block in enumerate(self.blocks) if block.address <= bias < block.address + block.size)
            self.blocks[at] = type(self.blocks[at])(self.blocks[at].address, self.blocks[at].size - 1)
            short += 1

    x, integer = signal(2, 5, 7, 9), integers_of(nn.Conv2d(5, 16, 1), signal(2, 5, 7, 9))
    with computing_with(found):
        assert_same_bits(NativeModel(integer)(x), integer(x))
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(AssertionError, match=r"AddressSanitizer: .*(?s:.)*63-byte region"),
        ):
            patch.setattr("programs.Memory", Short)
            NativeModel(integer)(x)
    assert short == 1


def test_all_memory_of_a_plan_is_found():
    """Every pointer, each block once, and a pointer into memory that nobody owns is an error."""
    steps, numbers = (Step * 2)(), torch.zeros(10)
    steps[1].weight, steps[1].x.data = numbers.data_ptr() + 4, numbers.data_ptr()
    memory = Memory(steps, 2)
    assert [(block.address, block.size) for block in memory.blocks if block.kind is None] == [(numbers.data_ptr(), 40)]
    places = [ctypes.addressof(steps) + ctypes.sizeof(Step) + field.offset for field in (Step.x, Step.weight)]
    assert sorted(memory.pointers) == sorted(places)
    steps[0].bias = 16
    with pytest.raises(AssertionError, match="no live object owns 0x10"):
        Memory(steps, 2)
