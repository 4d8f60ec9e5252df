"""Milliseconds of a call, from fp32 images (or token ids) to fp32 results: fxquant's int8 beside float and other int8 paths.

All contenders of a row live in one process and take turns; a turn is a few calls after one that is not counted, and its
median is kept, or with ``--fastest``, for a machine that others use too, its fastest call. A cell shows the median of a
contender's turns. What does not depend on the number of threads is built once for a network and batch size. The "vs"
columns are of fxquant on torch's operators (its faster form), the "native vs" columns of its own kernels, the "auto vs"
columns of ``compile(runtime="auto")``: medians over the rounds of the other's turn over ours, so whatever else the machine
does weighs on both; more than 1 means that ours is faster. Weights are random and batch norm statistics those of noise:
only speed means something here. "equal" is the share of values for which torch's operators give the very integer that
fxquant's exact reference gives, op by op on the same inputs; no value may be off by more than one ("worst"); "native is
exact" where the native kernels give the whole model's result to the bit.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torchvision
from latency_contenders import CONTENDERS, ON_REQUEST, OURS, AtThreads, Run, integer_model, new_row
from record import add_output_option, publish
from torch import Tensor, nn
from tqdm import tqdm

from fxquant.benchmark.time_limit import OutOfTimeError, time_limit
from fxquant.errors import ExportError

IMAGE, TOKENS = 224, 128
BERT = "bert_base"
MODELS = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0"),
    *("googlenet", "densenet121", "vit_b_16", BERT),
)
TURN = 0.03
"""Seconds that a turn should take."""
LONG = 0.05
"""Seconds of a call that needs no uncounted one before it: what the one before has left behind weighs nothing beside it."""
FEWEST_ROUNDS = 5

IN_TORCH = ("fxquant", "fxquant frozen")
NATIVE = "fxquant native"
AUTO = "fxquant auto"
COMPILED = "compiled"
Row = dict[str, Any]
Missing = dict[str, tuple[str, str]]
"""A word for a contender's cell, and the reason."""


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


def attempt(name: str, missing: Missing, limit: float, make: Callable[[], Any]) -> Any:
    """What ``make`` makes; None where it fails or takes too long, which ``missing`` then tells."""
    try:
        with time_limit(limit):
            return make()
    except OutOfTimeError:
        missing[name] = "time limit", f"not built within {limit:g} s"
    except ExportError as error:  # a runtime that says beforehand that the model is not for it
        missing[name] = "unfit", str(error).splitlines()[0][:200]
    except Exception as error:  # a fact about the contender; the other cells of the row still count
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        missing[name] = "failed", f"{type(error).__name__}: {first[:200]}"
    return None


def build(model: nn.Module, x: Tensor, args: argparse.Namespace) -> tuple[dict[str, AtThreads], Missing]:
    """Every contender, ready to be asked for a run at some number of threads."""
    found: dict[str, AtThreads] = {}
    missing: Missing = {}
    ours = [name for name in args.contenders if name in OURS]
    int8 = attempt(OURS[0], missing, args.time_limit, lambda: integer_model(model, x)) if ours else None
    missing = dict.fromkeys(ours, missing[OURS[0]]) if missing else {}
    for name in tqdm(args.contenders, desc="building", leave=False, disable=None):
        peer, start = CONTENDERS[name], int8 if name in OURS else model
        if name in missing:
            continue
        if peer.missing:
            missing[name] = "not installed", str(peer.missing)
            continue
        made = attempt(name, missing, args.time_limit, lambda p=peer, m=start: p.build(copy.deepcopy(m), x))  # type: ignore[misc]
        if made is not None:
            found[name] = made
    return found, missing


