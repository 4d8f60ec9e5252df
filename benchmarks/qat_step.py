"""The cost of one QAT training step: forward, cross entropy, backward and SGD at 224, as a ratio to the float step.

All contenders of a network live in one process and take turns: every round times each of them once, in an order that
rotates, and a contender's ratio of that round is its time over the float step's. The table shows the median of these
paired ratios, with the interval that holds the middle half of them.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from peers import QAT, Peer
from record import add_output_option, keep_heap, publish, seconds
from torch import Tensor, nn
from tqdm import tqdm

WARM_UP = 2
IMAGE = 224


def _float(model: nn.Module, example: Tensor) -> nn.Module:
    return model.train()


def _fxquant(model: nn.Module, example: Tensor, *, rule: str = "", compiled: bool = False, **how: Any) -> nn.Module:
    import fxquant

    if rule:
        how["recipe"] = fxquant.Recipe.preset("deploy", weight_bits=8, activation_bits=8, rule=rule)
    prepared = fxquant.prepare(model.train(), (example,), qat=True, **how)
    with torch.no_grad():
        prepared(example)
    fxquant.freeze(prepared)  # raises if any quantizer would have sat idle: a step without rounding proves nothing
    return torch.compile(prepared, fullgraph=True) if compiled else prepared


def _compiled(model: nn.Module, example: Tensor) -> nn.Module:
    return torch.compile(model.train(), fullgraph=True)


OURS = {
    "fxquant": {},
    "fxquant learned": {"rule": "lsq"},
    "fxquant whitepaper": {"batch_norm": "whitepaper"},
    "fxquant compiled": {"compiled": True},
    "fxquant learned compiled": {"rule": "lsq", "compiled": True},
}
"""Our rows: ranges that follow, that are learned (LSQ, weights too), batch norms folded in every pass, torch.compile."""
CONTENDERS = {
    peer.name: peer
    for peer in (
        Peer("float", "torch", _float),
        Peer("float compiled", "torch", _compiled),
        *(Peer(name, "fxquant", partial(_fxquant, **how)) for name, how in OURS.items()),
        *QAT,
    )
}


def example_batch(batch: int, image: int) -> tuple[Tensor, Tensor]:
    """A fixed batch of noise images ``(batch, 3, image, image)`` and random labels, NCHW contiguous."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, image, image, generator=generator)
    return images, torch.randint(1000, (batch,), generator=generator)


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], float]:
    """A function that takes one SGD step of ``model`` on the batch and returns the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def build_steps(
    model_name: str, names: list[str], batch: int, image: int
) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """The training step of every contender that runs, and the reason of every one that does not."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(model_name, weights=None)
    images, labels = example_batch(batch, image)
    steps: dict[str, Callable[[], float]] = {}
    skipped: dict[str, str] = {}
    for name in tqdm(names, desc=f"preparing {model_name}", leave=False):
        if reason := CONTENDERS[name].missing:
            skipped[name] = reason
            continue
        trained = CONTENDERS[name].build(copy.deepcopy(model), images)
        steps[name] = training_step(trained, images, labels)
    return steps, skipped


def race(steps: dict[str, Callable[[], float]], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every contender in every round, and its last loss."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    names = list(steps)
    for index in tqdm(range(-WARM_UP, rounds), desc="rounds", leave=False):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            losses[name] = steps[name]()
            if index >= 0:
                times[name].append(time.perf_counter() - start)
    return times, losses


def peak_megabytes(model_name: str, name: str, batch: int, image: int, heap_kept: bool) -> int:
    """Peak resident memory of a fresh process that takes three steps of one contender alone."""
    if heap_kept:
        keep_heap()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    steps, _ = build_steps(model_name, [name], batch, image)
    for _ in range(3):
        steps[name]()
    return _peak_kilobytes() // 1024


def _peak_kilobytes() -> int:
    """This process's own peak; Linux's ``ru_maxrss`` would include that of the process which started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def in_fresh_process(function: Callable[..., int], *arguments: Any) -> int:
    """``function(*arguments)``, computed by a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def model_rows(model_name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one network: one a contender, the float step first."""
    steps, skipped = build_steps(model_name, args.contenders, args.batch, args.image)
    times, losses = race(steps, args.rounds)
    rows = []
    for name in args.contenders:
        row: dict[str, Any] = {"model": model_name, "contender": name}
        if name in skipped:
            rows.append(row | {"ratio": skipped[name]})
            continue
        ratios = [own / base for own, base in zip(times[name], times["float"], strict=True)]
        row["ratio"] = round(statistics.median(ratios), 3)
        row["middle half"] = _middle_half(ratios)
        row["step s"] = seconds(statistics.median(times[name]))
        row["loss"] = round(losses[name], 4)
        if args.memory:
            row["peak MB"] = in_fresh_process(peak_megabytes, model_name, name, args.batch, args.image, args.keep_heap)
        rows.append(row)
    return rows


def _middle_half(ratios: list[float]) -> str | None:
    if len(ratios) < 2:
        return None
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{low:.2f}–{high:.2f}"


def options() -> argparse.Namespace:
    """The command line; the float step is always among the contenders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"], help="torchvision model names")
    parser.add_argument("--batch", type=int, default=16, help="images a step (default: 16)")
    parser.add_argument("--image", type=int, default=IMAGE, help=f"height and width (default: {IMAGE})")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: 15)")
    names = list(CONTENDERS)
    parser.add_argument("--contenders", nargs="+", choices=names, default=names, help=f"default: {', '.join(names)}")
    parser.add_argument("--memory", action="store_true", help="also measure each contender's peak memory, alone")
    parser.add_argument("--keep-heap", action="store_true", help="let glibc keep freed blocks (see README.md)")
    add_output_option(parser, "qat_step")
    args = parser.parse_args()
    args.contenders = list(dict.fromkeys(["float", *args.contenders]))
    return args


def main() -> None:
    """Run the comparison and publish its table."""
    args = options()
    if args.keep_heap:
        keep_heap()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    publish([row for name in args.models for row in model_rows(name, args)], args)


if __name__ == "__main__":
    main()
