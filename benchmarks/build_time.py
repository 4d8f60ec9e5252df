"""How long rewriting takes: seconds of prepare and of convert, for a real network and for ever longer chains.

A chain of n layers is n times convolution, BatchNorm, ReLU with few channels, so that almost all time is graph work.
Calibration on one batch happens in between and is not counted. The growth exponent is the slope of log seconds over
log nodes, fitted over the chains: 1 is linear, 2 is quadratic.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import Any

import torch
import torchvision
from record import add_output_option, publish, seconds
from torch import Tensor, nn
from tqdm import tqdm

CHAINS = (125, 250, 500, 1000, 2000)
CHANNELS = 4


@dataclass(frozen=True)
class Tool:
    """The three steps of one quantizer; the middle one is not timed."""

    prepare: Callable[[nn.Module, Tensor], nn.Module]
    calibrate: Callable[[nn.Module, Tensor], Any]
    convert: Callable[[nn.Module], nn.Module]


def fxquant_tool() -> Tool:
    """fxquant's three verbs."""
    import fxquant

    return Tool(
        prepare=lambda model, example: fxquant.prepare(model, (example,)),
        calibrate=lambda prepared, example: fxquant.calibrate(prepared, [example], progress=False),
        convert=fxquant.convert,
    )


def fx_tool() -> Tool:
    """torch FX with min-max observers: its histogram's search would hide the graph work."""
    from torch.ao.quantization import MinMaxObserver, QConfig, QConfigMapping, default_per_channel_weight_observer
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    mapping = QConfigMapping().set_global(QConfig(MinMaxObserver, default_per_channel_weight_observer))
    return Tool(
        prepare=lambda model, example: prepare_fx(model, mapping, (example,)),
        calibrate=torch.no_grad()(lambda prepared, example: prepared(example)),
        convert=convert_fx,
    )


TOOLS = {"fxquant": fxquant_tool, "FX": fx_tool}


def chain(layers: int) -> nn.Sequential:
    """``layers`` times convolution, BatchNorm, ReLU in eval mode, with the statistics of one batch of noise."""
    modules: list[nn.Module] = []
    for index in range(layers):
        conv = nn.Conv2d(CHANNELS if index else 3, CHANNELS, 3, padding=1, bias=False)
        modules += [conv, nn.BatchNorm2d(CHANNELS, momentum=1.0), nn.ReLU()]
    model = nn.Sequential(*modules)
    with torch.no_grad():
        model(torch.randn(8, 3, 8, 8))
    return model.eval()


def timed(function: Callable[..., nn.Module], *arguments: Any) -> tuple[nn.Module, float]:
    """The result of ``function(*arguments)`` and the seconds it took."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def measure(tool: Tool, build: Callable[[], nn.Module], example: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of prepare and convert over ``repeats`` freshly built models, and their sum a graph node."""
    prepares, converts = [], []
    for _ in range(repeats):
        model = build()
        prepared, prepare_time = timed(tool.prepare, model, example)
        tool.calibrate(prepared, example)
        prepares.append(prepare_time)
        converts.append(timed(tool.convert, prepared)[1])
    nodes = len(torch.fx.symbolic_trace(build()).graph.nodes)
    prepare, convert = statistics.median(prepares), statistics.median(converts)
    return {
        "nodes": nodes,
        "prepare s": seconds(prepare),
        "convert s": seconds(convert),
        "total s": seconds(prepare + convert),
        "ms a node": seconds(1000 * (prepare + convert) / nodes),
    }


def growth_exponent(rows: list[dict[str, Any]]) -> float | None:
    """The least-squares slope of log seconds over log nodes, or None for fewer than two chains."""
    if len(rows) < 2:
        return None
    nodes, totals = [log(row["nodes"]) for row in rows], [log(row["total s"]) for row in rows]
    return round(statistics.linear_regression(nodes, totals).slope, 2)


def tool_rows(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one tool: the network first, then the chains."""
    tool = TOOLS[name]()
    small = torch.randn(1, 3, 8, 8)
    measure(tool, lambda: chain(3), small, 1)  # imports and first-call work are not what is measured
    rows = []
    for model in args.models:
        build = lambda model=model: torchvision.models.get_model(model, weights=None).eval()  # noqa: E731
        rows.append({"tool": name, "model": model, **measure(tool, build, torch.randn(1, 3, 224, 224), args.repeats)})
    for layers in tqdm(args.chains, desc=f"{name}, chains", leave=False):
        timing = measure(tool, lambda layers=layers: chain(layers), small, args.repeats)
        rows.append({"tool": name, "model": f"chain of {layers}", **timing})
    return rows


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["resnet50"], help="torchvision model names")
    parser.add_argument("--chains", nargs="*", type=int, default=CHAINS, metavar="LAYERS", help="lengths of the chains")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--repeats", type=int, default=3, help="runs a row, the median counts (default: 3)")
    add_output_option(parser, "build_time")
    return parser.parse_args()


def main() -> None:
    """Time every tool and publish the table."""
    args = options()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.manual_seed(0)
    rows = {name: tool_rows(name, args) for name in args.tools}
    growth = {name: growth_exponent(own[len(args.models) :]) for name, own in rows.items()}
    publish([row for own in rows.values() for row in own], args, growth_exponent=growth)
    print("growth exponent of the chains: " + ", ".join(f"{name} {slope}" for name, slope in growth.items()))


if __name__ == "__main__":
    main()
