"""What several commands take: a model, a folder of images, shapes; and what is made of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import InputError
from fxquant.image_folder import ImageFolder
from fxquant.numerics.scheme import Scheme
from fxquant.recipe import PRESETS, Recipe, Setting
from fxquant.reporting.tabled import plain
from fxquant.targets import PROCESSORS, TARGETS, X86

__all__ = [
    "SHAPE",
    "Commands",
    "add_images",
    "add_json",
    "add_model",
    "bits_of",
    "example_of",
    "images_of",
    "note_random_weights",
    "only_json",
    "positive",
    "print_json",
    "recipe_of",
    "require_file",
    "require_folder_of",
    "shape_of",
    "size_of",
    "take_shape",
    "where",
]

Commands = argparse._SubParsersAction
"""Where a command adds its parser."""

_SPEC = (
    "torchvision:NAME, timm:NAME, or path/to/file.py:factory (a function or class that returns an nn.Module; what it needs "
    "behind its name: 'nets.py:Net(10, width=16)')"
)
SHAPE = "of an example input, as 1x3x32x32; 32x32 is one image (default 1x3x224x224)"


def add_model(parser: argparse.ArgumentParser) -> None:
    """SPEC, and how the model is prepared."""
    parser.add_argument("spec", metavar="SPEC", help=_SPEC)
    parser.add_argument("--weights", metavar="FILE", help="a state dict for the model; nothing is ever downloaded")
    parser.add_argument(
        "--target",
        choices=TARGETS,
        metavar="NAME",
        help=f"where it will run: {', '.join(TARGETS)} (default {X86.name}; for .pte and .xml files that format's)",
    )
    parser.add_argument(
        "--processor",
        choices=PROCESSORS,
        metavar="NAME",
        help=f"on what: {', '.join(PROCESSORS)} (default: the target's, mostly any)",
    )
    parser.add_argument(
        "--keep-float",
        action="append",
        default=[],
        metavar="GLOB",
        help="modules kept in float: 'fc', 'layer4.*'",
    )
    bits = "2 to 16; the target's own by default"
    told = "; ".join(f"{name}: {text}" for name, text in PRESETS.items())
    parser.add_argument("--preset", choices=PRESETS, help=f"which tensors have the bits asked for; {told}")
    parser.add_argument("--weight-bits", type=bits_of, metavar="N", help=f"of every weight, {bits}")
    parser.add_argument("--activation-bits", type=bits_of, metavar="N", help=f"of every tensor between ops, {bits}")


def add_images(parser: argparse.ArgumentParser, *, required: bool, batch_size: int) -> None:
    """A folder of images, and how they become tensors."""
    parser.add_argument("--data", required=required, metavar="FOLDER", help="images, flat or in subfolders")
    parser.add_argument("--images", type=positive, default=512, metavar="N", help="how many (default %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=batch_size, metavar="N", help="default %(default)s")
    parser.add_argument("--resize", type=positive, metavar="N", help="short side (default 8/7 of --crop)")
    parser.add_argument("--crop", type=positive, default=224, metavar="N", help="centre square (default %(default)s)")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="grey or colour (default %(default)s)")
    imagenet = "a channel, or one number for all; default ImageNet's"
    parser.add_argument("--mean", type=mean_of, default=(0.485, 0.456, 0.406), metavar="R,G,B", help=imagenet)
    parser.add_argument("--std", type=std_of, default=(0.229, 0.224, 0.225), metavar="R,G,B", help=imagenet)


def images_of(options: argparse.Namespace) -> ImageFolder:
    """The images of ``--data``."""
    return ImageFolder(
        options.data,
        limit=options.images,
        resize=options.resize or round(options.crop * 8 / 7),
        crop=options.crop,
        channels=options.channels,
        mean=options.mean,
        std=options.std,
        batch_size=options.batch_size,
    )


def require_folder_of(path: str) -> None:
    """Say at once, and not after minutes of calibration, that a file cannot be written."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise InputError(f"{path!r} cannot be written: it is a folder.")
    if not os.path.isdir(folder):
        raise InputError(f"{path!r} cannot be written: there is no folder {folder!r}.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path!r} cannot be written: the rights of the folder {folder!r} do not let you.")


def require_file(option: str, path: str, endings: tuple[str, ...]) -> None:
    """Say at once that a file which an option names is not there, or is of another kind."""
    if os.path.splitext(path)[1].lower() not in endings:
        raise InputError(f"{option} {path}: give a file that ends in {' or '.join(endings)}.")
    if not os.path.isfile(path):
        raise InputError(f"{option}: there is no file {path!r}.")


