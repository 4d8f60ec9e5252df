"""The diffs that CONTRIBUTING shows are complete: each is applied to a copy of the package, which does what they say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DIFFS = {
    title: diff
    for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
    for diff in re.findall(r"^```diff\n(.*?)^```$", section, re.M | re.S)
}


def hunks(diff: str) -> list[tuple[str, bool, list[str]]]:
    """Each hunk: its file, whether that is new, and its lines."""
    found: list[tuple[str, bool, list[str]]] = []
    is_new, path = False, ""
    for line in diff.splitlines():
        if line.startswith("--- "):
            is_new = line == "--- /dev/null"
        elif line.startswith("+++ b/"):
            path = line.removeprefix("+++ b/")
        elif line.startswith("@@"):
            found.append((path, is_new, []))
        else:
            found[-1][2].append(line)
    return found


def applied(diff: str, root: Path) -> None:
    """Apply a diff whose hunks stand where their lines do, once; raises where they stand nowhere, or twice."""
    for path, is_new, lines in hunks(diff):
        assert all(line[:1] in ("", " ", "+", "-") for line in lines), path
        before = "".join(f"{line[1:]}\n" for line in lines if line[:1] in ("", " ", "-"))
        after = "".join(f"{line[1:]}\n" for line in lines if line[:1] in ("", " ", "+"))
        file = root / path
        if is_new:
            assert not before and (not file.exists() or file.read_text(encoding="utf-8") == after), f"{path} is new"
            file.write_text(after, encoding="utf-8")
            continue
        text = file.read_text(encoding="utf-8")
        if after in text and before not in text:
            continue  # it shows what was done
        assert text.count(before) == 1, f"{path} has {text.count(before)} places for\n{before}"
        file.write_text(text.replace(before, after), encoding="utf-8")


def package(folder: Path) -> Path:
    for name in ("fxquant", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "golden", "fuzz"))
    return folder


def run(folder: Path, code: str) -> str:
    paths = os.pathsep.join([str(folder), str(folder / "tests")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return done.stdout


WHAT_IT_DOES = {
    "Add a runtime": """
import torch, fxquant
torch.manual_seed(0)
model, x = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).eval(), torch.randn(8, 6)
prepared = fxquant.calibrate(fxquant.prepare(model, x, target="onnx_reference"), [x], progress=False)
compiled, exact = fxquant.compile(prepared, x, runtime="onnx_reference"), fxquant.convert(prepared, kernels="reference")
assert (compiled(x) - exact(x)).abs().max() < 1e-5 * exact(x).abs().max(), (compiled(x) - exact(x)).abs().max()
from fxquant.runtimes import RUNNABLE as RUNTIMES
print(*RUNTIMES)
""",
    "Add a form": """
import torch, fxquant
from fxquant.export import export_program
from fxquant.passes.to_decomposed import to_decomposed
from fxquant.passes.to_qdq import to_qdq
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(6, 6) for _ in range(3))
    def forward(self, x):
        return self.c(torch.maximum(self.a(x), 3 * self.b(x)))
torch.manual_seed(0)
x, done = torch.randn(32, 6), ["reference"]
prepared = fxquant.calibrate(fxquant.prepare(Net().eval(), x), [x], progress=False)
exact, frozen = fxquant.convert(prepared, kernels="reference"), fxquant.freeze(prepared)
step = (exact(x).max() - exact(x).min()) / 100
assert (exact(x) - frozen(x)).abs().max() <= step and "IntMaximum" in str(exact)
on_torch = fxquant.convert(prepared, kernels="torch")
assert (on_torch(x) - exact(x)).abs().max() <= step
(kernel,) = (k for p, k in fxquant.coverage(on_torch).kernels.items() if "maximum" in p)
assert kernel == "float32 inside", kernel
done.append("torch")
for write in (to_qdq, to_decomposed):
    assert (write(exact)(x) - exact(x)).abs().max() <= step
    done.append(write.__name__.removeprefix("to_"))
assert (fxquant.compile(exact, x, runtime="onnxruntime")(x) - exact(x)).abs().max() <= step
print(", ".join([*done, "onnxruntime"]))
""",
    "Add a quantizer": """
import sys, torch, fxquant
from fxquant import Scheme, Setting
setting = Setting(
    weight=Scheme.weight(4, quantizer="log_lsq"), activation=Scheme.activation(4, quantizer="log_lsq")
)
torch.manual_seed(0)
model, x = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)), torch.randn(8, 6)
prepared = fxquant.prepare(model.train(), x, qat=True, recipe=setting)
optimizer = torch.optim.SGD(fxquant.parameter_groups(prepared, lr=0.1), 0.01)
before = None
for _ in range(3):
    optimizer.zero_grad()
    prepared(x).square().mean().backward()
    optimizer.step()
    now = prepared.get_submodule("0").weight_quantizer.scale
    assert before is None or (now != before).all() and (now > 0).all()
    before = now
prepared.eval()
wanted = prepared(x)
assert (fxquant.convert(prepared)(x) - wanted).abs().max() < 1e-3 * wanted.abs().max()
fxquant.save(prepared, "model.pt")
assert torch.equal(fxquant.load(model, "model.pt").eval()(x), wanted)
print(fxquant.diff(model, prepared))
""",
}
SAYS = {
    "Add a runtime": "onnx_reference",
    "Add a form": "reference, torch, qdq, decomposed, onnxruntime",
    "Add a quantizer": "s4 per-channel log_lsq",
}


@pytest.mark.parametrize("title", DIFFS)
def test_a_diff_of_contributing_applies(tmp_path, title):
    applied(DIFFS[title], package(tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("title", WHAT_IT_DOES)
def test_a_diff_of_contributing_does_what_it_says(tmp_path, title):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    applied(DIFFS[title], package(tmp_path))
    assert SAYS[title] in run(tmp_path, WHAT_IT_DOES[title])


def test_a_diff_that_does_not_fit_is_found(tmp_path):
    package(tmp_path)
    wrong = "--- a/fxquant/flow.py\n+++ b/fxquant/flow.py\n@@\n no such line\n+another\n"
    with pytest.raises(AssertionError, match="has 0 places"):
        applied(wrong, tmp_path)


GENERATED = {"Add an op": "softsign", "Add a form": "maximum", "Add a pass": "drop_repeated_clamps"}


@pytest.mark.long
@pytest.mark.parametrize("title", GENERATED)
def test_the_generated_tests_hold_for_a_diff(tmp_path, title):
    """The op's own tests, or the pass's, in the changed package."""
    applied(DIFFS[title], package(tmp_path))
    files = ["tests/test_passes.py"] if title == "Add a pass" else ["tests/test_ops.py", "tests/test_forms.py"]
    chosen = f"{GENERATED[title]} or every_form"
    arguments = ["-q", "-p", "no:cacheprovider", *files, "-k", chosen]
    code = f"import sys, pytest; sys.exit(pytest.main({arguments!r}))"
    run(tmp_path, code)
