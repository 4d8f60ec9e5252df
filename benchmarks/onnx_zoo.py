"""Do torchvision's classifiers load and run as ONNX files, and do they agree? One file a network, two runtimes.

Every network gets weights that carry a signal (see `quantizers_off`), is prepared, calibrated on a few batches of
colour blobs, exported with the default options from an example of one image, and run in ONNX Runtime and OpenVINO with one
image and with two. The figures compare the runtimes' logits with those of the frozen model:

- "SQNR" in decibels, the lower of the two batch sizes. Integers that fall on the other side of a rounding by one step
  go on through the network; deep random networks multiply such steps, trained ones much less (see `onnx_cifar.py`).
- "size" is the file's size over that of the float parameters.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import math
import time
from typing import Any

import torch
import torchvision
from quantizers_off import IMAGE, build, images
from record import add_output_option, publish, seconds
from torch import Tensor
from tqdm import tqdm

import fxquant
from fxquant.errors import FxquantError
from fxquant.export.installed import is_installed
from fxquant.export.sessions import Session, onnxruntime_session, openvino_session
from fxquant.export.to_onnx import OnnxFile, make_onnx

BATCHES = (1, 2)
RUNTIMES = {"onnxruntime": onnxruntime_session, "openvino": openvino_session}


def quantized(name: str) -> tuple[Any, float]:
    """The calibrated network, and the bytes of its float parameters."""
    side = IMAGE.get(name, 224)
    model = build(name)
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    prepared = fxquant.prepare(model, (images(1, side),))
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
        pairs.append((session([x])[0], made.model.run([x])[0]))
    same = [bool((own.argmax(1) == other.argmax(1)).all()) for own, other in pairs]
    return {"SQNR": round(min(sqnr(own, other) for own, other in pairs), 1), "top-1 agrees": all(same)}


def row(name: str, threads: int) -> dict[str, Any]:
    """One network's row."""
    side = IMAGE.get(name, 224)
    prepared, size = quantized(name)
    start = time.perf_counter()
    made = make_onnx(prepared)
    columns: dict[str, Any] = {"model": name, "export s": seconds(time.perf_counter() - start)}
    columns |= {"MB": round(len(made.content) / 1e6, 2), "size": round(len(made.content) / size, 3)}
    columns["free"] = "sizes" if not made.notes else "batch" if len(made.notes) == 1 else "none"
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


def try_row(name: str, threads: int) -> dict[str, Any]:
    """`row`, with an error in the verdict instead of the end of the run."""
    try:
        return row(name, threads)
    except Exception as error:
        message = str(error).strip().splitlines()
        return {"model": name, "verdict": f"{type(error).__name__}: {message[0] if message else ''}"[:200]}
    finally:
        gc.collect()


def parameters(name: str) -> int:
    """How many parameters a network has, by torchvision's own records."""
    return int(torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["*"], metavar="PATTERN", help="names, * and ? allowed")
    parser.add_argument("--largest", type=float, default=math.inf, help="skip networks of more million parameters")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further network after so long")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_output_option(parser, "onnx_zoo")
    return parser.parse_args()


def main() -> None:
    """Take every chosen network the whole way, the smallest first, and publish the table."""
    args = options()
    torch.set_num_threads(args.threads)
    names = torchvision.models.list_models(module=torchvision.models)
    chosen = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in args.models)]
    sizes = {name: parameters(name) for name in chosen}
    chosen = sorted((name for name in chosen if sizes[name] <= args.largest * 1e6), key=sizes.__getitem__)
    if not chosen:
        raise SystemExit(f"no classification model of torchvision matches {' '.join(args.models)}")
    rows, start = [], time.perf_counter()
    bar = tqdm(chosen)
    for name in bar:
        if time.perf_counter() - start > 60 * args.minutes:
            break
        bar.set_description(name)
        rows.append(try_row(name, args.threads))
        columns = dict.fromkeys(column for own in rows for column in own)
        table = [{column: own.get(column) for column in columns} for own in rows]
        write(table, args, left=len(chosen) - len(rows), quiet=len(rows) < len(chosen))
    print("\n".join(f"{value:8g} {what}" for what, value in summarize(rows).items()))


def write(table: list[dict[str, Any]], args: argparse.Namespace, *, left: int, quiet: bool) -> None:
    """Keep what there is after every network; print it at the end."""
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
