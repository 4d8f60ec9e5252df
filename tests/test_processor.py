"""Which instruction set fxquant believes to have, and the switch that hides a part of it."""

from __future__ import annotations

import os
import platform

import pytest

from fxquant import processor
from fxquant.errors import InputError


def test_the_best_set_is_taken(monkeypatch):
    monkeypatch.delenv(processor.VARIABLE, raising=False)
    best = processor.instruction_set()
    assert processor.has(best)
    assert processor.has("plain")


def test_the_switch_hides_what_is_above_it(monkeypatch):
    monkeypatch.setenv(processor.VARIABLE, "plain")
    assert processor.instruction_set() == "plain"
    assert processor.has("plain")
    assert not any(processor.has(name) for name in processor.INSTRUCTION_SETS if name != "plain")
    assert processor.adds_pairs_in_16_bits() is not processor.is_arm()


def test_512_bits_do_not_stand_for_dot_products(monkeypatch):
    everything = frozenset().union(*processor._X86.values())
    monkeypatch.setattr(processor, "is_arm", lambda: False)
    monkeypatch.setattr(processor, "_sets_here", lambda: tuple(processor._X86))
    for name, needs in processor._X86.items():
        monkeypatch.setenv(processor.VARIABLE, name)
        assert processor.has(name)
        assert processor.adds_pairs_in_16_bits() == (not {"avxvnni", "avx512vnni"} & needs)
        assert processor.has("avx512_vnni") == (needs == processor._X86["avx512_vnni"])
    assert everything == processor._X86["avx512_vnni"] | {"avxvnni"}


def test_a_set_that_is_unknown_or_missing_is_refused(monkeypatch):
    monkeypatch.setenv(processor.VARIABLE, "avx3")
    with pytest.raises(InputError, match="Choose one of plain, avx2"):
        processor.instruction_set()
    monkeypatch.setattr(processor, "_sets_here", lambda: ("plain", "avx2"))
    monkeypatch.setenv(processor.VARIABLE, "avx512_vnni")
    with pytest.raises(InputError, match=r"this processor does not have it\. It has plain, avx2"):
        processor.instruction_set()


@pytest.mark.parametrize(
    ("first", "second", "best"),
    [(0x8FB, 0, "neon"), (0x119FFB, 0, "neon_dotprod"), (0xECFFFFFB, 0x7F877FFF, "neon_i8mm"), (0, 0, "plain")],
    ids=["Cortex-A53", "Cortex-A76", "all", "none"],
)
def test_what_linux_tells_of_arm(monkeypatch, first, second, best):
    """The auxiliary vectors of QEMU's processors."""
    monkeypatch.setattr(processor, "is_arm", lambda: True)
    monkeypatch.setattr(processor.platform, "system", lambda: "Linux")
    monkeypatch.setattr(processor, "_auxiliary", {16: first, 26: second}.__getitem__)
    assert processor._sets_here.__wrapped__()[-1] == best


@pytest.mark.skipif(platform.system() != "Linux", reason="an auxiliary vector is Linux's")
def test_the_auxiliary_vector_is_read():
    assert processor._auxiliary(6) == os.sysconf("SC_PAGE_SIZE")
