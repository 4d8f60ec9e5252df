"""The README and the examples, run as a newcomer would run them."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language; ``""`` for those that name none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
    return [text for name, text in fenced if name == language]


def shape_of(text: str) -> list[str]:
    """A printed table without its numbers, whose last digits are the machine's."""
    return [re.sub(r"[-\d.]+", "#", re.sub(r"\s+", " ", line)).strip() for line in text.strip().splitlines()]


def test_the_readme_runs_from_top_to_bottom_and_prints_what_it_shows(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn, the extra `demo`, has the digits")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), namespace)
    shown = next(block for block in blocks("") if "float → prepared" in block)
    assert shape_of(printed.getvalue()) == shape_of(shown)
    assert (tmp_path / "int8.pt").exists()


def test_the_first_screen_shows_how_to_run_the_demo_and_the_tests():
    first, second = blocks("bash")[:2]
    assert "fxquant demo" in first and "pytest" in second
    assert len(blocks("python")[0].strip().splitlines()) <= 9


TRAINERS = ("accelerate_loop", "ddp", "hf_trainer", "lightning_trainer", "timm_ema")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.long if path.stem in TRAINERS else ())
        for path in sorted((ROOT / "examples").glob("*.py"))
    ],
)
def test_examples_run(path, capsys):
    if path.stem == "qat":
        pytest.importorskip("sklearn", reason="scikit-learn, the extra `demo`, has the digits")
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_kept_results_are_readable_and_say_where_they_come_from(path):
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["rows"] and kept["machine"]
    assert path.stem in README or path.stem in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
