"""The documentation site: every block of its pages runs, its reference is whole, its tables are those of the code."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from pages import DOCS, PAGES, blocks_of
from torch import Tensor, nn

import fxquant
import fxquant.errors
from fxquant.numerics.ranges import ESTIMATOR
from fxquant.numerics.scheme import ESTIMATORS, QUANTIZERS
from fxquant.quantizers import RULES
from fxquant.runtimes import RUNTIMES
from fxquant.targets import TARGETS

ROOT = DOCS.parent
PUBLIC = ("fxquant", *(f"fxquant.{name}" for name in ("algorithms", "export", "quantizers", "runtimes", "targets")))
"""The modules whose ``__all__`` users are told of, beside ``fxquant.errors``."""
REFERENCE = "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "reference").glob("*.md")))
DOCUMENTED = set(re.findall(r"^::: (\S+)$", REFERENCE, re.M))
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))

NEEDS = {
    "coming-from": ("torchao",),
    "guide": ("sklearn", "onnxruntime"),
    "first-model": ("sklearn", "onnxruntime"),
    "below-8-bits": ("sklearn",),
    "transformer": ("transformers", "onnxruntime"),
    "qat-lightning": ("lightning",),
    "deploy": ("onnxruntime", "openvino", "executorch", "litert_torch"),
    **dict.fromkeys(("index", "detector", "debug", "errors", "command-line", "extend"), ("onnxruntime",)),
}
"""What a page imports beyond fxquant's own dependencies."""
LONG = {"coming-from", "first-model", "detector", "transformer", "qat-lightning", "below-8-bits", "deploy", "debug"}
LONG |= {"guide", "index", "extend", "speed", "command-line", "recipes", "islands"}
ALONE = {"extend"}
"""Pages that enter things into fxquant's tables, where they would stay: run in a process of their own."""


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS).with_suffix(""))


def marks(*long: object) -> Any:
    return pytest.mark.long if any(long) else ()


def need(name: str) -> None:
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=name_of(page), marks=marks(page.stem in LONG)) for page in PAGES]
)
def test_every_block_of_a_page_runs_and_prints_what_the_page_shows(page, tmp_path, monkeypatch):
    need(page.stem if page.parent.name != "reference" else "")
    monkeypatch.chdir(tmp_path)
    if page.stem in ALONE:
        run = f"import pages, pathlib; pages.run_page(pathlib.Path({str(page)!r}))"
        path = [str(ROOT), str(ROOT / "tests")]
        code = f"import sys; sys.path[:0] = {path!r}; {run}"
        done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        pages.run_page(page)


@pytest.mark.parametrize(
    "shown, printed, fits",
    [
        ("top-1 98.5 %", "top-1 97 %\n", True),
        ("a  1\n---\nb  2", "a    3.5\n-----\nb      -4e-05\n", True),
        ("relu stays", "relu goes\n", False),
        ("a\nb", "a\n", False),
        ("a\n...\nd", "a\nb\nc\nd\n", True),
        ("a ... d", "a b\nc d\n", False),
        ("[1, 2]", "[1, 2, 3]\n", False),
        ("inf dB", "41.5 dB\n", True),
    ],
)
def test_what_a_page_shows_is_compared_but_for_numbers(shown, printed, fits):
    assert pages.matches(shown, printed) is fits


@pytest.mark.parametrize(
    "text, says",
    [
        ("```python\nprint('a')\n```\n```text\nb\n```\n", "shows"),
        ("```python\nimport fxquant\nfxquant.Scheme(bits=1)\n```\n", "the last block raised"),
        ("```bash\nfxquant info nothing.pt\n```\n", "no file"),
        ("```js\n1\n```\n", "nothing runs"),
    ],
)
def test_a_page_that_is_wrong_is_found(text, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match=says):
        pages.run_page(tmp_path / "page.md")


def test_code_that_is_not_run_is_that_of_tools_that_are_not_installed():
    where = {page.stem for page in PAGES for block in blocks_of(page.read_text("utf-8")) if block.language == "py"}
    assert where == {"coming-from"}


@pytest.mark.long
@pytest.mark.parametrize("package", ["nncf", "aimet_torch", "brevitas"])
def test_code_of_another_tool_runs_where_it_is_installed(package, tmp_path):
    """In a process of its own: NNCF changes torch for all that follow."""
    pytest.importorskip(package)
    blocks = blocks_of((DOCS / "coming-from.md").read_text(encoding="utf-8"))
    own = [block.text for block in blocks if block.language == "py" and package in block.text]
    assert len(own) == 1
    code = f"{blocks[0].text}\n{own[0]}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


# ---------------------------------------------------------------------------------------------- links


