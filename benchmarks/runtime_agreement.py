"""Do runtimes give what the integer model gives? ONNX Runtime, OpenVINO, ExecuTorch and `compile`'s own choice, 22 networks.

Each network is prepared, calibrated and converted as a user would (``processor="any"``, the default), and once more with
``target="xnnpack"`` for ExecuTorch. Every runtime then computes one batch that calibration has not seen, on the processor
at hand, beside the exact integer model:

- dB: signal to difference of all outputs that are real numbers, the least of them;
- same: the share of equal argmax entries, over classes, words or channels (none where a result is no score);
- words: what fxquant itself says of an agreement below 40 dB (noise of 1 % of the signal): in `export_onnx`'s notes, in
  `compile(runtime="auto").report`, in `export_executorch`'s notes. "silent" counts those of which it says nothing.

Vision networks see CIFAR-10's photographs, scaled up. All weights but resnet20's are random, of sizes that carry a signal
(`zoo_signal.randomize`); a deep random network multiplies each single rounding, so that one integer in a thousand that a
runtime rounds to the other neighbour can leave 30 dB. What that amounts to without any runtime is the column "one more
rounding": the integer model with one integer in twelve of each tensor off by one (`fxquant/export/tolerance.py`).

    python benchmarks/runtime_agreement.py --data FOLDER --models resnet18 gpt2 --resume

`scripts/without-vnni` in front shows a processor without dot products; the environment variable FXQUANT_ISA shows what
fxquant's own kernels do there, but other runtimes do not know it.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from cifar import DATA, load_cifar10, load_resnet
from record import add_output_option, publish, seconds
from torch import Tensor, nn
from tqdm import tqdm

import fxquant
from fxquant import processor
from fxquant.capture.calls import Call
from fxquant.errors import FxquantError
from fxquant.export import export_executorch
from fxquant.export.agreement import GOOD_SQNR, together
from fxquant.export.signature import tensors_of
from fxquant.export.to_executorch import executorch_session
from fxquant.export.tolerance import least_sqnr
from fxquant.runtimes.onnxruntime import onnxruntime_session
from fxquant.runtimes.openvino import openvino_session
from fxquant.runtimes.runtime import run_session

CALIBRATION, BATCH, EVALUATION = 4, 16, 16
"""Batches and rows that calibration sees, and rows that runtimes are compared on."""
RUNTIMES = ("ONNX Runtime", "OpenVINO", "ExecuTorch", "auto")
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Net:
    """A network to try.

    Attributes:
        build: makes it in eval mode; gets a first batch, over which random weights are scaled.
        inputs: ``inputs(rows, seed)``, what one call takes by name.
        classes: the axis of scores in its first output; None where that is no score.
    """

    build: Callable[[Inputs], nn.Module]
    inputs: Callable[[int, int], Inputs]
    classes: int | None = 1


# ---- networks -------------------------------------------------------------------------------------------------------

DATA_FOLDER = DATA


def photographs(name: str, side: int, **more: Callable[[int], Any]) -> Callable[[int, int], Inputs]:
    """Photographs of CIFAR-10's training set at another size, under the name of an argument."""

    def make(rows: int, seed: int) -> Inputs:
        data = load_cifar10(DATA_FOLDER, "train")
        chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:rows]
        ((images, _),) = data.take(chosen).batches(rows)
        images = images if side == images.shape[-1] else F.interpolate(images, side, mode="bilinear")
        return {name: images, **{key: value(rows) for key, value in more.items()}}

    return make


def carrying(make: Callable[[], nn.Module]) -> Callable[[Inputs], nn.Module]:
    """``make`` with random weights under which the output depends on the input."""
    from zoo_signal import randomize

    return lambda first: randomize(make().eval(), first)


def torchvision_net(name: str, side: int, **settings: Any) -> Net:
    from torchvision.models import get_model

    if name in ("googlenet", "inception_v3"):
        settings["init_weights"] = False
    if name.startswith("deeplab"):
        settings["weights_backbone"] = None
    forward = get_model(name, weights=None, **settings).forward
    named = next(iter(inspect.signature(forward).parameters))  # torchvision calls it input or x
    return Net(carrying(lambda: get_model(name, weights=None, **settings)), photographs(named, side))


def words(rows: int, seed: int) -> Inputs:
    """Sentences, every second of them padded."""
    generator, length = torch.Generator().manual_seed(seed), 32
    ends = torch.where(torch.arange(rows) % 2 == 1, length * 2 // 3, length)
    ids = torch.randint(0, 100, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < ends[:, None]).long()}


def transformer(name: str, inputs: Callable[[int, int], Inputs] = words) -> Net:
    """A small one of `transformers_int8.py`; its last axis holds what a head would tell apart."""
    from transformers_int8 import MODELS, sane

    return Net(lambda _: sane(MODELS[name](32)[0]), inputs, None if name == "unet" else -1)


def spectra(rows: int, seed: int) -> Inputs:
    return {"input_features": torch.randn(rows, 16, 32, generator=torch.Generator().manual_seed(seed))}


