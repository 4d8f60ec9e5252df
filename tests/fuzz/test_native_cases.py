"""Random layers by every set of native kernels that this processor has; ``scripts/fuzz-native`` tries thousands."""

from __future__ import annotations

import pytest
from native_cases import KINDS, cases, first_difference, layer

from fxquant import processor
from fxquant.errors import Refusal
from fxquant.kernels.native import library, sets

HERE = [row.name for row in sets.SETS if row.name in processor._sets_here()]
CASES = 6
REASON = library.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels here: {REASON}")


def compare(numbers: range, monkeypatch: pytest.MonkeyPatch) -> int:
    """Hold the layers of these numbers against the reference on each set; how many comparisons there were."""
    compared = 0
    for number in numbers:
        found = layer(number)
        for case in cases(found, number, CASES):
            for name in HERE:
                monkeypatch.setenv(processor.VARIABLE, name)
                try:
                    wrong = first_difference(found, case)
                except Refusal as reason:
                    assert "far apart" in str(reason) or "overflow" in str(reason), f"{found.words}: {reason}"
                    continue
                assert wrong is None, wrong
                compared += 1
    return compared


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=list(KINDS))
def test_one_of_each_kind(kind, monkeypatch):
    """Half of the cases at least have a native form."""
    assert compare(range(kind, kind + 1), monkeypatch) >= CASES * len(HERE) // 2


@pytest.mark.long
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=list(KINDS))
def test_some_of_each_kind(kind, monkeypatch):
    first = 100 * len(KINDS) + kind
    assert compare(range(first, first + 12 * len(KINDS), len(KINDS)), monkeypatch)