def anchors_of(page: Path) -> set[str]:
    """The ids that the builder gives to headings, and those of the objects that a reference page shows."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in re.findall(r"^#+ (.*)$", text, re.M)]
    return {re.sub(r"[-\s]+", "-", title) for title in titles} | set(re.findall(r"^::: (\S+)$", text, re.M))


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_links_lead_somewhere(page):
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {link}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors_of(path), f"{page.name} links to {link}, and there is none of {anchors_of(path)}"


def test_every_page_is_in_the_navigation():
    configured = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert {f"{name_of(page)}.md" for page in PAGES} == set(re.findall(r"^ +- .*: (\S+\.md)$", configured, re.M))


# ---------------------------------------------------------------------------------------------- reference


def public_names() -> Iterator[tuple[str, Any]]:
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            yield f"{module}.{name}", getattr(importlib.import_module(module), name)


def value_of(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


CALLABLES = {
    name: value
    for name, value in public_names()
    if (inspect.isfunction(value) or inspect.isclass(value)) and name != "fxquant.runtimes.Deployed"
}
"""All that users call; ``Deployed`` is a protocol, which nobody makes."""


def test_the_reference_has_every_public_name():
    errors = {f"fxquant.errors.{name}" for name in fxquant.errors.__all__ if name != "FxquantError"}
    shown = {id(value_of(name)) for name in DOCUMENTED}
    assert not [name for name, value in public_names() if name not in DOCUMENTED and id(value) not in shown]
    assert errors <= DOCUMENTED


def test_no_name_of_the_reference_is_also_a_folder():
    """``fxquant.report`` is the verb, and the builder, which reads files, would show the folder of that name."""
    assert not [name for name in DOCUMENTED if (ROOT / name.replace(".", "/")).exists()]


def test_what_the_reference_names_is_there_and_says_what_it_is():
    for name in DOCUMENTED:
        value = value_of(name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert inspect.getdoc(value), name


def test_the_reference_has_what_public_functions_return():
    for name, value in CALLABLES.items():
        given = inspect.signature(value).return_annotation if inspect.isfunction(value) else ""
        for part in str(given).split(" | "):
            made = getattr(inspect.getmodule(value), part, None)
            if inspect.isclass(made) and made.__module__.startswith("fxquant.") and part != "LeveledModule":
                assert {f"{made.__module__}.{part}", *(f"{module}.{part}" for module in PUBLIC)} & DOCUMENTED, name


class Net(nn.Module):
    """What the examples of docstrings call ``model``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.relu2, self.head = nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        return self.head(self.relu2(self.conv2(x) + x[..., 1:-1, 1:-1]).mean((2, 3)))


def names_for(value: Any) -> dict[str, Any]:
    """What an example may use: as ``docs/reference/verbs.md`` says, and what stands in the module of the object."""
    model, images = Net().eval(), torch.randn(4, 3, 8, 8)
    loader = [torch.randn(8, 3, 8, 8) for _ in range(4)]
    prepared = fxquant.calibrate(fxquant.prepare(model, images), loader, progress=False)
    labels = model(images).argmax(1)
    own = {name: getattr(fxquant, name) for name in ("Op", "Recipe", "Scheme", "Setting")}
    return {
        **own, **vars(inspect.getmodule(value)), "fxquant": fxquant, "torch": torch, "nn": nn, "dataclasses": dataclasses,
        "model": model, "images": images, "loader": loader, "prepared": prepared, "int8": fxquant.convert(prepared),
        "top1": lambda m: 100 * float((m(images).argmax(1) == labels).float().mean()),
    }  # fmt: skip


@contextmanager
def tables_kept() -> Iterator[None]:
    """What is registered inside is forgotten afterwards."""
    held = [(table, dict(table)) for table in (RULES, QUANTIZERS, ESTIMATOR, RUNTIMES, TARGETS)]
    estimators = list(ESTIMATORS)
    try:
        yield
    finally:
        for table, before in held:
            table.clear()
            table.update(before)
        ESTIMATORS[:] = estimators


SLOW = {"auto", "bench", "reconstruct", "export_executorch", "export_tflite", "report", "compile", "tune_placement"}
SLOW |= {"export_onnx", "fxquant.runtimes.register"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks(name.rpartition(".")[2] in SLOW, name in SLOW)) for name in CALLABLES]
)
def test_every_public_callable_has_an_example_that_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    packages = {"export_executorch": "executorch", "export_tflite": "litert_torch", "export_onnx": "onnxruntime"}
    if name.rpartition(".")[2] in packages or name == "fxquant.runtimes.register":
        pytest.importorskip(packages.get(name.rpartition(".")[2], "onnxruntime"))
    value = CALLABLES[name]
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")
    assert examples, f"the docstring of {name} has no example"
    names = names_for(value)
    with tables_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # such as that a convolutional network has nothing to smooth
        for example in examples:
            capsys.readouterr()
            exec(compile(example.source, name, "single"), names)
            if example.want:
                assert capsys.readouterr().out == example.want


# ---------------------------------------------------------------------------------------------- what the code knows


def test_generated_pages_are_up_to_date():
    """In a process of its own, since other tests enter ops, rules and runtimes."""
    command = [sys.executable, str(ROOT / "scripts" / "docs_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


def test_each_error_has_its_example_and_its_cure():
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    for name in (n for n in fxquant.errors.__all__ if issubclass(getattr(fxquant.errors, n), fxquant.FxquantError)):
        shown = [block.text for block in blocks_of(sections[name]) if block.language == "text"]
        assert shown and all(message.startswith(f"{name}: ") for message in shown), name
        assert "**Cure.**" in sections[name], name


# ---------------------------------------------------------------------------------------------- notebooks


def test_there_are_two_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["find_the_loss", "first_model"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid(path):
    """As nbformat's schema of version 4.5 has it, and without traces of the machine that made it."""
    book = json.loads(path.read_text(encoding="utf-8"))
    assert set(book) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    for cell in book["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        assert set(cell) == (keys | {"execution_count", "outputs"} if cell["cell_type"] == "code" else keys)
        assert all(isinstance(line, str) for line in cell["source"]) and cell["metadata"] == {}
        for output in cell.get("outputs", []):
            assert set(output) == {"name", "output_type", "text"} and output["output_type"] == "stream"
            assert not re.search(r"/(home|root|usr|tmp|work)/", "".join(output["text"]))
    assert book["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run_and_print_what_it_shows(path, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        capsys.readouterr()
        exec(compile("".join(cell["source"]), path.name, "exec"), names)
        shown, printed = ("".join("".join(o["text"]) for o in cell["outputs"]), capsys.readouterr().out)
        first = [text.partition("\n")[0] for text in (shown, printed)]  # rows are ordered by numbers that training made
        assert pages.matches(*first), f"{path.name}, cell {cell['id']}"
