"""ONNX files whose tensors lie in a file beside the graph: what both hold, who reads them, what a failure leaves."""

from __future__ import annotations

import gc
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from comparisons import assert_same_bits
from op_cases import prepared_of
from torch import nn

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.demo import DigitNet
from fxquant.errors import ExportError, InputError
from fxquant.export.to_onnx import make_onnx
from fxquant.onnx import files
from fxquant.runtimes.onnxruntime import onnxruntime_session
from fxquant.runtimes.openvino import openvino_session

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

RUNTIMES = {"onnxruntime": onnxruntime_session, "openvino": openvino_session}
OVERHEAD = 130
"""Bytes that the entry of one tensor elsewhere may take: its file, offset and length."""


def four_bits() -> Recipe:
    scheme = Scheme(bits=4, symmetric=True, signed=True, per_channel=True, narrow_range=True)
    return Recipe([(nn.Conv2d, Setting(weight=scheme))])


def digits(seed: int = 0, recipe: Recipe | None = None) -> Any:
    torch.manual_seed(seed)
    return prepared_of(DigitNet().eval(), torch.rand(4, 1, 8, 8), recipe)


def layer(seed: int) -> Any:
    """The least that has a tensor to lie beside the graph."""
    torch.manual_seed(seed)
    return prepared_of(nn.Linear(64, 32).eval(), torch.rand(4, 64))


def resnet18(recipe: Recipe | None = None) -> Any:
    return prepared_of(zoo.build("resnet18"), torch.randn(2, 3, 64, 64), recipe)


def outside(path: Path) -> dict[str, dict[str, str]]:
    """What the graph says of each tensor that lies elsewhere."""
    graph = onnx.load(path, load_external_data=False).graph
    found = {t.name: {e.key: e.value for e in t.external_data} for t in graph.initializer}
    return {name: entries for name, entries in found.items() if entries}


def tensors_in(file: Path | bytes) -> dict[str, Any]:
    proto = onnx.load_from_string(file) if isinstance(file, bytes) else onnx.load(file)
    return {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}


CASES = {
    "digits": (digits, (1, 8, 8)),
    "digits in 4 bits": (lambda: digits(recipe=four_bits()), (1, 8, 8)),
    "resnet18": (resnet18, (3, 64, 64)),
    "resnet18 in 4 bits": (lambda: resnet18(four_bits()), (3, 64, 64)),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_the_pair_is_the_single_file_in_both_runtimes(name, tmp_path):
    build, shape = CASES[name]
    prepared, path = build(), tmp_path / "net.onnx"
    single = fxquant.export_onnx(prepared, tmp_path / "single.onnx", verify=False)
    report = fxquant.export_onnx(prepared, path, external_data=True)
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.data", "single.onnx"] and single.data is None
    assert report.data == f"{path}.data" and f"{path} and net.onnx.data: " in str(report)
    assert report.agreement and min(own.sqnr for own in report.agreement) > 30
    sizes = [(tmp_path / own).stat().st_size for own in ("net.onnx", "net.onnx.data", "single.onnx")]
    placed = outside(path)
    assert report.size == sizes[0] + sizes[1] < sizes[2] + OVERHEAD * len(placed) and single.size == sizes[2]
    assert {entries["location"] for entries in placed.values()} == {"net.onnx.data"}
    spans = sorted((int(e["offset"]), int(e["length"])) for e in placed.values())
    assert all(length > 1024 and start + length <= sizes[1] for start, length in spans)
    assert all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(spans))
    ours, theirs = tensors_in(path), tensors_in(tmp_path / "single.onnx")
    assert ours.keys() == theirs.keys() and placed.keys() == {n for n, x in theirs.items() if _stored(x) > 1024}
    assert all(x.dtype == theirs[n].dtype and (x == theirs[n]).all() for n, x in ours.items())
    onnx.checker.check_model(str(path), full_check=True)
    for runtime, session in RUNTIMES.items():
        pytest.importorskip(runtime)
        one, other = session(str(path), threads=1), session((tmp_path / "single.onnx").read_bytes(), threads=1)
        for batch in (1, 8):
            x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(batch))
            assert_same_bits(one([x]), other([x]), f"{runtime} at batch {batch}")


def _stored(x: Any) -> float:
    return x.size / 2 if x.dtype.itemsize == 1 and "int4" in x.dtype.name else x.nbytes


@pytest.mark.long
@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_every_tensor_inside_is_compared_too(form, tmp_path):
    prepared = digits()
    single = fxquant.export_onnx(prepared, tmp_path / "a.onnx", form=form, verify="nodes")
    pair = fxquant.export_onnx(prepared, tmp_path / "b.onnx", form=form, verify="nodes", external_data=True)
    assert pair.nodes == single.nodes and len(pair.nodes) > 5 and pair.agreement == single.agreement
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "b.onnx", "b.onnx.data"]


