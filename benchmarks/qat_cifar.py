"""Quantization-aware training on CIFAR-10: last-epoch top-1 at 8 to 2 bits, beside float trained on as long.

Every row starts from the same trained weights and sees the same batches (seeded; crop of a 4-pixel border, flip) with the
same schedule: SGD, momentum 0.9, cosine to zero, weight decay 1e-4; batch norm statistics are taken anew at the end.
Accuracy is that of the last epoch on all test images, never of the best one. A row is a preset, bits, a rule and a seed.

``--net resnet20`` (the default) has the presets of ``Recipe.preset``:

    academic   first and last layer, the input, residual sums and what they add have 8 bits, all else the row's bits
    deploy     everything has the row's bits, as one target would run it

``--net nin``, a network in network, has 8 bits and what the article has that quantized it first, ranges that follow:

    symmetric, asymmetric                   batch norms train behind the rounded weights (``late``)
    symmetric folded, asymmetric folded     they are folded before weights are rounded, in every pass (``whitepaper``)

It has no trained weights to begin with: without ``--weights`` it is trained from scratch, in float, for ``--start-epochs``
with the first learning rate 0.1; these epochs are kept as those of rows are.

Rows that the JSON has are not run again, and a row goes on from the last epoch that was finished (``--work``). Net, epochs,
steps and learning rates are part of what a row is: another setting is another row, and goes on from its own epochs alone.
The bar of a row says how long it will still take: an epoch of resnet20 is 391 steps, one of nin has 5.4 times its products.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar import DATA, Cifar10, NetworkInNetwork, calibration_batches, load_cifar10, load_resnet
from ptq_cifar import percent, predictions
from record import add_output_option, publish
from torch import Tensor, nn
from tqdm import tqdm

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.recipe import PRESETS

NIN_PRESETS = ("symmetric", "symmetric folded", "asymmetric", "asymmetric folded")
OBSERVED = "moving average"
KEYS = ("preset", "bits", "rule", "seed")
SETTINGS = ("net", "epochs", "steps", "lr", "range_lr", "limit")
"""What a row was trained with, beside its key."""
FLOAT = "float"
BATCH = 128


def recipe_of(preset: str, bits: int, rule: str) -> Recipe:
    """The recipe of a row; ``moving average`` is the rule that ``prepare(qat=True)`` has by default."""
    if preset in NIN_PRESETS:
        activation = Scheme.activation(bits, symmetric=preset.startswith("symmetric"), estimator="moving_average")
        return Recipe(default=Setting(weight=Scheme.weight(bits), activation=activation))
    name = "observed" if rule == OBSERVED else rule
    return Recipe.preset(preset, weight_bits=bits, activation_bits=bits, rule=name)


def augmented(data: Cifar10, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of training batches: a random order, crops of images with a border of 4 pixels, half of them flipped."""
    random = torch.Generator().manual_seed(seed)
    for chosen in torch.randperm(len(data), generator=random).split(BATCH):
        ((images, labels),) = data.take(chosen).batches(BATCH)
        padded = F.pad(images, (4, 4, 4, 4))
        rows, columns = (torch.randint(0, 9, (len(chosen), 1), generator=random) for _ in range(2))
        span = torch.arange(32)
        y, x = (rows + span)[:, None, :, None], (columns + span)[:, None, None, :]
        images = padded[torch.arange(len(chosen))[:, None, None, None], torch.arange(3)[None, :, None, None], y, x]
        flip = torch.rand(len(chosen), generator=random) < 0.5
        yield torch.where(flip[:, None, None, None], images.flip(3), images), labels


def train(model: nn.Module, data: Cifar10, args: argparse.Namespace, seed: int, state: Path) -> None:
    """Train in place for ``args.epochs``, from the epoch that ``state`` holds on."""
    groups = fxquant.parameter_groups(model, lr=args.range_lr)
    rates = [group.get("lr", args.lr) for group in groups]
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, weight_decay=1e-4)
    start = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["epoch"]
    steps = args.steps or math.ceil(len(data) / BATCH)
    bar = tqdm(total=args.epochs * steps, initial=start * steps, desc=state.stem, unit="step", leave=False)
    for epoch in range(start, args.epochs):
        model.train()
        batches = augmented(data, 1000 * seed + epoch)
        for step, (images, labels) in zip(range(steps), batches, strict=False):
            bar.update()
            done = (epoch * steps + step) / (args.epochs * steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done))
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        part = state.with_suffix(".part")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, part)
        part.replace(state)
    bar.close()


def start_of(args: argparse.Namespace, data: Cifar10) -> nn.Module:
    """The float network that all rows start from, in training mode."""
    if args.net == "resnet20":
        return load_resnet("resnet20", args.weights).train()
    torch.manual_seed(0)
    model = NetworkInNetwork()
    if args.weights.exists():
        model.load_state_dict(torch.load(args.weights, weights_only=True))
        return model.train()
    own = argparse.Namespace(**{**vars(args), "epochs": args.start_epochs, "lr": 0.1, "range_lr": None})
    train(model, data, own, 0, state_of(("start", 32, FLOAT, 0), own))
    return model.train()


def settings_of(one: Any) -> tuple[Any, ...]:
    """``SETTINGS`` of a row, or of the command line."""
    held = one if isinstance(one, dict) else vars(one)
    return tuple(held.get(name) for name in SETTINGS)


