"""timm and transformers, captured bit for bit: a few in every run of the suite, one of each architecture with ``-m zoo``.

The networks and the comparisons are those of ``benchmarks/capture_zoo.py``: prepared for QAT with quantizers off, against
the original on the example, at another batch size, at another length or image size, and in train mode under one seed.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("timm")
pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
QUICK = {"BertForSequenceClassification", "convnext_zepto_rms"}
LIMIT = 280.0


def zoo(name: str = "capture_zoo") -> Any:
    """A file of ``benchmarks``, which is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)


def cases() -> list[Any]:
    chosen = zoo().entries(("timm", "transformers"))
    return [
        pytest.param(entry, id=entry.model, marks=() if entry.model in QUICK else pytest.mark.zoo) for entry in chosen
    ]


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("entry", cases())
def test_a_network_is_captured_bit_for_bit(entry, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    study = zoo("capture_study").Study(entry, {"limit": LIMIT, "peers": False, "largest": 1.5}, lambda row: None)
    row = study.measure()
    if row["verdict"].startswith("too large"):
        pytest.skip(row["verdict"])
    assert row["verdict"] in ("whole", "islands"), row
    assert row["example"] is True and row["batch"] is True, row
    assert all(row.get(what) in (True, None) for what in zoo().COMPARISONS), row
