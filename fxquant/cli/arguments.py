"""What several commands take: a model, a folder of images, shapes; and what is made of it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import InputError
from fxquant.image_folder import ImageFolder
from fxquant.numerics.scheme import Scheme
from fxquant.recipe import Recipe, Setting
from fxquant.reporting.tabled import plain
from fxquant.targets import PROCESSORS, TARGETS, X86

__all__ = [
    "SHAPE",
    "Commands",
    "add_images",
    "add_json",
    "add_model",
    "example_of",
    "images_of",
    "note_random_weights",
    "positive",
    "print_json",
    "recipe_of",
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
    parser.add_argument("--weight-bits", type=positive, metavar="N", help=f"of every weight, {bits}")
    parser.add_argument("--activation-bits", type=positive, metavar="N", help=f"of every tensor between ops, {bits}")


def add_images(parser: argparse.ArgumentParser, *, required: bool, batch_size: int) -> None:
    """A folder of images, and how they become tensors."""
    parser.add_argument("--data", required=required, metavar="FOLDER", help="images, flat or in subfolders")
    parser.add_argument("--images", type=positive, default=512, metavar="N", help="how many (default %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=batch_size, metavar="N", help="default %(default)s")
    parser.add_argument("--resize", type=positive, metavar="N", help="short side (default 8/7 of --crop)")
    parser.add_argument("--crop", type=positive, default=224, metavar="N", help="centre square (default %(default)s)")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="grey or colour (default %(default)s)")
    imagenet = "a channel, or one number for all; default ImageNet's"
    parser.add_argument("--mean", type=numbers_of, default=(0.485, 0.456, 0.406), metavar="R,G,B", help=imagenet)
    parser.add_argument("--std", type=numbers_of, default=(0.229, 0.224, 0.225), metavar="R,G,B", help=imagenet)


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
    return Recipe(floats, default=Setting(weight=weight, activation=activation))


def size_of(model: nn.Module) -> int:
    """Bytes of a model's state."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


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


def numbers_of(text: str) -> tuple[float, ...]:
    """One number for all channels, or three."""
    values = tuple(float(part) for part in text.split(","))
    if len(values) not in (1, 3):
        raise argparse.ArgumentTypeError(f"{text} is neither one number nor three")
    return values * 3 if len(values) == 1 else values


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``, for scripts."""
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")


def print_json(value: Any) -> None:
    """Dataclasses and containers as JSON on standard output; numbers that are not finite are null."""
    print(json.dumps(plain(value), indent=2, ensure_ascii=False))


def note_random_weights(options: argparse.Namespace) -> None:
    """Say, beside the results, that a model of a library has no trained weights."""
    if options.weights is None and options.spec.startswith(("torchvision:", "timm:")):
        print("note: these are random weights; give trained ones with --weights FILE", file=sys.stderr)