def hf_vit(_: Inputs) -> nn.Module:
    import transformers as hf
    from transformers_int8 import sane

    config = hf.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    return sane(hf.ViTForImageClassification(config))


def yolo() -> nn.Module:
    from yolo import Yolo

    return Yolo(head="dfl")


class Gru(nn.Module):
    """A photograph read line by line: a linear layer, a GRU in both directions, and a head over its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(96, 64), nn.Linear(128, 10)
        self.gru = nn.GRU(64, 64, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        lines = F.relu(self.enter(x.transpose(1, 2).flatten(2)))
        return self.leave(self.gru(lines)[0][:, -1])


NETS: dict[str, Callable[[], Net]] = {
    "resnet20 (trained)": lambda: Net(
        lambda _: load_resnet("resnet20", DATA_FOLDER / "resnet20-cifar10.pt"), photographs("x", 32)
    ),
    "resnet18": lambda: torchvision_net("resnet18", 96),
    "resnet50": lambda: torchvision_net("resnet50", 96),
    "mobilenet_v2": lambda: torchvision_net("mobilenet_v2", 96),
    "mobilenet_v3_large": lambda: torchvision_net("mobilenet_v3_large", 96),
    "efficientnet_b0": lambda: torchvision_net("efficientnet_b0", 96),
    "shufflenet_v2_x1_0": lambda: torchvision_net("shufflenet_v2_x1_0", 96),
    "googlenet": lambda: torchvision_net("googlenet", 96),
    "densenet121": lambda: torchvision_net("densenet121", 96),
    "regnet_y_400mf": lambda: torchvision_net("regnet_y_400mf", 96),
    "vit_b_16": lambda: torchvision_net("vit_b_16", 96, image_size=96),
    "swin_t": lambda: torchvision_net("swin_t", 96),
    "convnext_tiny": lambda: torchvision_net("convnext_tiny", 96),
    "deeplabv3_mobilenet_v3_large": lambda: torchvision_net("deeplabv3_mobilenet_v3_large", 96),
    "bert": lambda: transformer("bert"),
    "gpt2": lambda: transformer("gpt2"),
    "llama": lambda: transformer("llama"),
    "whisper encoder": lambda: transformer("whisper", spectra),
    "vit (transformers)": lambda: Net(hf_vit, photographs("pixel_values", 32)),
    "unet": lambda: transformer("unet", photographs("sample", 16, timestep=lambda rows: torch.arange(rows) * 60)),
    "yolo": lambda: Net(carrying(yolo), photographs("x", 96)),
    "gru": lambda: Net(lambda _: Gru().eval(), photographs("x", 32)),
}
"""By name; built only when their row is made."""


# ---- one row --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def integer_model(net: Net, target: str | None = None) -> Any:
    """The network from its first batch to exact integers."""
    torch.manual_seed(0)
    batches = [net.inputs(BATCH, seed) for seed in range(CALIBRATION)]
    model = net.build(batches[0])
    prepared = fxquant.prepare(model, batches[0], **({} if target is None else {"target": target}))
    return fxquant.convert(fxquant.calibrate(prepared, batches, progress=False), kernels="reference")


def decibels(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """The least agreement of all outputs; None stands for equal to the bit."""
    found = together(actual, expected)
    return None if found == math.inf else round(found, 1)


def same(net: Net, actual: Tensor, expected: Tensor) -> float | None:
    """The share of equal argmax entries, in percent."""
    if net.classes is None:
        return None
    equal = actual.argmax(net.classes) == expected.argmax(net.classes)
    return round(100 * float(equal.double().mean()), 1)


class Study:
    """Fills one row, runtime by runtime; what a runtime refuses is its words."""

    def __init__(self, name: str) -> None:
        self.net = NETS[name]()
        self.example = self.net.inputs(EVALUATION, 1000)
        self.row: dict[str, Any] = {"model": name}
        self.words: dict[str, str] = {}

    def measure(self) -> dict[str, Any]:
        integer = integer_model(self.net)
        with torch.no_grad():
            expected = tensors_of(integer(**self.example))
        chosen = self._auto(integer, expected)
        self._files(integer, expected)
        self._executorch()
        call = Call((), self.example)
        least = least_sqnr(integer, call, expected)
        self.row["one more rounding (dB)"] = round(least, 1)
        silent = [name for name in RUNTIMES if self._is_low(name) and not self.words.get(name)]
        return {**self.row, "auto takes": chosen, "silent": silent, "words": self.words}

    def _is_low(self, name: str) -> bool:
        return f"{name} (dB)" not in self.row or (self.row[f"{name} (dB)"] or math.inf) < GOOD_SQNR

    def _put(self, name: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        self.row[f"{name} (dB)"] = decibels(actual, expected)
        self.row[f"{name} same (%)"] = same(self.net, actual[0], expected[0])

    def _auto(self, integer: Any, expected: Sequence[Tensor]) -> str:
        """What `compile` takes, and what its report says of it and of OpenVINO."""
        compiled = fxquant.compile(integer, self.example)
        self._put("auto", tensors_of(compiled(**self.example)), expected)
        for own in compiled.report:
            named = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}.get(own.runtime)
            for column in (named, "auto" if own.runtime == compiled.runtime else None):
                if column is not None and own.reason:
                    self.words[column] = own.reason
        return compiled.runtime

    def _files(self, integer: Any, expected: Sequence[Tensor]) -> None:
        """The ONNX file in both runtimes, as anyone would open it."""
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/m.onnx"
            notes = fxquant.export_onnx(integer, path, self.example).notes
            for name, opened in (("ONNX Runtime", onnxruntime_session), ("OpenVINO", openvino_session)):
                try:
                    actual = run_session(opened(path), tensors_of(self.example))
                except FxquantError as error:
                    self.words[name] = str(error).splitlines()[0][:300]
                    continue
                self._put(name, actual, expected)
        said = [note for note in notes if "dB" in note]
        if said:
            self.words["ONNX Runtime"] = said[0]

    def _executorch(self) -> None:
        """The program of a model that was prepared for XNNPACK, beside that integer model."""
        integer = integer_model(self.net, "xnnpack")
        with torch.no_grad():
            expected = tensors_of(integer(**self.example))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.pte"
            try:
                report = export_executorch(integer, path, self.example)
                actual = executorch_session(path.read_bytes())(tensors_of(self.example))
            except FxquantError as error:
                self.words["ExecuTorch"] = str(error).splitlines()[0][:300]
                return
        self._put("ExecuTorch", actual, expected)
        self.row["ExecuTorch outside"] = ", ".join(report.outside) or "nothing"
        said = [note for note in report.notes if "dB" in note]
        if said and self._is_low("ExecuTorch"):
            self.words["ExecuTorch"] = said[0]


# ---- all rows -------------------------------------------------------------------------------------------------------


def work(name: str) -> None:
    """In a process of its own: print the row of ``name`` as one line of JSON, with an error as the verdict."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    out, start = sys.stdout, os.times().elapsed
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            row = {**Study(name).measure(), "verdict": "ok"}
        except Exception as error:
            row = {"model": name, "verdict": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:300]}
    print(json.dumps({**row, "s": seconds(os.times().elapsed - start)}), file=out)


