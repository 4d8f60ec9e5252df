"""ExecuTorch programs: run in its own runtime, held against the integer model, at batches of any size."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import mostly_long, run
from test_targets import Mixed
from torch import Tensor, nn

import fxquant
from fxquant import Recipe, installed
from fxquant.errors import ExportError, InputError, MissingPackageError, RecipeError
from fxquant.export import export_executorch
from fxquant.export.to_executorch import ExecutorchReport, executorch_session
from fxquant.nn.integer import Quantize
from fxquant.targets import TARGETS

SIDE = 12


def images(rows: int) -> Tensor:
    return torch.randn(rows, 3, SIDE, SIDE)


def integer_of(model: nn.Module, target: str = "xnnpack", recipe: Recipe | None = None) -> Any:
    prepared = fxquant.prepare(model.eval(), images(2), target=target, recipe=recipe)
    fxquant.calibrate(prepared, [images(8)], progress=False)
    return fxquant.convert(prepared, kernels="reference")


def on_its_grid(model: Any, x: Tensor) -> Tensor:
    """``x`` on the grid of the model's input, where a division and a product with the reciprocal round alike."""
    part = next(part for part in model.modules() if isinstance(part, Quantize))
    return (part(x).float() - part.zero_point) * part.scale


def exported(model: Any, path: Any, **options: Any) -> tuple[ExecutorchReport, Callable[..., list[Tensor]]]:
    report = export_executorch(model, path, **options)
    return report, executorch_session(path.read_bytes())


class Residual(nn.Module):
    """A sum, a join of a clamped and of an unclamped tensor, an average and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c, self.fc = nn.Conv2d(8, 4, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        y = F.relu(self.b(y) + y)
        y = torch.cat([y, F.relu6(9 * self.c(y))], 1)
        return self.fc(F.adaptive_avg_pool2d(y, 1).flatten(1))


def upscaler() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2))


def deconvolved() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU6(), nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=4), nn.ReLU(), nn.Conv2d(8, 3, 1)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "last convolution": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3)),
    "residual": Residual,
    "super-resolution": upscaler,
    "transposed in groups": deconvolved,
}


@pytest.mark.parametrize("name", mostly_long(MODELS, ["last convolution"]))
def test_the_integers_at_any_batch_whole_in_xnnpack(name, tmp_path):
    """More rows than 15, too: torch's choice of a convolution by the batch size is no bound of the program.

    XNNPACK rounds its product of a sum and a float32 scale to float32 first, so that a value next to the middle of two
    integers can go to the other one. Below 128 float32 are at most 2^-17 apart: of 2^17 values one may do so. What reads
    it takes it along, so that such a value may show in a few of the next layer's, as one step.
    """
    integer = integer_of(MODELS[name]())
    report, session = exported(integer, tmp_path / "m.pte", example_inputs=images(1), largest_batch=24)
    assert report.is_whole and report.delegated and not report.notes, report
    assert [own.rows for own in report.agreement] == [1, 2] and all(own.equal > 0.999 for own in report.agreement)
    assert report.largest_batch == 24 and next(iter(report.inputs.values())) == ["batch", 3, SIDE, SIDE]
    for rows in (1, 5, 24):
        x = on_its_grid(integer, images(rows))
        (y,) = session([x])
        expected = run(integer, (x,))
        steps = expected.unique().diff().min()
        apart = (y - expected).abs()
        assert float(apart.max()) < 1.01 * float(steps), f"{name}, {rows} rows"
        assert float((apart > 0).double().mean()) < 1e-3, f"{name}, {rows} rows"
    with pytest.raises(InputError, match="no more rows than largest_batch"):
        session([images(25)])


@pytest.mark.long
def test_a_head_between_floats_is_rounded_and_agrees(tmp_path):
    """Segmentation: XNNPACK resizes no integers, and what it reads is on the integer model's grid."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Upsample(scale_factor=2, mode="bilinear")
    )
    integer = integer_of(model)
    report, session = exported(integer, tmp_path / "m.pte")
    assert list(report.outside) == ["upsample_bilinear2d"] and "upsample_bilinear2d" in str(report)
    x = on_its_grid(integer, images(7))
    torch.testing.assert_close(session([x])[0], run(integer, (x,)), rtol=0, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("layer", ["convolution", "linear"])
def test_a_float_result_is_right_for_other_targets(layer, tmp_path):
    """The kind that ExecuTorch 1.5 computes wrongly: integers with one scale per channel behind a delegate."""
    last = nn.Conv2d(8, 8, 3) if layer == "convolution" else nn.Linear(SIDE, 5)
    integer = integer_of(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), last), target="x86")
    report, session = exported(integer, tmp_path / "m.pte")
    assert any("computes in float" in note and "2" in note for note in report.notes), report.notes
    x = on_its_grid(integer, images(3))
    expected = run(integer, (x,))
    assert float((session([x])[0] - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


def test_xnnpack_rounds_what_it_has_no_float_kernel_for():
    """A field of the target decides it, for LiteRT too; the diff says so, and no other target changes."""
    assert {n for n, target in TARGETS.items() if target.rounds_outputs} == {"xnnpack", "tflite"}
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * (SIDE - 2) ** 2, 4)).eval()
    for target, rounded in (("xnnpack", True), ("x86", False)):
        prepared = fxquant.prepare(model, images(2), target=target)
        assert (prepared.get_submodule("2").output_quantizer is not None) == rounded
    assert "has no linear whose result is a float" in str(
        fxquant.diff(model, fxquant.prepare(model, images(2), target="xnnpack"))
    )