def state_of(key: tuple[str, int, str, int], args: argparse.Namespace) -> Path:
    """Where the epochs of an unfinished row are kept."""
    named = [*key, *(f"{name}={value}" for name, value in zip(SETTINGS, settings_of(args), strict=True))]
    return args.work / f"{'-'.join([*map(str, named), args.weights.stem]).replace(' ', '_')}.pt"


def row(key: tuple[str, int, str, int], args: argparse.Namespace, data: Cifar10, test: Cifar10) -> dict[str, Any]:
    """One row of the table."""
    preset, bits, rule, seed = key
    torch.manual_seed(seed)
    model: Any = start_of(args, data)
    batches = calibration_batches(data)
    if rule != FLOAT:
        folds = {"batch_norm": "whitepaper"} if preset.endswith("folded") else {}
        model = fxquant.prepare(model, batches[0][0], qat=True, recipe=recipe_of(preset, bits, rule), **folds)
        fxquant.calibrate(model, batches, progress=False)
    train(model, data, args, seed, state_of(key, args))
    found: dict[str, Any] = {**dict(zip(KEYS, key, strict=True)), **dict(zip(SETTINGS, settings_of(args), strict=True))}
    name = " ".join(map(str, key))
    if rule == FLOAT:
        return {**found, "top-1": percent(predictions(model.eval(), test, name) == test.labels)}
    again = [batch for batch, _ in zip(augmented(data, 1000 * seed + 999), range(50), strict=False)]
    fxquant.reestimate_batchnorm(model, again)
    found["top-1"] = percent(predictions(model.eval(), test, name) == test.labels)
    found["integer"] = percent(predictions(fxquant.convert(model), test, f"{name} integer") == test.labels)
    return found


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the two zips, or torchvision's CIFAR-10")
    parser.add_argument("--net", choices=("resnet20", "nin"), default="resnet20")
    parser.add_argument("--weights", type=Path, help="trained weights (default: NET-cifar10-jpeg.pt in --data)")
    parser.add_argument("--start-epochs", type=int, default=30, help="of nin from scratch (default: 30)")
    parser.add_argument("--limit", type=int, help="test images, evenly chosen (default: all)")
    parser.add_argument(
        "--work", type=Path, default=Path.home() / ".cache" / "fxquant" / "qat_cifar", help="unfinished rows"
    )
    parser.add_argument("--presets", nargs="+", choices=[*PRESETS, *NIN_PRESETS], help="default: all that the net has")
    parser.add_argument("--bits", nargs="+", type=int, help="default: 4 2 3 8; of nin 8")
    parser.add_argument("--rules", nargs="+", help=f"rules, or '{OBSERVED}'; default: lsq and that; of nin that alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, help="of an epoch, to cut it short (default: the whole training set)")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--range-lr", type=float, help="of learned ranges (default: as --lr)")
    parser.add_argument("--threads", type=int, default=2)
    add_output_option(parser, "qat_cifar")
    args = parser.parse_args()
    is_nin = args.net == "nin"
    args.weights = args.weights or args.data / f"{args.net}-cifar10-jpeg.pt"
    args.presets = args.presets or list(NIN_PRESETS if is_nin else PRESETS)
    if not set(args.presets) <= set(NIN_PRESETS if is_nin else PRESETS):
        parser.error(f"--net {args.net} has no presets {', '.join(args.presets)}")
    args.bits = args.bits or ([8] if is_nin else [4, 2, 3, 8])
    args.rules = args.rules or ([OBSERVED] if is_nin else ["lsq", OBSERVED])
    return args


def rows_of(old: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file; those from before rows held all of their settings have the file's."""
    known = {name: value for name, value in old.get("settings", {}).items() if name in SETTINGS}
    return [{**one, **{name: value for name, value in known.items() if name not in one}} for one in old.get("rows", [])]


def wanted(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Iterator[tuple[str, int, str, int]]:
    """What is still to be run: float first."""
    same = [one for one in rows if settings_of(one) == settings_of(args)]
    done = {tuple(one[key] for key in KEYS) for one in same}
    for seed in args.seeds:
        keys = [(FLOAT, 32, FLOAT, seed)]
        keys += [(preset, bits, rule, seed) for bits in args.bits for preset in args.presets for rule in args.rules]
        yield from (key for key in keys if key not in done)


def with_drops(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what each has lost against float trained on for as long, of the same seed."""
    float_of = {(r["seed"], *settings_of(r)): r["top-1"] for r in rows if r["rule"] == FLOAT}
    made = []
    for one in rows:
        reference = float_of.get((one["seed"], *settings_of(one)))
        lost = None if reference is None else round(reference - one["top-1"], 2)
        made.append({**one, "drop": lost})
    return made


def main() -> None:
    """Run what is missing, row by row, and publish the table after each."""
    args = options()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    data, test = load_cifar10(args.data, "train"), load_cifar10(args.data, "test")
    test = test if args.limit is None else test.take(torch.linspace(0, len(test) - 1, args.limit).long())
    old = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    rows = rows_of(old)
    shown = argparse.Namespace(**{name: value for name, value in vars(args).items() if name != "work"})
    for key in tqdm(list(wanted(args, rows)), desc="rows"):
        rows = with_drops([*rows, row(key, args, data, test)])
        publish(rows, shown, quiet=True, test_images=len(test))
    publish(rows, shown, test_images=len(test))


if __name__ == "__main__":
    main()
