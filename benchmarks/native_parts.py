"""Models other than classifiers of images: milliseconds natively, mostly in parts, on torch's operators, elsewhere.

Detectors, optical flow and a YOLO, whose own code runs between graphs; segmentation heads, shifted windows and transformers
with functions of floats between integer ops; videos, waves and a U-Net, whose convolutions are over volumes, over lines and
transposed. All weights are random. The contenders take turns in one process; medians.

- parts: native parts of the graphs that were cut (whole graphs are not counted);
- native: the share of the ops on integers that native kernels compute;
- ONNX Runtime: of the file that ``export_onnx`` writes; a dash where there is none, as for models that run their own code.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torchvision
from islands import Case, call, cases
from record import add_output_option, publish, seconds
from torch import Tensor, nn

import fxquant
from fxquant.errors import FxquantError
from fxquant.graph.leveled import RUNNER
from fxquant.kernels.runner import on_torch


class Decoder(nn.Module):
    """One step of a GPT-2 behind tokens whose keys and values are given."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=500, n_embd=256, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
        self.model = GPT2LMHeadModel(config)

    def forward(self, ids: Tensor, past: tuple[tuple[Tensor, Tensor], ...]) -> tuple[Tensor, Any]:
        """Logits ``(n, length, 500)``, and the keys and values with those of these tokens."""
        from transformers import DynamicCache

        output = self.model(input_ids=ids, past_key_values=DynamicCache(past), use_cache=True)
        kept = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        return output.logits, tuple(kept)


class UNet(nn.Module):
    """Three steps down and up, by transposed convolutions and padding ``"same"``."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64, 128, 256)
        self.down = nn.ModuleList(double(a, b) for a, b in zip((3, *widths), widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * a, a, 2, stride=2) for a in widths[2::-1])
        self.joined = nn.ModuleList(double(2 * a, a) for a in widths[2::-1])
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of two classes for each pixel."""
        kept = list[Tensor]()
        for step in self.down:
            x = step(nn.functional.max_pool2d(x, 2) if kept else x)
            kept.append(x)
        for up, joined, other in zip(self.up, self.joined, kept[2::-1], strict=True):
            x = joined(torch.cat([up(x), other], 1))
        return self.head(x)


def double(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions with norms."""
    layers = list[nn.Module]()
    for size in (inputs, outputs):
        layers += [nn.Conv2d(size, outputs, 3, padding="same"), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def m5() -> nn.Module:
    """Classes of sounds from waves (Dai et al., "Very deep convolutional neural networks for raw waveforms", 1610.00087)."""
    layers, size = list[nn.Module](), 1
    for width, kernel, stride in ((128, 80, 4), (128, 3, 1), (256, 3, 1), (512, 3, 1)):
        layers += [nn.Conv1d(size, width, kernel, stride), nn.BatchNorm1d(width), nn.ReLU(), nn.MaxPool1d(4)]
        size = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(size, 35))


def noise(*shape: int) -> Callable[[int, int], tuple[Tensor]]:
    """Batches of noise of a shape."""
    return lambda count, seed: (torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)),)


def tokens_and_cache(count: int, seed: int) -> tuple[Tensor, Any]:
    """One token and the keys and values of 64 others."""
    generator = torch.Generator().manual_seed(seed)
    past = [torch.randn(2, count, 4, 64, 64, generator=generator).unbind(0) for _ in range(4)]
    return torch.randint(0, 500, (count, 1), generator=generator), tuple(past)


def t5_encoder() -> nn.Module:
    """A small T5 encoder, from its configuration alone."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=500, d_model=256, d_ff=1024, num_layers=4, num_heads=4))


def images(side: int) -> Callable[[int, int], tuple[Tensor]]:
    """Batches of noise."""
    return lambda count, seed: (torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)),)


def words(count: int, seed: int) -> dict[str, Tensor]:
    """Batches of 64 random tokens."""
    return {"input_ids": torch.randint(0, 500, (count, 64), generator=torch.Generator().manual_seed(seed))}


def networks() -> dict[str, Case]:
    """All that is measured, by name."""
    segmentation = torchvision.models.segmentation
    bare = {"weights": None, "weights_backbone": None}
    return cases() | {
        "fcn_resnet50": Case(lambda: segmentation.fcn_resnet50(**bare), images(224)),
        "lraspp_mobilenet_v3_large": Case(lambda: segmentation.lraspp_mobilenet_v3_large(**bare), images(224)),
        "swin_t": Case(lambda: torchvision.models.swin_t(weights=None), images(224)),
        "t5 encoder": Case(t5_encoder, words),
        "gpt2 with cache": Case(Decoder, tokens_and_cache),
        "r3d_18": Case(lambda: torchvision.models.video.r3d_18(weights=None), noise(3, 8, 112, 112)),
        "u-net": Case(UNet, images(224)),
        "m5": Case(m5, noise(1, 8000)),
    }


def native_parts(integer: nn.Module) -> tuple[int, str]:
    """How many native parts graphs have that were cut, and which share of the integer ops is native."""
    runners = [graph.__dict__[RUNNER] for graph in integer.modules() if RUNNER in graph.__dict__]
    last = [next(reversed(runner.programs.values())) for runner in runners if runner.programs]
    count = sum(part.native for program in last if hasattr(program, "parts") for part in program.parts.parts)
    kernels = list(fxquant.coverage(integer).kernels.values())
    return count, f"{100 * kernels.count('native') / max(1, len(kernels)):.0f} %"


def medians(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, in turns, after two rounds that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn > 1:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: seconds(statistics.median(own)) for name, own in times.items()}


@torch.no_grad()
def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each network and number of threads."""
    for name in args.networks:
        case = networks()[name]
        torch.manual_seed(0)
        model, batch = case.build().eval(), case.batch(args.batch, 2)
        prepared = fxquant.prepare(model, batch)
        integer = fxquant.convert(fxquant.calibrate(prepared, [case.batch(2, 3), batch], progress=False))
        for threads in args.threads:
            torch.set_num_threads(threads)
            models: dict[str, Any] = {"float": model, "torch's operators": on_torch(integer), "natively": integer}
            if args.onnxruntime:
                with suppress(FxquantError):  # a dash in its column: it has no file
                    models["ONNX Runtime"] = fxquant.compile(integer, batch, runtime="onnxruntime", threads=threads)
            runs = {title: partial(call, own, batch) for title, own in models.items()}
            found = medians(runs, args.rounds)
            parts, share = native_parts(integer)
            row = {"network": name, "threads": threads, "parts": parts, "native": share, **found}
            yield row | {"gain over torch's": round(found["torch's operators"] / found["natively"], 2)}
            print(row, flush=True)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(networks()), default=list(networks()), metavar="NAME")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", type=int, default=1, help="images or sentences a call (default: 1)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--onnxruntime", action=argparse.BooleanOptionalAction, default=True)
    add_output_option(parser, "native_parts")
    return parser.parse_args()


def main() -> None:
    """Measure every network and print the table."""
    args = options()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        publish(list(rows(args)), args)


if __name__ == "__main__":
    main()
