"""What `tune_placement` finds: milliseconds of all-float, all-int8 and the tuned placement, in each runtime.

The three of a row are built from one float model with random weights (batch norm statistics fit noise images) and were
timed interleaved at the end of the search; a row says how many of the ops stay in float, and `--steps` also prints what was
tried. Another budget may find another placement: the search stops where its time is over.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from latency import example_input, example_model
from record import add_output_option, publish, seconds
from tqdm import tqdm

import fxquant

MODELS = ("mobilenet_v3_large", "efficientnet_b0", "mobilenet_v2")
RUNTIMES = ("torch", "onnxruntime", "openvino")


def row_of(name: str, prepared: Any, x: torch.Tensor, runtime: str, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    row: dict[str, Any] = {"model": name, "batch": len(x), "threads": args.threads, "runtime": runtime}
    try:
        tuned = fxquant.tune_placement(prepared, x, runtime=runtime, threads=args.threads, budget=args.budget)
    except fxquant.FxquantError as error:  # a runtime that is not installed, or refuses the model
        return {**row, "chosen": str(error).splitlines()[0]}
    found = tuned.placement
    if args.steps:
        print(f"\n{name}, {runtime}\n{found}\n")
    times = {title: seconds(found.milliseconds[title]) for title in found.milliseconds}
    row |= {title: times.get(title) for title in ("all float", "all int8", "tuned")}
    plain = min(value for title, value in times.items() if title != "tuned")
    row |= {"chosen": found.chosen, "gain": f"{max(0.0, 1 - times[found.chosen] / plain):.1%}"}
    row |= {"in float": f"{len(found.kept_float)} of {found.quantizable}", "steps": len(found.steps)}
    return row | {"stopped": found.out_of_time, "seconds": seconds(found.seconds), "paths": list(found.kept_float)}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES), help="default: all")
    parser.add_argument("--batches", nargs="+", type=int, default=[1], help="images a call (default: 1)")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--budget", type=float, default=300.0, metavar="S", help="seconds of a search (default: 300)")
    parser.add_argument("--steps", action="store_true", help="also print what was tried")
    add_output_option(parser, "placement")
    return parser.parse_args()


def main() -> None:
    """Run the searches and publish their table; each row is written when it is finished."""
    args = options()
    warnings.filterwarnings("ignore")
    rows: list[dict[str, Any]] = []
    for name in args.models:
        model = example_model(name)
        for batch in args.batches:
            x = example_input(name, batch)
            prepared = fxquant.calibrate(fxquant.prepare(model, (x,)), [x], progress=False)
            for runtime in args.runtimes:
                rows.append(row_of(name, prepared, x, runtime, args))
                tqdm.write(" ".join(f"{key}={value}" for key, value in rows[-1].items() if key != "paths"))
                publish(rows, args, quiet=True)
    publish(rows, args, columns=[[key for key in rows[0] | rows[-1] if key != "paths"]])


if __name__ == "__main__":
    main()
