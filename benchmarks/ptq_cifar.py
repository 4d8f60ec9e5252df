"""8-bit post-training quantization of the CIFAR ResNets: top-1 of fxquant's integer model beside other tools'.

Every tool gets the same float model and the same 512 calibration images (the first 512 of a permutation of the
training set with seed 0, without augmentation), and is judged on the same test images.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from cifar import DATA, DEPTHS, Cifar10, calibration_batches, load_cifar10, load_resnet
from peers import PTQ, Batches, Peer
from record import add_output_option, publish
from torch import Tensor, nn
from tqdm import tqdm

import fxquant

EVALUATION_BATCH = 250


@torch.no_grad()
def predictions(model: nn.Module, test: Cifar10, label: str) -> Tensor:
    """The class that ``model`` gives each image of ``test``, ``(N,)``."""
    bar = tqdm(total=len(test), desc=label, unit="image", leave=False)
    predicted = []
    for images, labels in test.batches(EVALUATION_BATCH):
        predicted.append(model(images).argmax(1))
        bar.update(len(labels))
    bar.close()
    return torch.cat(predicted)


def percent(hits: Tensor) -> float:
    """The share of true values in ``hits``, in percent, to a hundredth."""
    return round(100 * hits.double().mean().item(), 2)


def fxquant_row(model: nn.Module, batches: Batches, test: Cifar10, float_top1: float) -> dict[str, Any]:
    """fxquant's columns: the integer model's top-1, its drop, and how often the frozen model gives the same class."""
    prepared = fxquant.prepare(model, (batches[0][0],))
    frozen = fxquant.freeze(fxquant.calibrate(prepared, batches, progress=False))
    simulated = predictions(frozen, test, "fxquant, frozen")
    integer = predictions(fxquant.convert(frozen), test, "fxquant int8")
    top1 = percent(integer == test.labels)
    drop = round(float_top1 - top1, 2)
    return {"fxquant int8": top1, "drop": drop, "agrees with frozen": percent(integer == simulated)}


def peer_top1(peer: Peer, model: nn.Module, batches: Batches, test: Cifar10) -> float | str:
    """``peer``'s top-1, or why there is none."""
    if peer.missing:
        return peer.missing
    return percent(predictions(peer.build(model, batches), test, peer.name) == test.labels)


def row(name: str, args: argparse.Namespace, batches: Batches, test: Cifar10) -> dict[str, Any]:
    """The table's row of the network ``name``."""
    model = load_resnet(name, args.weights / f"{name}-cifar10.pt")
    float_top1 = percent(predictions(model, test, "float") == test.labels)
    columns: dict[str, Any] = {"model": name, "float": float_top1}
    if not args.peers_only:
        columns |= fxquant_row(model, batches, test, float_top1)
    for peer in PTQ:
        if peer.name in args.peers:
            columns[peer.name] = peer_top1(peer, model, batches, test)
    return columns


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the two zips, or torchvision's CIFAR-10")
    parser.add_argument("--weights", type=Path, help="folder with resnetNN-cifar10.pt (default: the data folder)")
    parser.add_argument("--models", nargs="+", choices=DEPTHS, default=list(DEPTHS), metavar="NAME")
    parser.add_argument("--limit", type=int, help="use only this many test images, evenly spread over the classes")
    parser.add_argument("--calibration", type=int, default=512, help="calibration images (default: 512)")
    names = [peer.name for peer in PTQ]
    parser.add_argument("--peers", nargs="*", choices=names, default=names, help=f"default: {', '.join(names)}")
    parser.add_argument("--peers-only", action="store_true", help="leave fxquant out")
    add_output_option(parser, "ptq_cifar")
    args = parser.parse_args()
    args.weights = args.weights or args.data
    return args


def main() -> None:
    """Run the comparison and publish its table."""
    args = options()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.manual_seed(0)
    test = load_cifar10(args.data, "test")
    if args.limit:
        test = test.take(torch.linspace(0, len(test) - 1, args.limit).long())
    batches = calibration_batches(load_cifar10(args.data, "train"), args.calibration)
    rows = [row(name, args, batches, test) for name in tqdm(args.models, desc="models")]
    publish(rows, args, test_images=len(test))


if __name__ == "__main__":
    main()
