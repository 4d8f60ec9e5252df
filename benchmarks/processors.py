"""What protection against pairs that saturate costs: top-1 of the CIFAR ResNets for any processor, and for VNNI alone.

Models, calibration and test images are those of `ptq_cifar.py`. `narrowed` is the share of output channels whose weights
have less than 8 bits so that sums of two products stay within 16 bits on x86 without VNNI; `SQNR` is that of the logits
against float, on the test images. With `--runtimes`, also the share of images for which ONNX Runtime and OpenVINO give the
class of the integer model, on the processor at hand (`scripts/without-vnni` hides what it has of dot products).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from cifar import DATA, DEPTHS, Cifar10, calibration_batches, load_cifar10, load_resnet
from onnx_cifar import RUNTIMES
from ptq_cifar import EVALUATION_BATCH, percent
from record import add_output_option, publish
from torch import Tensor
from tqdm import tqdm

import fxquant
from fxquant.export.to_onnx import make_onnx

PROCESSORS = ("vnni", "any")


@torch.no_grad()
def logits(run: Any, test: Cifar10, label: str) -> Tensor:
    """What ``run`` gives for every image, ``(N, 10)``."""
    batches = tqdm(test.batches(EVALUATION_BATCH), total=-(-len(test) // EVALUATION_BATCH), desc=label, leave=False)
    return torch.cat([run(images) for images, _ in batches])


def row(name: str, args: argparse.Namespace, batches: list[Any], test: Cifar10) -> dict[str, Any]:
    """The row of one network."""
    model = load_resnet(name, args.weights / f"{name}-cifar10.pt")
    real = logits(model, test, f"{name} float")
    columns: dict[str, Any] = {"model": name, "float": percent(real.argmax(1) == test.labels)}
    for processor in PROCESSORS:
        prepared = fxquant.prepare(model, (batches[0][0][:1],), processor=processor)
        integer = fxquant.convert(fxquant.calibrate(prepared, batches, progress=False))
        own = logits(integer, test, f"{name} {processor}")
        noise = (own - real).double().square().sum()
        columns[f"{processor}"] = percent(own.argmax(1) == test.labels)
        columns[f"{processor}, SQNR"] = round(float(10 * torch.log10(real.double().square().sum() / noise)), 1)
        layers = fxquant.coverage(integer).audit.layers
        columns[f"{processor}, narrowed"] = round(
            100 * sum(part.narrowed for part in layers) / sum(part.channels for part in layers), 1
        )
        for title in RUNTIMES if args.runtimes else ():
            session = RUNTIMES[title][1](make_onnx(integer).content, 1)
            found = logits(lambda x, session=session: session([x])[0], test, f"{name} {processor} {title}")
            columns[f"{processor}, {title} agrees"] = percent(found.argmax(1) == own.argmax(1))
    return columns


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="as for ptq_cifar.py")
    parser.add_argument("--weights", type=Path, help="as for ptq_cifar.py")
    parser.add_argument("--models", nargs="+", choices=DEPTHS, default=list(DEPTHS), metavar="NAME")
    parser.add_argument("--limit", type=int, help="use only this many test images, evenly spread over the classes")
    parser.add_argument("--runtimes", action="store_true", help="also run files in ONNX Runtime and OpenVINO")
    add_output_option(parser, "processors")
    args = parser.parse_args()
    args.weights = args.weights or args.data
    return args


def main() -> None:
    """Run every network and publish the table."""
    args = options()
    torch.manual_seed(0)
    test = load_cifar10(args.data, "test")
    if args.limit:
        test = test.take(torch.linspace(0, len(test) - 1, args.limit).long())
    batches = calibration_batches(load_cifar10(args.data, "train"), 512)
    rows = [row(name, args, batches, test) for name in tqdm(args.models, desc="models")]
    publish(rows, args, test_images=len(test))


if __name__ == "__main__":
    main()
