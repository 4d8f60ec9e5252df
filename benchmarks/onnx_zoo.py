"""Do torchvision's classifiers load and run as ONNX files, and do they agree? One file a network, two runtimes.

Every network gets weights that carry a signal (see `quantizers_off`), is prepared, calibrated on a few batches of
colour blobs, exported with the default options from an example of one image, and run in ONNX Runtime and OpenVINO with one
image and with two. The figures compare the runtimes' logits with those of the frozen model:

- "SQNR" in decibels, the lower of the two batch sizes. Integers that fall on the other side of a rounding by one step
  go on through the network; deep random networks multiply such steps, trained ones much less (see `onnx_cifar.py`).
- "size" is the file's size over that of the float parameters.
- "free" is what may differ from call to call, by the input's shape in the file.

Each network has a process of its own, with limits on its time and memory; what exceeds one says so in its row. ``--resume``
goes on after the rows that the file has.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import resource
import subprocess
import sys
import time
from typing import Any

import onnx
import torch
import torchvision
from quantizers_off import IMAGE, build, images
from record import add_output_option, publish, seconds
from torch import Tensor
from tqdm import tqdm

import fxquant
from fxquant.errors import ExportError, FxquantError
from fxquant.export.to_onnx import OnnxFile, make_onnx
from fxquant.installed import is_installed
from fxquant.runtimes.onnxruntime import onnxruntime_session
from fxquant.runtimes.openvino import openvino_session
from fxquant.runtimes.runtime import Session

BATCHES = (1, 2)
RUNTIMES = {"onnxruntime": onnxruntime_session, "openvino": openvino_session}


def quantized(name: str, target: str) -> tuple[Any, float]:
    """The calibrated network, and the bytes of its float parameters."""
    side = IMAGE.get(name, 224)
    model = build(name)
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    prepared = fxquant.prepare(model, (images(1, side),), target=target)
    return fxquant.calibrate(prepared, [images(batch, side) for batch in (4, 3)], progress=False), size


def sqnr(actual: Tensor, expected: Tensor) -> float:
    """Signal to difference in decibels."""
    noise = float((actual - expected).double().square().sum())
    return math.inf if not noise else 10 * math.log10(float(expected.double().square().sum()) / noise)


def agreement(session: Session, made: OnnxFile, side: int) -> dict[str, float]:
    """The lowest figures of all batch sizes."""
    pairs = []
    for batch in BATCHES:
        x = images(batch, side)
        own, expected = session([x])[0], made.model.reference_outputs([x])[0]
        if own.shape != expected.shape:
            raise ExportError(f"gives {list(own.shape)} instead of {list(expected.shape)} for {batch} images")
        pairs.append((own, expected))
    same = [bool((own.argmax(1) == other.argmax(1)).all()) for own, other in pairs]
    return {"SQNR": round(min(sqnr(own, other) for own, other in pairs), 1), "top-1 agrees": all(same)}


def row(name: str, target: str, threads: int) -> dict[str, Any]:
    """One network's row."""
    side = IMAGE.get(name, 224)
    prepared, size = quantized(name, target)
    start = time.perf_counter()
    made = make_onnx(prepared)
    columns: dict[str, Any] = {"model": name, "export s": seconds(time.perf_counter() - start)}
    columns |= {"MB": round(len(made.content) / 1e6, 2), "size": round(len(made.content) / size, 3)}
    columns["free"] = free_sizes(made.content)
    for runtime, open_session in RUNTIMES.items():
        if not is_installed(runtime):
            columns[runtime] = "not installed"
            continue
        try:
            figures = agreement(open_session(made.content, threads), made, side)
            columns[f"{runtime} dB"] = figures["SQNR"]
            columns[f"{runtime} top-1"] = figures["top-1 agrees"]
        except FxquantError as error:
            columns[runtime] = str(error).splitlines()[0][:100]
    return {**columns, "verdict": "ok"}


def free_sizes(content: bytes) -> str:
    """What may differ from call to call: ``sizes`` (of images too), ``batch`` or ``none``."""
    batch, _, *sides = onnx.load_from_string(content).graph.input[0].type.tensor_type.shape.dim
    return "sizes" if all(side.dim_param for side in sides) else "batch" if batch.dim_param else "none"


