"""bench: the rows, what they say where a number is missing, the numbers that do not depend on time, and the command."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import fxquant
from fxquant.benchmark.memory import peak_memory
from fxquant.benchmark.table import Benchmark, Row
from fxquant.benchmark.time_limit import OutOfTimeError, time_limit
from fxquant.cli import main
from fxquant.errors import CalibrationError, InputError
from fxquant.export import interleaved_timing
from fxquant.export.interleaved_timing import InterleavedTimes, time_interleaved
from fxquant.runtimes import RUNNABLE as RUNTIMES
from fxquant.runtimes import runtime

SPEC = f"{Path(__file__).parent / 'golden' / 'model.py'}:Sample"
QUICK = {"memory": False, "rounds": 2, "progress": False, "threads": 1}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8, eps=1e-2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.hardswish(self.bn(self.conv(x)))
        return {"scores": self.fc(y.mean((2, 3))), "features": y}


@pytest.fixture
def net():
    torch.manual_seed(3)
    return Net()


def rows_of(found: Benchmark) -> dict[str, Row]:
    return {f"{row.contender} {row.runtime}": row for row in found.rows}


def test_turns_are_counted_by_the_given_clock():
    now = itertools.count(step=3)
    found = time_interleaved(
        {"a": lambda: None, "b": lambda: None}, rounds=3, least=4.0, clock=lambda: float(next(now))
    )
    assert {name: own.seconds for name, own in found.items()} == {"a": (3.0,) * 3, "b": (3.0,) * 3}


def test_turns_move_on_by_one_each_round():
    order: list[str] = []
    time_interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, least=0.0)
    assert order == [*"aaabbb", *"aabb", *"bbaa"]


def test_the_spread_is_half_of_the_middle_half():
    assert InterleavedTimes((1.0, 2.0, 3.0, 4.0, 100.0)).median == 3.0
    assert InterleavedTimes((1.0, 2.0, 3.0, 4.0, 100.0)).spread == 1.0
    assert InterleavedTimes((7.0,)).spread == 0.0
    assert interleaved_timing._ROUNDS >= 5


@pytest.mark.long
def test_a_float_model_in_every_runtime(net):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    state, x = copy.deepcopy(net.state_dict()), torch.randn(2, 3, 16, 16)
    found = fxquant.bench(net, x, batches=[1, 3], **QUICK)
    assert net.training and all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())
    names = ["float torch", "int8 torch", "int8 native", "int8 onnxruntime", "int8 openvino"]
    assert [f"{row.contender} {row.runtime}" for row in found.rows] == names * 2
    assert [row.batch for row in found.rows] == [1] * 5 + [3] * 5
    timed = [row for row in found.rows if row.runtime != "native" or row.milliseconds is not None]
    assert all(row.milliseconds > 0 and row.spread >= 0 and row.threads == 1 and not row.note for row in timed)
    assert all(row.note for row in found.rows if row not in timed)
    rows = rows_of(found)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    assert abs(rows["float torch"].size - len(file.getvalue())) < 2000  # the name of the file stands in it
    assert rows["int8 onnxruntime"].size == rows["int8 openvino"].size
    assert rows["float torch"].speedup == 1.0 and rows["float torch"].sqnr is None
    assert "calibrated on the example inputs" in found.notes[0]


def test_sqnr_is_that_of_the_converted_model(net):
    x = torch.randn(4, 3, 16, 16)
    prepared = fxquant.calibrate(fxquant.prepare(net.eval(), x), [x], progress=False)
    with torch.no_grad():
        expected, actual = net(x), fxquant.convert(prepared, kernels="reference")(x)
    signal = sum(v.double().square().sum() for v in expected.values())
    noise = sum((v.double() - actual[k].double()).square().sum() for k, v in expected.items())
    (row,) = [r for r in fxquant.bench(net, x, runtimes="torch", batches=1, **QUICK).rows if r.contender == "int8"]
    assert row.sqnr == pytest.approx(10 * math.log10(signal / noise), abs=0.5) and row.batch == 1
    assert row.sqnr > 25


@pytest.mark.parametrize("level", ["prepared", "frozen", "integer"])
def test_a_quantized_model_is_compared_with_the_given_float_model(net, level):
    x = torch.randn(2, 3, 16, 16)
    prepared = fxquant.calibrate(fxquant.prepare(net.eval(), x), [x], progress=False)
    model = {"prepared": lambda m: m, "frozen": fxquant.freeze, "integer": fxquant.convert}[level](prepared)
    before = copy.deepcopy(model.state_dict())
    found = fxquant.bench(model, x, reference=net, runtimes=["torch"], **QUICK)
    rows = rows_of(found)
    assert set(rows) == {"float torch", "int8 torch"} and rows["int8 torch"].sqnr > 25 and found.notes == ()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    alone = rows_of(fxquant.bench(model, x, runtimes=["torch"], **QUICK))
    if level == "prepared":
        assert alone["int8 torch"].sqnr == pytest.approx(rows["int8 torch"].sqnr, abs=0.01)
    else:
        assert set(alone) == {"int8 torch"} and alone["int8 torch"].sqnr is None


def test_noise_is_called_noise(net):
    x = torch.randn(2, 3, 16, 16)
    prepared = fxquant.prepare(net.eval(), x)
    found = fxquant.bench(prepared, runtimes="torch", **QUICK)
    assert any("noise" in note and "says nothing" in note for note in found.notes) and "noise" in str(found)
    assert not any(part.ready for name, part in prepared.named_modules() if name.endswith("output_quantizer"))


def test_calibration_gives_the_example(net):
    batches = [(torch.randn(2, 3, 16, 16), torch.zeros(2)) for _ in range(3)]
    found = fxquant.bench(net, calibration=iter(batches), runtimes="torch", **QUICK)
    assert found.rows[0].batch == 2 and found.notes == ()
    prepared = fxquant.calibrate(fxquant.prepare(net.eval(), batches[0][0]), batches, progress=False)
    expected = fxquant.bench(prepared, batches[0][0], reference=net, runtimes="torch", **QUICK)
    assert rows_of(found)["int8 torch"].sqnr == pytest.approx(rows_of(expected)["int8 torch"].sqnr, abs=1e-6)


def test_what_is_missing_is_a_row(net, monkeypatch):
    monkeypatch.setattr(runtime, "is_installed", lambda package: package == "onnxruntime")
    rows = rows_of(fxquant.bench(net, torch.randn(1, 3, 16, 16), runtimes=["torch", "openvino"], **QUICK))
    row = rows["int8 openvino"]
    assert (
        row.note == "not installed: pip install 'fxquant[openvino]'" and row.milliseconds is None and row.sqnr is None
    )
    assert rows["int8 torch"].milliseconds is not None


def test_a_compiler_that_fails_or_takes_long_is_a_row(net, monkeypatch):
    def refuse(model):
        def run(*args, **kwargs):
            raise RuntimeError("no\nbackend")

        return run

    x = torch.randn(1, 3, 16, 16)
    monkeypatch.setattr(torch, "compile", refuse)
    rows = rows_of(fxquant.bench(net, x, compiled=True, runtimes="torch", **QUICK))
    assert rows["float compiled torch"].note == "torch.compile fails: no"
    monkeypatch.setattr(torch, "compile", lambda model: lambda *a, **k: time.sleep(20))
    rows = rows_of(fxquant.bench(net, x, compiled=True, compile_limit=0.2, runtimes="torch", **QUICK))
    assert rows["float compiled torch"].note == "torch.compile took more than 0.2 s"
    assert rows["int8 torch"].milliseconds is not None


def test_a_time_limit_ends_and_leaves_nothing_behind():
    with pytest.raises(OutOfTimeError), time_limit(0.05):
        time.sleep(10)
    with time_limit(0.05):
        pass
    time.sleep(0.1)


@pytest.mark.long
def test_memory_is_that_of_a_process_of_its_own():
    small, large = nn.Linear(16, 16), nn.Linear(4000, 4000)
    found = [
        peak_memory({"runtime": "torch", "model": own, "call": ((torch.randn(2, own.in_features),), {})}, 1)
        for own in (small, large)
    ]
    if not Path("/proc/self/clear_refs").exists():
        assert all("lacks" in peak.why for peak in found)
        return
    assert 63e6 <= found[1] - found[0] < 4 * 64e6  # the first call of each takes a MB or two of its own, not alike
    assert "ModuleNotFound" in peak_memory({"runtime": "torch", "model": _elsewhere(), "call": ((), {})}, None).why


def _elsewhere() -> nn.Module:
    import sys
    from types import ModuleType

    module = ModuleType("a_module_of_this_process")
    module.Own = type("Own", (nn.Module,), {"__module__": module.__name__})
    sys.modules[module.__name__] = module
    return module.Own()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtimes": "tensorrt"}, "'tensorrt' is not known. Choose among torch, native, onnxruntime, openvino"),
        ({"runtimes": ["torch", "trt"]}, "'trt' is not known"),
        ({"threads": 0}, "threads=0: give a positive number"),
        ({"batches": [1, -1]}, "give a positive number"),
        ({"batches": []}, "give a positive number"),
        ({"rounds": 0}, "rounds=0"),
    ],
)
def test_arguments_that_do_not_fit(net, options, message):
    with pytest.raises(InputError, match=message):
        fxquant.bench(net, torch.randn(1, 3, 16, 16), progress=False, **options)


def test_no_inputs(net):
    with pytest.raises(InputError, match="needs inputs to run on"):
        fxquant.bench(net, progress=False)
    with pytest.raises(CalibrationError, match="calibration is empty"):
        fxquant.bench(net, calibration=[], progress=False)
    with pytest.raises(InputError, match=r"takes an nn\.Module, and was given a str"):
        fxquant.bench("resnet18", torch.zeros(1))


def test_the_table_leaves_out_what_nobody_has():
    rows = (Row("float", "torch", 1, None, 2.0, 0.1, 1.0, 4_000_000), Row("int8", "torch", 1, None, note="no"))
    lines = str(Benchmark("Net", rows, ("a note",))).splitlines()
    assert lines[0] == "Net" and lines[-1] == "a note"
    assert lines[2].split() == ["batch", "threads", "ms", "±", "×", "float", "size", "MB", "note"]
    assert lines[4].split() == ["float,", "torch", "1", "auto", "2", "0.1", "1.00", "4"]
    assert lines[5].split() == ["int8,", "torch", "1", "auto", "no"]


BENCH = ["bench", SPEC, "--runtimes", "torch", "--rounds", "2", "--no-memory"]


def test_the_command(tmp_path, capsys):
    out = tmp_path / "b.json"
    arguments = [*BENCH, "--shape", "1,3,8,8", "--batch", "1", "2", "--threads", "1", "--json", str(out)]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "says nothing about real data" in captured.out and captured.err == ""
    written = json.loads(out.read_text())
    assert [(row["contender"], row["batch"], row["threads"]) for row in written["rows"]] == [
        ("float", 1, 1),
        ("int8", 1, 1),
        ("float", 2, 1),
        ("int8", 2, 1),
    ]
    assert written["spec"] == SPEC and written["model"] == "Sample"


@pytest.mark.long
@pytest.mark.parametrize("more", [(), ("--runtimes", "auto")], ids=["left out", "auto"])
def test_the_command_times_every_runtime(more, capsys):
    assert main(["bench", SPEC, "--shape", "1,3,8,8", "--rounds", "2", "--no-memory", *more]) == 0
    printed = capsys.readouterr().out
    assert all(f"int8, {runtime}" in printed for runtime in RUNTIMES)


def test_the_command_on_images(tmp_path, capsys):
    for i in range(5):
        Image.linear_gradient("L").rotate(40 * i).resize((12, 10)).convert("RGB").save(tmp_path / f"{i}.png")
    assert main([*BENCH, "--data", str(tmp_path), "--shape", "1,3,8,8", "--resize", "8"]) == 0
    assert "noise" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--runtimes", "torch,tensorrt"], "'tensorrt' is not known"),
        (["--json", "no/such/folder/b.json"], "there is no folder 'no/such/folder'"),
        (["--data", "nowhere"], "there is no folder 'nowhere'"),
        (["--data", "nowhere", "--shape", "1,3,8"], "as 224x224"),
    ],
)
def test_errors_of_the_command(more, message, capsys):
    assert main([*BENCH, *more]) == 1
    assert message in capsys.readouterr().err
