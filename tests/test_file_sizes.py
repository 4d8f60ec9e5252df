"""Sizes in ONNX files: what the exporter fixed is named, a batch has one name; ONNX's own evaluator reads the default."""

from __future__ import annotations

import pytest
import torch
from onnx.reference import ReferenceEvaluator
from op_cases import run
from torch import Tensor, nn

import fxquant


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.a, self.r = nn.Linear(8, 8), kind(8, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.r(torch.relu(self.a(x)))[0]


class Unrolled(nn.Module):
    """A loop over the length, as people write a cell of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(8, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        state = self.a(x[:, 0])
        for step in x[:, 1:].unbind(1):
            state = torch.tanh(self.a(step) + self.h(state))
        return state


@pytest.mark.parametrize("model", [Recurrent(nn.LSTM), Unrolled()], ids=["LSTM", "loop"])
def test_a_size_that_the_exporter_fixed_is_named(model, tmp_path):
    x = torch.randn(2, 5, 8)
    integer = fxquant.quantize(model.eval(), [x], example_inputs=x, progress=False)
    report = fxquant.export_onnx(integer, tmp_path / "m.onnx", x, verify=False)
    (shape,) = report.inputs.values()
    assert shape == ["batch", 5, 8]
    (note,) = report.notes
    assert "axis 1 of x is 5 in the file" in note


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(y)


def test_a_batch_has_one_name_and_the_reference_evaluator_reads_the_file(tmp_path):
    x = torch.randn(3, 6), torch.randn(3, 5)
    prepared = fxquant.calibrate(fxquant.prepare(Two().eval(), x), [x], progress=False)
    integer = fxquant.convert(prepared, kernels="reference")
    report = fxquant.export_onnx(integer, tmp_path / "m.onnx", x, verify=False)
    assert report.opset == 19 and not report.notes
    assert (
        report.inputs == {"x": ["batch", 6], "y": ["batch", 5]}
        and [s[0] for s in report.outputs.values()] == ["batch"] * 2
    )
    found = ReferenceEvaluator(str(tmp_path / "m.onnx")).run(None, {"x": x[0].numpy(), "y": x[1].numpy()})
    for own, expected in zip(found, run(integer, x), strict=True):
        assert float((torch.from_numpy(own) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_a_size_that_the_model_itself_fixes_is_no_note(tmp_path):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), torch.randn(2, 3, 9, 8)
    integer = fxquant.quantize(model, [x], example_inputs=x, progress=False)
    report = fxquant.export_onnx(integer, tmp_path / "m.onnx", x, verify=False)
    assert not report.notes and list(report.inputs.values()) == [["batch", 3, "input_2", "input_3"]]
