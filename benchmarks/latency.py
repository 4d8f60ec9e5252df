"""Milliseconds of a call, from fp32 images (or token ids) to fp32 results: fxquant's int8 beside float and other int8 paths.

All contenders of a row live in one process and take turns; a turn is a few calls after one that is not counted, and its
median is kept, or with ``--fastest``, for a machine that others use too, its fastest call. A cell shows the median of a
contender's turns. The "vs" columns are of fxquant in PyTorch alone (its faster form), the "auto vs" columns of
``compile(runtime="auto")``: medians over the rounds of the other's turn over ours, so whatever else the machine does
weighs on both; more than 1 means that ours is faster. Weights are random and batch norm statistics those of noise: only
speed means something here. "equal" is the share of values for which fxquant's kernels give the very integer that its
exact reference gives, op by op on the same inputs; no value may be off by more than one ("worst").
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torchvision
from latency_contenders import CONTENDERS, ON_REQUEST, OURS, Run, integer_model, new_row
from record import add_output_option, publish
from torch import Tensor, nn
from tqdm import tqdm

from fxquant.benchmark.time_limit import OutOfTimeError, time_limit

IMAGE, TOKENS = 224, 128
BERT = "bert_base"
MODELS = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0"),
    *("googlenet", "densenet121", "vit_b_16", BERT),
)
TURN = 0.03
"""Seconds that a turn should take."""

IN_TORCH = ("fxquant", "fxquant frozen")
AUTO = "fxquant auto"
Row = dict[str, Any]


class Encoder(nn.Module):
    """BERT-base from token ids to the last hidden state, with random weights."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.bert = BertModel(BertConfig(), add_pooling_layer=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states of shape (batch, tokens, 768)."""
        return self.bert(ids, return_dict=False)[0]


def example_model(name: str) -> nn.Module:
    """A network with random weights, and batch norm statistics that fit noise images."""
    torch.manual_seed(0)
    if name == BERT:
        return Encoder().eval()
    model = torchvision.models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    if name == "googlenet":
        model.aux_logits, model.aux1, model.aux2 = False, None, None
    if any(isinstance(part, nn.BatchNorm2d) for part in model.modules()):
        with torch.no_grad():
            for _ in range(3):
                model.train()(torch.randn(4, 3, IMAGE, IMAGE))
    return model.eval()


def example_input(name: str, batch: int) -> Tensor:
    """Noise images, or any tokens."""
    generator = torch.Generator().manual_seed(1)
    if name == BERT:
        return torch.randint(0, 30000, (batch, TOKENS), generator=generator)
    return torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)


def build(model: nn.Module, x: Tensor, args: argparse.Namespace, threads: int) -> tuple[dict[str, Run], Row]:
    """Every contender that runs; for every one that does not, a word for its cell and the reason."""
    runs: dict[str, Run] = {}
    missing: Row = {}
    for name in tqdm(args.contenders, desc="building", leave=False, disable=None):
        if CONTENDERS[name].missing:
            missing[name] = "not installed", str(CONTENDERS[name].missing)
            continue
        try:
            with time_limit(args.time_limit):
                run = CONTENDERS[name].build(copy.deepcopy(model), x, threads)  # type: ignore[call-arg]
                run(x)
        except OutOfTimeError:
            missing[name] = "time limit", f"not built within {args.time_limit:g} s"
        except Exception as error:  # a fact about the contender; the other cells of the row still count
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            missing[name] = "failed", f"{type(error).__name__}: {first[:200]}"
        else:
            runs[name] = run
    return runs, missing


