"""What an integer model holds in memory while it is used, as a share of the float model's weights, and its first second.

Each row is a process of its own. Memory is what the process holds of its own (anonymous pages, after the allocator gave
back what is free) beyond what it held once everything was imported and a small network had run. "alone" is the callable
that ``fxquant.compile`` returned, after two calls and with everything else let go; "with graph" has the integer graph too.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from record import add_output_option, publish

import fxquant

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")
RUNTIMES = ("native", "torch")


def own_memory() -> float:
    """MiB of anonymous pages, once what is free was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) / 1024


def measure(network: str, runtime: str, batch: int) -> dict[str, Any]:
    """One row."""
    x = torch.randn(batch, 3, 224, 224)
    small = torchvision.models.mobilenet_v3_small(weights=None).eval()
    calibrated = fxquant.calibrate(fxquant.prepare(small, x), [x])
    fxquant.compile(fxquant.convert(calibrated), x, runtime=runtime)(x)
    del small, calibrated
    before = own_memory()
    model = torchvision.models.get_model(network, weights=None).eval()
    weights = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    calibrated = fxquant.calibrate(fxquant.prepare(model, x), [x])
    start = time.perf_counter()
    graph = fxquant.convert(calibrated)
    run = fxquant.compile(graph, x, runtime=runtime)
    run(x)
    seconds = time.perf_counter() - start
    del model, calibrated
    run(x)
    with_graph = own_memory() - before
    del graph
    alone = own_memory() - before
    run(x)
    return {
        "network": network,
        "runtime": runtime,
        "batch": batch,
        "float weights, MiB": round(weights, 1),
        "alone, MiB": round(alone, 1),
        "of the weights": round(alone / weights, 2),
        "with graph, MiB": round(with_graph, 1),
        "convert + first run, s": round(seconds, 2),
    }


def main() -> None:
    """Measure every row and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 8))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--one", nargs=3, metavar=("NETWORK", "RUNTIME", "BATCH"), help="measure one row, in this process"
    )
    add_output_option(parser, "memory")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(options.one[0], options.one[1], int(options.one[2]))))
        return
    rows = []
    for network in options.networks:
        for batch in options.batches:
            for runtime in RUNTIMES:
                command = [sys.executable, "-W", "ignore", __file__, "--threads", str(options.threads)]
                done = subprocess.run(
                    [*command, "--one", network, runtime, str(batch)], capture_output=True, text=True, check=True
                )
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(rows[-1], flush=True)
    publish(rows, options)


if __name__ == "__main__":
    main()
