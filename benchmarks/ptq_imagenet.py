"""Post-training quantization of EfficientNet-Lite0 with its ImageNet weights, beside torch FX and ONNX Runtime.

Depthwise convolutions and ReLU6, and channels of one tensor that differ by a hundred. Every tool gets the same crops to
calibrate on, or, where there are no data, the same images made from the network's batch norms, and is judged on crops of
other photographs: how often it has the float network's top-1, and how far its logits are from the float ones. Integer models
run as such; FX below 8 bits, for which it has no kernels, as fake quantization. Rows that the JSON has already are not run
again.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peers import Peer, fx_fake, fx_full_range, fx_per_tensor, fx_x86, ort_static
from photographs import CALIBRATING, JUDGING, crops, efficientnet_lite0
from record import add_output_option, publish, version
from torch import Tensor, nn
from tqdm import tqdm

import fxquant
from fxquant import Scheme, Setting
from fxquant.algorithms import synthesize
from fxquant.processor import adds_pairs_in_16_bits

SCHEMES = {
    "W8A8": (8, 8, True),
    "W8A8 per tensor": (8, 8, False),
    "W4A8": (4, 8, True),
    "W4A4": (4, 4, True),
}
"""Bits of weights and of activations, and whether weights have a scale a channel."""
SOURCES = ("photographs", "batch norms")
HERE = "any" if adds_pairs_in_16_bits() else "vnni"
"""What fxquant's models shall be right on: this processor, as the others' are; "any" has a row of its own."""
KEYS = ("scheme", "calibrated on", "tool")
BATCH, MADE_AT_ONCE = 32, 8

Batches = list[tuple[Tensor, Tensor]]
Run = Callable[[Tensor], Tensor]


def setting(scheme: str, estimator: str) -> Setting:
    """fxquant's recipe of a scheme."""
    weight, activation, per_channel = SCHEMES[scheme]
    return Setting(
        weight=Scheme.weight(weight, per_channel=per_channel, estimator=estimator),
        activation=Scheme.activation(activation, estimator=estimator),
    )


def ours(model: nn.Module, batches: Batches, scheme: str, *, recovers: bool, processor: str = HERE) -> Run:
    """fxquant's integer model: ranges alone, or roundings in closed form behind them."""
    estimator = "minmax" if min(SCHEMES[scheme][:2]) == 8 else "mse"
    prepared = fxquant.prepare(model, batches[0][0][:1], recipe=setting(scheme, estimator), processor=processor)
    fxquant.calibrate(prepared, batches, progress=False)
    if recovers:
        fxquant.recover(prepared, batches, progress=False)
    return fxquant.compile(fxquant.convert(prepared), runtime="torch")


def fx(model: nn.Module, batches: Batches, scheme: str) -> Run:
    """torch FX at its most accurate setting for a scheme."""
    weight, activation, per_channel = SCHEMES[scheme]
    if (weight, activation) != (8, 8):
        return fx_fake(model, batches, weight=weight, activation=activation)
    return fx_full_range(model, batches) if per_channel else fx_per_tensor(model, batches)


def fx_default(model: nn.Module, batches: Batches, scheme: str) -> Run:
    """torch FX as its x86 default has it: activations of 7 bits."""
    return fx_x86(model, batches)


def ort(model: nn.Module, batches: Batches, scheme: str, *, method: str) -> Run:
    """ONNX Runtime's static quantization."""
    weight, _, per_channel = SCHEMES[scheme]
    return ort_static(model, batches, per_channel=per_channel, method=method, weight_bits=weight)


TOOLS: dict[str, tuple[str, Callable[[nn.Module, Batches, str], Run], tuple[str, ...]]] = {
    "fxquant, ranges": ("fxquant", partial(ours, recovers=False), tuple(SCHEMES)),
    "fxquant, recover": ("fxquant", partial(ours, recovers=True), tuple(SCHEMES)),
    "fxquant, recover, any processor": (
        "fxquant",
        partial(ours, recovers=True, processor="any"),
        ("W8A8", "W8A8 per tensor"),
    ),
    "FX": ("torch", fx, tuple(SCHEMES)),
    "FX, x86 default": ("torch", fx_default, ("W8A8",)),
    "ONNX Runtime, min-max": ("onnxruntime", partial(ort, method="MinMax"), ("W8A8", "W8A8 per tensor", "W4A8")),
    "ONNX Runtime, entropy": ("onnxruntime", partial(ort, method="Entropy"), ("W8A8", "W8A8 per tensor")),
    "ONNX Runtime, percentile": ("onnxruntime", partial(ort, method="Percentile"), ("W8A8", "W8A8 per tensor")),
}
"""Of each tool its package, what builds its model, and the schemes that it has."""