@pytest.mark.long
def test_a_targets_rules_are_held_against_the_tensors_too(tmp_path):
    x = torch.rand(2, 3, 64, 64)
    prepared = fxquant.calibrate(fxquant.prepare(zoo.build("resnet18"), x, target="tensorrt"), [x], progress=False)
    report = fxquant.export_onnx(prepared, tmp_path / "m.onnx", external_data=True, verify=False)
    assert report.data and not report.notes


@pytest.mark.long
def test_the_pair_can_be_moved_together(tmp_path):
    prepared, x = digits(), torch.rand(3, 1, 8, 8)
    fxquant.export_onnx(prepared, tmp_path / "m.onnx", external_data=True, verify=False)
    (tmp_path / "elsewhere").mkdir()
    for name in ("m.onnx", "m.onnx.data"):
        os.rename(tmp_path / name, tmp_path / "elsewhere" / name)
    (actual,) = onnxruntime_session(tmp_path / "elsewhere" / "m.onnx", threads=1)([x])
    (expected,) = onnxruntime_session(make_onnx(prepared).content, threads=1)([x])
    assert_same_bits(actual, expected)


@pytest.mark.long
def test_it_is_chosen_where_one_file_cannot_hold_the_tensors(tmp_path, monkeypatch):
    prepared = digits()
    held = sum(_stored(x) for x in tensors_in(make_onnx(prepared).content).values())
    for limit, files_now in ((held, ["m.onnx"]), (held - 1, ["m.onnx", "m.onnx.data"])):
        monkeypatch.setattr(files, "LARGEST_PROTOBUF", int(limit))
        report = fxquant.export_onnx(prepared, tmp_path / "m.onnx")
        assert sorted(os.listdir(tmp_path)) == files_now and (report.data is None) == (len(files_now) == 1)
    before = contents(tmp_path)
    with pytest.raises(ExportError, match=r"(?s)one ONNX file ends at.*what to do: leave external_data out"):
        fxquant.export_onnx(prepared, tmp_path / "m.onnx", external_data=False)
    assert contents(tmp_path) == before


def test_no_file_for_tensors_without_a_large_one(tmp_path):
    prepared = prepared_of(nn.Sequential(nn.Conv2d(1, 2, 3)).eval(), torch.rand(1, 1, 8, 8))
    report = fxquant.export_onnx(prepared, tmp_path / "m.onnx", external_data=True)
    assert os.listdir(tmp_path) == ["m.onnx"] and report.data is None
    assert "no tensor is large enough to lie in a file of its own" in str(report)


@pytest.mark.long
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_compile_keeps_the_pair_as_long_as_it_runs(runtime, tmp_path, monkeypatch):
    pytest.importorskip(runtime)
    prepared, x = digits(), torch.rand(8, 1, 8, 8)
    expected = fxquant.compile(prepared, x, runtime=runtime, threads=1)(x)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(files, "LARGEST_PROTOBUF", 1000)
    compiled = fxquant.compile(prepared, x, runtime=runtime, threads=1)
    (folder,) = tmp_path.iterdir()
    assert sorted(os.listdir(folder)) == ["model.onnx", "model.onnx.data"]
    assert_same_bits(compiled(x), expected)
    assert_same_bits(compiled(x[:1]), expected[:1])
    del compiled
    gc.collect()
    assert not os.listdir(tmp_path)


@pytest.mark.long
def test_bench_counts_both_files(monkeypatch):
    x = torch.rand(2, 1, 8, 8)
    int8 = fxquant.convert(digits())
    bench = lambda: fxquant.bench(int8, x, runtimes="onnxruntime", rounds=1, progress=False, threads=1).rows  # noqa: E731
    (single,) = (row for row in bench() if row.runtime == "onnxruntime")
    monkeypatch.setattr(files, "LARGEST_PROTOBUF", 1000)
    (pair,) = (row for row in bench() if row.runtime == "onnxruntime")
    assert single.size < pair.size < single.size + 2000 and pair.sqnr == single.sqnr
    assert pair.memory is not None and pair.note == single.note == ""