def race(runs: dict[str, Run], x: Tensor, rounds: int, kept: Callable[..., float]) -> dict[str, list[float]]:
    """Each contender's turns, in seconds a call."""
    names = list(runs)
    calls = {name: max(1, min(20, int(TURN / max(_call(runs[name], x, 2, min), 1e-6)))) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(_call(runs[name], x, calls[name], kept))
    return times


def _call(run: Run, x: Tensor, calls: int, kept: Callable[..., float]) -> float:
    run(x)
    found = []
    for _ in range(calls):
        start = time.perf_counter()
        run(x)
        found.append(time.perf_counter() - start)
    return kept(found)


def equal_share(model: nn.Module, x: Tensor) -> Row:
    """The share of integers that are exactly the reference's, and the largest difference of any, in steps."""
    from fxquant.kernels.agreement import agreement

    x = x[:1]
    found = [a for a in agreement(integer_model(model, x, 1), x) if a.worst >= 1 or a.equal == a.values]
    share = sum(a.equal for a in found) / sum(a.values for a in found)
    return {"equal": f"{100 * share:.4f} %", "worst": int(max(a.worst for a in found))}


def ratios(times: dict[str, list[float]]) -> Row:
    """How many times as fast as each peer fxquant is: in PyTorch alone, and in the runtime that ``auto`` takes."""

    def ratio(other: str, own: str) -> float:
        paired = [base / mine for base, mine in zip(times[other], times[own], strict=True)]
        return float(f"{statistics.median(paired):.3g}")

    found: Row = {}
    middle = {name: statistics.median(turns) for name, turns in times.items()}
    ours = [name for name in IN_TORCH if name in times]
    if ours:
        best = min(ours, key=middle.__getitem__)
        found |= {f"vs {peer}": ratio(peer, best) for peer in CONTENDERS if peer in times and peer not in OURS}
    floats = {"float", "compiled"} & times.keys()
    peers = times.keys() - floats - set(OURS)
    for title, others in (("best peer", peers), ("best float", floats)):
        if AUTO in times and others:
            other = min(others, key=middle.__getitem__)
            found |= {title: other, f"auto vs {title}": ratio(other, AUTO)}
    return found


def row_of(name: str, model: nn.Module, batch: int, threads: int, args: argparse.Namespace) -> tuple[Row, Row]:
    """One line of the table, and why some of its cells are empty."""
    gc.collect()
    new_row(threads)
    x = example_input(name, batch)
    load = os.getloadavg()[0]
    runs, missing = build(model, x, args, threads)
    times = race(runs, x, args.rounds, min if args.fastest else statistics.median) if runs else {}
    row: Row = {"model": name, "batch": batch, "threads": threads}
    for contender in args.contenders:
        turns = times.get(contender)
        row[contender] = missing[contender][0] if turns is None else float(f"{1e3 * statistics.median(turns):.3g}")
    if AUTO in runs:
        row["auto is"] = runs[AUTO].runtime  # type: ignore[attr-defined]
    return {**row, **ratios(times), "load": round(load, 1)}, {who: why for who, (_, why) in missing.items()}


def key_of(row: Row) -> tuple[str, int, int]:
    """What a row is about."""
    return row["model"], row["batch"], row["threads"]


def kept_rows(args: argparse.Namespace) -> tuple[dict[Any, Row], dict[str, Row]]:
    """With ``--resume``, the rows that the file has already, by what they are about, and its reasons."""
    if not args.resume or not args.output.exists():
        return {}, {}
    record = json.loads(args.output.read_text(encoding="utf-8"))
    return {key_of(row): row for row in record["rows"]}, record.get("reasons", {})


def columns_of(rows: Iterable[Row]) -> list[list[str]]:
    """Two tables: milliseconds, and what follows from them."""
    every = list(dict.fromkeys(title for row in rows for title in row))
    about = ["model", "batch", "threads"]
    rest = [title for title in every if title not in about and title not in CONTENDERS]
    return [[*about, *CONTENDERS], [*about, *rest]]


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=f"torchvision names, or {BERT}")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="images a call (default: 1 8)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="default: 1 2")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (default: 15)")
    parser.add_argument("--fastest", action="store_true", help="keep the fastest call of a turn, not its median")
    names = [name for name in CONTENDERS if name not in ON_REQUEST]
    told = f"default: {', '.join(names)}; on request: {', '.join(ON_REQUEST)}"
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=names, help=told)
    limit = "seconds a contender may take to build and to run once (default: 600)"
    parser.add_argument("--time-limit", type=float, default=600.0, metavar="S", help=limit)
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has, and go on after them")
    parser.add_argument("--no-agreement", action="store_true", help="leave out the columns equal and worst")
    add_output_option(parser, "latency")
    return parser.parse_args()


def main() -> None:
    """Run the comparison and publish its table; each row is written when it is finished."""
    args = options()
    warnings.filterwarnings("ignore")  # every contender but float is deprecated somewhere
    rows, reasons = kept_rows(args)
    with torch.no_grad():
        for name in args.models:
            wanted = [(name, batch, threads) for batch in args.batches for threads in args.threads]
            wanted = [key for key in wanted if not set(args.contenders) <= rows.get(key, {}).keys()]
            if not wanted:
                continue
            model = example_model(name)
            agrees = {} if args.no_agreement else equal_share(model, example_input(name, 1))
            for key in wanted:
                row, why = row_of(name, model, key[1], key[2], args)
                rows[key] = {**row, **agrees}
                reasons[" ".join(map(str, key))] = why
                tqdm.write(" ".join(f"{title}={value}" for title, value in rows[key].items()))
                publish(list(rows.values()), args, quiet=True, reasons=reasons)
    publish(list(rows.values()), args, columns=columns_of(rows.values()), reasons=reasons)
    for key, why in reasons.items():
        for contender, reason in why.items():
            print(f"{key}: {contender}: {reason}")
    print(f"written to {Path(args.output).name}")
    if any(contender in OURS for why in reasons.values() for contender in why):
        raise SystemExit("fxquant itself failed in some rows, see above")


if __name__ == "__main__":
    main()