@torch.no_grad()
def logits(run: Run, images: Tensor) -> Tensor:
    """``(N, 1000)``."""
    return torch.cat([run(part) for part in images.split(BATCH)])


def measures(made: Tensor, true: Tensor) -> dict[str, float]:
    """The columns of a row: share of equal top-1 in %, KL divergence from float in nats, dB of the logits."""
    divergence = F.kl_div(made.log_softmax(1), true.log_softmax(1), log_target=True, reduction="batchmean")
    noise = (made - true).double().square().sum()
    return {
        "same top-1": round(100 * (made.argmax(1) == true.argmax(1)).double().mean().item(), 1),
        "KL": round(divergence.item(), 4),
        "dB": round(10 * torch.log10(true.double().square().sum() / noise).item(), 1),
    }


def calibration(source: str, model: nn.Module, args: argparse.Namespace) -> Batches:
    """What calibrates every tool; the labels say nothing."""
    real = crops(CALIBRATING, args.calibration, 0)
    if source == "batch norms":
        made = synthesize(model, real[:MADE_AT_ONCE], batches=args.made // MADE_AT_ONCE, steps=args.steps)
        real = torch.cat(made)
    return [(part, torch.zeros(len(part))) for part in real.split(BATCH)]


def wanted(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """What is still to be run."""
    done = {tuple(row[key] for key in KEYS) for row in rows}
    for source in args.sources:
        for scheme in args.schemes:
            for tool, (_, _, has) in TOOLS.items():
                if tool in args.tools and scheme in has and (scheme, source, tool) not in done:
                    yield scheme, source, tool


def row(key: tuple[str, str, str], model: nn.Module, batches: Batches, images: Tensor, true: Tensor) -> dict[str, Any]:
    """One row of the table."""
    scheme, _, tool = key
    package, build, _ = TOOLS[tool]
    named: dict[str, Any] = dict(zip(KEYS, key, strict=True))
    if (missing := Peer(tool, package, build).missing) is not None:
        return {**named, "why not": missing}
    start = time.process_time()
    try:
        run = build(model, batches, scheme)
    except Exception as error:  # a tool that cannot is a row of the table
        if package == "fxquant":
            raise
        return {**named, "why not": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
    seconds = time.process_time() - start
    return {**named, **measures(logits(run, images), true), "CPU s": round(seconds, 1)}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), metavar="SCHEME")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES), metavar="SOURCE")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), metavar="TOOL")
    parser.add_argument("--calibration", type=int, default=128, help="crops that calibrate (default: 128)")
    parser.add_argument("--judged", type=int, default=256, help="crops that are judged (default: 256)")
    parser.add_argument("--made", type=int, default=32, help="images made where there are no data (default: 32)")
    parser.add_argument("--steps", type=int, default=100, help="of gradient descent for each of them (default: 100)")
    parser.add_argument("--threads", type=int, default=1)
    add_output_option(parser, "ptq_imagenet")
    return parser.parse_args()


def require_same(old: dict[str, Any], args: argparse.Namespace) -> None:
    """Raise unless the rows of a file are of as many images."""
    for name in ("calibration", "judged", "made", "steps"):
        if old.get("rows") and old["settings"][name] != getattr(args, name):
            raise SystemExit(f"{args.output} holds rows with --{name} {old['settings'][name]}: give another --output.")


def main() -> None:
    """Run what is missing, row by row, and publish the table."""
    args = options()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    old = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    require_same(old, args)
    rows: list[dict[str, Any]] = old.get("rows", [])
    model, images = efficientnet_lite0(), crops(JUDGING, args.judged, 1)
    facts = {f"photographs of {name}": version(name) for name in ("scikit-image", "scikit-learn")}
    true, held = logits(model, images), dict[str, Batches]()
    for key in tqdm(list(wanted(args, rows)), desc="rows"):
        if key[1] not in held:
            held[key[1]] = calibration(key[1], model, args)
        rows.append(row(key, model, held[key[1]], images, true))
        publish(rows, args, quiet=True, **facts)
    publish(rows, args, **facts)


if __name__ == "__main__":
    main()