def where(options: argparse.Namespace, default: str = X86.name) -> dict[str, Any]:
    """Target and processor, as ``prepare`` takes them."""
    return {"target": options.target or default, "processor": options.processor}


def take_shape(options: argparse.Namespace) -> None:
    """Have images of the size that ``--shape`` says."""
    shape = options.shape
    is_image = isinstance(shape, _Image) or (len(shape) == 4 and shape[1] in (1, 3))
    if not is_image or shape[-2] != shape[-1]:
        raise InputError(f"--shape {'x'.join(map(str, shape))}: with --data it is that of square images, as 224x224.")
    options.channels = shape[1] if len(shape) == 4 else options.channels
    options.crop = shape[-1]


def example_of(model: nn.Module, shape: tuple[int, ...] | None) -> Tensor:
    """One input of zeros."""
    usual = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    if shape is None:
        return torch.zeros(1, *usual)
    return torch.zeros(1, usual[0], *shape) if isinstance(shape, _Image) else torch.zeros(shape)


def recipe_of(options: argparse.Namespace) -> Recipe:
    """What stays in float, and how many bits the rest has."""
    weight = None if options.weight_bits is None else Scheme.weight(options.weight_bits)
    activation = None if options.activation_bits is None else Scheme.activation(options.activation_bits)
    floats = [(glob, None) for glob in options.keep_float]
    if options.preset is not None:
        bits = {"weight_bits": options.weight_bits, "activation_bits": options.activation_bits}
        return Recipe.preset(options.preset, settings=floats, **bits)
    return Recipe(floats, default=Setting(weight=weight, activation=activation))


def size_of(model: nn.Module) -> int:
    """Bytes of a model's state."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more: write a whole number that is, as 8")
    return value


def bits_of(text: str) -> int:
    """A number of bits, 2 to 16."""
    if not text.strip().isdecimal() or not 2 <= int(text) <= 16:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bits: write one of 2 to 16, as 8")
    return int(text)


class _Image(tuple[int, ...]):
    """Height and width of one image, which has the channels that the model takes."""


def shape_of(text: str) -> tuple[int, ...]:
    """``1x3x32x32`` or ``1,3,32,32``; ``32x32`` is the size of an image, ``32,32`` two axes."""
    separator = "," if "," in text else "x"
    try:
        sizes = tuple(positive(part) for part in text.strip("()[] ").split(separator) if part.strip())
    except (ValueError, argparse.ArgumentTypeError):
        sizes = ()
    if not sizes:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: write 1x3x32x32 or 1,3,32,32, or 32x32 for an image")
    return _Image(sizes) if len(sizes) == 2 and separator == "x" else sizes


def mean_of(text: str) -> tuple[float, ...]:
    """One number for all channels, or three."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3) or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text!r}: write one number, or three, as 0.485,0.456,0.406")
    return values * 3 if len(values) == 1 else values


def std_of(text: str) -> tuple[float, ...]:
    """One number above 0 for all channels, or three."""
    values = mean_of(text)
    if min(values) <= 0:
        words = "images are divided by these: write numbers above 0, as 0.229,0.224,0.225"
        raise argparse.ArgumentTypeError(f"{text!r}: {words}")
    return values


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``, for scripts."""
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")


@contextlib.contextmanager
def only_json(options: argparse.Namespace) -> Iterator[None]:
    """Inside, where ``--json`` was given, standard output holds what ``print_json`` prints and nothing else.

    What a model's own file prints, or a library, goes to standard error.
    """
    options.stdout = sys.stdout
    is_json = getattr(options, "json", False) in (True, "-")
    with contextlib.redirect_stdout(sys.stderr) if is_json else contextlib.nullcontext():
        yield


def print_json(options: argparse.Namespace, value: Any) -> None:
    """Dataclasses and containers as JSON on standard output; numbers that are not finite are null."""
    print(json.dumps(plain(value), indent=2, ensure_ascii=False), file=options.stdout)


def note_random_weights(options: argparse.Namespace) -> None:
    """Say, beside the results, that a model of a library has no trained weights."""
    if options.weights is None and options.spec.startswith(("torchvision:", "timm:")):
        text = "these are random weights, the same in every command; give trained ones with --weights FILE"
        print(f"note: {text}", file=sys.stderr)
