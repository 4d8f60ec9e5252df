"""Microseconds of single 3 x 3 convolutions in the native kernels: directly, by Winograd's tiles of 2 x 2 and of 4 x 4.

A layer's own steps are timed, from bytes to requantized bytes, for each instruction set that the processor has. The ways of
a layer take turns in one process, and the least of all rounds counts. "rule" is what a plan takes
(`fxquant/kernels/native/winograd_rules.py`). The JSON is written with `--output` alone, and means something on a quiet
machine.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import publish, seconds
from tabulate import tabulate
from torch import nn

import fxquant
from fxquant.kernels.native.library import KINDS, Step
from fxquant.kernels.native.model import NativeModel
from fxquant.kernels.native.sets import SETS
from fxquant.kernels.native.winograd_rules import DIRECT, taken
from fxquant.processor import VARIABLE, has

WAYS = {"direct": DIRECT, "2 x 2": 2, "4 x 4": 4}
SHAPES = {
    "resnet": [(64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7)],
    "vgg": [(64, 64, 224), (128, 128, 112), (256, 256, 56), (512, 512, 28), (512, 512, 14)],
    "googlenet": [(64, 192, 56), (96, 128, 28), (128, 192, 28), (32, 96, 28), (96, 208, 14), (160, 320, 14), (192, 384, 7)],
    "densenet": [(128, 32, 56), (128, 32, 28), (128, 32, 14), (128, 32, 7)],
    "odd": [(64, 64, 55), (64, 64, 33), (80, 80, 25), (100, 100, 19), (128, 128, 17), (256, 256, 13)],
    "few channels": [(16, 16, 56), (32, 32, 28)],
}  # fmt: skip
"""Channels of the input and of the result, lines and columns."""


@dataclass
class Layer:
    """The steps of a plan that compute a convolution, and the plan, whose memory they use."""

    native: NativeModel
    plan: Any
    steps: Any
    way: int

    def run(self) -> None:
        """Compute it once."""
        self.native.program.library.run(self.steps, len(self.steps), self.plan.threads)


def integer_model(depth: int, channels: int, size: int) -> Any:
    """A convolution of bytes between two borders."""
    conv = nn.Conv2d(depth, channels, 3, padding=1)
    nn.init.normal_(conv.weight)  # as those of trained networks are: few of them near the largest
    x = torch.randn(1, depth, size, size)
    recipe = fxquant.Recipe(quantize_outputs=True)
    prepared = fxquant.prepare(nn.Sequential(conv, nn.ReLU()).eval(), x, recipe=recipe, processor="vnni")
    return fxquant.convert(fxquant.calibrate(prepared, [x], progress=False), kernels="reference")


def layer(integer: Any, x: torch.Tensor, way: int | None) -> Layer:
    """The layer, planned for ``x``."""
    with nullcontext() if way is None else taken(way):
        native = NativeModel(integer)
        native(x)
    plan = native.plan_of(x)
    computing = [KINDS[kind] for kind in ("convolution", "winograd", "winograd input")]
    steps = [step for step in plan.steps if step.kind in computing]
    found = next(step.taps for step in steps if step.kind != KINDS["winograd input"])
    return Layer(native, plan, (Step * len(steps))(*steps), {9: DIRECT, 16: 2, 36: 4}[found])


def least(runs: dict[str, Callable[[], None]], rounds: int, threads: int) -> dict[str, float]:
    """Microseconds of each in its fastest round, in turns; weights come from beyond the second cache, as in a network.

    Of one thread its own time counts, which other processes disturb less.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    best = dict.fromkeys(runs, float("inf"))
    others = torch.ones(2**20, dtype=torch.int64)
    for _ in range(rounds):
        for name, run in runs.items():
            others.sum()
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
    return {name: seconds(1e6 * value) for name, value in best.items()}


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each layer, batch, number of threads and set."""
    for name in args.sets:
        os.environ[VARIABLE] = name
        for family in args.families:
            for depth, channels, size in SHAPES[family]:
                integer = integer_model(depth, channels, size)
                for batch in args.batch:
                    x = torch.randn(batch, depth, size, size)
                    for threads in args.threads:
                        torch.set_num_threads(threads)
                        layers = {title: layer(integer, x, way) for title, way in WAYS.items()}
                        assert all(made.way in (WAYS[title], DIRECT) for title, made in layers.items())
                        runs = {title: made.run for title, made in layers.items() if made.way == WAYS[title]}
                        found = least(runs, args.rounds, threads)
                        rule = next(title for title, way in WAYS.items() if way == layer(integer, x, None).way)
                        row = {"set": name, "family": family, "layer": f"{depth}→{channels}, {size}²", "batch": batch}
                        tiled = min(found[title] for title in found if title != "direct")
                        row |= {"threads": threads, **found, "gain": round(found["direct"] / tiled, 2), "rule": rule}
                        yield row | {"rule's gain": round(found["direct"] / found[rule], 2)}


def options() -> argparse.Namespace:
    """The command line."""
    here = [row.name for row in SETS if has(row.name) and row.name != "plain"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=[row.name for row in SETS], default=here)
    parser.add_argument("--families", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="JSON file (default: none is written)")
    return parser.parse_args()


def main() -> None:
    """Measure every layer and print the table."""
    args = options()
    torch.manual_seed(0)
    found = list(rows(args))
    if args.output:
        publish(found, args)
    else:
        print(tabulate(found, headers="keys"))


if __name__ == "__main__":
    main()
