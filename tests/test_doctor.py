"""fxquant doctor: what it says of this machine is what the package does on it."""

from __future__ import annotations

import json
import os

import pytest
import torch

from fxquant import processor
from fxquant.cli import main
from fxquant.errors import Refusal
from fxquant.export import doctor as doctor_module
from fxquant.export.doctor import doctor
from fxquant.installed import is_installed
from fxquant.kernels.native import library
from fxquant.runtimes import native, pytorch, runtime


def of(found, name):
    return next(own for own in found.runtimes if own.name == name)


def test_this_machine():
    found = doctor()
    assert found.instruction_set == processor.instruction_set() and found.cores == len(os.sched_getaffinity(0))
    assert found.saturates == processor.adds_pairs_in_16_bits() == any("saturates" in note for note in found.notes)
    assert (of(found, "native").status == "the reference's integers") == (library.missing() is None)
    assert of(found, "torch").version == torch.__version__
    for name in ("onnxruntime", "openvino", "executorch"):
        assert bool(of(found, name).version) == is_installed(name)


def test_what_is_not_here_is_named_with_its_cure(monkeypatch):
    for module in (doctor_module, native):
        monkeypatch.setattr(module, "missing", lambda: Refusal("no C++ compiler was found"))
    monkeypatch.setattr(pytorch, "operators", lambda: None)

    def absent(name: str) -> str:
        if name == "fxquant":
            return "1"
        raise runtime.PackageNotFoundError

    for module in (runtime, native):
        monkeypatch.setattr(module, "version", absent)
    found = doctor()
    assert of(found, "native").status == "cannot run: no C++ compiler was found"
    assert "reference" in of(found, "torch").status
    assert of(found, "onnxruntime").status == "pip install 'fxquant[onnx]'"
    assert of(found, "openvino").status == "pip install 'fxquant[openvino]'"
    assert "no C++ compiler" in found.notes[0]


def test_as_on_a_lesser_processor(monkeypatch):
    monkeypatch.setenv("FXQUANT_ISA", "plain")
    found = doctor()
    assert found.instruction_set == "plain"
    assert any("FXQUANT_ISA=plain" in note for note in found.notes)


def test_the_command(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("processor") and "\nruntime" in printed
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(doctor().as_dict()))
    monkeypatch.setenv("FXQUANT_ISA", "sse")
    assert main(["doctor"]) == 1
    assert "FXQUANT_ISA='sse' is not known" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "diff", "quantize", "bench", "ops", "doctor"])
def test_every_command_is_in_the_help(command, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"fxquant {command}" in capsys.readouterr().out
