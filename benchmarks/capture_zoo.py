"""Is any model captured, and does it still compute the same? torchvision's, timm's and transformers' networks.

Each network is prepared for QAT (nothing is folded) from its own code, and with quantizers off compared bit for bit with
the original: at the example, at another batch size, at another image size or length where the original takes one, and in
train mode under a fixed seed, outputs and buffers (BatchNorm statistics). Weights carry a signal to the output
(`zoo_signal.randomize`); "signal" is the share of the output that depends on the input, since where it is small, equality
says little. Nothing is downloaded.

- verdict: ``whole`` (one graph), ``islands`` (parts run their author's code), ``refused`` (an error fxquant raises on
  purpose), ``failed`` (any other error, a crash, the time limit) or ``too large`` (not tried);
- MACs: the share of convolutions' and linear layers' multiply-accumulates that run inside fake-quant modules, counted
  while both models run at the example, by watching which ops are dispatched; products of activations (attention
  scores) count apart, under "products";
- capture / forward: seconds of capture over one plain forward of the example; "peak MiB" is what resident memory
  rises to during capture over what it was with the model built. "others" is how many cores other processes took
  meanwhile: a ratio counts only below 0.3, because contention slows a forward on two threads far more than a capture;

torch's fast path of ``nn.MultiheadAttention`` and ``nn.TransformerEncoder`` is switched off for all comparisons: it runs
other kernels that round otherwise.

Peers get the same model and inputs: ``torch.fx.symbolic_trace`` (where it fails, once more with forward's unused
arguments at their defaults), ``prepare_fx`` (it folds BatchNorm, so its bits may differ for that reason alone: the
difference tells), ``torch.export`` with a dynamic batch, and static where that fails.

Every model runs in a worker process with limits of time and memory; a row is appended to a JSON-lines file as it comes,
so that ``--resume`` goes on where a run ended, and ``--merge`` publishes what several shards measured.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import threading
from contextlib import suppress
from pathlib import Path

from capture_measures import Row
from capture_study import COMPARISONS, PEERS
from capture_worker import Worker
from record import RESULTS, add_output_option, publish, seconds
from tabulate import tabulate
from tqdm import tqdm
from zoo_cases import Entry
from zoo_models import FAMILIES, entries

LEAST_SIGNAL = 1e-2
MOST_OTHERS = 0.3  # cores: with both taken by others, a forward has been seen to take 50 times as long
LEAST_MACS = {"detection": 0.90, "optical_flow": 0.90}  # of the other kinds: 0.99


def measure_all(chosen: list[Entry], rows_file: Path, args: argparse.Namespace) -> None:
    """Measure ``chosen`` with ``args.jobs`` workers and append each row to ``rows_file``."""
    options = {name: getattr(args, name) for name in ("limit", "peer_limit", "peers", "largest", "memory", "debug")}
    options["threads"] = max(1, (os.cpu_count() or 1) // args.jobs)
    waiting: queue.Queue[Entry] = queue.Queue()
    for entry in chosen:
        waiting.put(entry)
    bar, lock = tqdm(total=len(chosen)), threading.Lock()

    def serve() -> None:
        worker = Worker(options, args.lives)
        try:
            while True:
                try:
                    entry = waiting.get_nowait()
                except queue.Empty:
                    return
                row = worker.measure(entry)
                with lock:
                    with rows_file.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    bar.update()
                    bar.set_description(f"{entry.model}: {row['verdict'][:60]}")
        finally:
            worker.stop()

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(args.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bar.close()


def read_rows(files: list[Path]) -> list[Row]:
    """The rows of ``files``, the last one of each model with the peers that an earlier one tried, in order."""
    found: dict[tuple[str, str, str], Row] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            with suppress(ValueError):
                row = json.loads(line)
                key = row["family"], row["kind"], row["model"]
                earlier = {peer: found[key][peer] for peer in PEERS if peer in found.get(key, ())}
                found[key] = {**earlier, **row}
    order = {family: index for index, family in enumerate(FAMILIES)}
    return [found[key] for key in sorted(found, key=lambda key: (order[key[0]], *key[1:]))]


def flat(row: Row) -> Row:
    """A row without what is empty or follows from the rest, its peers in one cell each."""
    shown = {
        name: value
        for name, value in row.items()
        if value not in (None, [], "") and name not in ("ci", *PEERS, "total s", "outputs", "parameters M", "model MiB")
    }
    if isinstance(row.get("input"), list):
        shown["input"] = "×".join(map(str, row["input"]))
    if row.get("causes"):
        shown["causes"] = "; ".join(row["causes"])
    if row.get("difference") == float("inf"):
        shown["difference"] = "other structure"
    shown["verdict"] = row["verdict"][:160]
    if (ratio := capture_ratio(row)) is not None:
        shown["capture / forward"] = seconds(ratio)
    for name in PEERS:
        if name in row:
            peer = row[name]
            bits = [{True: "same", False: "differs"}.get(peer.get(what), "error") for what in ("example", "batch")]
            made = peer.get("verdict", "").startswith(("ok", "static"))
            shown[name] = peer.get("verdict", "")[:80]
            if made:
                shown[name] = f"{peer['verdict']}: {'/'.join(bits)}, {peer['s']:g} s"
    return shown


def capture_ratio(row: Row) -> float | None:
    """Seconds of capture (of prepare, where capture cannot be timed alone) over one forward, where both were undisturbed."""
    if (row.get("others") or 0) > MOST_OTHERS:
        return None
    took = row.get("capture s", row.get("prepare s"))
    return took / row["forward s"] if took is not None and row.get("forward s") and captured(row) else None


def captured(row: Row) -> bool:
    """Whether a prepared model came out."""
    return row["verdict"] in ("whole", "islands")


def same_everywhere(row: Row) -> bool:
    """Whether all comparisons that could be made found the same bits."""
    found = [row[what] for what in COMPARISONS if row.get(what) is not None]
    return row.get("example") is True and row.get("batch") is True and all(same is True for same in found)


def summarize(rows: list[Row]) -> list[Row]:
    """One line a kind of network."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        name = row["kind"] if row["kind"] == row["family"] else f"{row['family']} {row['kind']}"
        kinds.setdefault(name, []).append(row)
    return [_summary(name, own) for name, own in kinds.items()]