@pytest.mark.long
def test_what_a_file_replaces(tmp_path):
    """Pair over pair, single over pair, pair over single; a file that happens to have the tensors' name stays."""
    path, x = tmp_path / "m.onnx", torch.rand(2, 64)

    def export(seed: int, external: bool) -> None:
        fxquant.export_onnx(layer(seed), path, external_data=external, verify=False)
        (actual,) = onnxruntime_session(path, threads=1)([x])
        assert_same_bits(actual, onnxruntime_session(make_onnx(layer(seed)).content, threads=1)([x])[0])
        assert sorted(os.listdir(tmp_path)) == ["m.onnx", *["m.onnx.data"] * external]

    for seed, external in enumerate([True, True, False, False, True]):
        export(seed, external)
    path.unlink()
    (tmp_path / "m.onnx.data").write_bytes(b"of someone else")
    fxquant.export_onnx(layer(0), path, verify=False)
    assert (tmp_path / "m.onnx.data").read_bytes() == b"of someone else"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[tuple[str, bool], dict[str, bytes]]:
    """What an older and a newer model are on disk, each as a pair and alone."""
    found = {}
    for seed, age in enumerate(("older", "newer")):
        for external in (True, False):
            folder = tmp_path_factory.mktemp(age)
            fxquant.export_onnx(layer(seed), folder / "m.onnx", external_data=external, verify=False)
            found[age, external] = contents(folder)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {own.name: own.read_bytes() for own in folder.iterdir()}


@pytest.mark.parametrize("older", ["pair", "single", "graph alone", "tensors alone", "none"])
@pytest.mark.parametrize("external", [True, False])
def test_a_failure_at_any_step_leaves_what_was_there(older, external, exported, tmp_path, monkeypatch):
    lost = {"graph alone": "m.onnx.data", "tensors alone": "m.onnx"}.get(older)
    old = {} if older == "none" else exported["older", older != "single"]
    new, real, failed = exported["newer", external], os.replace, -1
    while failed < 9:
        failed += 1
        place, calls = tmp_path / str(failed), iter(range(100))
        place.mkdir()
        for name in old.keys() - {lost}:
            (place / name).write_bytes(old[name])
        before, folder = contents(place), files.Folder(str(place))
        for name in new:
            Path(folder / name).write_bytes(new[name])
        pair = files.Pair(folder / "m.onnx", None) if external else None

        def fails(source: str, goal: str, calls=calls, failed=failed) -> None:
            if next(calls) == failed:
                raise OSError(28, "No space left on device")
            real(source, goal)

        monkeypatch.setattr(os, "replace", fails)
        try:
            files.put(new["m.onnx"], pair, str(place / "m.onnx"), folder)
        except ExportError as error:
            assert "'m.onnx' could not be written: [Errno 28] No space left" in str(error) and "what to do" in str(
                error
            )
            folder.close()
            assert contents(place) == before
            continue
        folder.close()
        kept = {"m.onnx.data": before["m.onnx.data"]} if older == "tensors alone" else {}
        assert contents(place) == {**kept, **new}
        break
    assert 1 <= failed <= 4


@pytest.mark.long
def test_no_space_for_the_tensors(tmp_path, monkeypatch):
    import onnx_ir as ir

    fxquant.export_onnx(digits(1), tmp_path / "m.onnx", external_data=True, verify=False)
    before = contents(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir.external_data, "unload_from_model", full)
    with pytest.raises(ExportError, match=r"(?s)No space left.*what to do: see to the space.*as it was"):
        fxquant.export_onnx(digits(2), tmp_path / "m.onnx", external_data=True)
    assert contents(tmp_path) == before


@pytest.mark.long
def test_places_that_cannot_be_written_to(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"external_data='yes' is not known\. Choose None, True or False"):
        fxquant.export_onnx(digits(), tmp_path / "m.onnx", external_data="yes")  # type: ignore[arg-type]
    (tmp_path / "taken.onnx").mkdir()
    with pytest.raises(InputError, match=r"is a folder, which a file cannot replace\. Choose another name"):
        fxquant.export_onnx(digits(), tmp_path / "taken.onnx")
    (tmp_path / "m.onnx").write_bytes(b"before")
    (tmp_path / "m.onnx.data").mkdir()
    with pytest.raises(ExportError, match=r"(?s)m.onnx.data' is a folder.*what to do: choose another name"):
        fxquant.export_onnx(digits(), tmp_path / "m.onnx", external_data=True, verify=False)
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data", "taken.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"before"

    def refuses(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuses)
    with pytest.raises(ExportError, match=r"(?s)nothing can be written into .*Permission denied.*what to do: choose"):
        fxquant.export_onnx(digits(), tmp_path / "m.onnx")
    monkeypatch.setattr(files, "LARGEST_PROTOBUF", 1000)
    with pytest.raises(ExportError, match=r"(?s)the folder for temporary files.*what to do: set TMPDIR"):
        fxquant.compile(digits(), runtime="onnxruntime")
