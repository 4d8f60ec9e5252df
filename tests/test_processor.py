"""Which instruction set fxquant believes to have, and the switch that hides a part of it."""

from __future__ import annotations

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