def _summary(name: str, rows: list[Row]) -> Row:
    tried = [row for row in rows if not row["verdict"].startswith("too large")]
    least = LEAST_MACS.get(rows[0]["kind"], 0.99)
    timed = [row for row in rows if capture_ratio(row) is not None]
    ratios = sorted(capture_ratio(row) for row in timed)
    beyond = [row.get("capture s", row.get("prepare s")) - 3 * row["forward s"] for row in timed]
    line = {
        "kind": name,
        "models": len(rows),
        "too large": len(rows) - len(tried),
        "captured": sum(captured(row) for row in rows),
        "whole": sum(row["verdict"] == "whole" for row in rows),
        "refused": sum(row["verdict"].startswith("refused") for row in rows),
        "failed": sum(row["verdict"].startswith("failed") for row in rows),
        "same bits": sum(same_everywhere(row) for row in rows),
        "trained": sum(row.get("train") is not None for row in rows),
        "MACs enough": sum((row.get("MACs") or 0) >= least for row in rows),
        "least MACs": least,
        "weak signal": sum(row.get("signal") is not None and row["signal"] < LEAST_SIGNAL for row in rows),
        "timed alone": len(ratios),
        "capture / forward": seconds(statistics.median(ratios)) if ratios else None,
        "beyond 3 forwards s": seconds(statistics.median(beyond)) if beyond else None,
        "90 %": seconds(ratios[min(len(ratios) - 1, int(0.9 * len(ratios)))]) if ratios else None,
    }
    for peer in PEERS:
        own = [row[peer] for row in rows if peer in row]
        made = [one for one in own if one.get("verdict", "").startswith(("ok", "static"))]
        if own:
            line[peer] = len(made)
            line[f"{peer} same"] = sum(one.get("example") is True and one.get("batch") is True for one in made)
            line[f"{peer} s"] = seconds(statistics.median(one["s"] for one in made)) if made else None
    return line


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="some of torchvision,timm,transformers")
    parser.add_argument("--models", nargs="+", default=["*"], metavar="GLOB", help="names, * and ? allowed")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="classification, detection, video, …")
    parser.add_argument("--timm", choices=("families", "all"), default="families", help="one a file, or all of them")
    parser.add_argument("--ci", action="store_true", help="the small set only")
    parser.add_argument("--list", action="store_true", help="say what would run")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="the I-th of N parts, counted from 1")
    parser.add_argument("--jobs", type=int, default=1, help="workers at a time (default 1); timings need 1")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--limit", type=float, default=300, help="seconds for a model (default 300)")
    parser.add_argument("--peer-limit", type=float, default=60, help="seconds for each peer (default 60)")
    parser.add_argument("--largest", type=float, default=1.5, help="GiB of parameters of a timm model (default 1.5)")
    parser.add_argument("--memory", type=float, default=14, help="GiB a worker may allocate, 0: any (default 14)")
    parser.add_argument("--lives", type=int, default=20, help="models that one worker measures (default 20)")
    parser.add_argument("--resume", action="store_true", help="keep the rows there are and measure the others")
    parser.add_argument("--retry", action="store_true", help="with --resume: measure failed rows again")
    parser.add_argument("--rows", type=Path, help="the JSON-lines file (default: results/capture_zoo.jsonl)")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="JSONL", help="measure nothing; publish these rows")
    parser.add_argument("--debug", action="store_true", help="show the workers' errors with their tracebacks")
    add_output_option(parser, "capture_zoo")
    args = parser.parse_args()
    args.families = args.families.split(",")
    if unknown := set(args.families) - set(FAMILIES):
        parser.error(f"--families: {', '.join(sorted(unknown))} is none of {', '.join(FAMILIES)}")
    try:
        index, parts = (int(part) for part in args.shard.split("/"))
    except ValueError:
        parser.error("--shard takes I/N")
    if not 1 <= index <= parts:
        parser.error("--shard takes I/N with I from 1 to N")
    args.part = (index - 1, parts)
    return args