def test_transposed_convolutions_in_groups_take_one_scale():
    prepared = fxquant.prepare(deconvolved().eval(), images(2), target="xnnpack")
    schemes = {n: prepared.get_submodule(n).weight_quantizer.scheme.per_channel for n in ("0", "2", "4")}
    assert schemes == {"0": True, "2": False, "4": True}
    per_channel = fxquant.Setting(weight=fxquant.targets.get("xnnpack").weight)
    with pytest.raises(RecipeError, match="conv_transpose2d in groups"):
        fxquant.prepare(deconvolved().eval(), images(2), target="xnnpack", recipe=Recipe([("2", per_channel)]))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 4)

    def forward(self, x: Tensor, flag: bool, other: dict[str, Tensor]) -> dict[str, Tensor]:
        y = self.a(x)
        return {"sum": y + other["y"] if flag else y, "own": y}


@pytest.mark.long
def test_inputs_and_outputs_have_names_and_fixed_sizes_are_said(tmp_path):
    example = (torch.randn(3, 6), True, {"y": torch.randn(3, 4)})
    prepared = fxquant.prepare(Two().eval(), example, target="xnnpack")
    integer = fxquant.convert(fxquant.calibrate(prepared, [example], progress=False))
    report, _ = exported(integer, tmp_path / "m.pte", example_inputs=example)
    assert report.inputs == {"x": ["batch", 6], "other_y": ["batch", 4]}
    assert report.outputs == {"sum": ["batch", 4], "own": ["batch", 4]}
    fixed, session = exported(integer, tmp_path / "f.pte", example_inputs=example, dynamic="none")
    assert fixed.inputs == {"x": [3, 6], "other_y": [3, 4]} and fixed.largest_batch == 3
    with pytest.raises(InputError, match="refuses inputs of shapes"):
        session([torch.randn(4, 6), torch.randn(4, 4)])


@pytest.mark.long
def test_a_program_that_executorch_cannot_run_joined_is_one_by_one(tmp_path):
    """A part in XNNPACK that reads another one's result and what was computed outside of both."""
    report, session = exported(integer_of(Mixed()), tmp_path / "m.pte")
    assert any("delegate of its own" in note for note in report.notes) and report.delegates > 4, report
    assert all(own.equal > 0.999 for own in report.agreement) and [len(y) for y in session([images(3)])] == [3, 3, 3]


@pytest.mark.long
def test_a_batch_that_executorch_cannot_plan_is_fixed_and_said(tmp_path):
    hf = pytest.importorskip("transformers")
    config = hf.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8, use_cache=False, attn_implementation="eager",
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    inputs = {"input_ids": torch.randint(0, 20, (3, 8))}
    prepared = fxquant.prepare(hf.GPT2Model(config).eval(), inputs, target="xnnpack")
    report, _ = exported(fxquant.calibrate(prepared, [inputs], progress=False), tmp_path / "m.pte")
    assert report.inputs == {"input_ids": [3, 8]} and any("a free batch could not be had" in n for n in report.notes)
    assert min(own.sqnr for own in report.agreement) > 40


def test_a_low_agreement_is_told_in_words(tmp_path, monkeypatch):
    """As of any runtime; and not by sums of 16 bits, which XNNPACK does not have."""
    integer = integer_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    monkeypatch.setattr(
        "fxquant.export.to_executorch._run", lambda _, __, tensors: [torch.zeros(len(tensors[0]), 4, 8, 8)]
    )
    report = export_executorch(integer, tmp_path / "m.pte")
    (note,) = report.notes
    assert "ExecuTorch agrees with the integer model to 0.0 dB only" in note and "What to do" in note


def test_wrong_arguments_are_told_and_nothing_is_left(tmp_path, monkeypatch):
    integer = integer_of(nn.Sequential(nn.Conv2d(3, 4, 3)))
    for path, options, words in (
        (tmp_path / "m.pt", {}, "does not end in .pte"),
        (tmp_path / "none" / "m.pte", {}, "there is no folder"),
        (tmp_path / "m.pte", {"dynamic": "all"}, "dynamic='all' is not known"),
        (tmp_path / "m.pte", {"largest_batch": 1}, "at least 2"),
    ):
        with pytest.raises(InputError, match=words):
            export_executorch(integer, path, **options)
    (tmp_path / "m.pte").write_bytes(b"before")
    monkeypatch.setattr("fxquant.export.to_executorch._verify", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        export_executorch(integer, tmp_path / "m.pte")
    assert os.listdir(tmp_path) == ["m.pte"] and (tmp_path / "m.pte").read_bytes() == b"before"
    monkeypatch.setattr(installed, "is_installed", lambda package: package != "executorch")
    with pytest.raises(MissingPackageError, match=r"fxquant\[executorch\]"):
        export_executorch(integer, tmp_path / "m.pte")


def test_what_executorch_refuses_is_an_error_of_ours():
    with pytest.raises(ExportError, match="ExecuTorch refuses the program"):
        executorch_session(b"no program")