def open_all(
    built: dict[str, AtThreads], x: Tensor, threads: int, args: argparse.Namespace
) -> tuple[dict[str, Run], Missing]:
    """Every contender at that number of threads, called once."""
    runs: dict[str, Run] = {}
    missing: Missing = {}

    def opened(at: AtThreads) -> Run:
        run = at(threads)
        run(x)
        return run

    for name, at in tqdm(built.items(), desc="opening", leave=False, disable=None):
        run = attempt(name, missing, args.time_limit, lambda at=at: opened(at))  # type: ignore[misc]
        if run is not None:
            runs[name] = run
    return runs, missing


def race(
    runs: dict[str, Run], x: Tensor, kept: Callable[..., float], rounds: int, row_seconds: float
) -> dict[str, list[float]]:
    """Each contender's turns, in seconds a call; no further round begins once ``row_seconds`` have gone."""
    names, began = list(runs), time.perf_counter()
    usual = {name: max(min(_calls(runs[name], x, 1)), 1e-6) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
        if index >= FEWEST_ROUNDS and time.perf_counter() - began > row_seconds:
            break
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            if usual[name] < LONG:
                runs[name](x)
            times[name].append(kept(_calls(runs[name], x, max(1, min(20, int(TURN / usual[name]))))))
    return times


def _calls(run: Run, x: Tensor, calls: int) -> list[float]:
    found = []
    for _ in range(calls):
        start = time.perf_counter()
        run(x)
        found.append(time.perf_counter() - start)
    return found


def equal_share(model: nn.Module, x: Tensor) -> Row:
    """The share of integers that are exactly the reference's, the largest difference of any in steps, and native's bits."""
    import fxquant
    from fxquant.kernels.agreement import agreement
    from fxquant.kernels.runner import use_kernels

    x = x[:1]
    int8 = integer_model(model, x)
    found = [a for a in agreement(int8, x) if a.worst >= 1 or a.equal == a.values]
    share = sum(a.equal for a in found) / sum(a.values for a in found)
    use_kernels(int8, "reference")
    try:
        wanted = int8(x)
        native = torch.equal(fxquant.compile(int8, (x,), runtime="native")(x), wanted)
        if wanted.unique().numel() == 1:  # torchvision's ViT begins with a head of zeros
            native = None
    except ExportError:
        native = None
    return {"equal": f"{100 * share:.4f} %", "worst": int(max(a.worst for a in found)), "native is exact": native}


def ratios(times: dict[str, list[float]]) -> Row:
    """How many times as fast as each peer fxquant is: on torch's operators, on its own kernels, and as ``auto`` has it."""

    def ratio(other: str, own: str) -> float:
        paired = [base / mine for base, mine in zip(times[other], times[own], strict=True)]
        return float(f"{statistics.median(paired):.3g}")

    found: Row = {}
    middle = {name: statistics.median(turns) for name, turns in times.items()}
    for title, ours in (("vs", IN_TORCH), ("native vs", (NATIVE,))):
        best = min((name for name in ours if name in times), key=middle.__getitem__, default=None)
        if best is not None:
            found |= {f"{title} {peer}": ratio(peer, best) for peer in CONTENDERS if peer in times and peer not in OURS}
    floats = {"float", COMPILED} & times.keys()
    peers = times.keys() - floats - set(OURS)
    for title, others in (("best peer", peers), ("best float", floats)):
        if AUTO in times and others:
            other = min(others, key=middle.__getitem__)
            found |= {title: other, f"auto vs {title}": ratio(other, AUTO)}
    return found


def row_of(
    key: tuple[str, int, int], x: Tensor, built: dict[str, AtThreads], missing: Missing, args: argparse.Namespace
) -> tuple[Row, Row]:
    """One line of the table, and why some of its cells are empty."""
    name, batch, threads = key
    gc.collect()
    new_row(threads)
    load = os.getloadavg()[0]
    asked = {who: at for who, at in built.items() if who != COMPILED or threads in args.compiled_threads}
    runs, more = open_all(asked, x, threads, args)
    missing = {**missing, **more}
    kept = min if args.fastest else statistics.median
    times = race(runs, x, kept, args.rounds, args.row_seconds) if runs else {}
    row: Row = {"model": name, "batch": batch, "threads": threads}
    for contender in args.contenders:
        turns = times.get(contender)
        told = missing[contender][0] if contender in missing else None
        row[contender] = told if turns is None else float(f"{1e3 * statistics.median(turns):.3g}")
    if AUTO in runs:
        row["auto is"] = runs[AUTO].runtime  # type: ignore[attr-defined]
    rounds = max((len(turns) for turns in times.values()), default=0)
    return {**row, **ratios(times), "rounds": rounds, "load": round(load, 1)}, {
        who: why for who, (_, why) in missing.items()
    }


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
    """Milliseconds, how they compare (on torch's operators and natively), and the rest."""
    every = list(dict.fromkeys(title for row in rows for title in row))
    about = ["model", "batch", "threads"]
    ours = [title for title in every if title.startswith(("vs ", "native vs "))]
    rest = [title for title in every if title not in about and title not in CONTENDERS and title not in ours]
    return [[*about, *CONTENDERS], [*about, *ours], [*about, *rest]]


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=f"torchvision names, or {BERT}")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="images a call (default: 1 8)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="default: 1 2")
    told = "of --threads, where the float model is also compiled, which takes long (default: the largest)"
    parser.add_argument("--compiled-threads", nargs="*", type=int, metavar="N", help=told)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (default: 15)")
    told = f"after which no further round of a row begins, but for the first {FEWEST_ROUNDS} (default: 30)"
    parser.add_argument("--row-seconds", type=float, default=30.0, metavar="S", help=told)
    parser.add_argument("--fastest", action="store_true", help="keep the fastest call of a turn, not its median")
    names = [name for name in CONTENDERS if name not in ON_REQUEST]
    told = f"default: {', '.join(names)}; on request: {', '.join(ON_REQUEST)}"
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=names, help=told)
    limit = "seconds a contender may take to build and to run once (default: 600)"
    parser.add_argument("--time-limit", type=float, default=600.0, metavar="S", help=limit)
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has, and go on after them")
    parser.add_argument("--no-agreement", action="store_true", help="leave out the columns equal and worst")
    add_output_option(parser, "latency")
    args = parser.parse_args()
    if args.compiled_threads is None:
        args.compiled_threads = [max(args.threads)]
    return args


