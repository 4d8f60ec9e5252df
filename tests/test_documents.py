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
    told = [ROOT / "docs" / "results.md", ROOT / "benchmarks" / "README.md"]
    assert any(path.stem in page.read_text(encoding="utf-8") for page in told)


def rows_of(page: Path, first: str) -> dict[str, list[str]]:
    """The rows of the table whose header begins with ``first``, by their first cell, without marks."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first)) + 2
    end = next(i for i, line in enumerate([*lines[start:], ""]) if not line.startswith("|")) + start
    cells = [[cell.strip(" *").replace("−", "-") for cell in line.strip("|").split("|")] for line in lines[start:end]]
    return {row[0]: row[1:] for row in cells}


def kept(name: str) -> list[dict[str, object]]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_tables_have_the_numbers_that_the_scripts_kept(page):
    path, given = ROOT / page, "| CIFAR-10 top-1" if page.startswith("docs") else "| | float | **fxquant int8**"
    columns = ("float", "fxquant int8", "FX", "FX x86", "PT2E", "NNCF")
    accuracy = rows_of(path, given)
    for row in kept("ptq_cifar"):
        assert [float(cell) for cell in accuracy[row["model"]][:6]] == [row[name] for name in columns]
    drops = rows_of(path, "| drop from float, points")
    found = {(r["scheme"], r["model"], r["method"]): r["drop"] for r in kept("ptq_low_bits") if r["seed"] == 0}
    columns = [("resnet20", "min-max"), ("resnet20", "mse")]
    columns += [(name, "closed form") for name in ("resnet20", "resnet32", "resnet44")]
    for scheme, cells in drops.items():
        assert [float(cell) for cell in cells] == [found[(scheme, *column)] for column in columns], scheme
    if page == "README.md":
        for file, first in (("latency", "| | float | FX x86"), ("latency_avx2", "| AVX2 | float | FX x86")):
            times = {row["model"]: row for row in kept(file) if (row["batch"], row["threads"]) == (1, 2)}
            names = ("float", "FX x86", "PT2E", "ORT", "OpenVINO", "fxquant native")
            for model, cells in rows_of(path, first).items():
                measured = [times[model][name] for name in names]
                assert [cell if cell == "failed" else float(cell) for cell in cells] == measured, model
