"""Top-1 of the CIFAR ResNets as ONNX files in ONNX Runtime and OpenVINO, beside our integer model's.

Models and calibration are those of `ptq_cifar.py`. One file a network and target, exported from an example of one image,
is run on the test images one by one and eight by eight, and compared with the integer model of that same target.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from cifar import DATA, DEPTHS, Cifar10, calibration_batches, load_cifar10, load_resnet
from ptq_cifar import percent, predictions
from record import add_output_option, publish
from torch import Tensor
from tqdm import tqdm

import fxquant
from fxquant.export.to_onnx import make_onnx
from fxquant.installed import is_installed
from fxquant.runtimes.onnxruntime import onnxruntime_session
from fxquant.runtimes.openvino import openvino_session
from fxquant.runtimes.runtime import Session

BATCHES = (1, 8)
TARGETS = ("x86", "openvino")
RUNTIMES = {"ORT": ("onnxruntime", onnxruntime_session), "OpenVINO": ("openvino", openvino_session)}


def classes(session: Session, test: Cifar10, batch: int, label: str) -> Tensor:
    """The class that a runtime gives each image, ``(N,)``."""
    batches = tqdm(test.batches(batch), total=-(-len(test) // batch), desc=label, leave=False)
    return torch.cat([session([images])[0].argmax(1) for images, _ in batches])


def row(
    name: str, target: str, top1: float | None, args: argparse.Namespace, batches: list[Any], test: Cifar10
) -> dict[str, Any]:
    """The row of one network prepared for one target; ``top1`` is the float model's where it is known."""
    model = load_resnet(name, args.weights / f"{name}-cifar10.pt")
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    prepared = fxquant.prepare(model, (batches[0][0][:1],), target=target)
    made = make_onnx(fxquant.calibrate(prepared, batches, progress=False))
    columns: dict[str, Any] = {"model": name, "target": target}
    columns["float"] = percent(predictions(model, test, "float") == test.labels) if top1 is None else top1
    integer = predictions(fxquant.convert(prepared), test, "integer")
    columns |= {"integer": percent(integer == test.labels), "size": round(len(made.content) / size, 3)}
    for title, (package, open_session) in RUNTIMES.items():
        for batch in BATCHES:
            if not is_installed(package):
                columns[f"{title}, batch {batch}"] = "not installed"
                continue
            found = classes(open_session(made.content, args.threads), test, batch, f"{title} {batch}")
            columns[f"{title}, batch {batch}"] = percent(found == test.labels)
            columns[f"{title} agrees, batch {batch}"] = percent(found == integer)
    return columns


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="as for ptq_cifar.py")
    parser.add_argument("--weights", type=Path, help="as for ptq_cifar.py")
    parser.add_argument("--models", nargs="+", choices=DEPTHS, default=list(DEPTHS), metavar="NAME")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS, metavar="TARGET")
    parser.add_argument("--limit", type=int, help="use only this many test images, evenly spread over the classes")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_output_option(parser, "onnx_cifar")
    args = parser.parse_args()
    args.weights = args.weights or args.data
    return args


def main() -> None:
    """Run every network and publish the table."""
    args = options()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    test = load_cifar10(args.data, "test")
    if args.limit:
        test = test.take(torch.linspace(0, len(test) - 1, args.limit).long())
    batches = calibration_batches(load_cifar10(args.data, "train"))
    pairs = [(name, target) for target in args.targets for name in args.models]
    rows = kept_rows(args, len(test))
    for name, target in tqdm([pair for pair in pairs if pair not in rows], desc="models"):
        known = next((own["float"] for (other, _), own in rows.items() if other == name), None)
        rows[name, target] = row(name, target, known, args, batches, test)
        done = [rows[pair] for pair in pairs if pair in rows]
        publish(done, args, quiet=len(done) < len(pairs), test_images=len(test))


def kept_rows(args: argparse.Namespace, images: int) -> dict[tuple[str, str], dict[str, Any]]:
    """With ``--resume``, the rows that the file has for as many test images, by network and target."""
    if not args.resume or not args.output.exists():
        return {}
    record = json.loads(args.output.read_text(encoding="utf-8"))
    same = record["test_images"] == images
    return {(own["model"], own["target"]): own for own in record["rows"]} if same else {}


if __name__ == "__main__":
    main()
