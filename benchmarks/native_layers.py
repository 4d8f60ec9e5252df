"""Where the time of a network on the native kernels goes: every step of its plan, with its products a second.

Steps are timed one by one in their order, in turns through the whole plan, so that each reads what the one before left in
the caches; a step's time is the median of its turns. "GMAC/s" is of products of weights (a tile of Winograd's counts as the
convolution that it computes). ``FXQUANT_ISA`` chooses the instruction set.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
import warnings
from dataclasses import replace
from typing import Any

import torch
from latency import MODELS, example_input, example_model
from latency_contenders import integer_model
from record import add_output_option, publish

from fxquant.kernels.native.library import KINDS, Library, Step
from fxquant.kernels.native.model import NativeModel
from fxquant.kernels.native.plan import Plan
from fxquant.processor import instruction_set

NAMES = {number: name for name, number in KINDS.items()}


def products(step: Step) -> int:
    """Products of a step with weights."""
    kind, y = NAMES[step.kind], step.y
    if kind == "convolution":
        return y.n * y.h * y.w * y.c * step.taps * step.depth
    if kind.startswith("depthwise"):
        return y.n * y.h * y.w * y.c * step.window.kernel[0] * step.window.kernel[1]
    return y.n * y.h * y.w * y.c * 9 * step.depth if kind == "winograd" else 0


class Timed:
    """A library that computes a plan's steps one by one, and keeps how long each took."""

    def __init__(self, library: Library, count: int) -> None:
        self.library, self.times = library, [list[float]() for _ in range(count)]

    def run(self, steps: Any, count: int, threads: int) -> None:
        """Compute an array of ``Step``."""
        for index in range(count):
            single = (Step * 1).from_buffer(steps, index * ctypes.sizeof(Step))
            began = time.perf_counter()
            self.library.run(single, 1, threads)
            self.times[index].append(time.perf_counter() - began)


def timed(plan: Plan, x: torch.Tensor, turns: int) -> list[float]:
    """Milliseconds of each step."""
    timer: Any = Timed(plan.program.library, plan.count)
    plan.program = replace(plan.program, library=timer)
    for _ in range(turns):
        plan.run([x])
    return [1e3 * statistics.median(own) for own in timer.times]


def rows_of(name: str, batch: int, threads: int, turns: int) -> list[dict[str, Any]]:
    """A row for each step."""
    torch.set_num_threads(threads)
    x = example_input(name, batch)
    plan = NativeModel(integer_model(example_model(name), x)).plan_of(x)
    rows = []
    for index, (step, milliseconds) in enumerate(zip(plan.steps, timed(plan, x, turns), strict=True)):
        y, made = step.y, products(step)
        rows.append(
            {
                "model": name,
                "batch": batch,
                "threads": threads,
                "step": index,
                "kind": NAMES[step.kind],
                "result": f"{y.n} x {y.h} x {y.w} x {y.c}",
                "window": f"{step.window.kernel[0]} x {step.window.kernel[1]}, {step.depth}" if made else "",
                "ms": round(milliseconds, 4),
                "GMAC/s": round(made / milliseconds / 1e6, 1) if made else None,
            }
        )
    return rows


def main() -> None:
    """Print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"], choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--turns", type=int, default=50)
    add_output_option(parser, "native_layers")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    with torch.no_grad():
        for name in args.models:
            for batch in args.batches:
                for threads in args.threads:
                    rows += rows_of(name, batch, threads, args.turns)
    shares: dict[str, float] = {}
    for row in rows:
        key = f"{row['model']}, batch {row['batch']}, {row['threads']} threads: {row['kind']}"
        shares[key] = round(shares.get(key, 0.0) + row["ms"], 4)
    publish(rows, args, **{"instruction set": instruction_set(), "ms by kind": shares})
    for key, milliseconds in shares.items():
        print(f"{key}: {milliseconds} ms")


if __name__ == "__main__":
    main()