def choose(args: argparse.Namespace) -> list[Entry]:
    """The networks of this run, in the order of `entries`."""
    chosen = entries(args.families, args.models, args.timm)
    chosen = [entry for entry in chosen if (entry.ci or not args.ci) and (not args.kinds or entry.kind in args.kinds)]
    if not chosen:
        raise SystemExit("no network matches; --list with fewer options says which there are")
    index, parts = args.part
    return chosen[index::parts]


def main() -> None:
    """Measure every chosen network and publish the table and its summary."""
    args = options()
    if args.merge:
        finish(read_rows(args.merge), args)
        return
    chosen = choose(args)
    if args.list:
        print("\n".join(f"{entry.family} {entry.kind} {entry.model}{' ci' if entry.ci else ''}" for entry in chosen))
        return
    index, parts = args.part
    shard = "" if parts == 1 else f".{index + 1}of{parts}"
    rows_file = args.rows or RESULTS / f"capture_zoo{shard}.jsonl"
    rows_file.parent.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        rows_file.unlink(missing_ok=True)
    there = {(row["family"], row["kind"], row["model"]) for row in read_rows([rows_file])
             if not (args.retry and row["verdict"].startswith("failed"))}  # fmt: skip
    measure_all([entry for entry in chosen if (entry.family, entry.kind, entry.model) not in there], rows_file, args)
    wanted = {(entry.family, entry.kind, entry.model) for entry in chosen}
    finish([row for row in read_rows([rows_file]) if (row["family"], row["kind"], row["model"]) in wanted], args)


def finish(rows: list[Row], args: argparse.Namespace) -> None:
    """Print and write the rows and the summary."""
    summary = summarize(rows)
    hidden = ("part", "rows", "merge", "list", "resume", "retry", "debug")
    shown = argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in hidden})
    publish([flat(row) for row in rows], shown, summary=summary)
    print("\n" + tabulate(summary, headers="keys", missingval="–"))


if __name__ == "__main__":
    main()
