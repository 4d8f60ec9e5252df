"""Post-training quantization below 8 bits: top-1 of the CIFAR ResNets with nearest rounding, with ``fxquant.recover``, and
with block reconstruction after that.

Every method gets the same calibration images, the first of a permutation of the training set with the seed of the row, and
its integer model is judged on all test images. A row is one network, scheme, method and seed; rows that the JSON has already
are not run again.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cifar import DATA, DEPTHS, Cifar10, load_cifar10, load_resnet
from ptq_cifar import percent, predictions
from record import RESULTS, add_output_option, machine, publish
from torch import Tensor, nn
from tqdm import tqdm

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.algorithms import reconstruct
from fxquant.targets import X86

SCHEMES = {
    "W4A8": (4, 8, False),
    "W4A4": (4, 4, False),
    "W4A4, first, last and input at 8": (4, 4, True),
    "W4A4, first, last and input at 8, wide sums": (4, 4, True),
    "W3A8": (3, 8, False),
    "W2A8": (2, 8, False),
}
"""Bits of weights and of activations, and whether the first and last layer and the input have 8."""
WIDE_SUMS = replace(X86, name="x86, wide sums", title="PyTorch on a CPU", reads_accumulators=frozenset({"add"}))
"""The papers' W4A4 (BRECQ, QDrop) rounds what weighted layers read: a sum reads the accumulator of a convolution.
All other schemes round both operands of a sum to the activations' bits, as x86 computes it."""
METHODS = ("min-max", "mse", "closed form", "closed form, then blocks")
STEPS = 300
"""Of block reconstruction, for each residual unit; the papers take 20,000."""
KEYS = ("model", "scheme", "method", "seed")


def recipe(scheme: str, estimator: str) -> Recipe:
    """The recipe of a scheme, every range found by ``estimator``."""
    weight, activation, ends_at_8 = SCHEMES[scheme]

    def setting(bits: int, activation_bits: int) -> Setting:
        return Setting(
            weight=Scheme.weight(bits, estimator=estimator),
            activation=Scheme.activation(activation_bits, estimator=estimator),
        )

    low = setting(weight, activation)
    if not ends_at_8:
        return Recipe(default=low)
    return Recipe([("layer*", low), ("relu", low)], default=setting(8, 8))


def images_of(train: Cifar10, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Calibration batches: the first ``count`` images of a permutation of the training set."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return list(train.take(order[:count]).batches(64))


def quantized_by(
    method: str, model: nn.Module, batches: list[tuple[Tensor, Tensor]], scheme: str
) -> tuple[nn.Module, float]:
    """The integer model, and the CPU seconds that ``method`` took after ``prepare``."""
    estimator = "minmax" if method == "min-max" else "mse"
    target = WIDE_SUMS if scheme.endswith("wide sums") else X86
    prepared = fxquant.prepare(model, (batches[0][0],), recipe=recipe(scheme, estimator), target=target)
    start = time.process_time()
    fxquant.calibrate(prepared, batches, progress=False)
    if method.startswith("closed form"):
        fxquant.recover(prepared, batches, progress=False)
    if method.endswith("blocks"):
        reconstruct(prepared, batches, steps=STEPS, progress=False)
    seconds = time.process_time() - start
    return fxquant.convert(prepared), seconds


def row(name: str, scheme: str, method: str, seed: int, args: Any, train: Cifar10, test: Cifar10) -> dict[str, Any]:
    """One row of the table."""
    model = load_resnet(name, args.weights / f"{name}-cifar10.pt")
    quantized, seconds = quantized_by(method, model, images_of(train, args.calibration, seed), scheme)
    top1 = percent(predictions(quantized, test, f"{name} {scheme} {method}") == test.labels)
    drop = round(args.float_top1[name] - top1, 2)
    key = dict(zip(KEYS, (name, scheme, method, seed), strict=True))
    return {**key, "float": args.float_top1[name], "top-1": top1, "drop": drop, "CPU s": round(seconds, 1)}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the two zips, or torchvision's CIFAR-10")
    parser.add_argument("--weights", type=Path, help="folder with resnetNN-cifar10.pt (default: the data folder)")
    parser.add_argument("--models", nargs="+", choices=DEPTHS, default=list(DEPTHS), metavar="NAME")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), metavar="SCHEME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of calibration images (default: 0)")
    parser.add_argument("--calibration", type=int, default=512, help="calibration images (default: 512)")
    parser.add_argument("--threads", type=int, default=1)
    add_output_option(parser, "ptq_low_bits")
    args = parser.parse_args()
    args.weights = args.weights or args.data
    return args


def require_same(old: dict[str, Any], args: argparse.Namespace) -> None:
    """Raise unless the rows of a file are of as many calibration images: a table of both would compare nothing."""
    held = old.get("settings", {}).get("calibration", args.calibration)
    if old.get("rows") and held != args.calibration:
        raise SystemExit(
            f"{args.output} holds rows of {held} calibration images, and --calibration is {args.calibration}.\n"
            "  what to do: give another --output."
        )


def wanted(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, int]]:
    """What is still to be run: the recovered models of all networks first."""
    done = {tuple(row[key] for key in KEYS) for row in rows}
    for seed in args.seeds:
        for method in sorted(args.methods, key=METHODS.index, reverse=True):
            for name in args.models:
                for scheme in args.schemes:
                    if (name, scheme, method, seed) not in done:
                        yield name, scheme, method, seed


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each scheme and method the mean drop over networks, each network's over its seeds, and their spread."""
    table = []
    for scheme in SCHEMES:
        for method in METHODS:
            drops: dict[str, list[float]] = {}
            for one in rows:
                if (one["scheme"], one["method"]) == (scheme, method):
                    drops.setdefault(one["model"], []).append(one["drop"])
            if drops:
                each = {name: sum(values) / len(values) for name, values in drops.items()}
                spread = max(max(values) - min(values) for values in drops.values())
                line: dict[str, Any] = {"scheme": scheme, "method": method}
                line |= {name: round(each[name], 2) if name in each else None for name in DEPTHS}
                line |= {"networks": len(each), "mean": round(sum(each.values()) / len(each), 2)}
                line["spread of seeds"] = round(spread, 2)
                table.append(line)
    return table


def measured_before(test_images: int) -> list[dict[str, Any]]:
    """The rows of ``ptq_cifar.py``, which measures the same float models, where they are of as many test images."""
    path = RESULTS / "ptq_cifar.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found["rows"] if found.get("test_images") == test_images else []


def processor_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), machine()["cpu"])


def main() -> None:
    """Run what is missing, row by row, and publish the table after each."""
    args = options()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    train, test = load_cifar10(args.data, "train"), load_cifar10(args.data, "test")
    old = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    require_same(old, args)
    rows: list[dict[str, Any]] = old.get("rows", [])
    args.float_top1 = {one["model"]: one["float"] for one in [*measured_before(len(test)), *rows]}
    facts = {"processor": processor_name(), "test_images": len(test)}
    for name, scheme, method, seed in tqdm(list(wanted(args, rows)), desc="rows"):
        if name not in args.float_top1:
            model = load_resnet(name, args.weights / f"{name}-cifar10.pt")
            args.float_top1[name] = percent(predictions(model, test, name) == test.labels)
        rows.append(row(name, scheme, method, seed, args, train, test))
        publish(rows, args, quiet=True, means=means(rows), **facts)
    publish(means(rows), argparse.Namespace(**{**vars(args), "output": args.output.with_suffix(".part")}))
    args.output.with_suffix(".part").unlink()
    publish(rows, args, quiet=True, means=means(rows), **facts)


if __name__ == "__main__":
    main()