def row_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The row that a process made, or why it made none."""
    command = [sys.executable, __file__, "--work", name, "--data", str(args.data)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"model": name, "verdict": f"stopped: more than {args.seconds:g} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"model": name, "verdict": f"the process died (exit {done.returncode}): {done.stderr.strip()[-200:]}"}
    made: dict[str, Any] = json.loads(lines[-1])
    return made


def kept_rows(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """With ``--resume``, the rows that the file has already, by their networks, but those that failed."""
    if not args.resume or not args.output.exists():
        return {}
    rows = json.loads(args.output.read_text(encoding="utf-8"))["rows"]
    return {own["model"]: own for own in rows if own["verdict"] == "ok"}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each runtime: how many networks it ran, the lowest agreement, how many are below 40 dB, and of how many of
    these fxquant says nothing."""
    found = {}
    for name in RUNTIMES:
        ran = {own["model"]: own[f"{name} (dB)"] or math.inf for own in rows if f"{name} (dB)" in own}
        worst = min(ran, key=ran.__getitem__, default=None)
        found[name] = {
            "ran": len(ran),
            "lowest (dB)": None if worst is None or ran[worst] == math.inf else ran[worst],
            "of": worst,
            "below 40 dB": sum(own < GOOD_SQNR for own in ran.values()),
            "silent": [own["model"] for own in rows if name in own.get("silent", ())],
        }
    return found


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="as for ptq_cifar.py")
    parser.add_argument("--models", nargs="+", choices=list(NETS), default=list(NETS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=1200, metavar="S", help="the most a network may take")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has, but those that failed")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    add_output_option(parser, "runtime_agreement")
    return parser.parse_args()


def main() -> None:
    """Take every chosen network through every runtime, and publish the table."""
    global DATA_FOLDER
    args = options()
    DATA_FOLDER = args.data
    if args.work:
        work(args.work)
        return
    del args.work
    rows = kept_rows(args)
    bar = tqdm([name for name in args.models if name not in rows])
    for name in bar:
        bar.set_description(name)
        rows[name] = row_of(name, args)
        write([rows[own] for own in NETS if own in rows], args, quiet=True)
    write([rows[own] for own in NETS if own in rows], args, quiet=False)


def write(rows: list[dict[str, Any]], args: argparse.Namespace, *, quiet: bool) -> None:
    """Keep what there is after every network; print the figures and the words at the end."""
    facts = {"instruction set": processor.instruction_set(), "adds pairs in 16 bits": processor.adds_pairs_in_16_bits()}
    shown = [f"{name} {what}" for name in RUNTIMES for what in ("(dB)", "same (%)")]
    columns = ["model", *shown, "one more rounding (dB)", "auto takes", "verdict"]
    publish(rows, args, quiet=quiet, columns=[columns], processor=facts, summary=summary(rows))
    if not quiet:
        for own in rows:
            for name, said in own.get("words", {}).items():
                print(f"{own['model']}, {name}: {said}")
        print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