def work(name: str, args: argparse.Namespace) -> None:
    """In a process of its own: print the row of ``name`` as one line of JSON, with an error as the verdict."""
    if args.memory is not None:
        most = int(args.memory * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    torch.set_num_threads(args.threads)
    try:
        made = row(name, args.target, args.threads)
    except MemoryError:
        made = failed(name, f"stopped: more than {args.memory:g} GiB")
    except Exception as error:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        is_memory = "allocate memory" in str(error) or "bad_alloc" in str(error)
        told = f"stopped: more than {args.memory:g} GiB" if is_memory else f"{type(error).__name__}: {text}"[:200]
        made = failed(name, told)
    made["peak GiB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
    print(json.dumps(made))


def failed(name: str, why: str) -> dict[str, Any]:
    """The row of a network that has no figures."""
    return {"model": name, "verdict": why}


def row_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The row that a process made, or why it made none."""
    command = [sys.executable, __file__, "--work", name, "--threads", str(args.threads), "--target", args.target]
    command += [] if args.memory is None else ["--memory", str(args.memory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.seconds, check=False)
    except subprocess.TimeoutExpired:
        return failed(name, f"stopped: more than {args.seconds:g} s")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return failed(name, f"the process died (exit {done.returncode}): {done.stderr.strip()[-120:]}")
    made: dict[str, Any] = json.loads(lines[-1])
    return made


def parameters(name: str) -> int:
    """How many parameters a network has, by torchvision's own records."""
    return int(torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["*"], metavar="PATTERN", help="names, * and ? allowed")
    parser.add_argument("--largest", type=float, help="skip networks of more million parameters")
    parser.add_argument("--minutes", type=float, help="begin no further network after so long")
    parser.add_argument("--seconds", type=float, metavar="S", help="the most a network may take")
    parser.add_argument("--memory", type=float, metavar="GIB", help="the most a network may hold")
    parser.add_argument("--target", default="x86", help="prepare for this target (default: x86)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has, but those that failed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", help=argparse.SUPPRESS)
    add_output_option(parser, "onnx_zoo")
    return parser.parse_args()


def main() -> None:
    """Take every chosen network the whole way, the smallest first, and publish the table."""
    args = options()
    if args.work:
        work(args.work, args)
        return
    torch.set_num_threads(args.threads)
    names = torchvision.models.list_models(module=torchvision.models)
    chosen = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in args.models)]
    sizes = {name: parameters(name) for name in names}
    names.sort(key=sizes.__getitem__)
    chosen = [name for name in names if name in chosen and sizes[name] <= (args.largest or math.inf) * 1e6]
    if not chosen:
        raise SystemExit(f"no classification model of torchvision matches {' '.join(args.models)}")
    rows, start = kept_rows(args), time.perf_counter()
    bar = tqdm([name for name in chosen if name not in rows])
    for name in bar:
        if time.perf_counter() - start > 60 * (args.minutes or math.inf):
            break
        bar.set_description(name)
        rows[name] = row_of(name, args)
        write([rows[own] for own in names if own in rows], args, left=len(set(chosen) - set(rows)), quiet=True)
    table = [rows[name] for name in names if name in rows]
    write(table, args, left=len(set(chosen) - set(rows)), quiet=False)
    print("\n".join(f"{value:8g} {what}" for what, value in summarize(table).items()))


def kept_rows(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """With ``--resume``, the finished rows that the file has already, by their networks."""
    if not args.resume or not args.output.exists():
        return {}
    record = json.loads(args.output.read_text(encoding="utf-8"))
    if record["settings"].get("target") != args.target:
        raise SystemExit(f"{args.output.name} holds rows for another target than {args.target}: give another --output.")
    return {own["model"]: own for own in record["rows"] if own["verdict"] == "ok"}


def write(rows: list[dict[str, Any]], args: argparse.Namespace, *, left: int, quiet: bool) -> None:
    """Keep what there is after every network; print it at the end."""
    columns = dict.fromkeys(column for own in rows for column in own)
    table = [{column: own.get(column) for column in columns} for own in rows]
    publish(table, args, quiet=quiet, summary=summarize(table) | {"not reached": left})


def summarize(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many were tried, export, and run in each runtime, and the worst figures."""
    done = [own for own in rows if own["verdict"] == "ok"]
    summary: dict[str, float] = {"networks": len(rows), "exported": len(done)}
    for runtime in RUNTIMES:
        figures = [own[f"{runtime} dB"] for own in done if own.get(f"{runtime} dB") is not None]
        summary[f"ran in {runtime}"] = len(figures)
        summary[f"lowest SQNR in {runtime}"] = min(figures, default=math.nan)
    summary["largest size over float"] = max((own["size"] for own in done), default=math.nan)
    return summary


if __name__ == "__main__":
    main()