def main() -> None:
    """Run the comparison and publish its table; each row is written when it is finished."""
    args = options()
    warnings.filterwarnings("ignore")  # every contender but float is deprecated somewhere
    logging.disable(logging.WARNING)
    rows, reasons = kept_rows(args)
    with torch.no_grad():
        for name in args.models:
            wanted = [(name, batch, threads) for batch in args.batches for threads in args.threads]
            wanted = [key for key in wanted if not set(args.contenders) <= rows.get(key, {}).keys()]
            if not wanted:
                continue
            new_row(max(args.threads))
            model = example_model(name)
            agrees = {} if args.no_agreement else equal_share(model, example_input(name, 1))
            for batch in dict.fromkeys(batch for _, batch, _ in wanted):
                new_row(max(args.threads))
                x = example_input(name, batch)
                built, missing = build(model, x, args)
                for key in [key for key in wanted if key[1] == batch]:
                    row, why = row_of(key, x, built, missing, args)
                    rows[key] = {**row, **agrees}
                    reasons[" ".join(map(str, key))] = why
                    tqdm.write(" ".join(f"{title}={value}" for title, value in rows[key].items()))
                    publish(list(rows.values()), args, quiet=True, reasons=reasons)
    publish(list(rows.values()), args, columns=columns_of(rows.values()), reasons=reasons)
    for about, why in reasons.items():
        for contender, reason in why.items():
            print(f"{about}: {contender}: {reason}")
    print(f"written to {Path(args.output).name}")
    if any(row.get(name) in ("failed", "time limit") for row in rows.values() for name in OURS):
        raise SystemExit("fxquant itself failed in some rows, see above")


if __name__ == "__main__":
    main()
